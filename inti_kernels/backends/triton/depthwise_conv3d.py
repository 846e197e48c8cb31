"""depthwise_conv3d in Triton: the tokens are read where they lie, and a frame serves all outputs that it feeds.

A program owns a tile of patch tokens, a block of channels and a run of frames. It walks along the run and adds each
frame, through its nine shifts, to the outputs before, at and behind it; an output is written when its last frame has
been seen. So a frame comes from device memory once a program, and only the halo of the tile is read by two. The shifts
are loads of their own, which hit L1: Triton has no way to move a tile inside the registers.

The taps are re-read from L1 for every frame (27 weights for 8 channels a thread are 216 registers); the three of 3×1×1
are few enough to be kept.
"""

# No `from __future__ import annotations` here: Triton reads the annotations of the kernels.
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .._arguments import channels_contiguous, expect, expect_convolution, gradient_buffer, taps_first, wide_dtype
from .._memory import empty
from ._launch import Settings, launch, settings, small, store_rounded, strides, sum_partials, vector, wide

Gradients = tuple[Tensor | None, ...]


# --- What the kernels share -------------------------------------------------------------------------------------------


@triton.jit
def _program(dim, tiles, runs, run, out_frames, CHANNELS: tl.constexpr):
    """This program's channels and which there are [CHANNELS], tile, run of output frames [first, last), and clip.

    Blocks of channels next to each other run at the same time: together they read whole rows of memory.
    """
    blocks = tl.cdiv(dim, CHANNELS)
    rest = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    tile = rest % tiles
    first = rest // tiles % runs * run
    return (
        channels,
        channels < dim,
        tile,
        first,
        tl.minimum(first + run, out_frames),
        (rest // tiles // runs).to(tl.int64),
    )


@triton.jit
def _place(tile, tile_tokens, height, width, TOKENS: tl.constexpr, SPACE: tl.constexpr):
    """The tile's patch tokens by number and by row; which of them there are; a tuple of which have a neighbour in each
    of the SPACE columns around them.  all [TOKENS]"""
    inside = tl.arange(0, TOKENS)
    token = tile * tile_tokens + inside
    live = (inside < tile_tokens) & (token < height * width)
    column = token % width
    columns = (live,)
    if SPACE == 3:
        columns = (live & (column >= 1), live, live & (column < width - 1))
    return token, token // width, live, columns


@triton.jit
def _kept_taps(taps, tap_step, there, SPACE: tl.constexpr):
    """A tuple of the taps [CHANNELS] that stay in registers; empty where they wouldn't fit."""
    kept = ()
    if SPACE == 1:
        for k in tl.static_range(3):
            kept = kept + (tl.load(taps + k * tap_step, mask=there, other=0),)
    return kept


@triton.jit
def _load_position(position, frame, exists, there, dim, WIDE: tl.constexpr):
    """A tuple of a frame's σP, wide [CHANNELS]; empty if position, pointers to frame 0's, is None.

    (Before 3.6, Triton's functions can't return None.)
    """
    added = ()
    if position is not None:
        added = (tl.load(position + frame * dim, mask=exists & there, other=0).to(WIDE),)
    return added


@triton.jit
def _load_shifted(frame, offset, inside, there, added, WIDE: tl.constexpr):
    """A frame's tile moved by some rows and columns, x + σP, and 0 on the padding.  [TOKENS, CHANNELS], wide"""
    inside = inside[:, None]
    value = tl.load(frame + offset, mask=inside & there[None, :], other=0).to(WIDE)
    for k in tl.static_range(len(added)):
        value = tl.where(inside, value + added[k][None, :], 0)  # the padding has no position
    return value


@triton.jit
def _add_frame(
    sums,  # a tuple of [TOKENS, CHANNELS]: the outputs that the frame feeds; sums[k] by tap FIRST - STEP·k along time
    frame,  # its number; out of the clip, it adds nothing
    source,  # pointers to the tile in frame 0 [TOKENS, CHANNELS]; frames; strides of a frame and of a token
    position,  # pointers to frame 0's [CHANNELS], or None
    place,  # rows of the tile's tokens [TOKENS], height, width
    columns,  # as `_place` gives them
    taps,  # pointers to the first tap [CHANNELS]
    kept,  # as `_kept_taps` gives them
    there,  # [CHANNELS]
    rows,  # SPACE, as a number that the compiler doesn't know
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,  # from a tap to the next
    DIM: tl.constexpr,
    SPACE: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, frames, stride_frame, stride_token = source
    row, height, width = place
    exists = (frame >= 0) & (frame < frames)
    added = _load_position(position, frame, exists, there, DIM, WIDE)
    tile += frame * stride_frame
    # A loop whose end the compiler doesn't know: unrolled, it has all loads ahead of all sums, and spills.
    for h in range(rows):
        below = h - SPACE // 2
        inside = (row >= -below) & (row < height - below) & exists
        fed = sums
        for w in tl.static_range(SPACE):
            offset = (below * width + (w - SPACE // 2)) * stride_token
            value = _load_shifted(tile, offset, inside & columns[w], there, added, WIDE)
            more = ()
            for k in tl.static_range(len(sums)):
                if SPACE == 1:
                    tap = kept[FIRST - STEP * k]
                else:
                    tap = tl.load(taps + (((FIRST - STEP * k) * SPACE + h) * SPACE + w) * TAP_STEP, mask=there, other=0)
                more = more + (fed[k] + value * tap.to(WIDE)[None, :],)
            fed = more
        sums = fed
    return sums


@triton.jit
def _clear_prefix(frame, prefix, channels, there, dim, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Zeros into a frame's prefix tokens, which have no place on the grid.  frame: a pointer to its first token"""
    zeros = tl.zeros((TOKENS, CHANNELS), frame.dtype.element_ty)
    for start in range(0, prefix, TOKENS):
        token = start + tl.arange(0, TOKENS)
        mask = (token < prefix)[:, None] & there[None, :]
        tl.store(frame + (token.to(tl.int64) * dim)[:, None] + channels[None, :], zeros, mask=mask)


# --- Forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _finish_output(value, bias, y_tile, mask, there, WIDE: tl.constexpr):
    if bias is not None:
        value += tl.load(bias, mask=there, other=0).to(WIDE)[None, :]
    store_rounded(y_tile, value, mask)


# What may change from clip to clip must not compile anew. The strides come in units of VECTOR elements, so that the
# compiler knows what they are multiples of. DIM is the model's: as a constant it makes the taps' 27 addresses one and
# 27 immediate offsets, which would be 54 registers.
_SIZES = ["frames", "height", "width", "prefix", "stride_batch", "stride_frame", "stride_token"]
_TILING = ["tile_tokens", "tiles", "run", "runs"]


@triton.jit(do_not_specialize=[*_SIZES, "rows", *_TILING])
def _depthwise_conv3d_forward_kernel(
    x,  # [B, T, prefix + H·W, C], any strides but the last
    taps,  # [3·SPACE·SPACE, C]
    bias,  # [C] or None
    position,  # [T, C] or None
    y,  # [B, T / STRIDE, prefix + H·W, C]
    frames,
    height,
    width,
    prefix,
    stride_batch: tl.int64,
    stride_frame: tl.int64,
    stride_token: tl.int64,
    rows,  # SPACE, as a number that the compiler doesn't know
    tile_tokens,
    tiles,
    run,  # output frames of a program
    runs,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    SPACE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    stride_frame, stride_token = stride_frame * VECTOR, stride_token * VECTOR
    out_frames = frames // STRIDE
    channels, there, tile, first, last, clip = _program(DIM, tiles, runs, run, out_frames, CHANNELS)
    token, row, live, columns = _place(tile, tile_tokens, height, width, TOKENS, SPACE)
    mask = live[:, None] & there[None, :]
    token = (prefix + token).to(tl.int64)[:, None]
    x_tile = x + clip * stride_batch * VECTOR + token * stride_token + channels[None, :]
    source, place = (x_tile, frames, stride_frame, stride_token), (row, height, width)
    frame_size = (prefix + height * width).to(tl.int64) * DIM
    y += clip * out_frames * frame_size
    y_tile = y + token * DIM + channels[None, :]
    taps += channels
    kept = _kept_taps(taps, DIM, there, SPACE)
    if position is not None:
        position += channels
    if bias is not None:
        bias += channels
    start = tl.zeros((TOKENS, CHANNELS), WIDE)

    # An output is open from the frame before it to the frame behind it; `at` is the run's first one.
    at = _add_frame(
        (start,), STRIDE * first - 1, source, position, place, columns, taps, kept, there, rows,
        0, 1, DIM, DIM, SPACE, WIDE,
    )[0]  # fmt: skip
    if STRIDE == 2:
        for out in range(first, last):
            at = _add_frame(
                (at,), 2 * out, source, position, place, columns, taps, kept, there, rows,
                1, 1, DIM, DIM, SPACE, WIDE,
            )[0]  # fmt: skip
            fed = _add_frame(
                (at, start), 2 * out + 1, source, position, place, columns, taps, kept, there, rows,
                2, 2, DIM, DIM, SPACE, WIDE,
            )  # fmt: skip
            _finish_output(fed[0], bias, y_tile + out * frame_size, mask, there, WIDE)
            at = fed[1]
    else:
        opened = _add_frame(
            (at, start), first, source, position, place, columns, taps, kept, there, rows,
            1, 1, DIM, DIM, SPACE, WIDE,
        )  # fmt: skip
        at, behind = opened[0], opened[1]
        for out in range(first, last):
            fed = _add_frame(
                (at, behind, start), out + 1, source, position, place, columns, taps, kept, there, rows,
                2, 1, DIM, DIM, SPACE, WIDE,
            )  # fmt: skip
            _finish_output(fed[0], bias, y_tile + out * frame_size, mask, there, WIDE)
            at, behind = fed[1], fed[2]
    if tile == 0:
        for out in range(first, last):
            _clear_prefix(y + out * frame_size, prefix, channels, there, DIM, TOKENS, CHANNELS)


def _tiling(at: Settings, grid: Sequence[int], out_frames: int, temporal_stride: int) -> dict[str, int]:
    """How patches and output frames are shared out: tiles of equal size, runs of at.frames input frames."""
    patches = grid[0] * grid[1]
    tiles, run = triton.cdiv(patches, at.tokens), at.frames // temporal_stride
    return {
        "tile_tokens": triton.cdiv(patches, tiles), "tiles": tiles, "run": run, "runs": triton.cdiv(out_frames, run),
    }  # fmt: skip


def _sizes(x: Tensor, grid: Sequence[int], prefix: int) -> dict[str, int]:
    height, width = grid
    return {
        "frames": x.shape[1], "height": height, "width": width, "prefix": prefix, "DIM": x.shape[3],
    }  # fmt: skip


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
    y = empty((batch, frames // temporal_stride, tokens, dim), x)
    at = settings("depthwise_conv3d_forward", x)
    tiling = _tiling(at, grid, frames // temporal_stride, temporal_stride)
    unit = vector(x)
    launch(
        _depthwise_conv3d_forward_kernel,
        lambda at: at.blocks(dim) * tiling["tiles"] * tiling["runs"] * batch,
        at,
        x=x,
        taps=small(taps_first(weight), x),
        bias=small(bias, x),
        position=small(position, x),
        y=y,
        **_sizes(x, grid, prefix),
        **strides(x, unit),
        **tiling,
        rows=weight.shape[-1],
        STRIDE=temporal_stride,
        SPACE=weight.shape[-1],
        VECTOR=unit,
        WIDE=wide(x),
    )
    return y


# --- Backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _finish_gradient(
    value,  # [TOKENS, CHANNELS], wide: what the op adds to the gradient of a frame's tile
    frame,
    exists,
    grad_tile,
    frame_size,
    sums,  # pointers to frame 0's sums over the tile's tokens [CHANNELS], or None
    mask,  # [TOKENS, CHANNELS]
    there,
    dim,
    ACCUMULATE: tl.constexpr,
):
    """Writes a frame's tile of grad_x, or adds to it, and its sum over the tokens, which is grad_position's."""
    mask = mask & exists
    if grad_tile is not None:
        to = grad_tile + frame * frame_size
        grad = value
        if ACCUMULATE:
            grad += tl.load(to, mask=mask, other=0).to(value.dtype)
        store_rounded(to, grad, mask)
    if sums is not None:
        # Tokens that aren't there have loaded nothing, and are 0.
        tl.store(sums + frame * dim, tl.sum(value, 0), mask=exists & there)


@triton.jit(do_not_specialize=[*_SIZES, "rows", *_TILING])
def _depthwise_conv3d_backward_x_kernel(
    grad_y,  # [B, T / STRIDE, prefix + H·W, C], any strides but the last
    taps,  # [3·SPACE·SPACE, C]
    grad_x,  # [B, T, prefix + H·W, C] or None
    partials,  # [B · tiles, T, C] or None: grad_position's
    frames,
    height,
    width,
    prefix,
    stride_batch: tl.int64,
    stride_frame: tl.int64,
    stride_token: tl.int64,
    rows,  # SPACE, as a number that the compiler doesn't know
    tile_tokens,
    tiles,
    run,  # frames of grad_y that are a program's own
    runs,
    ACCUMULATE: tl.constexpr,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    SPACE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gather form: every element of grad_x is written by one program, once. grad_y's frames are what is walked
    along, and an open frame of grad_x takes the taps turned round."""
    stride_frame, stride_token = stride_frame * VECTOR, stride_token * VECTOR
    out_frames = frames // STRIDE
    channels, there, tile, first, last, clip = _program(DIM, tiles, runs, run, out_frames, CHANNELS)
    token, row, live, columns = _place(tile, tile_tokens, height, width, TOKENS, SPACE)
    mask = live[:, None] & there[None, :]
    token = (prefix + token).to(tl.int64)[:, None]
    grad_tile = grad_y + clip * stride_batch * VECTOR + token * stride_token + channels[None, :]
    source, place = (grad_tile, out_frames, stride_frame, stride_token), (row, height, width)
    frame_size = (prefix + height * width).to(tl.int64) * DIM
    x_tile = None
    if grad_x is not None:
        grad_x += clip * frames * frame_size
        x_tile = grad_x + token * DIM + channels[None, :]
    sums_at = None
    if partials is not None:
        sums_at = partials + (clip * tiles + tile) * frames * DIM + channels
    # From the last tap to the first, for what an output read before itself lies behind its input.
    taps += (3 * SPACE * SPACE - 1) * DIM + channels
    kept = _kept_taps(taps, -DIM, there, SPACE)
    zeros = tl.zeros((TOKENS, CHANNELS), WIDE)

    if STRIDE == 2:
        # Frame j of grad_y feeds frames 2j - 1, 2j and 2j + 1 of grad_x; the first of them was opened by frame j - 1.
        before = zeros
        for out in range(first, last):
            fed = _add_frame(
                (before, zeros, zeros), out, source, None, place, columns, taps, kept, there, rows,
                2, 1, -DIM, DIM, SPACE, WIDE,
            )  # fmt: skip
            _finish_gradient(
                fed[0], 2 * out - 1, out > first, x_tile, frame_size, sums_at, mask, there, DIM, ACCUMULATE
            )
            _finish_gradient(fed[1], 2 * out, True, x_tile, frame_size, sums_at, mask, there, DIM, ACCUMULATE)
            before = fed[2]
        before = _add_frame(
            (before,), last, source, None, place, columns, taps, kept, there, rows,
            2, 1, -DIM, DIM, SPACE, WIDE,
        )[0]  # fmt: skip
        _finish_gradient(before, 2 * last - 1, True, x_tile, frame_size, sums_at, mask, there, DIM, ACCUMULATE)
    else:
        at = _add_frame(
            (zeros,), first - 1, source, None, place, columns, taps, kept, there, rows,
            0, 1, -DIM, DIM, SPACE, WIDE,
        )[0]  # fmt: skip
        opened = _add_frame(
            (at, zeros), first, source, None, place, columns, taps, kept, there, rows,
            1, 1, -DIM, DIM, SPACE, WIDE,
        )  # fmt: skip
        at, behind = opened[0], opened[1]
        for out in range(first, last):
            fed = _add_frame(
                (at, behind, zeros), out + 1, source, None, place, columns, taps, kept, there, rows,
                2, 1, -DIM, DIM, SPACE, WIDE,
            )  # fmt: skip
            _finish_gradient(fed[0], out, True, x_tile, frame_size, sums_at, mask, there, DIM, ACCUMULATE)
            at, behind = fed[1], fed[2]
    if (grad_x is not None) and (not ACCUMULATE):  # noqa: SIM102 - this much is known when compiling
        if tile == 0:
            for frame in range(STRIDE * first, STRIDE * last):
                _clear_prefix(grad_x + frame * frame_size, prefix, channels, there, DIM, TOKENS, CHANNELS)


@triton.jit(
    do_not_specialize=[*_SIZES, *_TILING, "grad_stride_batch", "grad_stride_frame", "grad_stride_token"],
)
def _depthwise_conv3d_backward_weight_kernel(
    x,  # [B, T, prefix + H·W, C], any strides but the last
    grad_y,  # [B, T / STRIDE, prefix + H·W, C], any strides but the last
    position,  # [T, C] or None
    partials,  # [B · runs · tiles, 3·SPACE·SPACE + 1, C]: the taps' sums, and in the last row the bias's
    frames,
    height,
    width,
    prefix,
    stride_batch: tl.int64,
    stride_frame: tl.int64,
    stride_token: tl.int64,
    grad_stride_batch: tl.int64,
    grad_stride_frame: tl.int64,
    grad_stride_token: tl.int64,
    tile_tokens,
    tiles,
    run,
    runs,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    SPACE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Three walks along the run, one a tap along time: 27 sums a thread would spill, nine don't. What the first walk
    has loaded, the others find in L1 or L2."""
    stride_frame, stride_token = stride_frame * VECTOR, stride_token * VECTOR
    grad_stride_frame, grad_stride_token = grad_stride_frame * VECTOR, grad_stride_token * VECTOR
    channels, there, tile, first, last, clip = _program(DIM, tiles, runs, run, frames // STRIDE, CHANNELS)
    token, row, live, columns = _place(tile, tile_tokens, height, width, TOKENS, SPACE)
    mask = live[:, None] & there[None, :]
    token = (prefix + token).to(tl.int64)[:, None]
    x_tile = x + clip * stride_batch * VECTOR + token * stride_token + channels[None, :]
    grad_tile = grad_y + clip * grad_stride_batch * VECTOR + token * grad_stride_token + channels[None, :]
    if position is not None:
        position += channels
    sums_of: tl.constexpr = SPACE * SPACE
    partials += ((clip * runs + first // run) * tiles + tile) * (3 * sums_of + 1) * DIM + channels
    zeros = tl.zeros((TOKENS, CHANNELS), WIDE)
    bias_sum = zeros
    for time in range(3):
        sums = ()
        for _k in tl.static_range(sums_of):
            sums = sums + (zeros,)
        for out in range(first, last):
            frame = STRIDE * out + time - 1
            exists = (frame >= 0) & (frame < frames)
            added = _load_position(position, frame, exists, there, DIM, WIDE)
            grad = tl.load(grad_tile + out * grad_stride_frame, mask=mask, other=0).to(WIDE)
            if time == 1:
                bias_sum += grad
            fed = ()
            for k in tl.static_range(sums_of):
                below = k // SPACE - SPACE // 2
                inside = (row >= -below) & (row < height - below) & columns[k % SPACE] & exists
                offset = (below * width + (k % SPACE - SPACE // 2)) * stride_token
                value = _load_shifted(x_tile + frame * stride_frame, offset, inside, there, added, WIDE)
                fed = fed + (sums[k] + value * grad,)
            sums = fed
        for k in tl.static_range(sums_of):
            tl.store(partials + (time * sums_of + k) * DIM, tl.sum(sums[k], 0), mask=there)
    tl.store(partials + 3 * sums_of * DIM, tl.sum(bias_sum, 0), mask=there)


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
    grad_x = gradient_buffer(x, needs[0], grad_x_accumulate)
    grad_weight = grad_bias = grad_position = None
    shape = {"STRIDE": temporal_stride, "SPACE": weight.shape[-1], "WIDE": wide(x)}
    if needs[0] or needs[3]:
        at = settings("depthwise_conv3d_backward_x", x)
        tiling = _tiling(at, grid, frames // temporal_stride, temporal_stride)
        partials = empty((batch * tiling["tiles"], frames, dim), x, wide_dtype(x)) if needs[3] else None
        unit = vector(grad_y)
        launch(
            _depthwise_conv3d_backward_x_kernel,
            lambda at: at.blocks(dim) * tiling["tiles"] * tiling["runs"] * batch,
            at,
            grad_y=grad_y,
            taps=small(taps_first(weight), x),
            grad_x=grad_x,
            partials=partials,
            **_sizes(x, grid, prefix),
            **strides(grad_y, unit),
            **tiling,
            rows=weight.shape[-1],
            ACCUMULATE=grad_x is not None and grad_x_accumulate is not None,
            VECTOR=unit,
            **shape,
        )
        if needs[3]:
            grad_position = empty(position.shape, position)
            sum_partials(partials, grad_position, (dim, 1))
    if needs[1] or needs[2]:
        at = settings("depthwise_conv3d_backward_weight", x)
        tiling = _tiling(at, grid, frames // temporal_stride, temporal_stride)
        taps = weight.numel() // dim
        partials = empty((batch * tiling["runs"] * tiling["tiles"], taps + 1, dim), x, wide_dtype(x))
        unit = min(vector(x), vector(grad_y))
        launch(
            _depthwise_conv3d_backward_weight_kernel,
            lambda at: at.blocks(dim) * tiling["tiles"] * tiling["runs"] * batch,
            at,
            x=x,
            grad_y=grad_y,
            position=small(position, x),
            partials=partials,
            **_sizes(x, grid, prefix),
            **strides(x, unit),
            **{f"grad_{name}": stride for name, stride in strides(grad_y, unit).items()},
            **tiling,
            VECTOR=unit,
            **shape,
        )
        if needs[1]:
            grad_weight = empty(weight.shape, weight)
            sum_partials(partials[:, :-1], grad_weight, (1, taps))
        if needs[2]:
            grad_bias = empty(bias.shape, bias)
            sum_partials(partials[:, -1:], grad_bias, (dim, 1))
    return None if grad_x_accumulate is not None else grad_x, grad_weight, grad_bias, grad_position
