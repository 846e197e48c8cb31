"""What kernels share that walk over tiles of tokens, in Triton: a program's place, loads of x + σP, Eq. 7 and its way
back."""

# No `from __future__ import annotations` here: Triton reads the annotations of the kernels.
import triton
import triton.language as tl
from torch import Tensor

from ._launch import LEAST_PROGRAMS, Settings, store_rounded


def tiling(at: Settings, x: Tensor, programs_of: int) -> dict[str, int]:
    """How a frame's tokens are shared out: whole tiles where the batch is large; where it isn't, smaller ones, down to
    half, so that there are enough programs. No more than that: each writes a row of partial sums.

    Args:
        at: the kernel's settings.
        x: tokens [B, T, N, C].
        programs_of: frames, or pairs of frames, that have programs of their own.
    """
    tokens = x.shape[2]
    enough = triton.cdiv(LEAST_PROGRAMS, max(1, programs_of))
    tiles = max(triton.cdiv(tokens, at.tokens), min(enough, triton.cdiv(tokens, at.tokens // 2)))
    tile_tokens = triton.cdiv(tokens, tiles)
    return {"tile_tokens": tile_tokens, "tiles": triton.cdiv(tokens, tile_tokens)}


@triton.jit
def program(tokens, tile_tokens, tiles, TOKENS: tl.constexpr):
    """This program's frame or pair of frames, counted over all clips, and tile; its tokens and which there are
    [TOKENS]."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    inside = tl.arange(0, TOKENS)
    token = tile * tile_tokens + inside
    return row, tile, token, (inside < tile_tokens) & (token < tokens)


@triton.jit
def load_row(row, channel, mask, WIDE: tl.constexpr):
    """A row that all tokens of a tile share, wide [TOKENS, CHANNELS].

    Every token's threads load it (from L1): a row alone would go through shared memory to reach them.
    """
    return tl.load(row + tl.broadcast_to(channel[None, :], mask.shape), mask=mask, other=0).to(WIDE)


@triton.jit
def load_frame(x, position, first, channel, mask, WIDE: tl.constexpr):
    """x + σP, wide [TOKENS, CHANNELS].

    x: pointers to the frame's tokens [TOKENS, 1]; position: a pointer to the pair's or None; first: the frame's offset.
    """
    value = tl.load(x + channel[None, :], mask=mask, other=0).to(WIDE)
    if position is not None:
        value += load_row(position + first, channel, mask, WIDE)
    return value


@triton.jit
def interpolate(
    x,  # pointers to the first frame's tokens [TOKENS, 1]
    position,  # a pointer to the pair's σP or None
    z,  # pointers to the output's tokens [TOKENS, 1]
    alpha,  # wide [TOKENS, 1]
    beta,  # wide [TOKENS, 1]
    live,  # [TOKENS]
    stride_frame,
    dim,
    WIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """z = α·x₀ + β·x₁ (Eq. 7)."""
    for start in range(0, dim, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
        mask = live[:, None] & (channel < dim)[None, :]
        x0 = load_frame(x, position, 0, channel, mask, WIDE)
        x1 = load_frame(x + stride_frame, position, dim, channel, mask, WIDE)
        store_rounded(z + channel[None, :], alpha * x0 + beta * x1, mask)


@triton.jit
def interpolate_backward(
    grad_z,  # pointers to its tokens [TOKENS, 1]
    x,  # pointers to the first frame's tokens [TOKENS, 1], or None: nothing is to be summed
    position,  # a pointer to the pair's σP or None
    grad_x,  # pointers to the first frame's tokens [TOKENS, 1], or None
    sums,  # a pointer to the tile's sums of the first frame's gradient [C], the second's behind them; or None
    alpha,  # wide [TOKENS, 1]
    beta,  # wide [TOKENS, 1]
    live,  # [TOKENS]
    stride_frame,
    frame_size,  # from a frame of grad_x to the next
    dim,
    ACCUMULATE: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Writes the gradients of both frames' tokens, or adds to them, and their sums over the tile; returns the weights',
    less each other: Σ grad_z · (x₀ - x₁), wide [TOKENS]."""
    difference = tl.zeros((TOKENS, CHANNELS), WIDE)
    for start in range(0, dim, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
        there = channel < dim
        mask = live[:, None] & there[None, :]
        grad = tl.load(grad_z + channel[None, :], mask=mask, other=0).to(WIDE)
        grad0, grad1 = alpha * grad, beta * grad
        if sums is not None:
            # Tokens that aren't there have loaded nothing, and are 0.
            tl.store(sums + channel, tl.sum(grad0, 0), mask=there)
            tl.store(sums + dim + channel, tl.sum(grad1, 0), mask=there)
        if x is not None:
            x0 = load_frame(x, position, 0, channel, mask, WIDE)
            x1 = load_frame(x + stride_frame, position, dim, channel, mask, WIDE)
            difference += grad * (x0 - x1)
        if grad_x is not None:
            to = grad_x + channel[None, :]
            if ACCUMULATE:
                grad0 += tl.load(to, mask=mask, other=0).to(WIDE)
                grad1 += tl.load(to + frame_size, mask=mask, other=0).to(WIDE)
            store_rounded(to, grad0, mask)
            store_rounded(to + frame_size, grad1, mask)
    return tl.sum(difference, 1)
