"""Adapters: vision towers of the libraries that people use, one file a library. None of the libraries is imported."""

from ._base import Adapter, BlockParts, adapter_for, attend, register_adapter
from .open_clip import OpenCLIP, OpenCLIPTimm
from .openai_clip import OpenAICLIP
from .timm import Timm
from .transformers import TransformersCLIP, TransformersDINOv2, TransformersSigLIP

# OpenAI's tower is known by its form alone, so it comes first, to be asked last.
for _adapter in (OpenAICLIP, Timm, OpenCLIP, OpenCLIPTimm, TransformersCLIP, TransformersSigLIP, TransformersDINOv2):
    register_adapter(_adapter)

__all__ = ["Adapter", "BlockParts", "adapter_for", "attend", "register_adapter"]
