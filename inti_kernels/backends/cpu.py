"""Tensors in, addresses out to the compiled module: the CPU backend.

PyTorch allocates everything, workspaces too. What is small beside the tokens (logits, weights, taps, positions) is
converted here to the kernels' working dtype, so that the kernels have one instantiation for each dtype of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from ._arguments import channels_contiguous, expect, expect_convolution, gradient_buffer, in_wide_dtype, taps_first
from ._memory import empty

Gradients = tuple[Tensor | None, ...]


def pair_interpolate_forward(x: Tensor, logits: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, frames, tokens, dim = x.shape
    expect(x, (logits, (batch, frames // 2, tokens, 2)), (position, (frames, dim)))
    x = channels_contiguous(x, "pair_interpolate")
    logits64, position = logits.to(torch.float64).contiguous(), in_wide_dtype(position, x)
    z = empty((batch, frames // 2, tokens, dim), x)
    weights = empty(logits64.shape, logits64)
    native.load().pair_interpolate_forward(
        shape=(batch, frames, tokens, dim),
        **_common(x),
        x=x.data_ptr(),
        x_strides=x.stride()[:3],
        logits=logits64.data_ptr(),
        position=_address(position),
        z=z.data_ptr(),
        weights=weights.data_ptr(),
    )
    return z, weights.to(logits.dtype)


def pair_interpolate_backward(
    grad_z: Tensor,
    grad_weights: Tensor,
    x: Tensor,
    logits: Tensor,
    position: Tensor | None,
    needs: Sequence[bool],
    grad_x_accumulate: Tensor | None,
) -> Gradients:
    batch, frames, tokens, dim = x.shape
    module = native.load()
    pairs = (batch, frames // 2, tokens)
    expect(x, (logits, (*pairs, 2)), (grad_weights, (*pairs, 2)), (grad_z, (*pairs, dim)), (position, (frames, dim)))
    x, grad_z = channels_contiguous(x, "pair_interpolate"), channels_contiguous(grad_z)
    logits64, wide_position = logits.to(torch.float64).contiguous(), in_wide_dtype(position, x)
    grad_weights = grad_weights.to(torch.float64).contiguous()
    grad_x = gradient_buffer(x, needs[0], grad_x_accumulate)
    grad_logits = empty(logits64.shape, logits64) if needs[1] else None
    grad_position = partials = None
    if needs[2]:
        grad_position = empty((frames, dim), wide_position)
        partials = empty((batch, module.pair_interpolate_chunks(tokens), frames, dim), wide_position)
    module.pair_interpolate_backward(
        shape=(batch, frames, tokens, dim),
        **_common(x),
        x=x.data_ptr(),
        x_strides=x.stride()[:3],
        logits=logits64.data_ptr(),
        position=_address(wide_position),
        grad_z=grad_z.data_ptr(),
        grad_z_strides=grad_z.stride()[:3],
        grad_weights=grad_weights.data_ptr(),
        grad_x=_address(grad_x),
        accumulate=grad_x_accumulate is not None,
        grad_logits=_address(grad_logits),
        grad_position=_address(grad_position),
        partials=_address(partials),
    )
    return (
        None if grad_x_accumulate is not None else grad_x,
        None if grad_logits is None else grad_logits.to(logits.dtype),
        None if grad_position is None else grad_position.to(position.dtype),
    )


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
    taps, bias, position = in_wide_dtype(taps_first(weight), x), in_wide_dtype(bias, x), in_wide_dtype(position, x)
    y = empty((batch, frames // temporal_stride, tokens, dim), x)
    native.load().depthwise_conv3d_forward(
        shape=(batch, frames, prefix, *grid, dim, temporal_stride),
        kernel_space=weight.shape[-1],
        **_common(x),
        x=x.data_ptr(),
        x_strides=x.stride()[:3],
        weight=taps.data_ptr(),
        bias=_address(bias),
        position=_address(position),
        y=y.data_ptr(),
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
    module.depthwise_conv3d_backward(
        shape=(batch, frames, prefix, *grid, dim, temporal_stride),
        kernel_space=weight.shape[-1],
        **_common(x),
        x=x.data_ptr(),
        x_strides=x.stride()[:3],
        weight=taps.data_ptr(),
        position=_address(wide_position),
        grad_y=grad_y.data_ptr(),
        grad_y_strides=grad_y.stride()[:3],
        grad_x=_address(grad_x),
        accumulate=grad_x_accumulate is not None,
        grad_position=_address(grad_position),
        position_partials=_address(position_partials),
        grad_weight=_address(grad_taps),
        weight_partials=_address(weight_partials),
    )
    return (
        None if grad_x_accumulate is not None else grad_x,
        grad_taps[:-1].t().reshape(weight.shape).to(weight.dtype).contiguous() if needs[1] else None,
        grad_taps[-1].to(bias.dtype, copy=True) if needs[2] else None,
        None if grad_position is None else grad_position.to(position.dtype),
    )


def _common(x: Tensor) -> dict[str, object]:
    return {"dtype": str(x.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
