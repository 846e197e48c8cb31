"""token_features on the CUDA kernels: tensors in, addresses out. See csrc/include/inti/cuda/token_features.h.

The two products of the Linear's backward are torch's: plain GEMMs of whole matrices, with nothing to fuse that a kernel
beside them wouldn't read anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._arguments import channels_contiguous, expect, expect_one_dtype, gradient_buffer, in_wide_dtype, wide_dtype
from .._memory import empty
from . import load
from ._launch import launch, name_of, strides

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
    _expect_all(x, norm_weight, norm_bias, weight, bias, position)
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
    if not any(needs):
        return (None,) * 6
    batch, frames, tokens, dim = x.shape
    width, rows = weight.shape[0], batch * frames * tokens
    _expect_all(x, norm_weight, norm_bias, weight, bias, position)
    expect(
        x,
        (grad_features, (batch, frames // 2, tokens, 2 * width)),
        (statistics, (batch, frames, tokens, 2)),
        (preactivation, (batch, frames, tokens, width)),
    )
    expect_one_dtype(x, grad_features, preactivation)
    x, weight = channels_contiguous(x, "token_features"), weight.contiguous()
    shape = _shape(x, weight)
    tiles = load().token_features_tiles(shape)
    grad_preactivation = empty((rows, width), x)
    grad_bias = empty((width,), x) if needs[4] else None
    launch(
        "token_features_backward_activation",
        x,
        shape=shape,
        grad_features=grad_features.contiguous(),
        preactivation=preactivation.contiguous(),
        grad_preactivation=grad_preactivation,
        grad_bias=grad_bias,
        partials=empty((tiles, width), x, wide_dtype(x)) if needs[4] else None,
    )
    tokens_of = {
        "shape": shape,
        "x": x,
        "x_strides": strides(x),
        "position": in_wide_dtype(position, x),
        "norm_weight": norm_weight.contiguous(),
        "norm_bias": norm_bias.contiguous(),
        "statistics": statistics.contiguous(),
    }
    grad_weight = None
    if needs[3]:
        normalized = empty((rows, dim), x)
        launch("token_features_normalize", x, **tokens_of, normalized=normalized)
        grad_weight = grad_preactivation.t() @ normalized
    grad_x = gradient_buffer(x, needs[0], grad_x_accumulate)
    grad_norm_weight, grad_norm_bias = (empty((dim,), x) if need else None for need in needs[1:3])
    grad_position = empty((frames, dim), x, wide_dtype(x)) if needs[5] else None
    if needs[0] or needs[1] or needs[2] or needs[5]:
        launch(
            "token_features_backward_norm",
            x,
            **tokens_of,
            grad_normalized=grad_preactivation @ weight,
            grad_x=grad_x,
            accumulate=grad_x_accumulate is not None,
            grad_norm_weight=grad_norm_weight,
            grad_norm_bias=grad_norm_bias,
            grad_position=grad_position,
            partials=empty((tiles, 3, dim), x, wide_dtype(x)) if needs[1] or needs[2] or needs[5] else None,
        )
    return (
        None if grad_x_accumulate is not None else grad_x,
        grad_norm_weight,
        grad_norm_bias,
        grad_weight,
        grad_bias,
        None if grad_position is None else grad_position.to(position.dtype),
    )


def _expect_all(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None
) -> None:
    _, frames, _, dim = x.shape
    width = weight.shape[0]
    expect(
        x,
        (norm_weight, (dim,)),
        (norm_bias, (dim,)),
        (weight, (width, dim)),
        (bias, (width,)),
        (position, (frames, dim)),
    )
    expect_one_dtype(x, norm_weight, norm_bias, weight, bias)


def _shape(x: Tensor, weight: Tensor) -> tuple[object, ...]:
    return (*x.shape, weight.shape[0], name_of(x.dtype))
