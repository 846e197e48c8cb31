"""Bytes that a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Kept:
    """Storages that a forward keeps for its backward, by address: all of them, and those kept inside given modules."""

    everywhere: dict[int, int] = field(default_factory=dict)
    inside: dict[int, int] = field(default_factory=dict)


@contextmanager
def kept_for_backward(own: Iterable[Tensor], inside: Iterable[nn.Module] = ()) -> Iterator[Kept]:
    """Record the storages saved for the backward while the context is open, each once; those of ``own`` are left out.

    Read the result while the forward's output is alive: a freed storage's address may be given out again.
    """
    kept = Kept()
    left_out = {tensor.untyped_storage()._cdata for tensor in own}
    depth = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            kept.everywhere[storage._cdata] = storage.nbytes()
            if depth:
                kept.inside[storage._cdata] = storage.nbytes()
        return tensor

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1

    hooks = [hook for m in inside for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()
