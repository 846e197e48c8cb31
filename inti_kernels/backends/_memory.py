"""Where every backend's outputs and workspaces come from: PyTorch's allocator, so that CUDA graphs see them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Contiguous and uninitialised, of ``like``'s dtype and device. The tests fill it with NaN, so that what a kernel
    leaves unwritten shows."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
