"""interpolation_head in Triton: Linear over [features ; cube + frame_context] → GELU → two logits → softmax →
interpolation. Only the difference of the two logits matters, so it alone is computed.

From sm_80 on, in 16 bits, the forward is a product whose epilogue leaves partial differences of the logits, one a tile
of its columns, and a pass that adds them up and interpolates. Elsewhere the product is cuBLAS's, and the pass takes the
GELU and the second Linear too. The backward is a pass before cuBLAS's products. What the frames' context adds to the
first Linear is computed once a frame, not once a token, by torch: B·T/2 rows are no work for a kernel.

In the passes a program owns a tile of token pairs of one pair of frames, and walks along the channels.
"""

# No `from __future__ import annotations` here: Triton reads the annotations of the kernels.
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import (
    channels_contiguous,
    expect,
    expect_interpolation_head,
    expect_one_dtype,
    gradient_buffer,
    wide_dtype,
)
from .._memory import empty
from . import _products
from ._gelu import gelu, gelu_and_slope
from ._launch import launch, rounds_elsewhere, settings, small, store_rounded, strides, sum_partials, unit, vector, wide
from ._products import dots, load_factor, operand
from ._tokens import interpolate, interpolate_backward, load_row, program, tiling

Gradients = tuple[Tensor | None, ...]

# Sizes change from model to model or from clip to clip, and must not compile anew. `dim` and the strides come in units
# of VECTOR elements, the network's sizes in units of NETWORK_VECTOR, so that the compiler knows what they are multiples
# of.
_SIZES = ["pairs", "tokens", "dim", "hidden", "stride_batch", "stride_frame", "stride_token", "tile_tokens", "tiles"]


# --- What the kernels share -------------------------------------------------------------------------------------------


@triton.jit
def _weights_of(difference):
    """The weights from the first logit less the second. Both by their own quotient: 1 - α would lose a small β's
    digits. An infinite difference gives NaN, as a logit of +inf does in PyTorch: loss scaling has to see that the
    network has overflowed."""
    nan_or_0 = difference - difference
    return 1 / (1 + tl.exp(-difference)) + nan_or_0, 1 / (1 + tl.exp(difference)) + nan_or_0


@triton.jit
def _second_weight(weight2, channel, hidden, mask, WIDE: tl.constexpr):
    """The second Linear's rows, the first less the second, wide [TOKENS, CHANNELS]."""
    first = load_row(weight2, channel, mask, WIDE)
    return first - load_row(weight2 + hidden, channel, mask, WIDE)


@triton.jit
def _add_product(
    total,  # wide [TOKENS, CHANNELS]
    rows_of,  # pointers to a matrix's rows [TOKENS, 1]
    live,  # [TOKENS]
    weight,  # a pointer to the first of the matrix's columns of weight1
    column,  # [CHANNELS]
    pitch,
    columns,
    inners,  # columns of the matrix
    PRODUCT: tl.constexpr,
    INNER: tl.constexpr,
):
    for start in range(0, inners, INNER):
        inner = start + tl.arange(0, INNER)  # [INNER]
        mask = live[:, None] & (inner < inners)[None, :]
        value = tl.load(rows_of + inner[None, :], mask=mask, other=0).to(PRODUCT)
        total = tl.dot(value, load_factor(weight, column, inner, pitch, columns, inners, PRODUCT), total)
    return total


