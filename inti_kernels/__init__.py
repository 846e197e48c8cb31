"""Kernels that turn an image-pre-trained CLIP ViT into a compressive video model: InTI, arXiv 2408.06840.

``InTI`` is the reference module in plain PyTorch, ``FusedInTI`` the drop-in on this package's kernels; ``fuse(model)``
swaps one for the other. ``compress(vision_model)`` makes a compressive video model of a CLIP of another library.
``ops`` has the functions beneath, ``use_backend`` chooses what runs them. Nothing compiled is loaded before the first
op runs. ``python -m inti_kernels info`` says what this machine can do.
"""

from . import ops, reference
from ._version import __version__
from .backends import use_backend
from .models import compress
from .modules import FusedInTI, fuse, unfuse
from .reference import InTI

__all__ = ["FusedInTI", "InTI", "__version__", "compress", "fuse", "ops", "reference", "unfuse", "use_backend"]
