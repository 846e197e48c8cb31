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
    LEAST_PROGRAMS,
    Settings,
    capability,
    launch,
    settings,
    small,
    store_rounded,
    strides,
    sum_partials,
    vector,
    wide,
)

Gradients = tuple[Tensor | None, ...]


@triton.jit
def _program(tokens, tile_tokens, tiles, TOKENS: tl.constexpr):
    """This program's pair of frames, counted over all clips, and tile; its tokens and which there are [TOKENS]."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    inside = tl.arange(0, TOKENS)
    token = tile * tile_tokens + inside
    return row, tile, token, (inside < tile_tokens) & (token < tokens)


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


@triton.jit
def _load_frame(x, position, first, channel, mask, WIDE: tl.constexpr):
    """x + σP, wide [TOKENS, CHANNELS].

    x: pointers to the frame's tokens [TOKENS, 1]; position: a pointer to the pair's or None; first: the frame's offset.
    """
    value = tl.load(x + channel[None, :], mask=mask, other=0).to(WIDE)
    if position is not None:
        # Every token's threads load it (from L1): a row alone would go through shared memory to reach them.
        value += tl.load(position + first + tl.broadcast_to(channel[None, :], mask.shape), mask=mask, other=0).to(WIDE)
    return value


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
    row, tile, token, live = _program(tokens, tile_tokens, tiles, TOKENS)
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
    for start in range(0, dim, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
        there = channel < dim
        mask = live[:, None] & there[None, :]
        x0 = _load_frame(x_tile, position, 0, channel, mask, WIDE)
        x1 = _load_frame(x_tile + stride_frame, position, dim, channel, mask, WIDE)
        store_rounded(z_tile + channel[None, :], first * x0 + second * x1, mask)


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
    row, tile, token, live = _program(tokens, tile_tokens, tiles, TOKENS)
    pair = row.to(tl.int64) * tokens + token
    first, second = _softmax_of_two(logits, pair, live, SOFTMAX)
    alpha, beta = first.to(WIDE)[:, None], second.to(WIDE)[:, None]
    clip, frame = (row // pairs).to(tl.int64), 2 * (row % pairs)
    x_tile = x + clip * stride_batch * VECTOR + frame * stride_frame + (token.to(tl.int64) * stride_token)[:, None]
    grad_tile = grad_z + clip * grad_stride_batch * VECTOR + (row % pairs) * grad_stride_frame * VECTOR
    grad_tile += (token.to(tl.int64) * grad_stride_token * VECTOR)[:, None]
    frame_size = tokens.to(tl.int64) * dim
    difference = tl.zeros((TOKENS, CHANNELS), WIDE)
    if position is not None:
        position += frame * dim
    for start in range(0, dim, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
        there = channel < dim
        mask = live[:, None] & there[None, :]
        grad = tl.load(grad_tile + channel[None, :], mask=mask, other=0).to(WIDE)
        grad0, grad1 = alpha * grad, beta * grad
        if partials is not None:
            # Tokens that aren't there have loaded nothing, and are 0.
            sums = partials + ((clip * tiles + tile) * 2 * pairs + frame) * dim + channel
            tl.store(sums, tl.sum(grad0, 0), mask=there)
            tl.store(sums + dim, tl.sum(grad1, 0), mask=there)
        if grad_logits is not None:
            x0 = _load_frame(x_tile, position, 0, channel, mask, WIDE)
            x1 = _load_frame(x_tile + stride_frame, position, dim, channel, mask, WIDE)
            difference += grad * (x0 - x1)
        if grad_x is not None:
            to = grad_x + (clip * 2 * pairs + frame) * frame_size + (token.to(tl.int64) * dim)[:, None]
            to += channel[None, :]
            if ACCUMULATE:
                grad0 += tl.load(to, mask=mask, other=0).to(WIDE)
                grad1 += tl.load(to + frame_size, mask=mask, other=0).to(WIDE)
            store_rounded(to, grad0, mask)
            store_rounded(to + frame_size, grad1, mask)
    if grad_logits is not None:
        # ∂α/∂l₀ = αβ = -∂β/∂l₀, and the other way round for l₁.
        total = tl.sum(difference, 1).to(SOFTMAX)
        total += tl.load(grad_weights + 2 * pair, mask=live, other=0).to(SOFTMAX)
        total -= tl.load(grad_weights + 2 * pair + 1, mask=live, other=0).to(SOFTMAX)
        total = first * second * total
        store_rounded(grad_logits + 2 * pair, total, live)
        store_rounded(grad_logits + 2 * pair + 1, -total, live)


def pair_interpolate_forward(x: Tensor, logits: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, frames, tokens, dim = x.shape
    expect(x, (logits, (batch, frames // 2, tokens, 2)), (position, (frames, dim)))
    if _rounds_elsewhere(logits):
        z, weights = pair_interpolate_forward(x, logits.float(), position)
        return z, weights.to(logits.dtype)
    x, logits = channels_contiguous(x, "pair_interpolate"), logits.contiguous()
    z = empty((batch, frames // 2, tokens, dim), x)
    weights = empty(logits.shape, logits)
    at, unit = settings("pair_interpolate_forward", x), vector(x)
    tiling = _tiling(at, x)
    launch(
        _pair_interpolate_forward_kernel,
        lambda at: batch * (frames // 2) * tiling["tiles"],
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
        **tiling,
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
    if _rounds_elsewhere(logits):
        wide_logits = (grad_weights.float(), x, logits.float())
        grads = pair_interpolate_backward(grad_z, *wide_logits, position, needs, grad_x_accumulate)
        return grads[0], None if grads[1] is None else grads[1].to(logits.dtype), grads[2]
    x, grad_z = channels_contiguous(x, "pair_interpolate"), channels_contiguous(grad_z)
    logits, grad_weights = logits.contiguous(), grad_weights.contiguous()
    at, unit = settings("pair_interpolate_backward", x), min(vector(x), vector(grad_z))
    grad_x = gradient_buffer(x, needs[0], grad_x_accumulate)
    grad_logits = empty(logits.shape, logits) if needs[1] else None
    grad_position = empty((frames, dim), position) if needs[2] else None
    tiling = _tiling(at, x)
    partials = empty((batch * tiling["tiles"], frames, dim), x, wide_dtype(x)) if needs[2] else None
    launch(
        _pair_interpolate_backward_kernel,
        lambda at: batch * (frames // 2) * tiling["tiles"],
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
        **tiling,
        ACCUMULATE=grad_x is not None and grad_x_accumulate is not None,
        VECTOR=unit,
        WIDE=wide(x),
        SOFTMAX=_softmax_dtype(x, logits),
    )
    if grad_position is not None:
        sum_partials(partials, grad_position, (dim, 1))
    return None if grad_x_accumulate is not None else grad_x, grad_logits, grad_position


def _tiling(at: Settings, x: Tensor) -> dict[str, int]:
    """How a frame's tokens are shared out: whole tiles where the batch is large; where it isn't, smaller ones, down to
    half, so that there are enough programs. No more than that: each writes a row of partial sums."""
    batch, frames, tokens, _ = x.shape
    enough = triton.cdiv(LEAST_PROGRAMS, max(1, batch * (frames // 2)))
    tiles = max(triton.cdiv(tokens, at.tokens), min(enough, triton.cdiv(tokens, at.tokens // 2)))
    tile_tokens = triton.cdiv(tokens, tiles)
    return {"tile_tokens": tile_tokens, "tiles": triton.cdiv(tokens, tile_tokens)}


def _rounds_elsewhere(logits: Tensor) -> bool:
    """Whether logits are bfloat16 where a GPU can't round to it: float32 holds them, and PyTorch rounds what comes."""
    return logits.dtype == torch.bfloat16 and capability(logits) < 80


def _softmax_dtype(x: Tensor, logits: Tensor) -> tl.dtype:
    """float64 where x or the logits are, else float32, however narrow the logits."""
    return tl.float64 if torch.float64 in (x.dtype, logits.dtype) else tl.float32