# --- Forward ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "tokens", "width", "context", "pitch", "hidden", "frame_step"])
def _interpolation_head_dot_kernel(
    features,  # [B, T/2, N, D]
    cube,  # [B, T/2, N, C'] or None
    weight1,  # [h, D + C']
    frame_bias,  # [B·T/2 or 1, h], wide
    weight2,  # [2, h]
    preactivation,  # [B, T/2, N, h] or None
    partials,  # [columns' tiles, B·T/2·N], wide, or None: of the difference of the logits
    rows,  # B·T/2·N
    tokens,
    width,  # D
    context,  # C'
    pitch,  # D + C'
    hidden,  # h
    frame_step,  # from a frame's row of frame_bias to the next: h or 0
    NETWORK_VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    PRODUCT: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    width, context, pitch = width * NETWORK_VECTOR, context * NETWORK_VECTOR, pitch * NETWORK_VECTOR
    hidden, frame_step = hidden * NETWORK_VECTOR, frame_step * NETWORK_VECTOR
    # Blocks of columns next to each other run at the same time, and share their rows in L2.
    blocks = tl.cdiv(hidden, CHANNELS)
    row = tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    live = row < rows
    place = row.to(tl.int64)
    total = tl.zeros((TOKENS, CHANNELS), WIDE)
    of_features = features + (place * width)[:, None]
    total = _add_product(total, of_features, live, weight1, column, pitch, hidden, width, PRODUCT, INNER)
    if cube is not None:
        of_cube, weight = cube + (place * context)[:, None], weight1 + width
        total = _add_product(total, of_cube, live, weight, column, pitch, hidden, context, PRODUCT, INNER)
    there = column < hidden
    mask = live[:, None] & there[None, :]
    of_frame = frame_bias + ((row // tokens).to(tl.int64) * frame_step)[:, None]
    total += tl.load(of_frame + column[None, :], mask=mask, other=0)
    if preactivation is not None:
        store_rounded(preactivation + (place * hidden)[:, None] + column[None, :], total, mask)
    if partials is not None:
        # Columns that aren't there have loaded nothing, and are 0.
        second = tl.load(weight2 + column, mask=there, other=0).to(WIDE)
        second -= tl.load(weight2 + hidden + column, mask=there, other=0).to(WIDE)
        to = partials + (tl.program_id(0) % blocks).to(tl.int64) * rows + row
        tl.store(to, tl.sum(gelu(total) * second[None, :], 1), mask=live)


@triton.jit(do_not_specialize=[*_SIZES, "frame_step", "count", "rows"])
def _interpolation_head_forward_kernel(
    product,  # [B, T/2, N, h]: the first Linear without its bias; or None
    frame_bias,  # [B·T/2 or 1, h], wide; read with product
    partials,  # [count, B·T/2·N], wide: of the difference of the logits; read without product
    weight2,  # [2, h]
    bias2,  # [2]
    x,  # [B, T, N, C], any strides but the last
    position,  # [T, C] or None
    preactivation,  # [B, T/2, N, h] or None; written with product
    difference,  # [B, T/2, N], wide
    z,  # [B, T/2, N, C]
    weights,  # [B, T/2, N, 2]
    count,
    rows,  # B·T/2·N
    frame_step,  # from a frame's row of frame_bias to the next: h or 0
    pairs,  # T/2
    tokens,
    dim,
    hidden,  # h
    stride_batch: tl.int64,
    stride_frame: tl.int64,
    stride_token: tl.int64,
    tile_tokens,
    tiles,
    VECTOR: tl.constexpr,
    NETWORK_VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    dim, stride_frame, stride_token = dim * VECTOR, stride_frame * VECTOR, stride_token * VECTOR
    hidden, frame_step = hidden * NETWORK_VECTOR, frame_step * NETWORK_VECTOR
    row, tile, token, live = program(tokens, tile_tokens, tiles, TOKENS)
    pair = row.to(tl.int64) * tokens + token
    total = tl.zeros((TOKENS,), WIDE)
    if product is not None:
        frame_bias += row.to(tl.int64) * frame_step
        sums = tl.zeros((TOKENS, CHANNELS), WIDE)
        for start in range(0, hidden, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
            mask = live[:, None] & (channel < hidden)[None, :]
            offset = (pair * hidden)[:, None] + channel[None, :]
            value = tl.load(product + offset, mask=mask, other=0).to(WIDE)
            value += load_row(frame_bias, channel, mask, WIDE)
            if preactivation is not None:
                store_rounded(preactivation + offset, value, mask)
            sums += gelu(value) * _second_weight(weight2, channel, hidden, mask, WIDE)
        total += tl.sum(sums, 1)
    else:
        at = partials + pair
        for _block in range(count):
            total += tl.load(at, mask=live, other=0)
            at += rows
    total += tl.load(bias2).to(WIDE) - tl.load(bias2 + 1).to(WIDE)
    tl.store(difference + pair, total, mask=live)
    first, second = _weights_of(total)
    store_rounded(weights + 2 * pair, first, live)
    store_rounded(weights + 2 * pair + 1, second, live)
    frame = 2 * (row % pairs)
    x += (row // pairs).to(tl.int64) * stride_batch * VECTOR + frame * stride_frame
    x_tile = x + (token.to(tl.int64) * stride_token)[:, None]
    if position is not None:
        position += frame * dim
    z_tile = z + (pair * dim)[:, None]
    interpolate(x_tile, position, z_tile, first[:, None], second[:, None], live, stride_frame, dim, WIDE, CHANNELS)


def interpolation_head_forward(
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expect_interpolation_head(features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
    if rounds_elsewhere(features):
        network = _in_float32(features, cube, frame_context, weight1, bias1, weight2, bias2)
        z, weights, difference, preactivation = interpolation_head_forward(
            *network[:3], x, *network[3:], position, keep
        )
        return z, weights.to(features.dtype), difference, preactivation.to(features.dtype)
    batch, frames, tokens, dim = x.shape
    pairs, hidden = features.shape[:3], weight1.shape[0]
    x, features = channels_contiguous(x, "interpolation_head"), features.contiguous()
    cube = None if cube is None else cube.contiguous()
    frame_bias, weight2 = _frame_bias(features, frame_context, weight1, bias1), weight2.contiguous()
    z, weights = empty((*pairs, dim), x), empty((*pairs, 2), features)
    difference = empty(pairs, features, wide_dtype(features))
    preactivation = empty((*pairs, hidden), features) if keep else None
    multiplied = partials = None
    if dots(features):
        blocks = settings("interpolation_head_dot", features).blocks(hidden)
        partials = empty((blocks, weights.numel() // 2), features, torch.float32)
        _multiply(features, cube, frame_bias, weight1, weight2, preactivation, partials)
    else:
        multiplied = _product_without_bias(features, cube, weight1)
    at, step = settings("interpolation_head_forward", x), vector(x)
    network_step = unit(features, hidden)
    tile = tiling(at, x, batch * (frames // 2))
    launch(
        _interpolation_head_forward_kernel,
        lambda at: batch * (frames // 2) * tile["tiles"],
        at,
        product=multiplied,
        frame_bias=frame_bias,
        partials=partials,
        weight2=weight2,
        bias2=bias2.contiguous(),
        x=x,
        position=small(position, x),
        preactivation=None if multiplied is None else preactivation,
        difference=difference,
        z=z,
        weights=weights,
        count=0 if partials is None else partials.shape[0],
        rows=weights.numel() // 2,
        frame_step=_frame_step(frame_bias) // network_step,
        pairs=frames // 2,
        tokens=tokens,
        dim=dim // step,
        hidden=hidden // network_step,
        **strides(x, step),
        **tile,
        VECTOR=step,
        NETWORK_VECTOR=network_step,
        WIDE=wide(x),
    )
    return z, weights, difference, features.new_empty(0) if preactivation is None else preactivation


def interpolation_head_preactivation(
    features: Tensor, cube: Tensor | None, frame_context: Tensor | None, weight1: Tensor, bias1: Tensor
) -> Tensor:
    """The first Linear alone: what `interpolation_head_forward` keeps [B, T/2, N, h], with the same bits."""
    if rounds_elsewhere(features):
        network = _in_float32(features, cube, frame_context, weight1, bias1)
        return interpolation_head_preactivation(*network).to(features.dtype)
    features = features.contiguous()
    cube = None if cube is None else cube.contiguous()
    frame_bias = _frame_bias(features, frame_context, weight1, bias1)
    if dots(features):
        preactivation = empty((*features.shape[:3], weight1.shape[0]), features)
        _multiply(features, cube, frame_bias, weight1, None, preactivation, None)
        return preactivation
    multiplied = _product_without_bias(features, cube, weight1)
    multiplied.flatten(0, 1).add_(frame_bias[:, None])
    return multiplied


def _multiply(
    features: Tensor,
    cube: Tensor | None,
    frame_bias: Tensor,
    weight1: Tensor,
    weight2: Tensor | None,
    preactivation: Tensor | None,
    partials: Tensor | None,
) -> None:
    """The first Linear by tl.dot: writes what the GELU is taken of, the partial differences of the logits, or both."""
    *pairs, width = features.shape
    (hidden, pitch), rows = weight1.shape, features[..., 0].numel()
    context = pitch - width
    step = unit(features, width, context, hidden)
    launch(
        _interpolation_head_dot_kernel,
        lambda at: triton.cdiv(rows, at.tokens) * at.blocks(hidden),
        settings("interpolation_head_dot", features),
        features=features,
        cube=cube,
        weight1=weight1.contiguous(),
        frame_bias=frame_bias,
        weight2=weight2,
        preactivation=preactivation,
        partials=partials,
        rows=rows,
        tokens=pairs[2],
        width=width // step,
        context=context // step,
        pitch=pitch // step,
        hidden=hidden // step,
        frame_step=_frame_step(frame_bias) // step,
        NETWORK_VECTOR=step,
        WIDE=wide(features),
        PRODUCT=operand(features),
    )


def _product_without_bias(features: Tensor, cube: Tensor | None, weight1: Tensor) -> Tensor:
    """The first Linear by cuBLAS, but for what a frame's tokens share [B, T/2, N, h]."""
    width = features.shape[3]
    result = _products.product(features.flatten(0, 2), weight1[:, :width].t())
    if cube is not None:
        _products.product(cube.flatten(0, 2), weight1[:, width:].t(), add=result, out=result)
    return result.view(*features.shape[:3], weight1.shape[0])


def _frame_bias(features: Tensor, frame_context: Tensor | None, weight1: Tensor, bias1: Tensor) -> Tensor:
    """What all of a frame's tokens get beside the products: bias1, and what the frames' context adds [B·T/2, h]; a
    single row without context. The only terms that all of a frame's tokens share, so not rounded to 16 bits."""
    wide = wide_dtype(features)
    bias = bias1.to(wide).contiguous()
    if frame_context is None:
        return bias[None]
    return torch.addmm(bias, frame_context.to(wide).flatten(0, 1), weight1[:, features.shape[3] :].to(wide).t())


def _frame_step(frame_bias: Tensor) -> int:
    return frame_bias.shape[1] if frame_bias.shape[0] > 1 else 0


def _in_float32(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]


# --- Backward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*_SIZES, "grad_stride_batch", "grad_stride_frame", "grad_stride_token", "frames_in_all"])
def _interpolation_head_backward_kernel(
    grad_z,  # [B, T/2, N, C], any strides but the last
    grad_weights,  # [B, T/2, N, 2]
    x,  # [B, T, N, C], any strides but the last; read for grad_difference
    position,  # [T, C] or None
    difference,  # [B, T/2, N], wide
    preactivation,  # [B, T/2, N, h]; read for grad_hidden
    weight2,  # [2, h]; read for grad_hidden
    grad_x,  # [B, T, N, C] or None
    position_partials,  # [B · tiles, T, C], wide, or None: grad_position's
    grad_difference,  # [B, T/2, N], wide, or None
    grad_hidden,  # [B, T/2, N, h] or None: of what the GELU was taken of
    frame_partials,  # [tiles, B·T/2, h], wide, or None: sums of grad_hidden over a frame's tokens
    weight2_partials,  # [tiles, B·T/2, h], wide, or None: of weight2's first row
    frames_in_all,  # B·T/2
    pairs,  # T/2
    tokens,
    dim,
    hidden,  # h
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
    NETWORK_VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    dim, stride_frame, stride_token = dim * VECTOR, stride_frame * VECTOR, stride_token * VECTOR
    hidden *= NETWORK_VECTOR
    row, tile, token, live = program(tokens, tile_tokens, tiles, TOKENS)
    pair = row.to(tl.int64) * tokens + token
    alpha, beta = _weights_of(tl.load(difference + pair, mask=live, other=0))
    clip, frame = (row // pairs).to(tl.int64), 2 * (row % pairs)
    x_tile = None
    if grad_difference is not None:
        x_tile = x + clip * stride_batch * VECTOR + frame * stride_frame + (token.to(tl.int64) * stride_token)[:, None]
    grad_tile = grad_z + clip * grad_stride_batch * VECTOR + (row % pairs) * grad_stride_frame * VECTOR
    grad_tile += (token.to(tl.int64) * grad_stride_token * VECTOR)[:, None]
    frame_size = tokens.to(tl.int64) * dim
    grad_x_tile = None
    if grad_x is not None:
        grad_x_tile = grad_x + (clip * 2 * pairs + frame) * frame_size + (token.to(tl.int64) * dim)[:, None]
    sums = None
    if position_partials is not None:
        sums = position_partials + ((clip * tiles + tile) * 2 * pairs + frame) * dim
    if position is not None:
        position += frame * dim
    total = interpolate_backward(
        grad_tile, x_tile, position, grad_x_tile, sums, alpha[:, None], beta[:, None], live, stride_frame, frame_size,
        dim, ACCUMULATE, WIDE, TOKENS, CHANNELS,
    )  # fmt: skip
    if grad_difference is not None:
        # ∂α/∂l₀ = αβ = -∂β/∂l₀, and only l₀ - l₁ matters.
        total += tl.load(grad_weights + 2 * pair, mask=live, other=0).to(WIDE)
        total -= tl.load(grad_weights + 2 * pair + 1, mask=live, other=0).to(WIDE)
        total *= alpha * beta
        tl.store(grad_difference + pair, total, mask=live)
    if grad_hidden is not None:
        partial = (tile.to(tl.int64) * frames_in_all + row) * hidden
        for start in range(0, hidden, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
            there = channel < hidden
            mask = live[:, None] & there[None, :]
            offset = (pair * hidden)[:, None] + channel[None, :]
            value, slope = gelu_and_slope(tl.load(preactivation + offset, mask=mask, other=0).to(WIDE))
            grad = total[:, None] * _second_weight(weight2, channel, hidden, mask, WIDE) * slope
            store_rounded(grad_hidden + offset, grad, mask)
            # Tokens that aren't there have loaded nothing, and are 0.
            if frame_partials is not None:
                tl.store(frame_partials + partial + channel, tl.sum(grad, 0), mask=there)
            if weight2_partials is not None:
                tl.store(weight2_partials + partial + channel, tl.sum(total[:, None] * value, 0), mask=there)


def interpolation_head_backward(
    grad_z: Tensor,
    grad_weights: Tensor,
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None,
    difference: Tensor,
    preactivation: Tensor,
    needs: Sequence[bool],
    grad_x_accumulate: Tensor | None,
) -> Gradients:
    """The gradients of features and cube are columns of one matrix, not contiguous ones."""
    if not any(needs):
        return (None,) * 9
    expect_interpolation_head(features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
    batch, frames, tokens, dim = x.shape
    pairs, hidden = (batch, frames // 2, tokens), weight1.shape[0]
    expect(
        x, (grad_z, (*pairs, dim)), (grad_weights, (*pairs, 2)), (difference, pairs), (preactivation, (*pairs, hidden))
    )
    expect_one_dtype(x, grad_z)
    expect_one_dtype(features, grad_weights, preactivation)
    if rounds_elsewhere(features):
        network = _in_float32(features, cube, frame_context, weight1, bias1, weight2, bias2, preactivation)
        grads = interpolation_head_backward(
            grad_z, grad_weights.float(), *network[:3], x, *network[3:7], position, difference, network[7], needs,
            grad_x_accumulate,
        )  # fmt: skip
        own = {3, 8}  # x's and position's
        return tuple(g if g is None or i in own else g.to(features.dtype) for i, g in enumerate(grads))
    wide_one, in_all = wide_dtype(features), batch * (frames // 2)
    x, grad_z = channels_contiguous(x, "interpolation_head"), channels_contiguous(grad_z)
    at, step, network_step = (
        settings("interpolation_head_backward", x),
        min(vector(x), vector(grad_z)),
        unit(features, hidden),
    )
    tile = tiling(at, x, in_all)
    grad_x = gradient_buffer(x, needs[3], grad_x_accumulate)
    grad_position = empty((frames, dim), position) if needs[8] else None
    position_partials = empty((batch * tile["tiles"], frames, dim), x, wide_one) if needs[8] else None
    # The hidden layer's gradient is what all gradients of the network but the last bias's are made of.
    of_network = any(needs[:3]) or any(needs[4:7])
    of_frames = needs[2] or needs[5] or (needs[4] and frame_context is not None)
    partials = (tile["tiles"], in_all, hidden)
    grad_hidden = empty((in_all * tokens, hidden), features) if of_network else None
    frame_partials = empty(partials, features, wide_one) if of_frames else None
    weight2_partials = empty(partials, features, wide_one) if needs[6] else None
    grad_difference = empty(pairs, features, wide_one) if of_network or needs[7] else None
    launch(
        _interpolation_head_backward_kernel,
        lambda at: in_all * tile["tiles"],
        at,
        grad_z=grad_z,
        grad_weights=grad_weights.contiguous(),
        x=x,
        position=small(position, x),
        difference=difference.contiguous(),
        preactivation=preactivation.contiguous(),
        weight2=weight2.contiguous(),
        grad_x=grad_x,
        position_partials=position_partials,
        grad_difference=grad_difference,
        grad_hidden=grad_hidden,
        frame_partials=frame_partials,
        weight2_partials=weight2_partials,
        frames_in_all=in_all,
        pairs=frames // 2,
        tokens=tokens,
        dim=dim // step,
        hidden=hidden // network_step,
        **strides(x, step),
        **{f"grad_{name}": stride for name, stride in strides(grad_z, step).items()},
        **tile,
        ACCUMULATE=grad_x is not None and grad_x_accumulate is not None,
        VECTOR=step,
        NETWORK_VECTOR=network_step,
        WIDE=wide(x),
    )
    if grad_position is not None:
        sum_partials(position_partials, grad_position, (dim, 1))
    grad_frame_bias = None
    if of_frames:
        grad_frame_bias = empty((in_all, hidden), frame_partials)
        sum_partials(frame_partials.flatten(1)[:, None], grad_frame_bias, (in_all * hidden, 1))
    grad_features, grad_cube, grad_frame_context = _gradients_of_inputs(
        grad_hidden, grad_frame_bias, features, cube, weight1, needs
    )
    return (
        grad_features,
        grad_cube,
        None if grad_frame_context is None else grad_frame_context.view(frame_context.shape),
        None if grad_x_accumulate is not None else grad_x,
        _gradient_of_weight1(grad_hidden, grad_frame_bias, features, cube, frame_context) if needs[4] else None,
        grad_frame_bias.sum(0).to(bias1.dtype) if needs[5] else None,
        _gradient_of_weight2(weight2_partials, weight2) if needs[6] else None,
        _and_its_negative(grad_difference.sum()).to(bias2.dtype) if needs[7] else None,
        grad_position,
    )


def _gradients_of_inputs(
    grad_hidden: Tensor | None,
    grad_frame_bias: Tensor | None,
    features: Tensor,
    cube: Tensor | None,
    weight1: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    """Of features, cube and frame_context; the last as a matrix. One product, whose columns are the first two."""
    grad_features = grad_cube = grad_frame_context = None
    width = features.shape[3]
    if needs[0] or needs[1]:
        both = _products.product(grad_hidden, weight1 if cube is not None else weight1[:, :width])
        both = both.view(*features.shape[:3], both.shape[1])
        grad_features = both[..., :width] if needs[0] else None
        grad_cube = both[..., width:] if needs[1] else None
    if needs[2]:
        of_context = weight1[:, width:].to(grad_frame_bias.dtype)
        grad_frame_context = (grad_frame_bias @ of_context).to(features.dtype)
    return grad_features, grad_cube, grad_frame_context


def _gradient_of_weight1(
    grad_hidden: Tensor,
    grad_frame_bias: Tensor | None,
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
) -> Tensor:
    """[h, D + C']: the context's columns are the sum of a product over tokens and one over frames."""
    width = features.shape[3]
    context = cube if frame_context is None else frame_context
    grad = empty((grad_hidden.shape[1], width + (0 if context is None else context.shape[-1])), features)
    _products.product(grad_hidden.t(), features.flatten(0, 2), out=grad[:, :width])
    if cube is not None:
        _products.product(grad_hidden.t(), cube.flatten(0, 2), out=grad[:, width:])
    if frame_context is not None:
        of_frames = grad_frame_bias.t() @ frame_context.to(grad_frame_bias.dtype).flatten(0, 1)
        if cube is None:
            grad[:, width:] = of_frames
        else:
            grad[:, width:] += of_frames
    return grad


def _gradient_of_weight2(partials: Tensor, weight2: Tensor) -> Tensor:
    """[2, h] from the partial sums of its first row."""
    first = empty((1, weight2.shape[1]), partials)
    sum_partials(partials.view(-1, *first.shape), first, (first.shape[1], 1))
    return _and_its_negative(first[0]).to(weight2.dtype)


def _and_its_negative(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, -tensor))
