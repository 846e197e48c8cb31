"""What every call of the compiled module gets: tensors as addresses, PyTorch's number of threads.

PyTorch allocates everything, workspaces too. What is small beside the tokens (logits, weights, taps, positions) is
converted in Python to the kernels' working dtype, so that the kernels have instantiations for the dtypes of what is
large alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import native
from .._arguments import name_of
from .._memory import empty

# Rows that go through the passes and products at once, by the bytes of the products' numbers: enough for the products
# to run at full speed, few enough that what one hands to the next is still in a last cache of 32 MB. In 16 bits with
# AMX products take an eighth of the time, and as long to begin: with 1600 rows a step took 10 % longer (Xeon, Emerald
# Rapids, 300 MB of last cache; no other was measured).
ROWS = {2: 6400, 4: 1600, 8: 1600}


def call(entry: str, **arguments: Any) -> None:
    """Calls a kernel of the module with PyTorch's number of threads.

    Args:
        entry: its name.
        **arguments: the members of its struct. A tensor stands for its address, and must be contiguous or have its
            strides beside it; None is the null pointer, a list of these one of addresses.
    """
    values = {name: _address(v) if v is None or isinstance(v, (Tensor, list)) else v for name, v in arguments.items()}
    getattr(native.load(), entry)(threads=torch.get_num_threads(), **values)


def chunks(
    frames: int, tokens: int, step: int, dtype: torch.dtype, *, halve: bool = False
) -> Iterator[tuple[int, int]]:
    """Cuts frames into (first, count) of about as many tokens as go at once.

    Args:
        frames: how many there are, over all clips; a multiple of ``step``.
        tokens: of a frame.
        step: what a chunk is a multiple of: 2 where pairs of frames must stay together.
        dtype: of the products.
        halve: at most half of all, where memory counts: a chunk then needs half of what all would.
    """
    size = min(ROWS[dtype.itemsize] // tokens, (frames + 1) // 2 if halve else frames) // step * step
    for first in range(0, max(frames, 1), max(size, step)):
        yield first, min(max(size, step), frames - first)


def largest(cut: list[tuple[int, int]]) -> int:
    """Frames of the largest chunk."""
    return max(count for _, count in cut)


def add_up(partials: Tensor) -> Tensor:
    """[n, terms, ...] → [n, ...]: the sums over the terms, in order, so of the same bits at any number of threads."""
    n, terms, *rest = partials.shape
    sums = empty((n, *rest), partials)
    shape = (n, terms, math.prod(rest))
    call("partial_sums", shape=shape, dtype=name_of(partials.dtype), partials=partials, sums=sums)
    return sums


def _address(tensor: Tensor | list[Tensor | None] | None) -> int | list[int]:
    if isinstance(tensor, list):
        return [_address(one) for one in tensor]
    return 0 if tensor is None else tensor.data_ptr()
