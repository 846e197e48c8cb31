"""Times one workload in a process of its own: `measure` starts it, `main` is it.

What ran before in a process decides how much of the heap glibc has given back to the system, and with it how many pages
a step must ask for again: seen here, 30 % of an eager InTI step. In a process that only times, nothing ran before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ._kept import kept_for_backward
from ._timing import WARM_UP, Contender, Step, autograd_contender, interleave, peak_bytes

EAGER, COMPILE, FUSED, RECOMPUTE, FLOOR = "eager", "compile", "fused", "recompute", "floor"
# Not a workload of benchmarks/ but a whole model (_towers.py).
MODEL = "model"
# glibc then keeps what it has got, as the allocators do that PyTorch's tuning guide recommends.
KEPT_HEAP = {"MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000000"}
# The profiler that counts allocations on the CPU says on stderr when it starts and stops.
QUIET = {"KINETO_LOG_LEVEL": "6"}


class TimingFailed(RuntimeError):
    """The process that times ended early; what it said went to stderr."""


@dataclass(frozen=True)
class Task:
    """What to time; plain data, so that it can be handed to another process."""

    workload: str  # one of benchmarks.WORKLOADS, or MODEL
    sizes: Mapping[str, Any]
    dtype: str
    device: str
    backend: str | None
    contenders: tuple[str, ...]
    repeats: int
    threads: int
    warm_up: int = WARM_UP


@dataclass(frozen=True)
class Measured:
    """What was found out about one contender."""

    steps: list[Step]
    kept_bytes: int | None
    peak_bytes: int | None


def measure(task: Task, tick: Callable[[str], None], kept_heap: bool = False) -> dict[str, Measured]:
    """Runs a task in a fresh interpreter.

    Args:
        task: what to time.
        tick: called with a contender's name before each of its steps.
        kept_heap: whether glibc is told to keep freed memory (a no-op with other allocators).

    Raises:
        TimingFailed: the process ended early.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(task))]
    environment = {**QUIET, **os.environ, **(KEPT_HEAP if kept_heap else {})}
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("tick "):
                tick(line.removeprefix("tick ").strip())
            last = line
    if process.returncode:
        raise TimingFailed(f"the process that times {task.workload} ended with status {process.returncode}")
    found = json.loads(last)
    return {name: Measured([Step(*step) for step in f["steps"]], *f["bytes"]) for name, f in found.items()}


def main() -> None:
    """Times the task that is the only argument; prints a line a step, then one JSON object."""
    task = Task(**json.loads(sys.argv[1]))
    torch.set_num_threads(task.threads)
    device = torch.device(task.device)
    contenders, leaves = _contenders(task, device)
    tick = partial(print, "tick", flush=True)
    rounds = interleave(contenders, task.repeats, device, tick, task.warm_up)
    found = {}
    for name, contender in contenders.items():
        kept = _kept_bytes(contender, leaves) if name in (EAGER, FUSED, RECOMPUTE) else None
        # The profiler that counts on the CPU takes seconds: worth it for a model, of which `kept` says nothing.
        counts = device.type == "cuda" or task.workload == MODEL
        peak = peak_bytes(contender, device) if counts else None
        found[name] = {"steps": rounds[name], "bytes": (kept, peak)}
    print(json.dumps(found))


def _kept_bytes(contender: Contender, leaves: list[torch.Tensor]) -> int:
    with kept_for_backward(leaves) as kept:
        outputs = contender.forward()
    total = sum(kept.everywhere.values())
    del outputs
    return total


def _contenders(task: Task, device: torch.device) -> tuple[dict[str, Contender], list[torch.Tensor]]:
    if task.workload == MODEL:
        from ._towers import contenders

        return contenders(task, device), []
    from ..benchmarks import Sizes, load
    from ..benchmarks.floor import Floor

    sizes = Sizes(**{**task.sizes, "grid": tuple(task.sizes["grid"])})
    dtype = getattr(torch, task.dtype)
    workload = load(task.workload, sizes, dtype, device, task.backend)
    leaves = list(workload.leaves.values())
    contenders = {}
    for name in task.contenders:
        if name == FLOOR:
            floor = Floor(sizes, dtype, device)
            contenders[name] = Contender(floor.forward, lambda _, floor=floor: floor.backward())
            continue
        function = workload.kernels.get(name, workload.reference)
        contenders[name] = autograd_contender(
            workload.bind(torch.compile(function) if name == COMPILE else function), leaves
        )
    return contenders, leaves


if __name__ == "__main__":
    main()
