"""Vision towers of other libraries made compressive video models: :func:`compress`."""

from .adapters import Adapter, BlockParts, adapter_for, register_adapter
from .compress import compress
from .methods import TokenReduction
from .model import CompressedViT, LoadReport
from .temporal import TemporalModules

__all__ = [
    "Adapter",
    "BlockParts",
    "CompressedViT",
    "LoadReport",
    "TemporalModules",
    "TokenReduction",
    "adapter_for",
    "compress",
    "register_adapter",
]
