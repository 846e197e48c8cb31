"""interpolation_head: Linear(2C, C) of [features ; cube + frame_context], GELU, two logits, softmax, interpolation."""

from __future__ import annotations

import torch

from . import pair_interpolate
from .workload import Sizes, Workload, op_workload


def forward_macs(sizes: Sizes) -> int:
    """Both Linears', with hidden = C, and the interpolation's."""
    return sizes.pairs * (2 * sizes.dim * sizes.dim + 2 * sizes.dim) + pair_interpolate.forward_macs(sizes)


def workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str | None) -> Workload:
    """All inputs require grad; both contexts are given."""
    return op_workload("interpolation_head", sizes, dtype, device, backend, forward_macs(sizes))
