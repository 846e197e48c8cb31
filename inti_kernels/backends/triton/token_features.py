"""token_features in Triton: LayerNorm → Linear → GELU of every token, written as concatenated pairs.

From sm_80 on, in 16 bits, the forward is a pass that takes the LayerNorm's statistics and a product whose prologue
normalises and whose epilogue writes the pairs. Elsewhere, and in the backward, the products are cuBLAS's, between
passes over the tokens: a program owns a tile of tokens of one frame, and walks along the channels.
"""

# No `from __future__ import annotations` here: Triton reads the annotations of the kernels.
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .._arguments import (
    channels_contiguous,
    expect,
    expect_one_dtype,
    expect_token_features,
    gradient_buffer,
    wide_dtype,
)
from .._memory import empty
from . import _products
from ._gelu import gelu, gelu_and_slope
from ._launch import launch, rounds_elsewhere, settings, small, store_rounded, strides, sum_partials, unit, vector, wide
from ._products import dots, load_factor, operand
from ._tokens import load_frame, load_row, program, tiling

Gradients = tuple[Tensor | None, ...]

# Sizes change from model to model or from clip to clip, and must not compile anew. `dim`, `width` and the strides come
# in units of VECTOR elements, so that the compiler knows what they are multiples of.
_SIZES = ["frames", "tokens", "dim", "stride_batch", "stride_frame", "stride_token"]
_TILING = ["tile_tokens", "tiles"]


# --- LayerNorm --------------------------------------------------------------------------------------------------------


