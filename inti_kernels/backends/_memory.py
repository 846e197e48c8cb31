"""Where every backend's outputs and workspaces come from: PyTorch's allocator, so that CUDA graphs see them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous and uninitialised, of ``like``'s device, and its dtype if no other is given. The tests fill it with
    NaN, so that what a kernel leaves unwritten shows."""
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)
