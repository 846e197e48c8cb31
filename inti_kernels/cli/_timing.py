"""How `bench` and `demo` measure: contenders in turn, forward and backward of one step, quantiles."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._kept import allocated_by

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

WARM_UP = 3


@dataclass(frozen=True)
class Contender:
    """One way to compute a step: ``backward`` takes what ``forward`` returned."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]


def autograd_contender(forward: Callable[[], Any], leaves: Sequence[Tensor], seed: int = 0) -> Contender:
    """A step of training: the gradients of all leaves from a random upstream gradient of the first output.

    ``torch.autograd.grad`` returns them fresh; adding to ``.grad`` would cost every contender the same.
    """
    generator = torch.Generator().manual_seed(seed)
    upstream: list[Tensor] = []

    def backward(outputs: Any) -> tuple[Tensor, ...]:
        first = outputs if isinstance(outputs, Tensor) else outputs[0]
        if not upstream:
            upstream.append(torch.randn(first.shape, generator=generator).to(first))
        return torch.autograd.grad(first, leaves, upstream[0])

    return Contender(forward, backward)


class Step(NamedTuple):
    """One forward and the backward that followed it."""

    forward: float  # seconds
    backward: float
    page_faults: int  # of both, on the CPU: pages that the system had to hand out anew


def timed_step(contender: Contender, device: torch.device) -> Step:
    """Times one step."""
    before = _page_faults()
    forward, backward = _step_seconds(contender, device)
    return Step(forward, backward, _page_faults() - before)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def _step_seconds(contender: Contender, device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize(device)
        marks[0].record()
        outputs = contender.forward()
        marks[1].record()
        gradients = contender.backward(outputs)
        marks[2].record()
        torch.cuda.synchronize(device)
        del outputs, gradients
        return marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3
    start = time.perf_counter()
    outputs = contender.forward()
    middle = time.perf_counter()
    gradients = contender.backward(outputs)
    end = time.perf_counter()
    # Freed after the clock has stopped, for every contender alike.
    del outputs, gradients
    return middle - start, end - middle


def interleave(
    contenders: Mapping[str, Contender],
    repeats: int,
    device: torch.device,
    tick: Callable[[str], None],
    warm_up: int = WARM_UP,
) -> dict[str, list[Step]]:
    """Times all contenders in turn, ``repeats`` rounds, each round starting with another.

    Args:
        contenders: by name.
        repeats: rounds that are timed.
        device: what the clock is read on.
        tick: called with the contender's name before each of its ``warm_up + repeats`` steps.
        warm_up: rounds before them.

    Returns:
        Name → the step of every round.
    """
    rounds: dict[str, list[Step]] = {name: [] for name in contenders}
    names = list(contenders)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(warm_up + repeats):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                tick(name)
                step = timed_step(contenders[name], device)
                if number >= warm_up:
                    rounds[name].append(step)
    finally:
        if was_enabled:
            gc.enable()
    return rounds


def by_mode(steps: Sequence[Step]) -> dict[str, list[float]]:
    """Seconds of forward, backward and both, step by step."""
    return {
        "forward": [step.forward for step in steps],
        "backward": [step.backward for step in steps],
        "forward+backward": [step.forward + step.backward for step in steps],
    }


def quantiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The 20, 50 and 80 % quantiles."""
    if len(seconds) < 2:
        return (seconds[0],) * 3
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


def peak_bytes(contender: Contender, device: torch.device) -> int:
    """The most that a step allocates at once, above what was there before; on the CPU by torch's profiler."""
    if device.type != "cuda":

        def step() -> tuple[()]:
            contender.backward(contender.forward())
            return ()

        return allocated_by(step).peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    outputs = contender.forward()
    contender.backward(outputs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
