"""depthwise_conv3d on the CUDA kernels: tensors in, addresses out. See csrc/include/inti/cuda/depthwise_conv3d.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import (
    channels_contiguous,
    expect,
    expect_convolution,
    gradient_buffer,
    in_wide_dtype,
    name_of,
    wide_dtype,
)
from .._memory import empty
from . import load
from ._launch import deferred_sums, launch, strides

Gradients = tuple[Tensor | None, ...]


def depthwise_conv3d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    grid: Sequence[int],
    temporal_stride: int,
    prefix: int,
) -> Tensor:
    batch, frames, tokens, dim = x.shape
    expect_convolution(x, weight, bias, position, grid, temporal_stride, prefix)
    x = channels_contiguous(x, "depthwise_conv3d")
    weight, bias = _of_one_dtype(weight, bias)
    y = empty((batch, frames // temporal_stride, tokens, dim), x)
    launch(
        "depthwise_conv3d_forward",
        x,
        shape=_shape(x, weight, grid, temporal_stride, prefix),
        x=x,
        x_strides=strides(x),
        weight=weight,
        bias=bias,
        position=in_wide_dtype(position, x),
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
    expect_convolution(x, weight, bias, position, grid, temporal_stride, prefix)
    expect(x, (grad_y, (batch, frames // temporal_stride, tokens, dim)))
    x, grad_y = channels_contiguous(x, "depthwise_conv3d"), channels_contiguous(grad_y)
    parameters = _of_one_dtype(weight, bias)
    shape = _shape(x, parameters[0], grid, temporal_stride, prefix)
    tiles, runs = load().depthwise_conv3d_tiling(shape)
    grad_x = gradient_buffer(x, needs[0], grad_x_accumulate)
    grad_weight, grad_bias = (
        empty(parameter.shape, parameter) if need else None
        for parameter, need in zip((weight, bias), needs[1:3], strict=True)
    )
    grad_position = position_partials = weight_partials = None
    with deferred_sums() as sums:
        if needs[1] or needs[2]:
            taps = weight.numel() // dim
            weight_partials = empty((batch * runs * tiles, dim, taps + 1), x, wide_dtype(x))
            if needs[1]:
                sums.add(weight_partials[..., :taps], grad_weight)
            if needs[2]:
                sums.add(weight_partials[..., taps], grad_bias)
        if needs[3]:
            position_partials = empty((batch * tiles, frames, dim), x, wide_dtype(x))
            grad_position = sums.position(position_partials, position)
        launch(
            "depthwise_conv3d_backward",
            x,
            shape=shape,
            x=x,
            x_strides=strides(x),
            weight=parameters[0],
            position=in_wide_dtype(position, x),
            grad_y=grad_y,
            grad_y_strides=strides(grad_y),
            grad_x=grad_x,
            accumulate=grad_x_accumulate is not None,
            grad_position=None,
            position_partials=position_partials,
            grad_weight=None,
            grad_bias=None,
            weight_partials=weight_partials,
        )
    return None if grad_x_accumulate is not None else grad_x, grad_weight, grad_bias, grad_position


def _of_one_dtype(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Contiguous, and both of the wider dtype: the kernels read them as one."""
    dtype = weight.dtype if bias is None else torch.promote_types(weight.dtype, bias.dtype)
    return weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype).contiguous()


def _shape(x: Tensor, weight: Tensor, grid: Sequence[int], temporal_stride: int, prefix: int) -> tuple[object, ...]:
    batch, frames, _, dim = x.shape
    sizes = (batch, frames, prefix, *grid, dim, temporal_stride, weight.shape[-1])
    return (*sizes, name_of(x.dtype), name_of(weight.dtype))
