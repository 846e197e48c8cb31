"""interpolation_head on the CUDA kernels: tensors in, addresses out. See csrc/include/inti/cuda/interpolation_head.h.

The products of the first Linear's backward are torch's: plain GEMMs of whole matrices. What the frames' context adds to
the first Linear is computed once a frame, not once a token, also by torch: B·T/2 rows are no work for a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import channels_contiguous, expect, expect_one_dtype, gradient_buffer, in_wide_dtype, wide_dtype
from .._memory import empty
from . import load
from ._launch import launch, name_of, strides

Gradients = tuple[Tensor | None, ...]


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
    _expect_all(features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
    pairs, wide = features.shape[:3], wide_dtype(features)
    x = channels_contiguous(x, "interpolation_head")
    shape = _shape(features, x, weight1)
    z, weights = empty((*pairs, x.shape[3]), x), empty((*pairs, 2), features)
    difference = empty(pairs, features, wide)
    preactivation = empty((*pairs, weight1.shape[0]), features) if keep else None
    launch(
        "interpolation_head_forward",
        x,
        shape=shape,
        features=features.contiguous(),
        cube=None if cube is None else cube.contiguous(),
        frame_bias=_frame_bias(features, frame_context, weight1),
        x=x,
        x_strides=strides(x),
        position=in_wide_dtype(position, x),
        weight1=weight1.contiguous(),
        bias1=bias1.contiguous(),
        weight2=weight2.contiguous(),
        bias2=bias2.contiguous(),
        partials=empty((load().interpolation_head_partials(shape), difference.numel()), difference),
        difference=difference,
        preactivation=preactivation,
        z=z,
        weights=weights,
    )
    if not keep:
        return z, weights, difference.new_empty(0), features.new_empty(0)
    return z, weights, difference, preactivation


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
    if not any(needs):
        return (None,) * 9
    _expect_all(features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
    batch, frames, tokens, dim = x.shape
    pairs, hidden = (batch, frames // 2, tokens), weight1.shape[0]
    expect(
        x, (grad_z, (*pairs, dim)), (grad_weights, (*pairs, 2)), (difference, pairs), (preactivation, (*pairs, hidden))
    )
    expect_one_dtype(x, grad_z)
    expect_one_dtype(features, grad_weights, preactivation)
    wide, module = wide_dtype(features), load()
    x, grad_z = channels_contiguous(x, "interpolation_head"), channels_contiguous(grad_z)
    shape = _shape(features, x, weight1)
    grad_x = gradient_buffer(x, needs[3], grad_x_accumulate)
    grad_position = position_partials = None
    if needs[8]:
        grad_position = empty((frames, dim), x, wide_dtype(x))
        tiles = module.pair_interpolate_tiles(batch, frames, tokens)
        position_partials = empty((batch, tiles, frames, dim), grad_position)
    # The hidden layer's gradient is what all gradients of the network but the last bias's are made of.
    of_network = any(needs[:3]) or any(needs[4:7])
    grad_hidden = empty((features.numel() // features.shape[3], hidden), features) if of_network else None
    of_frames = needs[2] or needs[5] or (needs[4] and frame_context is not None)
    grad_frame_bias = empty((batch * (frames // 2), hidden), features, wide) if of_frames else None
    grad_weight2 = empty((2, hidden), features) if needs[6] else None
    hidden_partials = None
    if of_frames or needs[6]:
        hidden_partials = empty((module.interpolation_head_tiles(shape), 2, hidden), features, wide)
    grad_difference = empty(pairs, features, wide)
    launch(
        "interpolation_head_backward",
        x,
        shape=shape,
        x=x,
        x_strides=strides(x),
        position=in_wide_dtype(position, x),
        difference=difference.contiguous(),
        grad_z=grad_z,
        grad_z_strides=strides(grad_z),
        grad_weights=grad_weights.contiguous(),
        preactivation=preactivation.contiguous() if of_network else None,
        weight2=weight2.contiguous(),
        grad_x=grad_x,
        accumulate=grad_x_accumulate is not None,
        grad_position=grad_position,
        position_partials=position_partials,
        grad_difference=grad_difference,
        grad_preactivation=grad_hidden,
        grad_frame_bias=grad_frame_bias,
        grad_weight2=grad_weight2,
        hidden_partials=hidden_partials,
    )
    grad_features, grad_cube, grad_frame_context = _gradients_of_inputs(
        grad_hidden, grad_frame_bias, features, weight1, needs
    )
    grad_bias2 = None
    if needs[7]:
        total = grad_difference.sum()
        grad_bias2 = torch.stack((total, -total)).to(bias2.dtype)
    return (
        None if grad_features is None else grad_features.view(features.shape),
        None if grad_cube is None else grad_cube.view(cube.shape),
        None if grad_frame_context is None else grad_frame_context.view(frame_context.shape),
        None if grad_x_accumulate is not None else grad_x,
        _gradient_of_weight1(grad_hidden, grad_frame_bias, features, cube, frame_context) if needs[4] else None,
        grad_frame_bias.sum(0).to(bias1.dtype) if needs[5] else None,
        grad_weight2,
        grad_bias2,
        None if grad_position is None else grad_position.to(position.dtype),
    )


def _frame_bias(features: Tensor, frame_context: Tensor | None, weight1: Tensor) -> Tensor | None:
    """What the frames' context adds to the first Linear's output [B·T/2, h]: the only term that all of a frame's tokens
    share, so not rounded to 16 bits."""
    if frame_context is None:
        return None
    wide = wide_dtype(features)
    return frame_context.to(wide).flatten(0, 1) @ weight1[:, features.shape[3] :].to(wide).t()


def _gradients_of_inputs(
    grad_hidden: Tensor | None,
    grad_frame_bias: Tensor | None,
    features: Tensor,
    weight1: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of features, cube and frame_context, as matrices."""
    of_features, of_context = weight1[:, : features.shape[3]], weight1[:, features.shape[3] :]
    return (
        grad_hidden @ of_features if needs[0] else None,
        grad_hidden @ of_context if needs[1] else None,
        (grad_frame_bias @ of_context.to(grad_frame_bias.dtype)).to(features.dtype) if needs[2] else None,
    )


