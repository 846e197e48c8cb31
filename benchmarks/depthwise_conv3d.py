"""depthwise_conv3d as the cube level has it: 3×3×3, temporal stride 2, on the patch tokens."""

from __future__ import annotations

import torch

from .workload import Sizes, Workload, op_workload


def forward_macs(sizes: Sizes) -> int:
    """One product a tap and output that isn't on the zero padding."""
    height, width = sizes.grid
    # Along an axis of n the three taps of n outputs miss one input at either end. Along time, at stride 2, the output
    # centred on frame 2j misses one at the start only.
    taps = (3 * (sizes.frames // 2) - 1) * (3 * height - 2) * (3 * width - 2)
    return sizes.batch * taps * sizes.dim


def workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str | None) -> Workload:
    """All of x, weight, bias and position require grad."""
    return op_workload("depthwise_conv3d", sizes, dtype, device, backend, forward_macs(sizes))
