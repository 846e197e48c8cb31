"""What torch.utils.flop_counter counts for this package's ops; importing this module registers it.

Two FLOPs a multiply-accumulate of the equations' matrix products and convolutions (every tap at every output, on the
padding too), whatever backend runs them: what the reference's own operators are counted as. Element-wise work is 0, as
everywhere in that counter, so `pair_interpolate` has no formula. In a backward every product costs once for each of its
operands that a gradient goes to, and once more where the forward didn't keep its result. (For a plain depthwise
convolution's weight gradient torch's own formula counts C times that.)

Not imported with the ops: the counter imports Triton, which takes longer than the rest of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backends.inti import FRAME, GLOBAL, Inputs, Kept, Sizes

# Of tensors; what is kept for a backward is (0,) where it wasn't, optional inputs are None.
Shape = Sequence[int]
_OPS = torch.ops.inti_kernels
_INPUTS, _KEPT = len(Inputs._fields), len(Kept._fields)


def linear_macs(x: Shape, weight: Shape) -> int:
    """Of x [..., a] · weightᵀ [a, b]."""
    return prod(x[:-1]) * prod(weight)


def depthwise_macs(x: Shape, weight: Shape, temporal_stride: int, prefix: int) -> int:
    """Of a depthwise convolution with weight [C, 1, KT, KH, KW] over the patches of x [B, T, N, C]."""
    batch, frames, tokens, _ = x
    return batch * (frames // temporal_stride) * (tokens - prefix) * prod(weight)


def head_macs(x: Shape, weight1: Shape, weight2: Shape) -> int:
    """Of the head's two Linears for every token pair of x [B, T, N, C]."""
    batch, frames, tokens, _ = x
    return batch * frames // 2 * tokens * (prod(weight1) + prod(weight2))


def frame_level_macs(x: Shape, pair_weight: Shape, frame_weight: Shape) -> int:
    """Of the frame level's Linears for the frames, and the pairs, of x [B, T, N, C]."""
    batch, frames = x[:2]
    return batch * (frames * prod(pair_weight) + frames // 2 * prod(frame_weight))


def global_level_macs(x: Shape) -> int:
    """Of the global level's convolutions in time, kernel 3, between which the frames of x [B, T, N, C] are pooled."""
    batch, frames, _, dim = x
    half = -(-frames // 2)
    return batch * 3 * dim * (frames + half + -(-half // 2))


@register_flop_formula(_OPS.token_features)
def _token_features(x: Shape, norm_weight: Shape, norm_bias: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * linear_macs(x, weight)


@register_flop_formula(_OPS.token_features_backward)
def _token_features_backward(grad_features: Shape, x: Shape, *args: Any, **_: Any) -> int:
    weight, statistics, needs = args[2], args[6], args[8]
    of_input = any(needs[:3]) or needs[5]
    again = any(needs) and not prod(statistics)
    return 2 * linear_macs(x, weight) * (of_input + needs[3] + again)


@register_flop_formula(_OPS.depthwise_conv3d)
def _depthwise_conv3d(x: Shape, weight: Shape, *args: Any, **_: Any) -> int:
    stride, prefix = args[3:5]
    return 2 * depthwise_macs(x, weight, stride, prefix)


@register_flop_formula(_OPS.depthwise_conv3d_backward)
def _depthwise_conv3d_backward(grad_y: Shape, x: Shape, weight: Shape, *args: Any, **_: Any) -> int:
    stride, prefix, needs = args[3:6]
    return 2 * depthwise_macs(x, weight, stride, prefix) * ((needs[0] or needs[3]) + needs[1])


@register_flop_formula(_OPS.interpolation_head)
def _interpolation_head(*args: Any, **_: Any) -> int:
    x, weight1, weight2 = args[3], args[4], args[6]
    return 2 * head_macs(x, weight1, weight2)


@register_flop_formula(_OPS.interpolation_head_backward)
def _interpolation_head_backward(grad_z: Shape, grad_weights: Shape, *args: Any, **_: Any) -> int:
    x, weight1, weight2, preactivation, needs = args[3], args[4], args[6], args[10], args[11]
    return 2 * _head_backward(x, weight1, weight2, any(needs[:3]), needs[4:8], not prod(preactivation))


def _head_backward(x: Shape, weight1: Shape, weight2: Shape, of_input: bool, needs: Sequence[bool], again: bool) -> int:
    """``needs``: of weight1, bias1, weight2 and bias2."""
    of_hidden = of_input or any(needs[:2])
    again = again and (of_hidden or any(needs[2:]))
    nothing = (0, 0)
    return head_macs(x, weight1, nothing) * (of_input + needs[0] + again) + head_macs(x, nothing, weight2) * (
        of_hidden + needs[2] + again
    )


@register_flop_formula(_OPS.inti)
def _inti(*args: Any, **_: Any) -> int:
    inputs, sizes = Inputs(*args[:_INPUTS]), Sizes(*args[_INPUTS : _INPUTS + len(Sizes._fields)])
    return 2 * (_token_and_cube(inputs, sizes) + _class_levels(inputs) + _head(inputs))


@register_flop_formula(_OPS.inti_backward)
def _inti_backward(grad_z: Shape, grad_weights: Shape, *args: Any, **_: Any) -> int:
    *args, needs, _, _ = args
    inputs, sizes, kept = Inputs(*args[:_INPUTS]), Sizes(*args[_INPUTS:-_KEPT]), Kept(*args[-_KEPT:])
    if not any(needs):
        return 0
    need, of_x = Inputs(*needs), needs[0] or needs[-1]
    again = not prod(kept.token_preactivation)
    of_levels = of_x or any(needs[1 : GLOBAL.stop])
    head = _head_backward(inputs.x, inputs.weight1, inputs.weight2, of_levels, needs[-5:-1], again)
    token = linear_macs(inputs.x, inputs.weight) * ((of_x or need.norm_weight or need.norm_bias) + need.weight + again)
    cube = _cube(inputs, sizes) * (of_x + need.cube_weight + again)
    # Of a few tokens: all of their gradients or none.
    of_class_levels = of_x or any(needs[FRAME.start : GLOBAL.stop])
    class_levels = _class_levels(inputs) * (2 * of_class_levels + (not prod(kept.context)))
    return 2 * (head + token + cube + class_levels)


def _cube(inputs: Inputs, sizes: Sizes) -> int:
    return depthwise_macs(inputs.x, inputs.cube_weight, 2, sizes.prefix) if inputs.cube_weight else 0


def _token_and_cube(inputs: Inputs, sizes: Sizes) -> int:
    return linear_macs(inputs.x, inputs.weight) + _cube(inputs, sizes)


def _class_levels(inputs: Inputs) -> int:
    frame = frame_level_macs(inputs.x, inputs.pair_weight, inputs.frame_weight) if inputs.pair_weight else 0
    return frame + (global_level_macs(inputs.x) if inputs.global_weight1 else 0)


def _head(inputs: Inputs) -> int:
    return head_macs(inputs.x, inputs.weight1, inputs.weight2)
