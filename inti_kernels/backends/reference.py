"""The reference as a backend: what `auto` falls back to inside an op. (An explicit "reference" never gets here: the
user's functions then call `inti_kernels.reference` itself, which differentiates to any order and exports to ONNX.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import functional
from ._arguments import wide_dtype

Gradients = tuple[Tensor | None, ...]


def pair_interpolate_forward(x: Tensor, logits: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
    z, weights = functional.pair_interpolate(x, logits, position)
    return z.contiguous(), weights.contiguous()


def pair_interpolate_backward(
    grad_z: Tensor,
    grad_weights: Tensor,
    x: Tensor,
    logits: Tensor,
    position: Tensor | None,
    needs: Sequence[bool],
    grad_x_accumulate: Tensor | None,
) -> Gradients:
    inputs = (x, logits, position)
    grads = _gradients(functional.pair_interpolate, inputs, (grad_z, grad_weights), needs)
    return _accumulated(grads, grad_x_accumulate)


def depthwise_conv3d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    grid: Sequence[int],
    temporal_stride: int,
    prefix: int,
) -> Tensor:
    return functional.depthwise_conv3d(
        x, weight, bias, tuple(grid), temporal_stride=temporal_stride, prefix=prefix, position=position
    ).contiguous()


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
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None) -> Tensor:
        return functional.depthwise_conv3d(
            x, weight, bias, tuple(grid), temporal_stride=temporal_stride, prefix=prefix, position=position
        )

    return _accumulated(_gradients(forward, (x, weight, bias, position), grad_y, needs), grad_x_accumulate)


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
    x = functional.add_position(x, position)
    preactivation = F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), weight, bias)
    features = token_features_activation(preactivation)
    if not keep:
        return features, x.new_empty(0), x.new_empty(0)
    # The backward below has no use for statistics of its own.
    return features, x.new_zeros((*x.shape[:3], 2), dtype=wide_dtype(x)), preactivation


def token_features_activation(preactivation: Tensor) -> Tensor:
    frames = F.gelu(preactivation)
    return torch.cat((frames[:, 0::2], frames[:, 1::2]), dim=-1)


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
    def forward(*inputs: Tensor | None) -> Tensor:
        return functional.token_features(*inputs, eps=eps)

    inputs = (x, norm_weight, norm_bias, weight, bias, position)
    return _accumulated(_gradients(forward, inputs, grad_features, needs), grad_x_accumulate)


def interpolation_head_forward(*inputs_and_keep: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, cube, frame_context, x, weight1, bias1, weight2, bias2, position, keep = inputs_and_keep
    preactivation = interpolation_head_preactivation(features, cube, frame_context, weight1, bias1)
    logits = F.linear(F.gelu(preactivation), weight2, bias2)
    z, weights = pair_interpolate_forward(x, logits, position)
    difference = (logits[..., 0] - logits[..., 1]).to(wide_dtype(features))
    return z, weights, difference, preactivation if keep else features.new_empty(0)


def interpolation_head_preactivation(
    features: Tensor, cube: Tensor | None, frame_context: Tensor | None, weight1: Tensor, bias1: Tensor
) -> Tensor:
    return F.linear(functional.head_inputs(features, cube, frame_context), weight1, bias1)


def interpolation_head_backward(
    grad_z: Tensor,
    grad_weights: Tensor,
    *inputs_and_kept: Any,
) -> Gradients:
    *inputs, _, _, needs, grad_x_accumulate = inputs_and_kept
    grads = _gradients(functional.interpolation_head, inputs, (grad_z, grad_weights), needs)
    if grad_x_accumulate is None or grads[3] is None:
        return grads
    grad_x_accumulate += grads[3]
    return (*grads[:3], None, *grads[4:])


def _gradients(
    forward: Callable[..., Any], inputs: Sequence[Tensor | None], upstream: Any, needs: Sequence[bool]
) -> Gradients:
    """The gradients of those inputs that need one. torch.func.vjp, since autograd itself is off inside a custom op."""
    wanted = [i for i, need in enumerate(needs) if need]

    def of_wanted(*values: Tensor) -> Any:
        arguments = list(inputs)
        for i, value in zip(wanted, values, strict=True):
            arguments[i] = value
        return forward(*arguments)

    _, vjp = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))
    grads: list[Tensor | None] = [None] * len(needs)
    for i, grad in zip(wanted, vjp(upstream), strict=True):
        grads[i] = grad.contiguous()
    return tuple(grads)


def _accumulated(grads: Gradients, grad_x_accumulate: Tensor | None) -> Gradients:
    if grad_x_accumulate is None or grads[0] is None:
        return grads
    grad_x_accumulate += grads[0]
    return (None, *grads[1:])
