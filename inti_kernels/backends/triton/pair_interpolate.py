"""pair_interpolate in Triton: softmax of the two logits and weighted sum in one pass, and one pass back.

A program owns a tile of token pairs of one pair of frames, and walks along the channels.
"""

# No `from __future__ import annotations` here: Triton reads the annotations of the kernels.
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import channels_contiguous, expect, gradient_buffer, wide_dtype
from .._memory import empty
from ._launch import (
    launch,
    rounds_elsewhere,
    settings,
    small,
    store_rounded,
    strides,
    sum_partials,
    vector,
    wide,
)
from ._tokens import interpolate, interpolate_backward, program, tiling

Gradients = tuple[Tensor | None, ...]


@triton.jit
def _softmax_of_two(logits, pair, live, SOFTMAX: tl.constexpr):
    """The weights of a tile's pairs, each [TOKENS]. Both by their own quotient: 1 - α would lose a small β's digits.

    A GPU's float32 exponential is accurate to about 1e-7 of the largest weight, not of a tiny one's own size.
    """
    first = tl.load(logits + 2 * pair, mask=live, other=0).to(SOFTMAX)
    second = tl.load(logits + 2 * pair + 1, mask=live, other=0).to(SOFTMAX)
    largest = tl.maximum(first, second)
    first, second = tl.exp(first - largest), tl.exp(second - largest)
    return first / (first + second), second / (first + second)


# Sizes change from model to model or from clip to clip, and must not compile anew. `dim` and the strides come in units
# of VECTOR elements, so that the compiler knows what they are multiples of.
_SIZES = ["pairs", "tokens", "dim", "stride_batch", "stride_frame", "stride_token", "tile_tokens", "tiles"]


