"""depthwise_conv3d on the CPU kernels. See csrc/include/inti/depthwise_conv3d.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .._arguments import (
    channels_contiguous,
    expect,
    expect_convolution,
    expect_result_dtype,
    gradient_buffer,
    in_wide_dtype,
    name_of,
    taps_first,
)
from .._memory import empty
from ._call import call

Gradients = tuple[Tensor | None, ...]


def depthwise_conv3d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    grid: Sequence[int],
    temporal_stride: int,
    prefix: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y is of ``dtype``: x's if None, or of 16 bits where x has 32."""
    batch, frames, tokens, dim = x.shape
    expect_convolution(x, weight, bias, position, grid, temporal_stride, prefix)
    expect_result_dtype(x, dtype or x.dtype)
    x = channels_contiguous(x, "depthwise_conv3d")
    taps, bias, position = in_wide_dtype(taps_first(weight), x), in_wide_dtype(bias, x), in_wide_dtype(position, x)
    y = empty((batch, frames // temporal_stride, tokens, dim), x, dtype)
    call(
        "depthwise_conv3d_forward",
        shape=(batch, frames, prefix, *grid, dim, temporal_stride),
        kernel_space=weight.shape[-1],
        dtypes=(name_of(x.dtype), name_of(y.dtype)),
        x=x,
        x_strides=x.stride()[:3],
        weight=taps,
        bias=bias,
        position=position,
        y=y,
    )
    return y


def depthwise_conv3d_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    grid: Sequence[int],
    temporal_stride: int,
    prefix: int,
    needs: Sequence[bool],
    grad_x_accumulate: Tensor | None,
) -> Gradients:
    batch, frames, tokens, dim = x.shape
    module = native.load()
    expect_convolution(x, weight, bias, position, grid, temporal_stride, prefix)
    expect(x, (grad_y, (batch, frames // temporal_stride, tokens, dim)))
    expect_result_dtype(x, grad_y.dtype)
    x, grad_y = channels_contiguous(x, "depthwise_conv3d"), channels_contiguous(grad_y)
    taps, wide_position = in_wide_dtype(taps_first(weight), x), in_wide_dtype(position, x)
    grad_x = gradient_buffer(x, needs[0], grad_x_accumulate)
    grad_taps = weight_partials = grad_position = position_partials = None
    if needs[1] or needs[2]:
        # The last row is the bias's: its sums come out of the same pass.
        grad_taps = empty((taps.shape[0] + 1, dim), taps)
        weight_partials = empty(
            (module.depthwise_conv3d_chunks(batch, frames // temporal_stride), *grad_taps.shape), taps
        )
    if needs[3]:
        grad_position = empty((frames, dim), wide_position)
        position_partials = empty((batch, frames, dim), wide_position)
    call(
        "depthwise_conv3d_backward",
        shape=(batch, frames, prefix, *grid, dim, temporal_stride),
        kernel_space=weight.shape[-1],
        dtypes=(name_of(x.dtype), name_of(grad_y.dtype)),
        x=x,
        x_strides=x.stride()[:3],
        weight=taps,
        position=wide_position,
        grad_y=grad_y,
        grad_y_strides=grad_y.stride()[:3],
        grad_x=grad_x,
        accumulate=grad_x_accumulate is not None,
        grad_position=grad_position,
        position_partials=position_partials,
        grad_weight=grad_taps,
        weight_partials=weight_partials,
    )
    return (
        None if grad_x_accumulate is not None else grad_x,
        grad_taps[:-1].t().reshape(weight.shape).to(weight.dtype).contiguous() if needs[1] else None,
        grad_taps[-1].to(bias.dtype, copy=True) if needs[2] else None,
        None if grad_position is None else grad_position.to(position.dtype),
    )