def _gradient_of_weight1(
    grad_hidden: Tensor,
    grad_frame_bias: Tensor | None,
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
) -> Tensor:
    """[h, D + C']: the context's columns are the sum of a product over tokens and one over frames."""
    parts = [grad_hidden.t() @ features.flatten(0, 2)]
    if cube is not None:
        parts.append(grad_hidden.t() @ cube.flatten(0, 2))
    if frame_context is not None:
        of_frames = grad_frame_bias.t() @ frame_context.to(grad_frame_bias.dtype).flatten(0, 1)
        of_frames = of_frames if cube is None else of_frames + parts.pop()
        parts.append(of_frames.to(features.dtype))
    return torch.cat(parts, 1)


def _expect_all(
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None,
) -> None:
    batch, frames, tokens, dim = x.shape
    pairs, (hidden, width) = (batch, frames // 2, tokens), weight1.shape
    context = width - features.shape[-1]
    expect(
        x,
        (features, (*pairs, features.shape[-1])),
        (cube, (*pairs, context)),
        (frame_context, (*pairs[:2], context)),
        (weight1, (hidden, features.shape[-1] + (context if cube is not None or frame_context is not None else 0))),
        (bias1, (hidden,)),
        (weight2, (2, hidden)),
        (bias2, (2,)),
        (position, (frames, dim)),
    )
    expect_one_dtype(features, cube, frame_context, weight1, bias1, weight2, bias2)
    if wide_dtype(features) != wide_dtype(x):
        raise ValueError(f"expected float64 for x and the network, or for neither, got {x.dtype} and {features.dtype}")


def _shape(features: Tensor, x: Tensor, weight1: Tensor) -> tuple[object, ...]:
    hidden, inputs = weight1.shape
    width = features.shape[3]
    return (*x.shape, width, inputs - width, hidden, name_of(features.dtype), name_of(x.dtype))
