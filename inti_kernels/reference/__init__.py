"""The specification: plain PyTorch, any floating dtype, no backend code. Every kernel is the same function, faster."""

from .functional import add_position, depthwise_conv3d, interpolation_head, pair_interpolate, token_features
from .inti import InTI

__all__ = ["InTI", "add_position", "depthwise_conv3d", "interpolation_head", "pair_interpolate", "token_features"]
