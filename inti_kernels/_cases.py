"""Random cases for the checks: inputs of every op, an InTI where no gradient vanishes. See `inti_kernels.testing`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class OpCase(NamedTuple):
    """Arguments of an op: its tensors by name (None where one is left out), and the others by name."""

    inputs: dict[str, Tensor | None]
    kwargs: dict[str, Any]


def op_cases(
    name: str,
    *,
    dim: int,
    frames: int,
    grid: tuple[int, int],
    batch: int = 1,
    prefix: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    position: bool = True,
    kernel: tuple[int, int, int] = (3, 3, 3),
    temporal_stride: int = 2,
    hidden: int | None = None,
    context: Sequence[str] = ("cube", "frame"),
) -> OpCase:
    """Random contiguous inputs for an op, scaled so that outputs and gradients are of order 1 and none vanishes.

    Args:
        name: one of `inti_kernels.ops.OPS`, or "inti".
        dim, frames, grid, batch, prefix: C, T, (H, W), B and the number of prefix tokens.
        dtype, device: of every tensor.
        seed: the same seed gives the same numbers, rounded, in every dtype and on every device.
        position: False leaves the temporal position out (None).
        kernel, temporal_stride: of depthwise_conv3d.
        hidden: h of interpolation_head and inti, C by default.
        context: which of interpolation_head's optional inputs are given, "cube" and "frame"; which of inti's levels,
            "cube", "frame" and "global".

    Raises:
        ValueError: ``name`` isn't an op.
    """
    draw = Draw(seed, dtype, device)
    b, t, c, n = batch, frames, dim, prefix + grid[0] * grid[1]
    kwargs: dict[str, Any] = {}
    x = draw(b, t, n, c)
    if name == "pair_interpolate":
        inputs: dict[str, Tensor | None] = {"x": x, "logits": draw(b, t // 2, n, 2)}
    elif name == "depthwise_conv3d":
        inputs = {"x": x, "weight": draw(c, 1, *kernel, scale=math.prod(kernel) ** -0.5), "bias": draw(c, scale=0.5)}
        kwargs = {"grid": tuple(grid), "temporal_stride": temporal_stride, "prefix": prefix}
    elif name == "token_features":
        inputs = {"x": x, "norm_weight": draw(c, scale=0.2, shift=1.0), "norm_bias": draw(c, scale=0.2)}
        inputs |= {"weight": draw(c // 2, c, scale=c**-0.5), "bias": draw(c // 2, scale=0.2)}
    elif name == "interpolation_head":
        width, h = (2 * c if context else c), hidden or c
        inputs = {"features": draw(b, t // 2, n, c), "cube": draw(b, t // 2, n, c) if "cube" in context else None}
        inputs |= {"frame_context": draw(b, t // 2, c) if "frame" in context else None, "x": x}
        inputs |= {"weight1": draw(h, width, scale=width**-0.5), "bias1": draw(h, scale=0.2)}
        inputs |= {"weight2": draw(2, h, scale=2 * h**-0.5), "bias2": draw(2, scale=0.2)}
    elif name == "inti":
        inputs, kwargs = _inti_inputs(draw, x, hidden or c, context), {"grid": tuple(grid), "prefix": prefix}
    else:
        raise ValueError(f"name must be an op of inti_kernels.ops.OPS, got {name!r}")
    return OpCase({**inputs, "position": draw(t, c, scale=0.5) if position else None}, kwargs)


def _inti_inputs(draw: Draw, x: Tensor, hidden: int, context: Sequence[str]) -> dict[str, Tensor | None]:
    c = x.shape[3]
    half, cube, frame, clip = c // 2, "cube" in context, "frame" in context, "global" in context
    width = 2 * half + c * bool(context)

    def norm_and_linear(prefix: str, inputs: int, outputs: int, there: bool = True) -> dict[str, Tensor | None]:
        values = {"norm_weight": draw(inputs, scale=0.2, shift=1.0), "norm_bias": draw(inputs, scale=0.2)}
        values |= {"weight": draw(outputs, inputs, scale=inputs**-0.5), "bias": draw(outputs, scale=0.2)}
        return {prefix + name: value if there else None for name, value in values.items()}

    inputs: dict[str, Tensor | None] = {"x": x, **norm_and_linear("", c, half)}
    inputs["cube_weight"] = draw(c, 1, 3, 3, 3, scale=27**-0.5) if cube else None
    inputs["cube_bias"] = draw(c, scale=0.5) if cube else None
    inputs |= norm_and_linear("pair_", c, half, frame) | norm_and_linear("frame_", 2 * half, c, frame)
    for number in (1, 2, 3):
        inputs[f"global_weight{number}"] = draw(c, 1, 3) if clip else None
        inputs[f"global_bias{number}"] = draw(c, scale=0.3) if clip else None
    inputs |= {"weight1": draw(hidden, width, scale=width**-0.5), "bias1": draw(hidden, scale=0.2)}
    return inputs | {"weight2": draw(2, hidden, scale=2 * hidden**-0.5), "bias2": draw(2, scale=0.2)}


def module_case(
    *,
    dim: int,
    frames: int,
    grid: tuple[int, int],
    batch: int = 1,
    prefix: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **ablation: Any,
) -> tuple[nn.Module, Tensor]:
    """An `InTI` whose parameters are all random, and x [B, T, N, C] for it.

    σ, P and the last Linear are random too, so that no gradient vanishes. ``ablation`` takes InTI's ``context``,
    ``fusion``, ``head`` and ``hidden``; the other arguments are those of `op_cases`.
    """
    from .reference import InTI

    module = InTI(dim, frames, grid, prefix=prefix, **ablation).to(device=device, dtype=dtype)
    randomize(module, seed)
    return module, Draw(seed + 1, dtype, device)(batch, frames, prefix + grid[0] * grid[1], dim)


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Gives every parameter random values of its natural size, in place: norms near 1, matrices by their fan-in."""
    for number, (name, parameter) in enumerate(module.named_parameters()):
        draw = Draw(seed + 31 * number, parameter.dtype, parameter.device)
        if name.endswith("norm.weight"):
            parameter.copy_(draw(*parameter.shape, scale=0.2, shift=1.0))
        elif name.endswith("position_scale"):
            parameter.copy_(draw(*parameter.shape, scale=0.1, shift=0.7))
        elif parameter.dim() >= 2:
            parameter.copy_(draw(*parameter.shape, scale=math.prod(parameter.shape[1:]) ** -0.5))
        else:
            parameter.copy_(draw(*parameter.shape, scale=0.3))


class Draw:
    """Seeded normal numbers, drawn in float64 on the CPU: every device and dtype gets the same ones, rounded."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str | torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + shift
        return value.to(device=self.device, dtype=self.dtype)


def redraw(tensor: Tensor, seed: int, number: int, name: str = "") -> Tensor:
    """Other random numbers of the same RMS; those of another name are others again."""
    draw = Draw(seed + 7919 * number + sum(map(ord, name)), tensor.dtype, tensor.device)
    return draw(*tensor.shape, scale=rms(tensor.detach()))


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
