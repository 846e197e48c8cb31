"""A Linear of a few rows on the CPU: what is of a frame and not of a token.

PyTorch's products pack the weight before they use it, which for eight rows takes longer than the product. Of a thousand
rows they take half as long as these; that is 1 % of what the tokens of so many frames take.
"""

from __future__ import annotations

from torch import Tensor

from .._arguments import channels_contiguous, name_of, wide_dtype
from .._memory import empty
from ._call import call


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y [n, b] of rows [n, a], all but the weight in the wide dtype of the weight's.

    Args:
        x: [n, a], contiguous.
        weight: [b, a], any strides.
        bias: [b], contiguous.
    """
    _expect_wide(weight, x, bias)
    weight = channels_contiguous(weight)
    y = empty((x.shape[0], weight.shape[0]), x)
    call(
        "few_rows_forward",
        shape=(*x.shape, weight.shape[0]),
        dtype=name_of(weight.dtype),
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
    """The gradients, each into the tensor that is given for it, of the dtypes of :func:`forward`; the weight's in the
    wide one.

    Args:
        grad_y: [n, b], rows contiguous.
        x: [n, a], contiguous.
        weight: [b, a], any strides.
        grad_x: [n, a], contiguous.
        grad_weight: [b, a], rows contiguous.
        accumulate: whether ``grad_weight`` is added to, not written.
        grad_bias: [b].
    """
    _expect_wide(weight, x, grad_y, grad_x, grad_weight, grad_bias)
    weight = channels_contiguous(weight)
    (rows, width), out = x.shape, weight.shape[0]
    call(
        "few_rows_backward",
        shape=(rows, width, out),
        dtype=name_of(weight.dtype),
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


def _expect_wide(weight: Tensor, *others: Tensor | None) -> None:
    wide = wide_dtype(weight)
    for tensor in others:
        if tensor is not None and tensor.dtype != wide:
            raise ValueError(f"expected {wide} beside a weight in {weight.dtype}, got {tensor.dtype}")
