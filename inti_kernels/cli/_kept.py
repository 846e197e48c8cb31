"""Bytes that a forward keeps for its backward: as autograd tells it, and as PyTorch's allocator does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


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


class Allocated(NamedTuple):
    """What a call took from PyTorch's allocator beyond its outputs, in bytes."""

    live: int  # that is still taken while the outputs are alive
    peak: int  # the most at once


def allocated_by(function: Callable[[], Tensor | tuple[Tensor, ...]]) -> Allocated:
    """Calls a function on CPU tensors under torch.profiler, and adds up its memory records.

    Unlike `kept_for_backward` this sees what is kept in any way: a tensor as an attribute of ctx, one in a cache. What
    a function keeps from its first call on, whoever calls it, is counted if this is the first.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs: Any = function()
    events = profiler.profiler.kineto_results.events()
    records = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    taken = list(itertools.accumulate(event.nbytes() for event in records)) or [0]
    storages = [tensor.untyped_storage() for tensor in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
    own = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    return Allocated(taken[-1] - own, max(taken) - own)
