"""pair_interpolate: bound by memory; 1 multiply-accumulate a number of x."""

from __future__ import annotations

import torch

from .workload import Sizes, Workload, op_workload


def forward_macs(sizes: Sizes) -> int:
    """Two products a number of z."""
    return 2 * sizes.pairs * sizes.dim


def workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str | None) -> Workload:
    """All of x, logits and position require grad."""
    return op_workload("pair_interpolate", sizes, dtype, device, backend, forward_macs(sizes))
