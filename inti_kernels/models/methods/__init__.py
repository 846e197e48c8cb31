"""The methods of compression that a tower can be given, by name. "naive" is the tower with none."""

from torch import nn

from ...modules import FusedInTI
from ...reference import InTI
from ._base import TokenReduction
from .pooling import ConvPooling, LinearPooling, insertion_choices
from .sta import STA
from .tome import ToMe

# Name → class. Of two kinds: a TokenReduction works inside the blocks and is made with (adapter, **options); the others
# stand between two blocks, halve the frames, [B, T, N, C] → [B, T/2, N, C], and are made with (dim, frames, grid,
# prefix=…, **options).
METHODS: dict[str, type[nn.Module]] = {
    "inti": FusedInTI,
    "inti_reference": InTI,
    "linear_pooling": LinearPooling,
    "conv_pooling": ConvPooling,
    "tome": ToMe,
    "sta": STA,
}

__all__ = ["METHODS", "STA", "ConvPooling", "LinearPooling", "ToMe", "TokenReduction", "insertion_choices"]
