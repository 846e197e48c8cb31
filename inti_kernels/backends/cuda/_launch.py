"""How every entry point of the module is called: on x's device, in the current stream, tensors as addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import load

NOWHERE = 1 << 12  # an address that nothing is at, aligned to all that kernels ask for


def launch(entry: str, like: Tensor, /, **arguments: Any) -> None:
    """Calls an entry point of the module.

    Args:
        entry: its name.
        like: on whose device the kernels run.
        **arguments: the members of its struct but the stream. A tensor stands for its address, and must be contiguous
            or have its strides beside it; None is the null pointer.
    """
    values = {name: _address(v) if v is None or isinstance(v, Tensor) else v for name, v in arguments.items()}
    run = getattr(load(), entry)
    if not like.is_cuda:  # the emulator
        run(stream=0, **values)
        return
    with torch.cuda.device_of(like):
        run(stream=torch.cuda.current_stream(like.device).cuda_stream, **values)


def name_of(dtype: torch.dtype) -> str:
    """As the module names it."""
    return str(dtype).removeprefix("torch.")


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of [B, T, N, C] but for the channels. That of an axis of one is nothing, and must not forbid wide accesses."""
    return tuple(x.stride(axis) if x.shape[axis] > 1 else 0 for axis in range(3))


def _address(tensor: Tensor | None) -> int:
    # PyTorch gives an empty tensor no address; what has no elements is still not what was left out.
    return 0 if tensor is None else tensor.data_ptr() or NOWHERE
