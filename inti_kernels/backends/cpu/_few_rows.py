"""[LayerNorm →] Linear [→ GELU] of a few rows on the CPU: what is of a frame and not of a token.

PyTorch's products pack the weight before they use it, which for eight rows takes longer than the product. Of a thousand
rows they take half as long as these; that is 1 % of what the tokens of so many frames take.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._arguments import channels_contiguous, name_of
from .._memory import empty
from ._call import call


class Kept(NamedTuple):
    """What :func:`backward` needs of :func:`forward`.

    Attributes:
        x: [n, a].
        statistics, normalized: mean and 1/σ [n, 2], and what the Linear took [n, a]; None without a LayerNorm.
        preactivation: what the GELU took [n, b]; None without one.
    """

    x: Tensor
    statistics: Tensor | None = None
    normalized: Tensor | None = None
    preactivation: Tensor | None = None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    gelu: bool = False,
) -> tuple[Tensor, Kept]:
    """y [n, b] of rows [n, a], all of one dtype, float32 or float64.

    Args:
        x: [n, a], contiguous.
        weight: [b, a], any strides.
        bias: [b], contiguous.
        norm: the LayerNorm's weight and bias [a], contiguous, or None without one.
        eps: of the LayerNorm.
        gelu: whether the exact GELU follows.
    """
    weight = channels_contiguous(weight)
    (rows, width), out = x.shape, weight.shape[0]
    norm_weight, norm_bias = norm or (None, None)
    statistics, normalized = (None, None) if norm is None else (empty((rows, 2), x), empty(x.shape, x))
    preactivation = empty((rows, out), x)
    y = empty((rows, out), x) if gelu else None
    call(
        "few_rows_forward",
        shape=(rows, width, out),
        dtype=name_of(x.dtype),
        x=x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
        statistics=statistics,
        normalized=normalized,
        weight=weight,
        weight_pitch=weight.stride(0),
        bias=bias,
        preactivation=preactivation,
        y=y,
    )
    if y is None:
        return preactivation, Kept(x, statistics, normalized)
    return y, Kept(x, statistics, normalized, preactivation)


def backward(
    grad_y: Tensor,
    kept: Kept,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    *,
    grad_x: Tensor | None,
    grad_norm: tuple[Tensor, Tensor] | None = None,
    grad_weight: Tensor | None,
    accumulate: bool = False,
    grad_bias: Tensor | None = None,
) -> None:
    """The gradients, each into the tensor that is given for it.

    Args:
        grad_y: [n, b], rows contiguous.
        kept: of :func:`forward`, with x and the rest as it had them.
        weight: [b, a], any strides.
        norm_weight: the LayerNorm's [a], or None without one.
        grad_x: [n, a], contiguous; None only without a LayerNorm.
        grad_norm: two of [a]; there if norm_weight is.
        grad_weight: [b, a], rows contiguous.
        accumulate: whether ``grad_weight`` is added to, not written.
        grad_bias: [b].
    """
    weight, x = channels_contiguous(weight), kept.x
    (rows, width), out = x.shape, weight.shape[0]
    call(
        "few_rows_backward",
        shape=(rows, width, out),
        dtype=name_of(x.dtype),
        grad_y=grad_y,
        grad_y_pitch=grad_y.stride(0),
        preactivation=kept.preactivation,
        x=x,
        norm_weight=norm_weight,
        statistics=kept.statistics,
        linear_input=x if kept.normalized is None else kept.normalized,
        weight=weight,
        weight_pitch=weight.stride(0),
        grad_x=grad_x,
        grad_norm_weight=None if grad_norm is None else grad_norm[0],
        grad_norm_bias=None if grad_norm is None else grad_norm[1],
        grad_weight=grad_weight,
        grad_weight_pitch=0 if grad_weight is None else grad_weight.stride(0),
        accumulate=accumulate,
        grad_bias=grad_bias,
        grad_preactivation=empty((out, rows), x),
        grad_normalized=None if norm_weight is None else empty(x.shape, x),
    )
