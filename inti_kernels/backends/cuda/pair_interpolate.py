"""pair_interpolate on the CUDA kernels: tensors in, addresses out. See csrc/include/inti/cuda/pair_interpolate.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._arguments import channels_contiguous, expect, gradient_buffer, in_wide_dtype, name_of, wide_dtype
from .._memory import empty
from . import load
from ._launch import deferred_sums, launch, strides

Gradients = tuple[Tensor | None, ...]


def pair_interpolate_forward(x: Tensor, logits: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, frames, tokens, dim = x.shape
    expect(x, (logits, (batch, frames // 2, tokens, 2)), (position, (frames, dim)))
    x, logits = channels_contiguous(x, "pair_interpolate"), logits.contiguous()
    z, weights = empty((batch, frames // 2, tokens, dim), x), empty(logits.shape, logits)
    launch(
        "pair_interpolate_forward",
        x,
        shape=_shape(x, logits),
        x=x,
        x_strides=strides(x),
        logits=logits,
        position=in_wide_dtype(position, x),
        z=z,
        weights=weights,
    )
    return z, weights


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
    pairs = (batch, frames // 2, tokens)
    expect(x, (logits, (*pairs, 2)), (grad_weights, (*pairs, 2)), (grad_z, (*pairs, dim)), (position, (frames, dim)))
    x, grad_z = channels_contiguous(x, "pair_interpolate"), channels_contiguous(grad_z)
    logits = logits.contiguous()
    grad_x = gradient_buffer(x, needs[0], grad_x_accumulate)
    grad_logits = empty(logits.shape, logits) if needs[1] else None
    grad_position = partials = None
    with deferred_sums() as sums:
        if needs[2]:
            tiles = load().pair_interpolate_tiles(batch, frames, tokens)
            partials = empty((batch * tiles, frames, dim), x, wide_dtype(x))
            grad_position = sums.position(partials, position)
        launch(
            "pair_interpolate_backward",
            x,
            shape=_shape(x, logits),
            x=x,
            x_strides=strides(x),
            logits=logits,
            position=in_wide_dtype(position, x),
            grad_z=grad_z,
            grad_z_strides=strides(grad_z),
            grad_weights=grad_weights.to(logits.dtype).contiguous(),
            grad_x=grad_x,
            accumulate=grad_x_accumulate is not None,
            grad_logits=grad_logits,
            grad_position=None,
            partials=partials,
        )
    return None if grad_x_accumulate is not None else grad_x, grad_logits, grad_position


def _shape(x: Tensor, logits: Tensor) -> tuple[object, ...]:
    return (*x.shape, name_of(x.dtype), name_of(logits.dtype))
