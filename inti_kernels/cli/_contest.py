"""One workload of `bench`: its contenders are verified, then timed in turn; a row of plain data for each and mode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .. import testing
from ._coverage import watch
from ._stopwatch import COMPILE, EAGER, FLOOR, Measured, Task, measure
from ._timing import autograd_contender, by_mode, quantiles

if TYPE_CHECKING:
    from ..benchmarks.workload import Outputs, Workload

# Random upstream gradients that a workload is compared over before it is timed. Gradients of a few numbers (σ's has
# one) need more than is bearable at full size; these are compared over as many as it takes on a small clip.
DRAWS = 3
# torch.compile sums in an order of its own, at times a worse one than eager PyTorch's. It isn't ours to judge: it is
# timed unless its errors are this many bounds large, which no rounding makes, and its share of the bound is printed.
COMPILE_SLACK = 16


@dataclass
class Entry:
    """A contender, what was found out about it, and its status: "ok", "FAIL", "not covered" or "not run"."""

    run: Callable[[], Outputs]
    status: str = "ok"
    note: str = ""
    executed: str = "torch"
    used: float | None = None  # the largest share of a bound that its errors took
    compile_seconds: float | None = None


def ticks(task: Task) -> int:
    """How often `contest` calls its ``tick``, if all contenders pass."""
    kernels = len(set(task.contenders) - {EAGER, COMPILE, FLOOR})
    return len(task.contenders) * (task.warm_up + task.repeats) + 1 + kernels + (COMPILE in task.contenders)


def contest(
    workload: Workload, small: Workload, task: Task, *, kept_heap: bool, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Verifies the contenders of a workload, and times those that pass.

    Args:
        workload: what to compute.
        small: the same on a clip of a few tokens, where the gradients of a few numbers are compared.
        task: what to time, with all contenders.
        kept_heap: as in `measure`.
        tick: told what is done before each step.

    Returns:
        Rows of plain data, for every contender and mode; figures of time are None where nothing was timed.
    """
    entries = {EAGER: Entry(workload.bind(workload.reference))}  # the bounds' measure, whether it is timed or not
    if COMPILE in task.contenders:
        tick(f"{workload.name}: torch.compile")
        entries[COMPILE] = _compile(workload)
    entries |= {n: Entry(workload.bind(run)) for n, run in workload.kernels.items() if n in task.contenders}
    verify(workload, small, entries, tick)
    entries[FLOOR] = Entry(entries[EAGER].run)
    entries = {name: entries[name] for name in task.contenders}
    passed = tuple(name for name, entry in entries.items() if entry.status == "ok")
    measured = measure(replace(task, contenders=passed), lambda name: tick(f"{workload.name}: {name}"), kept_heap)
    return _rows(workload, entries, measured)


def _compile(workload: Workload) -> Entry:
    """torch.compile in its default mode; both passes are compiled here, so that no timed round is."""
    torch.compiler.reset()
    entry = Entry(workload.bind(torch.compile(workload.reference)))
    start = time.perf_counter()
    try:
        contender = autograd_contender(entry.run, list(workload.leaves.values()))
        contender.backward(contender.forward())
    except Exception as error:  # no compiler, no Triton, an unsupported dtype: the others are still worth timing
        entry.status, entry.note = "not run", f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}"
    entry.compile_seconds = time.perf_counter() - start
    return entry


