"""interpolation_head on the CUDA kernels: tensors in, addresses out. See csrc/include/inti/cuda/interpolation_head.h.

The products of the first Linear's backward are torch's: plain GEMMs of whole matrices. What the frames' context adds to
the first Linear is computed once a frame, not once a token, also by torch: B·T/2 rows are no work for a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import (
    channels_contiguous,
    expect,
    expect_interpolation_head,
    expect_one_dtype,
    gradient_buffer,
    in_wide_dtype,
    name_of,
    wide_dtype,
)
from .._memory import empty
from . import load
from ._launch import deferred_sums, launch, strides

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
    expect_interpolation_head(features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
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
    return z, weights, difference, features.new_empty(0) if preactivation is None else preactivation


def interpolation_head_preactivation(
    features: Tensor, cube: Tensor | None, frame_context: Tensor | None, weight1: Tensor, bias1: Tensor
) -> Tensor:
    """The first Linear's output [B, T/2, N, h], as the forward keeps it."""
    batch, pairs, tokens, _ = features.shape
    hidden, inputs = weight1.shape
    context = inputs - features.shape[3]
    expect(
        features,
        (cube, (batch, pairs, tokens, context)),
        (frame_context, (batch, pairs, context)),
        (weight1, (hidden, features.shape[3] + (context if cube is not None or frame_context is not None else 0))),
        (bias1, (hidden,)),
    )
    expect_one_dtype(features, cube, frame_context, weight1, bias1)
    preactivation = empty((batch, pairs, tokens, hidden), features)
    launch(
        "interpolation_head_preactivation",
        features,
        shape=_shape(features, features.new_empty(batch, 2 * pairs, tokens, 0), weight1),  # of no x
        features=features.contiguous(),
        cube=None if cube is None else cube.contiguous(),
        frame_bias=_frame_bias(features, frame_context, weight1),
        weight1=weight1.contiguous(),
        bias1=bias1.contiguous(),
        preactivation=preactivation,
    )
    return preactivation


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
    expect_interpolation_head(features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
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
    grad_difference = empty(pairs, features, wide)
    grad_bias1, grad_weight2, grad_bias2 = (
        empty(parameter.shape, features) if need else None
        for parameter, need in zip((bias1, weight2, bias2), needs[5:8], strict=True)
    )
    grad_position = grad_hidden = grad_frame_bias = position_partials = frame_partials = weight2_partials = None
    with deferred_sums() as sums:
        if needs[8]:
            tiles = module.pair_interpolate_tiles(batch, frames, tokens)
            position_partials = empty((batch * tiles, frames, dim), x, wide)
            grad_position = sums.position(position_partials, position)
        # The hidden layer's gradient is what all gradients of the network but the last bias's are made of.
        if any(needs[:3]) or any(needs[4:7]):
            grad_hidden = empty((difference.numel(), hidden), features)
        of_frames = needs[2] or (needs[4] and frame_context is not None)
        tiles, frame_pairs = module.interpolation_head_tiles(shape), batch * (frames // 2)
        if of_frames or needs[5]:
            frame_partials = empty((tiles // max(frame_pairs, 1), frame_pairs, hidden), features, wide)
        if of_frames:
            grad_frame_bias = empty((frame_pairs, hidden), features)
            sums.add(frame_partials, grad_frame_bias)
        if needs[5]:
            sums.add(frame_partials.flatten(0, 1), grad_bias1)
        if needs[6]:
            weight2_partials = empty((tiles, hidden), features, wide)
            sums.add_both_signs(weight2_partials, grad_weight2)
        if needs[7]:
            sums.add_both_signs(grad_difference.view(-1, 1), grad_bias2)
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
            preactivation=None if grad_hidden is None else preactivation.contiguous(),
            weight2=weight2.contiguous(),
            grad_x=grad_x,
            accumulate=grad_x_accumulate is not None,
            grad_position=None,
            position_partials=position_partials,
            grad_difference=grad_difference,
            grad_bias2=None,
            grad_preactivation=grad_hidden,
            grad_frame_bias=None,
            grad_bias1=None,
            frame_partials=frame_partials,
            grad_weight2=None,
            weight2_partials=weight2_partials,
        )
        grad_features, grad_cube = _gradients_of_tokens(grad_hidden, features, cube, weight1, needs)
        grad_frame_context = empty(frame_context.shape, frame_context) if needs[2] else None
        if needs[2]:
            of_context = weight1[:, features.shape[3] :]
            sums.then(lambda: torch.mm(grad_frame_bias, of_context, out=grad_frame_context.flatten(0, 1)))
        grad_weight1 = None
        if needs[4]:
            grad_weight1 = _gradient_of_weight1(grad_hidden, features, cube, weight1)
            if frame_context is not None:
                to, beta = grad_weight1[:, features.shape[3] :], 0 if cube is None else 1
                sums.then(lambda: to.addmm_(grad_frame_bias.t(), frame_context.flatten(0, 1), beta=beta))
    return (
        grad_features,
        grad_cube,
        grad_frame_context,
        None if grad_x_accumulate is not None else grad_x,
        grad_weight1,
        grad_bias1,
        grad_weight2,
        grad_bias2,
        grad_position,
    )


def _frame_bias(features: Tensor, frame_context: Tensor | None, weight1: Tensor) -> Tensor | None:
    """What the frames' context adds to the first Linear's output [B·T/2, h]: the only term that all of a frame's tokens
    share, so not rounded to 16 bits."""
    if frame_context is None:
        return None
    wide = wide_dtype(features)
    return frame_context.to(wide).flatten(0, 1) @ weight1[:, features.shape[3] :].to(wide).t()


def _gradients_of_tokens(
    grad_hidden: Tensor | None, features: Tensor, cube: Tensor | None, weight1: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of features and cube. Of both, in one product: then they are its columns, and views."""
    width = features.shape[3]
    if needs[0] and needs[1]:
        both = grad_hidden @ weight1
        return both[:, :width].view(features.shape), both[:, width:].view(cube.shape)
    return (
        (grad_hidden @ weight1[:, :width]).view(features.shape) if needs[0] else None,
        (grad_hidden @ weight1[:, width:]).view(cube.shape) if needs[1] else None,
    )


def _gradient_of_weight1(grad_hidden: Tensor, features: Tensor, cube: Tensor | None, weight1: Tensor) -> Tensor:
    """[h, D + C'] but for the frames' context, whose part is still to be added to the cube's columns."""
    width = features.shape[3]
    grad = empty(weight1.shape, weight1)
    torch.mm(grad_hidden.t(), features.flatten(0, 2), out=grad[:, :width])
    if cube is not None:
        torch.mm(grad_hidden.t(), cube.flatten(0, 2), out=grad[:, width:])
    return grad


def _shape(features: Tensor, x: Tensor, weight1: Tensor) -> tuple[object, ...]:
    hidden, inputs = weight1.shape
    width = features.shape[3]
    return (*x.shape, width, inputs - width, hidden, name_of(features.dtype), name_of(x.dtype))
