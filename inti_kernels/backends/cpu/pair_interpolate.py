"""pair_interpolate on the CPU kernels. See csrc/include/inti/pair_interpolate.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .._arguments import channels_contiguous, expect, gradient_buffer, in_wide_dtype, name_of
from .._memory import empty
from ._call import call

Gradients = tuple[Tensor | None, ...]


def pair_interpolate_forward(x: Tensor, logits: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, frames, tokens, dim = x.shape
    expect(x, (logits, (batch, frames // 2, tokens, 2)), (position, (frames, dim)))
    x = channels_contiguous(x, "pair_interpolate")
    logits64, position = logits.to(torch.float64).contiguous(), in_wide_dtype(position, x)
    z = empty((batch, frames // 2, tokens, dim), x)
    weights = empty(logits64.shape, logits64)
    call(
        "pair_interpolate_forward",
        shape=(batch, frames, tokens, dim),
        dtype=name_of(x.dtype),
        x=x,
        x_strides=x.stride()[:3],
        logits=logits64,
        position=position,
        z=z,
        weights=weights,
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
    call(
        "pair_interpolate_backward",
        shape=(batch, frames, tokens, dim),
        dtype=name_of(x.dtype),
        x=x,
        x_strides=x.stride()[:3],
        logits=logits64,
        position=wide_position,
        grad_z=grad_z,
        grad_z_strides=grad_z.stride()[:3],
        grad_weights=grad_weights,
        grad_x=grad_x,
        accumulate=grad_x_accumulate is not None,
        grad_logits=grad_logits,
        grad_position=grad_position,
        partials=partials,
    )
    return (
        None if grad_x_accumulate is not None else grad_x,
        None if grad_logits is None else grad_logits.to(logits.dtype),
        None if grad_position is None else grad_position.to(position.dtype),
    )
