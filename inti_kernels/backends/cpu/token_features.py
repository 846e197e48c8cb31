"""token_features on the CPU kernels: passes around products of PyTorch's or, where that is faster, one kernel for the
whole forward. See csrc/include/inti/token_features.h.

The passes and products take a part of the frames at a time, so that the normalised tokens never stand in memory whole,
and what a pass writes is still in a cache when the product reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .._arguments import (
    as_dtype,
    channels_contiguous,
    expect,
    expect_one_dtype,
    expect_token_features,
    gradient_buffer,
    in_wide_dtype,
    name_of,
    wide_dtype,
)
from .._memory import empty
from . import _products
from ._call import add_up, call, chunks, largest
from ._products import add_product_over_rows, product

Gradients = tuple[Tensor | None, ...]


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
    expect_token_features(x, norm_weight, norm_bias, weight, bias, position)
    batch, frames, tokens, dim = x.shape
    width, dtype = weight.shape[0], _products.product_dtype(weight.dtype)
    x = channels_contiguous(x, "token_features")
    features = empty((batch, frames // 2, tokens, 2 * width), weight)
    statistics = empty((batch, frames, tokens, 2), x, wide_dtype(x))
    preactivation = empty((batch, frames, tokens, width), weight) if keep else None
    norm = _norm(x, position, norm_weight, norm_bias, eps, statistics)
    wide_bias = in_wide_dtype(bias, weight)
    if _products.in_one_pass(dtype):
        call(
            "token_features_forward",
            **_shape(x, weight, dtype, 0, batch * frames),
            **norm,
            weight=as_dtype(weight, dtype).contiguous(),
            bias=wide_bias,
            features=features,
            preactivation=preactivation,
            workspace=empty((native.load().gemm_workspace(width, dim, torch.get_num_threads()),), x, torch.float32),
        )
    else:
        _forward_in_passes(x, weight, wide_bias, norm, features, preactivation)
    if not keep:
        return features, statistics.new_empty(0), weight.new_empty(0)
    return features, statistics, preactivation


def _forward_in_passes(
    x: Tensor,
    weight: Tensor,
    wide_bias: Tensor,
    norm: dict[str, object],
    features: Tensor,
    preactivation: Tensor | None,
) -> None:
    """A part of the frames at a time: normalised, multiplied, activated."""
    batch, frames, tokens, dim = x.shape
    keep, width, dtype = preactivation is not None, weight.shape[0], _products.product_dtype(weight.dtype)
    cut = list(chunks(batch * frames, tokens, 2, dtype, halve=not keep))
    rows = largest(cut) * tokens
    normalized = empty((rows, dim), weight, dtype)
    # What is kept is written where the product was, if both are of one dtype.
    products = empty((rows, width), weight, dtype) if not keep or dtype != weight.dtype else None
    matrix = as_dtype(weight, dtype).t()
    for first, count in cut:
        shape, begin, end = _shape(x, weight, dtype, first, count), first * tokens, (first + count) * tokens
        call("token_features_normalize", **shape, **norm, have_statistics=False, normalized=normalized)
        out = preactivation.flatten(0, 2)[begin:end] if products is None else products[: end - begin]
        call(
            "token_features_activation",
            **shape,
            product=product(normalized[: end - begin], matrix, out),
            bias=wide_bias,
            features=features,
            preactivation=preactivation,
        )


def token_features_activation(preactivation: Tensor) -> Tensor:
    """[B, T, N, D] → its GELU as concatenated pairs [B, T/2, N, 2·D]."""
    batch, frames, tokens, width = preactivation.shape
    preactivation = preactivation.contiguous()
    features = empty((batch, frames // 2, tokens, 2 * width), preactivation)
    call(
        "token_features_activation",
        shape=(batch, frames, tokens, 0, width, 0, batch * frames),
        dtypes=(name_of(preactivation.dtype),) * 3,
        product=preactivation,
        bias=None,
        features=features,
        preactivation=None,
    )
    return features


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
    """The parameters' in the wide dtype."""
    if not any(needs):
        return (None,) * 6
    expect_token_features(x, norm_weight, norm_bias, weight, bias, position)
    batch, frames, tokens, dim = x.shape
    width, dtype = weight.shape[0], _products.product_dtype(weight.dtype)
    expect(
        x,
        (grad_features, (batch, frames // 2, tokens, 2 * width)),
        (statistics, (batch, frames, tokens, 2)),
        (preactivation, (batch, frames, tokens, width)),
    )
    expect_one_dtype(weight, grad_features, preactivation)
    x, statistics, preactivation = (
        channels_contiguous(x, "token_features"),
        statistics.contiguous(),
        preactivation.contiguous(),
    )
    upstream = channels_contiguous(grad_features.flatten(0, 2))
    wide, blocks = wide_dtype(x), native.load().token_blocks(tokens)
    grad_x = gradient_buffer(x, needs[0], grad_x_accumulate)
    of_norm = needs[1] or needs[2] or needs[5]
    bias_partials = empty((1, batch * frames * blocks, width), x, wide) if needs[4] else None
    norm_partials = empty((batch * frames, blocks, 3, dim), x, wide) if of_norm else None
    grad_weight = empty(weight.shape, weight, wide) if needs[3] else None
    cut = list(chunks(batch * frames, tokens, 2, dtype))
    rows = largest(cut) * tokens
    grad_preactivation, normalized = empty((rows, width), weight, dtype), empty((rows, dim), weight, dtype)
    norm = _norm(x, position, norm_weight, norm_bias, eps, statistics)
    matrix = as_dtype(weight, dtype)
    for first, count in cut:
        shape, size = _shape(x, weight, dtype, first, count), count * tokens
        call(
            "token_features_activation_backward",
            **shape,
            grad_features=upstream,
            grad_features_pitch=upstream.stride(0),
            preactivation=preactivation,
            grad_preactivation=grad_preactivation,
            partials=bias_partials,
        )
        if grad_weight is not None:
            call("token_features_normalize", **shape, **norm, have_statistics=True, normalized=normalized)
            add_product_over_rows(grad_weight, grad_preactivation[:size], normalized[:size], first == 0)
        if needs[0] or of_norm:
            # The normalised tokens have been used.
            grad_normalized = product(grad_preactivation[:size], matrix, normalized[:size])
            call(
                "token_features_norm_backward",
                **shape,
                **{name: norm[name] for name in ("x", "x_strides", "position", "norm_weight", "statistics")},
                grad_normalized=grad_normalized,
                grad_x=grad_x,
                accumulate=grad_x_accumulate is not None,
                partials=norm_partials,
            )
    of_frames = None
    if of_norm:
        of_frames = add_up(norm_partials)  # [B·T, 3, C]
        of_norm_parameters = add_up(of_frames[None])[0]
    grad_position = add_up(of_frames.view(1, batch, frames, 3, dim))[0, :, 2] if needs[5] else None
    return (
        None if grad_x_accumulate is not None else grad_x,
        of_norm_parameters[0].clone() if needs[1] else None,
        of_norm_parameters[1].clone() if needs[2] else None,
        grad_weight,
        add_up(bias_partials)[0] if needs[4] else None,
        grad_position.to(position.dtype, copy=True) if needs[5] else None,
    )


def _shape(x: Tensor, weight: Tensor, dtype: torch.dtype, first: int, count: int) -> dict[str, object]:
    """What the passes over frames [first, first + count) share; ``dtype`` is the products'."""
    return {
        "shape": (*x.shape, weight.shape[0], first, count),
        "dtypes": (name_of(x.dtype), name_of(weight.dtype), name_of(dtype)),
    }


def _norm(
    x: Tensor, position: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float, statistics: Tensor
) -> dict[str, object]:
    """The tokens and their LayerNorm."""
    return {
        "x": x,
        "x_strides": x.stride()[:3],
        "position": in_wide_dtype(position, x),
        "norm_weight": in_wide_dtype(norm_weight, x),
        "norm_bias": in_wide_dtype(norm_bias, x),
        "eps": eps,
        "statistics": statistics,
    }
