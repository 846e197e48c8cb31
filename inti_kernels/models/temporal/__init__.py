"""Temporal modules, that let the frames of a clip see each other inside a tower made for single pictures."""

from ._base import TemporalModules
from .st_adapter import STAdapter
from .uniformer_v2 import UniFormerV2

# What compress() calls them.
TEMPORAL: dict[str, type[TemporalModules]] = {"uniformer_v2": UniFormerV2, "st_adapter": STAdapter}

__all__ = ["TEMPORAL", "STAdapter", "TemporalModules", "UniFormerV2"]