def verify(workload: Workload, small: Workload, entries: dict[str, Entry], tick: Callable[[str], None]) -> None:
    """Compares every contender but eager PyTorch, which is what the bounds are made of, on the tensors to be timed.

    Args:
        workload, small, tick: as in `contest`.
        entries: by name, EAGER among them; what is found out is written into them.
    """
    tick(f"{workload.name}: reference in float64")
    upstreams = [testing.Upstream(seed) for seed in range(DRAWS)]
    plain = _runs(workload, entries[EAGER].run, upstreams)
    exact = [workload.exact(upstream) for upstream in upstreams]
    few = {f"grad {name}" for name, leaf in workload.leaves.items() if leaf.numel() < testing.MIN_SAMPLES}
    for name, entry in entries.items():
        if name == EAGER or entry.status != "ok":
            continue
        ours = name in workload.kernels
        if ours:
            tick(f"{workload.name}: verifying {name}")
        try:
            with watch(workload.name) as ran:
                kernel = _runs(workload, entry.run, upstreams)
        except Exception as error:  # an op that raises is a row that failed, not the end of the benchmark
            entry.status, entry.note = "FAIL", f"{type(error).__name__}: {error}"
            continue
        rows = [row for row in _compared(workload, kernel, plain, exact) if row.name not in few]
        if ours:
            entry.executed, entry.note = str(ran), ran.note
            entry.status = "ok" if ran.covered else "not covered"
            rows += _compared_small(small, name, few) if few else []
        entry.used = max(row.used for row in rows)
        if failed := [row for row in rows if not (row.ok if ours else row.used <= COMPILE_SLACK)]:
            entry.status, entry.note = "FAIL", "; ".join(f"{row.name}: {row.note}" for row in failed)


def _compared_small(small: Workload, name: str, few: set[str]) -> list[testing.Comparison]:
    """The gradients of a few numbers, over enough draws to tell rounding errors apart."""
    upstreams = [testing.Upstream(seed) for seed in range(testing.enough_draws(small.leaves.values()))]
    kernel, plain = (_runs(small, small.bind(f), upstreams) for f in (small.kernels[name], small.reference))
    exact = [small.exact(upstream) for upstream in upstreams]
    return [row for row in _compared(small, kernel, plain, exact) if row.name in few]


def _runs(workload: Workload, run: Callable[[], Outputs], upstreams: list[testing.Upstream]) -> list[testing.Rows]:
    return [testing.collect(run(), dict(workload.leaves), upstream) for upstream in upstreams]


def _compared(workload: Workload, *runs: list[testing.Rows]) -> list[testing.Comparison]:
    dtype = workload.compute_dtype if workload.autocast else None
    return testing.compare_runs(list(zip(*runs, strict=True)), dtype)


def _rows(workload: Workload, entries: Mapping[str, Entry], measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    with torch.no_grad():
        work = workload.work(workload.bind(workload.reference)())
    rows = []
    for mode, least in work.items():
        seconds = {name: by_mode(found.steps)[mode] for name, found in measured.items()}
        medians = {name: quantiles(values)[1] for name, values in seconds.items()}
        best = min((medians[name] for name in (EAGER, COMPILE) if name in medians), default=None)
        for name, entry in entries.items():
            row: dict[str, Any] = {"op": workload.name, "mode": mode, "contender": name, "executed": entry.executed}
            row |= {"status": entry.status, "note": entry.note, "share_of_bound": entry.used}
            row |= {"autocast": workload.autocast, "compile_seconds": entry.compile_seconds}
            row |= {"least_bytes": least.bytes, "least_macs": least.macs}
            row |= dict.fromkeys(("ms_20", "ms_50", "ms_80", "gb_per_s", "gflop_per_s", "speedup_eager", "rounds"))
            row |= dict.fromkeys(("speedup_best", "over_floor", "kept_bytes", "peak_bytes", "page_faults"))
            if name in measured:
                found, median = measured[name], medians[name]
                row |= zip(("ms_20", "ms_50", "ms_80"), (1e3 * q for q in quantiles(seconds[name])), strict=True)
                row |= {"rounds": len(found.steps), "kept_bytes": found.kept_bytes, "peak_bytes": found.peak_bytes}
                row |= {"page_faults": statistics.median_low(step.page_faults for step in found.steps)}
                if EAGER in medians:
                    row |= {"speedup_eager": medians[EAGER] / median, "speedup_best": best / median}
                if name != FLOOR:  # its work is another
                    row |= {"gb_per_s": least.bytes / median / 1e9, "gflop_per_s": 2 * least.macs / median / 1e9}
                if FLOOR in medians:
                    row["over_floor"] = median / medians[FLOOR]
            rows.append(row)
    return rows