@triton.jit
def _moments(x, position, live, dim, WIDE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and variance of a tile's tokens, in one walk.  wide [TOKENS]

    Each place of the tile keeps the mean of the channels that it has seen, and their squared distances from it: a
    variance by E[x²] - E[x]² would lose its digits where all channels share an offset.
    """
    mean = tl.zeros((TOKENS, CHANNELS), WIDE)
    squares = tl.zeros((TOKENS, CHANNELS), WIDE)
    seen = tl.zeros((1, 1), WIDE)
    for start in range(0, dim, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
        there = (channel < dim)[None, :]
        value = load_frame(x, position, 0, channel, live[:, None] & there, WIDE)
        seen += 1
        away = value - mean
        moved = mean + away * (1 / seen)
        squares += tl.where(there, away * (value - moved), 0)
        mean = tl.where(there, moved, mean)
    counts = ((dim - tl.arange(0, CHANNELS) + CHANNELS - 1) // CHANNELS).to(WIDE)[None, :]
    center = tl.sum(mean * counts, 1) / dim
    apart = mean - center[:, None]
    return center, tl.sum(squares + counts * apart * apart, 1) / dim


@triton.jit
def _tokens_of(x, position, row, token, frames, dim, stride_batch, stride_frame, stride_token):
    """Pointers to a tile's tokens [TOKENS, 1], and how far σP of their frame is from the first."""
    x += (row // frames).to(tl.int64) * stride_batch + (row % frames) * stride_frame
    return x + (token.to(tl.int64) * stride_token)[:, None], row % frames * dim


@triton.jit(do_not_specialize=[*_SIZES, *_TILING])
def _token_features_normalize_kernel(
    x,  # [B, T, N, C], any strides but the last
    position,  # [T, C] or None
    norm_weight,  # [C]
    norm_bias,  # [C]
    statistics,  # [B, T, N, 2], wide: mean and 1/σ; written if EPS is there, else read
    normalized,  # [B, T, N, C] or None
    frames,
    tokens,
    dim,
    stride_batch: tl.int64,
    stride_frame: tl.int64,
    stride_token: tl.int64,
    tile_tokens,
    tiles,
    EPS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    dim, stride_frame, stride_token = dim * VECTOR, stride_frame * VECTOR, stride_token * VECTOR
    row, tile, token, live = program(tokens, tile_tokens, tiles, TOKENS)
    place = row.to(tl.int64) * tokens + token
    x_tile, first = _tokens_of(x, position, row, token, frames, dim, stride_batch * VECTOR, stride_frame, stride_token)
    if position is not None:
        position += first
    if EPS is not None:
        mean, variance = _moments(x_tile, position, live, dim, WIDE, TOKENS, CHANNELS)
        scale = 1 / tl.sqrt(variance + EPS)
        tl.store(statistics + 2 * place, mean, mask=live)
        tl.store(statistics + 2 * place + 1, scale, mask=live)
    else:
        mean = tl.load(statistics + 2 * place, mask=live, other=0)
        scale = tl.load(statistics + 2 * place + 1, mask=live, other=0)
    if normalized is not None:
        for start in range(0, dim, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
            mask = live[:, None] & (channel < dim)[None, :]
            value = load_frame(x_tile, position, 0, channel, mask, WIDE)
            value = (value - mean[:, None]) * scale[:, None] * load_row(norm_weight, channel, mask, WIDE)
            value += load_row(norm_bias, channel, mask, WIDE)
            store_rounded(normalized + (place * dim)[:, None] + channel[None, :], value, mask)


# --- Forward ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*_SIZES, "rows", "width"])
def _token_features_dot_kernel(
    x,  # [B, T, N, C], any strides but the last
    position,  # [T, C] or None
    norm_weight,  # [C]
    norm_bias,  # [C]
    statistics,  # [B, T, N, 2], wide: mean and 1/σ
    weight,  # [D, C]
    bias,  # [D]
    features,  # [B, T/2, N, 2·D]
    preactivation,  # [B, T, N, D] or None
    rows,  # B·T·N
    frames,
    tokens,
    dim,
    width,  # D
    stride_batch: tl.int64,
    stride_frame: tl.int64,
    stride_token: tl.int64,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    PRODUCT: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    dim, width, stride_token = dim * VECTOR, width * VECTOR, stride_token * VECTOR
    # Blocks of columns next to each other run at the same time, and share their tokens in L2.
    blocks = tl.cdiv(width, CHANNELS)
    row = tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    live = row < rows
    place, frame, token = row.to(tl.int64), row // tokens, row % tokens
    x_tile = x + ((frame // frames).to(tl.int64) * stride_batch * VECTOR)[:, None]
    x_tile += ((frame % frames) * stride_frame * VECTOR + token * stride_token)[:, None]
    if position is not None:
        position += (frame % frames * dim)[:, None]
    mean = tl.load(statistics + 2 * place, mask=live, other=0)[:, None]
    scale = tl.load(statistics + 2 * place + 1, mask=live, other=0)[:, None]
    total = tl.zeros((TOKENS, CHANNELS), WIDE)
    for start in range(0, dim, INNER):
        inner = start + tl.arange(0, INNER)  # [INNER]
        there = inner < dim
        mask = live[:, None] & there[None, :]
        value = tl.load(x_tile + inner[None, :], mask=mask, other=0).to(WIDE)
        if position is not None:
            value += tl.load(position + inner[None, :], mask=mask, other=0).to(WIDE)
        value = (value - mean) * scale * tl.load(norm_weight + inner, mask=there, other=0).to(WIDE)[None, :]
        value += tl.load(norm_bias + inner, mask=there, other=0).to(WIDE)[None, :]
        factor = load_factor(weight, column, inner, dim, width, dim, PRODUCT)
        total = tl.dot(value.to(PRODUCT), factor, total)
    there = column < width
    mask = live[:, None] & there[None, :]
    total += tl.load(bias + column, mask=there, other=0).to(WIDE)[None, :]
    if preactivation is not None:
        store_rounded(preactivation + (place * width)[:, None] + column[None, :], total, mask)
    to = features + (((frame // 2).to(tl.int64) * tokens + token) * 2 * width + frame % 2 * width)[:, None]
    store_rounded(to + column[None, :], gelu(total), mask)


@triton.jit(do_not_specialize=["tokens", "width", *_TILING])
def _token_features_activation_kernel(
    preactivation,  # [B, T, N, D]
    features,  # [B, T/2, N, 2·D]
    tokens,
    width,  # D
    tile_tokens,
    tiles,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    width *= VECTOR
    row, tile, token, live = program(tokens, tile_tokens, tiles, TOKENS)
    at = preactivation + ((row.to(tl.int64) * tokens + token) * width)[:, None]
    to = features + (((row // 2).to(tl.int64) * tokens + token) * 2 * width + row % 2 * width)[:, None]
    for start in range(0, width, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
        mask = live[:, None] & (channel < width)[None, :]
        value = tl.load(at + channel[None, :], mask=mask, other=0).to(WIDE)
        store_rounded(to + channel[None, :], gelu(value), mask)


def token_features_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x may be of another dtype than the Linear, whose dtype the features then have."""
    batch, frames, tokens, dim = x.shape
    width = weight.shape[0]
    expect_token_features(x, norm_weight, norm_bias, weight, bias, position)
    if rounds_elsewhere(weight):
        given = (x, norm_weight, norm_bias, weight.float(), bias.float(), position)
        features, statistics, preactivation = token_features_forward(*given, eps, keep)
        return features.to(weight.dtype), statistics, preactivation.to(weight.dtype)
    x = channels_contiguous(x, "token_features")
    statistics = empty((batch, frames, tokens, 2), x, wide_dtype(x))
    multiplies = dots(weight)
    normalized = None if multiplies else empty((batch, frames, tokens, dim), weight)
    tokens_of = (x, norm_weight, norm_bias, position, statistics)
    _normalize(*tokens_of, normalized, eps)
    if multiplies:
        features, preactivation = _multiply(*tokens_of, weight, bias, keep)
    else:
        preactivation = _products.product(normalized.flatten(0, 2), weight.t(), add=bias).view(
            batch, frames, tokens, width
        )
        features = token_features_activation(preactivation)
    return (features, statistics, preactivation) if keep else (features, x.new_empty(0), weight.new_empty(0))


def _normalize(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    position: Tensor | None,
    statistics: Tensor,
    normalized: Tensor | None,
    eps: float | None,
) -> None:
    """Writes the LayerNorm's statistics, or without eps reads them, and its output, if that is wanted."""
    batch, frames, tokens, dim = x.shape
    at, step = settings("token_features_normalize", x), vector(x)
    tile = tiling(at, x, batch * frames)
    launch(
        _token_features_normalize_kernel,
        lambda at: batch * frames * tile["tiles"],
        at,
        x=x,
        position=small(position, x),
        norm_weight=small(norm_weight, x),
        norm_bias=small(norm_bias, x),
        statistics=statistics,
        normalized=normalized,
        frames=frames,
        tokens=tokens,
        dim=dim // step,
        **strides(x, step),
        **tile,
        EPS=eps,
        VECTOR=step,
        WIDE=wide(x),
    )


def _multiply(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    position: Tensor | None,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The features and, to keep, what the GELU was taken of, by tl.dot."""
    batch, frames, tokens, dim = x.shape
    width, rows = weight.shape[0], batch * frames * tokens
    features = empty((batch, frames // 2, tokens, 2 * width), weight)
    preactivation = empty((batch, frames, tokens, width), weight) if keep else None
    step = min(vector(x), unit(weight, width))
    launch(
        _token_features_dot_kernel,
        lambda at: triton.cdiv(rows, at.tokens) * at.blocks(width),
        settings("token_features_dot", x),
        x=x,
        position=small(position, x),
        norm_weight=small(norm_weight, x),
        norm_bias=small(norm_bias, x),
        statistics=statistics,
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        features=features,
        preactivation=preactivation,
        rows=rows,
        frames=frames,
        tokens=tokens,
        dim=dim // step,
        width=width // step,
        **strides(x, step),
        VECTOR=step,
        WIDE=wide(x),
        PRODUCT=operand(weight),
    )
    return features, preactivation


def token_features_activation(preactivation: Tensor) -> Tensor:
    """GELU of what `token_features_forward` kept [B, T, N, D], written as concatenated pairs [B, T/2, N, 2·D]."""
    if rounds_elsewhere(preactivation):
        return token_features_activation(preactivation.float()).to(preactivation.dtype)
    batch, frames, tokens, width = preactivation.shape
    preactivation = preactivation.contiguous()
    features = empty((batch, frames // 2, tokens, 2 * width), preactivation)
    at, step = settings("token_features_activation", preactivation), vector(preactivation)
    tile = tiling(at, preactivation, batch * frames)
    launch(
        _token_features_activation_kernel,
        lambda at: batch * frames * tile["tiles"],
        at,
        preactivation=preactivation,
        features=features,
        tokens=tokens,
        width=width // step,
        **tile,
        VECTOR=step,
        WIDE=wide(preactivation),
    )
    return features


# --- Backward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["frames", "tokens", "width", "stride_batch", "stride_frame", "stride_token", *_TILING])
def _token_features_backward_activation_kernel(
    grad_features,  # [B, T/2, N, 2·D], any strides but the last
    preactivation,  # [B, T, N, D]
    grad_preactivation,  # [B, T, N, D]
    partials,  # [B · T · tiles, D], wide, or None: grad_bias's
    frames,
    tokens,
    width,  # D
    stride_batch: tl.int64,
    stride_frame: tl.int64,
    stride_token: tl.int64,
    tile_tokens,
    tiles,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    width *= VECTOR
    row, tile, token, live = program(tokens, tile_tokens, tiles, TOKENS)
    place = ((row.to(tl.int64) * tokens + token) * width)[:, None]
    grad_tile = grad_features + (row // frames).to(tl.int64) * stride_batch * VECTOR + row % 2 * width
    grad_tile += row % frames // 2 * stride_frame * VECTOR + (token.to(tl.int64) * stride_token * VECTOR)[:, None]
    if partials is not None:
        partials += (row.to(tl.int64) * tiles + tile) * width
    for start in range(0, width, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
        there = channel < width
        mask = live[:, None] & there[None, :]
        value = tl.load(preactivation + place + channel[None, :], mask=mask, other=0).to(WIDE)
        grad = tl.load(grad_tile + channel[None, :], mask=mask, other=0).to(WIDE)
        grad *= gelu_and_slope(value)[1]
        if partials is not None:
            # Tokens that aren't there have loaded nothing, and are 0.
            tl.store(partials + channel, tl.sum(grad, 0), mask=there)
        store_rounded(grad_preactivation + place + channel[None, :], grad, mask)


@triton.jit(do_not_specialize=[*_SIZES, *_TILING])
def _token_features_backward_norm_kernel(
    grad_normalized,  # [B, T, N, C]
    x,  # [B, T, N, C], any strides but the last
    position,  # [T, C] or None
    norm_weight,  # [C]
    statistics,  # [B, T, N, 2], wide
    grad_x,  # [B, T, N, C] or None
    norm_partials,  # [B · T · tiles, 2, C], wide, or None: grad_norm_weight's and grad_norm_bias's
    position_partials,  # [B · tiles, T, C], wide, or None: grad_position's
    frames,
    tokens,
    dim,
    stride_batch: tl.int64,
    stride_frame: tl.int64,
    stride_token: tl.int64,
    tile_tokens,
    tiles,
    ACCUMULATE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Two walks: what a token's gradient loses along 1 and along its normalised self, then the gradient. What the first
    has loaded, the second finds in L1."""
    dim, stride_frame, stride_token = dim * VECTOR, stride_frame * VECTOR, stride_token * VECTOR
    row, tile, token, live = program(tokens, tile_tokens, tiles, TOKENS)
    place = row.to(tl.int64) * tokens + token
    x_tile, first = _tokens_of(x, position, row, token, frames, dim, stride_batch * VECTOR, stride_frame, stride_token)
    if position is not None:
        position += first
    # Tokens that aren't there have loaded nothing, and all their sums are 0.
    mean = tl.load(statistics + 2 * place, mask=live, other=0)[:, None]
    scale = tl.load(statistics + 2 * place + 1, mask=live, other=0)[:, None]
    grad_tile = grad_normalized + (place * dim)[:, None]
    if norm_partials is not None:
        norm_partials += (row.to(tl.int64) * tiles + tile) * 2 * dim
    along_one = tl.zeros((TOKENS, CHANNELS), WIDE)
    along_self = tl.zeros((TOKENS, CHANNELS), WIDE)
    for start in range(0, dim, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
        there = channel < dim
        mask = live[:, None] & there[None, :]
        value = (load_frame(x_tile, position, 0, channel, mask, WIDE) - mean) * scale
        grad = tl.load(grad_tile + channel[None, :], mask=mask, other=0).to(WIDE)
        if norm_partials is not None:
            tl.store(norm_partials + channel, tl.sum(grad * value, 0), mask=there)
            tl.store(norm_partials + dim + channel, tl.sum(grad, 0), mask=there)
        grad *= load_row(norm_weight, channel, mask, WIDE)
        along_one += grad
        along_self += grad * value
    if grad_x is not None or position_partials is not None:
        of_one = (tl.sum(along_one, 1) / dim)[:, None]
        of_self = (tl.sum(along_self, 1) / dim)[:, None]
        if position_partials is not None:
            clip = (row // frames).to(tl.int64)
            position_partials += ((clip * tiles + tile) * frames + row % frames) * dim
        for start in range(0, dim, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)  # [CHANNELS]
            there = channel < dim
            mask = live[:, None] & there[None, :]
            value = (load_frame(x_tile, position, 0, channel, mask, WIDE) - mean) * scale
            grad = tl.load(grad_tile + channel[None, :], mask=mask, other=0).to(WIDE)
            grad = (grad * load_row(norm_weight, channel, mask, WIDE) - of_one - value * of_self) * scale
            if position_partials is not None:
                tl.store(position_partials + channel, tl.sum(grad, 0), mask=there)
            if grad_x is not None:
                to = grad_x + (place * dim)[:, None] + channel[None, :]
                if ACCUMULATE:
                    grad += tl.load(to, mask=mask, other=0).to(WIDE)
                store_rounded(to, grad, mask)


def token_features_backward(
    grad_features: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    eps: float,
    statistics: Tensor,
    preactivation: Tensor,
    needs: Sequence[bool],
    grad_x_accumulate: Tensor | None,
) -> Gradients:
    """grad_features may have any strides but the last: columns of a wider matrix are not copied."""
    if not any(needs):
        return (None,) * 6
    batch, frames, tokens, dim = x.shape
    width, rows = weight.shape[0], batch * frames * tokens
    expect_token_features(x, norm_weight, norm_bias, weight, bias, position)
    expect(
        x,
        (grad_features, (batch, frames // 2, tokens, 2 * width)),
        (statistics, (batch, frames, tokens, 2)),
        (preactivation, (batch, frames, tokens, width)),
    )
    expect_one_dtype(weight, grad_features, preactivation)
    if rounds_elsewhere(weight):
        given = (x, norm_weight, norm_bias, weight.float(), bias.float(), position, eps, statistics)
        grads = token_features_backward(grad_features.float(), *given, preactivation.float(), needs, grad_x_accumulate)
        of_linear = (None if grad is None else grad.to(weight.dtype) for grad in grads[3:5])
        return *grads[:3], *of_linear, grads[5]
    x, statistics = channels_contiguous(x, "token_features"), statistics.contiguous()
    grad_preactivation, grad_bias = _backward_activation(grad_features, preactivation, bias, needs[4])
    grad_weight = None
    if needs[3]:
        normalized = empty((rows, dim), weight)
        _normalize(x, norm_weight, norm_bias, position, statistics, normalized, None)
        grad_weight = _products.product(grad_preactivation.t(), normalized)
    grad_x = gradient_buffer(x, needs[0], grad_x_accumulate)
    grad_norm_weight, grad_norm_bias, grad_position = (
        empty(parameter.shape, parameter) if need else None
        for parameter, need in ((norm_weight, needs[1]), (norm_bias, needs[2]), (position, needs[5]))
    )
    if needs[0] or needs[1] or needs[2] or needs[5]:
        at, step = settings("token_features_backward_norm", x), vector(x)
        tile = tiling(at, x, batch * frames)
        count, wide_one = batch * tile["tiles"], wide_dtype(x)
        norm_partials = empty((count * frames, 2, dim), x, wide_one) if needs[1] or needs[2] else None
        position_partials = empty((count, frames, dim), x, wide_one) if needs[5] else None
        launch(
            _token_features_backward_norm_kernel,
            lambda at: batch * frames * tile["tiles"],
            at,
            grad_normalized=_products.product(grad_preactivation, weight),
            x=x,
            position=small(position, x),
            norm_weight=small(norm_weight, x),
            statistics=statistics,
            grad_x=grad_x,
            norm_partials=norm_partials,
            position_partials=position_partials,
            frames=frames,
            tokens=tokens,
            dim=dim // step,
            **strides(x, step),
            **tile,
            ACCUMULATE=grad_x is not None and grad_x_accumulate is not None,
            VECTOR=step,
            WIDE=wide(x),
        )
        if grad_norm_weight is not None:
            sum_partials(norm_partials[:, :1], grad_norm_weight, (dim, 1))
        if grad_norm_bias is not None:
            sum_partials(norm_partials[:, 1:], grad_norm_bias, (dim, 1))
        if grad_position is not None:
            sum_partials(position_partials, grad_position, (dim, 1))
    grad_x = None if grad_x_accumulate is not None else grad_x
    return grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, grad_position


def _backward_activation(
    grad_features: Tensor, preactivation: Tensor, bias: Tensor, need_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of what the GELU was taken of [B·T·N, D], and the bias's."""
    batch, frames, tokens, width = preactivation.shape
    grad_features, preactivation = channels_contiguous(grad_features), preactivation.contiguous()
    grad_preactivation = empty((batch * frames * tokens, width), preactivation)
    at = settings("token_features_backward_activation", preactivation)
    step = min(vector(preactivation), vector(grad_features))
    tile = tiling(at, preactivation, batch * frames)
    partials = None
    if need_bias:
        partials = empty((batch * frames * tile["tiles"], 1, width), preactivation, wide_dtype(preactivation))
    launch(
        _token_features_backward_activation_kernel,
        lambda at: batch * frames * tile["tiles"],
        at,
        grad_features=grad_features,
        preactivation=preactivation,
        grad_preactivation=grad_preactivation,
        partials=partials,
        frames=frames,
        tokens=tokens,
        width=width // step,
        **strides(grad_features, step),
        **tile,
        VECTOR=step,
        WIDE=wide(preactivation),
    )
    if not need_bias:
        return grad_preactivation, None
    grad_bias = empty(bias.shape, bias)
    sum_partials(partials, grad_bias, (width, 1))
    return grad_preactivation, grad_bias
