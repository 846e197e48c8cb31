"""token_features: LayerNorm → Linear(C, C/2) → GELU of every token."""

from __future__ import annotations

import torch

from .workload import Sizes, Workload, op_workload


def forward_macs(sizes: Sizes) -> int:
    """The Linear's."""
    return sizes.tokens * sizes.dim * (sizes.dim // 2)


def workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str | None) -> Workload:
    """All of x, the parameters and position require grad."""
    return op_workload("token_features", sizes, dtype, device, backend, forward_macs(sizes))
