"""The ops: what users call. Each checks its input, and is differentiable and traceable as a whole."""

from .depthwise_conv3d import depthwise_conv3d
from .interpolation_head import interpolation_head
from .inti import inti
from .pair_interpolate import pair_interpolate
from .token_features import token_features

# Those with kernels of their own; inti is a chain of them.
OPS = ("pair_interpolate", "depthwise_conv3d", "token_features", "interpolation_head")

__all__ = ["OPS", "depthwise_conv3d", "interpolation_head", "inti", "pair_interpolate", "token_features"]
