"""Temporal modules, that let the frames of a clip see each other inside a tower made for single pictures."""

from collections.abc import Mapping
from typing import Any

from ..adapters import Adapter
from ._base import TemporalModules
from .st_adapter import STAdapter
from .uniformer_v2 import UniFormerV2

# What compress() calls them.
TEMPORAL: dict[str, type[TemporalModules]] = {"uniformer_v2": UniFormerV2, "st_adapter": STAdapter}


def build_temporal(kind: str | None, adapter: Adapter, options: Mapping[str, Any]) -> TemporalModules | None:
    """The temporal modules of a kind (a key of :data:`TEMPORAL`, or None for none) for a tower; options: more
    arguments of their class."""
    if kind is None:
        return None
    return TEMPORAL[kind](adapter.dim, len(adapter.blocks), adapter.own_grid, prefix=adapter.prefix, **options)


__all__ = ["TEMPORAL", "STAdapter", "TemporalModules", "UniFormerV2", "build_temporal"]
