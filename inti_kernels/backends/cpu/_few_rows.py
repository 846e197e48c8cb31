"""A Linear of a few rows on the CPU: what is of a frame and not of a token.

PyTorch's products pack the weight before they use it, which for eight rows takes longer than the product. Of a thousand
rows they take half as long as these; that is 1 % of what the tokens of so many frames take.
"""

from __future__ import annotations

from torch import Tensor

from .._arguments import channels_contiguous, name_of
from .._memory import empty
from ._call import call


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y [n, b] of rows [n, a], all of one dtype, float32 or float64.

    Args:
        x: [n, a], contiguous.
        weight: [b, a], any strides.
        bias: [b], contiguous.
    """
    weight = channels_contiguous(weight)
    y = empty((x.shape[0], weight.shape[0]), x)
    call(
        "few_rows_forward",
        shape=(*x.shape, weight.shape[0]),
        dtype=name_of(x.dtype),
        x=x,
        weight=weight,
        weight_pitch=weight.stride(0),
        bias=bias,
        y=y,
    )
    return y


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    accumulate: bool = False,
    grad_bias: Tensor | None = None,
) -> None:
    """The gradients, each into the tensor that is given for it.

    Args:
        grad_y: [n, b], rows contiguous.
        x: [n, a], contiguous.
        weight: [b, a], any strides.
        grad_x: [n, a], contiguous.
        grad_weight: [b, a], rows contiguous.
        accumulate: whether ``grad_weight`` is added to, not written.
        grad_bias: [b].
    """
    weight = channels_contiguous(weight)
    (rows, width), out = x.shape, weight.shape[0]
    call(
        "few_rows_backward",
        shape=(rows, width, out),
        dtype=name_of(x.dtype),
        grad_y=grad_y,
        grad_y_pitch=grad_y.stride(0),
        x=x,
        weight=weight,
        weight_pitch=weight.stride(0),
        grad_x=grad_x,
        grad_weight=grad_weight,
        grad_weight_pitch=0 if grad_weight is None else grad_weight.stride(0),
        accumulate=accumulate,
        grad_bias=grad_bias,
        grad_preactivation=empty((out, rows), x),
    )
