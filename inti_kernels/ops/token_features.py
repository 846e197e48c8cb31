"""token_features: LayerNorm, Linear and GELU of every token, written as concatenated pairs (Eq. 9).

The op has no kernel of its own yet: its implementation on every backend is the reference.
"""

from __future__ import annotations

from torch import Tensor

from .. import backends
from ..reference import functional
from . import _recipe as recipe


def token_features(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """F_token[j,k] = concat(T_{C→D}(x[2j,k]), T_{C→D}(x[2j+1,k])), T = LayerNorm → Linear → GELU (Eq. 9; D = C/2).

    Backends: plain PyTorch on all. Differentiable to any order.

    Args:
        x: tokens [B, T, N, C], T even, any floating dtype and strides.
        norm_weight, norm_bias: the LayerNorm's [C].
        weight, bias: the Linear's [D, C] and [D].
        position: σ·P [T, C], any floating dtype, added to x first (Eq. 8); or None.
        eps: of the LayerNorm.
        backend: "auto", "reference", "cpu" or "triton"; None takes the choice in force, see
            :func:`inti_kernels.use_backend`.

    Returns:
        [B, T/2, N, 2·D] in the dtype of the Linear's output.

    Raises:
        ValueError: shapes that don't go together, odd T, tensors on different devices, an unknown backend.
        TypeError: an input that isn't a dense floating tensor; mixed dtypes outside autocast.
        RuntimeError: the backend that was asked for can't run here.
    """
    recipe.check_tokens(x)
    frames, dim = x.shape[1], x.shape[3]
    functional.check_pairs(frames)
    recipe.check_like(norm_weight, "norm_weight", x, (dim,), "[C]")
    recipe.check_like(norm_bias, "norm_bias", x, (dim,), "[C]")
    recipe.check_matrix(weight, "weight")
    recipe.check_like(weight, "weight", x, (weight.shape[0], dim), "[D, C]")
    recipe.check_like(bias, "bias", x, (weight.shape[0],), "[D]")
    recipe.check_like(position, "position", x, (frames, dim), "[T, C]", optional=True)
    recipe.check_one_dtype(x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    backends.without_kernel("token_features", backend, x)
    return functional.token_features(x, norm_weight, norm_bias, weight, bias, position, eps=eps)