@triton.jit(do_not_specialize=_SIZES)
def _pair_interpolate_forward_kernel(
    x,  # [B, T, N, C], any strides but the last
    logits,  # [B, T/2, N, 2]
    position,  # [T, C] or None
    z,  # [B, T/2, N, C]
    weights,  # [B, T/2, N, 2]
    pairs,  # T/2
    tokens,
    dim,
    stride_batch: tl.int64,
    stride_frame: tl.int64,
    stride_token: tl.int64,
    tile_tokens,
    tiles,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    dim, stride_frame, stride_token = dim * VECTOR, stride_frame * VECTOR, stride_token * VECTOR
    row, tile, token, live = program(tokens, tile_tokens, tiles, TOKENS)
    pair = row.to(tl.int64) * tokens + token
    first, second = _softmax_of_two(logits, pair, live, SOFTMAX)
    store_rounded(weights + 2 * pair, first, live)
    store_rounded(weights + 2 * pair + 1, second, live)
    first, second = first.to(WIDE)[:, None], second.to(WIDE)[:, None]
    frame = 2 * (row % pairs)
    x += (row // pairs).to(tl.int64) * stride_batch * VECTOR + frame * stride_frame
    x_tile = x + (token.to(tl.int64) * stride_token)[:, None]
    z_tile = z + (pair * dim)[:, None]
    if position is not None:
        position += frame * dim
    interpolate(x_tile, position, z_tile, first, second, live, stride_frame, dim, WIDE, CHANNELS)


@triton.jit(do_not_specialize=[*_SIZES, "grad_stride_batch", "grad_stride_frame", "grad_stride_token"])
def _pair_interpolate_backward_kernel(
    grad_z,  # [B, T/2, N, C], any strides but the last
    grad_weights,  # [B, T/2, N, 2]
    x,  # [B, T, N, C], any strides but the last; read for grad_logits
    logits,  # [B, T/2, N, 2]
    position,  # [T, C] or None
    grad_x,  # [B, T, N, C] or None
    grad_logits,  # [B, T/2, N, 2] or None
    partials,  # [B · tiles, T, C] or None: grad_position's
    pairs,
    tokens,
    dim,
    stride_batch: tl.int64,
    stride_frame: tl.int64,
    stride_token: tl.int64,
    grad_stride_batch: tl.int64,
    grad_stride_frame: tl.int64,
    grad_stride_token: tl.int64,
    tile_tokens,
    tiles,
    ACCUMULATE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    dim, stride_frame, stride_token = dim * VECTOR, stride_frame * VECTOR, stride_token * VECTOR
    row, tile, token, live = program(tokens, tile_tokens, tiles, TOKENS)
    pair = row.to(tl.int64) * tokens + token
    first, second = _softmax_of_two(logits, pair, live, SOFTMAX)
    alpha, beta = first.to(WIDE)[:, None], second.to(WIDE)[:, None]
    clip, frame = (row // pairs).to(tl.int64), 2 * (row % pairs)
    x_tile = None
    if grad_logits is not None:
        x_tile = x + clip * stride_batch * VECTOR + frame * stride_frame + (token.to(tl.int64) * stride_token)[:, None]
    grad_tile = grad_z + clip * grad_stride_batch * VECTOR + (row % pairs) * grad_stride_frame * VECTOR
    grad_tile += (token.to(tl.int64) * grad_stride_token * VECTOR)[:, None]
    frame_size = tokens.to(tl.int64) * dim
    grad_x_tile = None
    if grad_x is not None:
        grad_x_tile = grad_x + (clip * 2 * pairs + frame) * frame_size + (token.to(tl.int64) * dim)[:, None]
    sums = None
    if partials is not None:
        sums = partials + ((clip * tiles + tile) * 2 * pairs + frame) * dim
    if position is not None:
        position += frame * dim
    total = interpolate_backward(
        grad_tile, x_tile, position, grad_x_tile, sums, alpha, beta, live, stride_frame, frame_size, dim,
        ACCUMULATE, WIDE, TOKENS, CHANNELS,
    ).to(SOFTMAX)  # fmt: skip
    if grad_logits is not None:
        # ∂α/∂l₀ = αβ = -∂β/∂l₀, and the other way round for l₁.
        total += tl.load(grad_weights + 2 * pair, mask=live, other=0).to(SOFTMAX)
        total -= tl.load(grad_weights + 2 * pair + 1, mask=live, other=0).to(SOFTMAX)
        total = first * second * total
        store_rounded(grad_logits + 2 * pair, total, live)
        store_rounded(grad_logits + 2 * pair + 1, -total, live)


def pair_interpolate_forward(x: Tensor, logits: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, frames, tokens, dim = x.shape
    expect(x, (logits, (batch, frames // 2, tokens, 2)), (position, (frames, dim)))
    if rounds_elsewhere(logits):
        z, weights = pair_interpolate_forward(x, logits.float(), position)
        return z, weights.to(logits.dtype)
    x, logits = channels_contiguous(x, "pair_interpolate"), logits.contiguous()
    z = empty((batch, frames // 2, tokens, dim), x)
    weights = empty(logits.shape, logits)
    at, unit = settings("pair_interpolate_forward", x), vector(x)
    tile = tiling(at, x, batch * (frames // 2))
    launch(
        _pair_interpolate_forward_kernel,
        lambda at: batch * (frames // 2) * tile["tiles"],
        at,
        x=x,
        logits=logits,
        position=small(position, x),
        z=z,
        weights=weights,
        pairs=frames // 2,
        tokens=tokens,
        dim=dim // unit,
        **strides(x, unit),
        **tile,
        VECTOR=unit,
        WIDE=wide(x),
        SOFTMAX=_softmax_dtype(x, logits),
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
    if rounds_elsewhere(logits):
        wide_logits = (grad_weights.float(), x, logits.float())
        grads = pair_interpolate_backward(grad_z, *wide_logits, position, needs, grad_x_accumulate)
        return grads[0], None if grads[1] is None else grads[1].to(logits.dtype), grads[2]
    x, grad_z = channels_contiguous(x, "pair_interpolate"), channels_contiguous(grad_z)
    logits, grad_weights = logits.contiguous(), grad_weights.contiguous()
    at, unit = settings("pair_interpolate_backward", x), min(vector(x), vector(grad_z))
    grad_x = gradient_buffer(x, needs[0], grad_x_accumulate)
    grad_logits = empty(logits.shape, logits) if needs[1] else None
    grad_position = empty((frames, dim), position) if needs[2] else None
    tile = tiling(at, x, batch * (frames // 2))
    partials = empty((batch * tile["tiles"], frames, dim), x, wide_dtype(x)) if needs[2] else None
    launch(
        _pair_interpolate_backward_kernel,
        lambda at: batch * (frames // 2) * tile["tiles"],
        at,
        grad_z=grad_z,
        grad_weights=grad_weights,
        x=x,
        logits=logits,
        position=small(position, x),
        grad_x=grad_x,
        grad_logits=grad_logits,
        partials=partials,
        pairs=frames // 2,
        tokens=tokens,
        dim=dim // unit,
        **strides(x, unit),
        **{f"grad_{name}": stride for name, stride in strides(grad_z, unit).items()},
        **tile,
        ACCUMULATE=grad_x is not None and grad_x_accumulate is not None,
        VECTOR=unit,
        WIDE=wide(x),
        SOFTMAX=_softmax_dtype(x, logits),
    )
    if grad_position is not None:
        sum_partials(partials, grad_position, (dim, 1))
    return None if grad_x_accumulate is not None else grad_x, grad_logits, grad_position


def _softmax_dtype(x: Tensor, logits: Tensor) -> tl.dtype:
    """float64 where x or the logits are, else float32, however narrow the logits."""
    return tl.float64 if torch.float64 in (x.dtype, logits.dtype) else tl.float32
