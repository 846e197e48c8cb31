"""token_features on the CUDA kernels: tensors in, addresses out. See csrc/include/inti/cuda/token_features.h.

The two products of the Linear's backward are torch's: plain GEMMs of whole matrices, with nothing to fuse that a kernel
beside them wouldn't read anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._arguments import (
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
from . import load
from ._launch import deferred_sums, launch, rows, strides

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
    batch, frames, tokens, _ = x.shape
    width = weight.shape[0]
    expect_token_features(x, norm_weight, norm_bias, weight, bias, position)
    expect_one_dtype(x, norm_weight, norm_bias, weight)
    x = channels_contiguous(x, "token_features")
    statistics = empty((batch, frames, tokens, 2), x, wide_dtype(x))
    features = empty((batch, frames // 2, tokens, 2 * width), x)
    preactivation = empty((batch, frames, tokens, width), x) if keep else None
    launch(
        "token_features_forward",
        x,
        shape=_shape(x, weight),
        x=x,
        x_strides=strides(x),
        position=in_wide_dtype(position, x),
        norm_weight=norm_weight.contiguous(),
        norm_bias=norm_bias.contiguous(),
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        eps=eps,
        statistics=statistics,
        features=features,
        preactivation=preactivation,
    )
    return (features, statistics, preactivation) if keep else (features, x.new_empty(0), x.new_empty(0))


def token_features_activation(preactivation: Tensor) -> Tensor:
    """The features, from what a forward kept: GELU of [B, T, N, D] as pairs [B, T/2, N, 2·D]."""
    batch, frames, tokens, width = preactivation.shape
    features = empty((batch, frames // 2, tokens, 2 * width), preactivation)
    shape = (batch, frames, tokens, 2 * width, width, name_of(preactivation.dtype))  # its dim is not looked at
    launch(
        "token_features_activation",
        preactivation,
        shape=shape,
        preactivation=preactivation.contiguous(),
        features=features,
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
    total: Tensor | None = None,
) -> Gradients:
    """With ``total``, in the wide dtype beside 16 bits, x's gradient and ``grad_x_accumulate``, which is left as it is,
    are added to that."""
    if not any(needs):
        return (None,) * 6
    batch, frames, tokens, dim = x.shape
    width, count = weight.shape[0], batch * frames * tokens
    expect_token_features(x, norm_weight, norm_bias, weight, bias, position)
    expect_one_dtype(x, norm_weight, norm_bias, weight)
    expect(
        x,
        (grad_features, (batch, frames // 2, tokens, 2 * width)),
        (statistics, (batch, frames, tokens, 2)),
        (preactivation, (batch, frames, tokens, width)),
        (total, x.shape),
    )
    expect_one_dtype(x, grad_features, preactivation)
    if total is not None and not (
        needs[0] and x.dtype.itemsize == 2 and total.dtype == wide_dtype(x) and total.is_contiguous()
    ):
        raise ValueError(f"expected a contiguous total in float32 beside 16 bits, got {total.dtype} beside {x.dtype}")
    x, weight = channels_contiguous(x, "token_features"), weight.contiguous()
    grad_features, pitch = rows(grad_features)
    shape, wide = _shape(x, weight), wide_dtype(x)
    tiles = load().token_features_tiles(shape)
    tokens_of = {
        "shape": shape,
        "x": x,
        "x_strides": strides(x),
        "position": in_wide_dtype(position, x),
        "norm_weight": norm_weight.contiguous(),
        "norm_bias": norm_bias.contiguous(),
        "statistics": statistics.contiguous(),
    }
    grad_x = (
        None if total is not None and grad_x_accumulate is None else gradient_buffer(x, needs[0], grad_x_accumulate)
    )
    grad_norm_weight, grad_norm_bias = (empty((dim,), x) if need else None for need in needs[1:3])
    grad_bias = empty((width,), x) if needs[4] else None
    grad_weight = grad_position = partials = norm_partials = position_partials = None
    with deferred_sums() as sums:
        if needs[4]:
            partials = empty((tiles, width), x, wide)
            sums.add(partials, grad_bias)
        grad_preactivation = empty((count, width), x)
        launch(
            "token_features_backward_activation",
            x,
            shape=shape,
            grad_features=grad_features,
            grad_features_pitch=pitch,
            preactivation=preactivation.contiguous(),
            grad_preactivation=grad_preactivation,
            grad_bias=None,
            partials=partials,
        )
        if needs[3]:
            normalized = empty((count, dim), x)
            launch("token_features_normalize", x, **tokens_of, normalized=normalized)
            grad_weight = grad_preactivation.t() @ normalized
        if needs[1] or needs[2]:
            norm_partials = empty((tiles, 2, dim), x, wide)
            for number, grad in enumerate((grad_norm_weight, grad_norm_bias)):
                if grad is not None:
                    sums.add(norm_partials[:, number], grad)
        if needs[5]:
            position_partials = empty((tiles // frames, frames, dim), x, wide)
            grad_position = sums.position(position_partials, position)
        if needs[0] or needs[1] or needs[2] or needs[5]:
            launch(
                "token_features_backward_norm",
                x,
                **tokens_of,
                grad_normalized=grad_preactivation @ weight,
                grad_x=grad_x,
                accumulate=grad_x_accumulate is not None,
                total=total,
                grad_norm_weight=None,
                grad_norm_bias=None,
                grad_position=None,
                norm_partials=norm_partials,
                position_partials=position_partials,
            )
    return (
        None if grad_x_accumulate is not None else grad_x,
        grad_norm_weight,
        grad_norm_bias,
        grad_weight,
        grad_bias,
        grad_position,
    )


def _shape(x: Tensor, weight: Tensor) -> tuple[object, ...]:
    return (*x.shape, weight.shape[0], name_of(x.dtype))
