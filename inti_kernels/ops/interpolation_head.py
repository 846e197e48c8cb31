"""interpolation_head: the network that predicts the weights, and the interpolation, in one (Eq. 13 and 7).

The op has no kernel of its own yet: its network is the reference on every backend; its interpolation is the op
pair_interpolate, and runs where that runs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..reference import functional
from . import _recipe as recipe
from .pair_interpolate import pair_interpolate


def interpolation_head(
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear over [features ; cube + frame_context] → GELU → Linear to two logits → softmax → interpolation.

    Backends: plain PyTorch on all, but for the interpolation, see :func:`pair_interpolate`, whose limits (one
    derivative, no forward-mode AD) hold here too unless the backend is "reference".

    Args:
        features: F_token [B, T/2, N, D].
        cube: F_cube [B, T/2, N, C'] or None.
        frame_context: F_frame + F_global [B, T/2, C'] or None.
        x: tokens [B, T, N, C], T even: what is interpolated; any floating dtype and strides.
        weight1, bias1: [h, D + C'] ([h, D] with neither cube nor frame_context) and [h].
        weight2, bias2: [2, h] and [2].
        position: σ·P [T, C], any floating dtype, added to x first (Eq. 8); or None.
        backend: "auto", "reference", "cpu" or "triton"; None takes the choice in force, see
            :func:`inti_kernels.use_backend`.

    Returns:
        z [B, T/2, N, C] in x's dtype, and the weights (α, β) [B, T/2, N, 2] in the logits' dtype.

    Raises:
        ValueError: shapes that don't go together, odd T, tensors on different devices, an unknown backend.
        TypeError: an input that isn't a dense floating tensor; mixed dtypes outside autocast (x's and position's may
            be others).
        RuntimeError: the backend that was asked for can't run here.
    """
    recipe.check_tokens(x)
    functional.check_pairs(x.shape[1])
    pairs = (x.shape[0], x.shape[1] // 2, x.shape[2])
    recipe.check_matrix(features, "features")
    recipe.check_like(features, "features", x, (*pairs, features.shape[-1]), "[B, T/2, N, D]")
    width = features.shape[-1]
    context = frame_context if cube is None else cube
    if context is not None:
        recipe.check_matrix(context, "cube and frame_context")
        recipe.check_like(cube, "cube", x, (*pairs, context.shape[-1]), "[B, T/2, N, C']", optional=True)
        recipe.check_like(
            frame_context, "frame_context", x, (*pairs[:2], context.shape[-1]), "[B, T/2, C']", optional=True
        )
        width += context.shape[-1]
    recipe.check_matrix(weight1, "weight1")
    recipe.check_like(weight1, "weight1", x, (weight1.shape[0], width), "[h, D + C']")
    recipe.check_like(bias1, "bias1", x, (weight1.shape[0],), "[h]")
    recipe.check_like(weight2, "weight2", x, (2, weight1.shape[0]), "[2, h]")
    recipe.check_like(bias2, "bias2", x, (2,), "[2]")
    recipe.check_like(position, "position", x, (x.shape[1], x.shape[3]), "[T, C]", optional=True)
    recipe.check_one_dtype(features=features, cube=cube, frame_context=frame_context, weight1=weight1, bias1=bias1,
                           weight2=weight2, bias2=bias2)  # fmt: skip
    backends.without_kernel("interpolation_head", backend, x)
    logits = F.linear(functional.head_hidden(features, cube, frame_context, weight1, bias1), weight2, bias2)
    return pair_interpolate(x, logits, position, backend=backend)
