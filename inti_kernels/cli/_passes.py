"""What `_traffic` counts: the passes of every op, and the bytes that none of them can do without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends._arguments import wide_dtype
from ..ops.depthwise_conv3d import CASES
from ..testing import op_cases


@dataclass(frozen=True)
class Part:
    """Launches between which nothing else runs: what one has left in the L2 cache is there for the next."""

    stage: str
    least: int  # bytes: every input read once, every output written once
    first: str = ""  # the kernel that it begins with, where a call has several parts


@dataclass(frozen=True)
class Pass:
    """A call of a backend's function."""

    case: str
    call: Callable[[], object]
    parts: tuple[Part, ...]


def passes(op: str, dtype: torch.dtype, sizes: Mapping[str, Any], backend: str) -> Iterator[Pass]:
    """Every pass of an op.

    Args:
        op: one of `_traffic.COUNTED[backend]`.
        dtype: of every tensor.
        sizes: dim, frames, grid, batch, prefix.
        backend: "triton" or "cuda".
    """
    kernels = import_module(f"{backends.__name__}.{backend}.{op}")
    of = {"pair_interpolate": _interpolation, "token_features": _features, "interpolation_head": _head}
    if op == "depthwise_conv3d":
        for kernel, stride in CASES:
            yield from _convolution(kernels, dtype, sizes, kernel, stride, whole=backend == "cuda")
    else:
        yield from of[op](kernels, dtype, sizes)


def least(*tensors: Tensor) -> int:
    """Their bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _interpolation(kernels: ModuleType, dtype: torch.dtype, sizes: Mapping[str, Any]) -> Iterator[Pass]:
    x, logits, position = op_cases("pair_interpolate", dtype=dtype, **sizes).inputs.values()
    z, needs = x[:, ::2].contiguous(), (True,) * 3
    yield Pass(
        "",
        lambda: kernels.pair_interpolate_forward(x, logits, position),
        (Part("forward", least(x, logits, position, z, logits)),),
    )
    yield Pass(
        "",
        lambda: kernels.pair_interpolate_backward(z, logits, x, logits, position, needs, None),
        (Part("backward", least(z, logits) + 2 * least(x, logits, position)),),
    )


def _convolution(
    kernels: ModuleType,
    dtype: torch.dtype,
    sizes: Mapping[str, Any],
    kernel: tuple[int, int, int],
    stride: int,
    *,
    whole: bool,
) -> Iterator[Pass]:
    inputs, kwargs = op_cases("depthwise_conv3d", dtype=dtype, kernel=kernel, temporal_stride=stride, **sizes)
    x, weight, bias, position = inputs.values()
    arguments = (x, weight, bias, position, kwargs["grid"], stride, sizes["prefix"])
    case, y = f"{'×'.join(map(str, kernel))} / {stride}", x[:, ::stride].clone()

    def backward(stage: str, bytes_: int, *needs: bool) -> Pass:
        return Pass(case, lambda: kernels.depthwise_conv3d_backward(y, *arguments, needs, None), (Part(stage, bytes_),))

    forward = Part("forward", least(x, weight, bias, position, y))
    yield Pass(case, lambda: kernels.depthwise_conv3d_forward(*arguments), (forward,))
    yield backward("backward to x, position", least(y, weight, x, position), True, False, False, True)
    yield backward("backward to weight, bias", least(x, y, position, weight, bias), False, True, True, False)
    if whole:
        yield backward("backward", least(y, bias) + 2 * least(x, weight, position), True, True, True, True)


def _features(kernels: ModuleType, dtype: torch.dtype, sizes: Mapping[str, Any]) -> Iterator[Pass]:
    inputs = op_cases("token_features", dtype=dtype, **sizes).inputs
    x, norm_weight, norm_bias, weight, bias, position = inputs.values()
    width, pairs = weight.shape[0], (x.shape[0], x.shape[1] // 2, x.shape[2])
    features, preactivation = x.new_ones(*pairs, 2 * width), x.new_ones(*x.shape[:3], width)
    statistics = x.new_ones(*x.shape[:3], 2, dtype=wide_dtype(x))
    yield Pass(
        "",
        lambda: kernels.token_features_forward(*inputs.values(), 1e-6, True),
        (Part("forward", least(*inputs.values(), features, statistics, preactivation)),),
    )
    # What a backward begins with whose forward kept no features.
    yield Pass(
        "",
        lambda: kernels.token_features_activation(preactivation),
        (Part("activation", least(preactivation, features)),),
    )
    # Products of torch's come between its parts.
    yield Pass(
        "",
        lambda: kernels.token_features_backward(
            features, *inputs.values(), 1e-6, statistics, preactivation, (True,) * 6, None
        ),
        (
            Part(
                "backward of GELU",
                least(features, preactivation, preactivation, bias),
                "token_features_backward_activation_kernel",
            ),
            Part(
                "normalize",
                least(x, statistics, norm_weight, norm_bias, position, x),
                "token_features_normalize_kernel",
            ),
            Part(
                "backward of LayerNorm",
                least(x, x, statistics, norm_weight, position) + least(x, norm_weight, norm_bias, position),
                "token_features_backward_norm_kernel",
            ),
        ),
    )


def _head(kernels: ModuleType, dtype: torch.dtype, sizes: Mapping[str, Any]) -> Iterator[Pass]:
    inputs = op_cases("interpolation_head", dtype=dtype, **sizes).inputs
    x, position, features = inputs["x"], inputs["position"], inputs["features"]
    z, weights = x[:, ::2].contiguous(), features.new_ones(*features.shape[:3], 2)
    difference = features.new_ones(features.shape[:3], dtype=wide_dtype(x))
    preactivation = features.new_ones(*features.shape[:3], inputs["weight1"].shape[0])
    yield Pass(
        "",
        lambda: kernels.interpolation_head_forward(*inputs.values(), True),
        (Part("forward", least(*inputs.values(), z, weights, difference, preactivation)),),
    )
    yield Pass(
        "",
        lambda: kernels.interpolation_head_backward(
            z, weights, *inputs.values(), difference, preactivation, (True,) * 9, None
        ),
        (
            Part(
                "backward",
                # The gradients of the hidden layer and of the difference are what the caller's products take.
                least(z, weights, difference, preactivation)
                + 2 * least(x, position, inputs["weight2"])
                + least(preactivation, difference, inputs["bias1"]),
            ),
        ),
    )
