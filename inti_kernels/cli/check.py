"""`python -m inti_kernels check`: every op and FusedInTI against the reference, forward and backward, on this machine.

A row says what was compared, which backend executed it (counted, not believed), the error and the bound, and is one of

* pass: a kernel ran and every output and gradient is inside the bounds of `inti_kernels.testing`;
* FAIL: it isn't, or it raised;
* not covered: the reference ran, so nothing was shown of any kernel;
* not run: the backend can't run here, and why.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import backends, ops, testing
from ..modules import FusedInTI
from ..ops.depthwise_conv3d import CASES
from . import _environment
from ._coverage import watch
from ._tables import Progress, print_table

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
AUTOCASTS = (torch.bfloat16, torch.float16)
SIZES: dict[str, Any] = {"dim": 34, "frames": 8, "grid": (5, 3), "batch": 2}
# Many tokens, so that every thread has work, and a width that fills vector registers.
FULL: dict[str, Any] = {"dim": 192, "grid": (14, 14), "batch": 1}
# Triton's interpreter takes a second for what a GPU does in microseconds, the emulator of CUDA not much less: fewer
# rows, programs and draws.
INTERPRETED: dict[str, Any] = {"dim": 32, "frames": 4, "grid": (3, 2), "batch": 1}
INTERPRETED_FULL: dict[str, Any] = {"dim": 36, "frames": 2, "grid": (9, 8), "batch": 1}
INTERPRETED_DRAWS = 8
# Of a plain ViT, of none, and of registers.
PREFIXES = (1, 0, 5)
ABLATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"context": ()},
    {"context": ("cube",)},
    {"fusion": "add"},
    {"fusion": "cat"},
    {"head": "sigmoid"},
    {"head": "attention"},
    {"prefix": 0},
    {"prefix": 5, "hidden": 20},
)


# Of which a row takes seconds where kernels are interpreted; the rows of the module, which is a chain of them, have
# their cases.
_OF_SEVERAL_PASSES = ("token_features", "interpolation_head")


@dataclass
class Row:
    """One line of the report."""

    what: str
    case: str
    dtype: str
    backend: str  # what executed, by the counters
    status: str
    comparisons: list[testing.Comparison] = field(default_factory=list)
    note: str = ""

    @property
    def worst(self) -> testing.Comparison | None:
        """The comparison that used most of its bound."""
        return max(self.comparisons, key=lambda row: row.used, default=None)


@dataclass
class Job:
    """A row to be: what to run, or why it can't be."""

    what: str
    case: str
    dtype: str
    run: Callable[[], list[testing.Comparison]] | None
    why_not: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--backend",
        choices=(*backends.BACKENDS, "auto"),
        help="check this backend only, an error if it can't run here (default: INTI_BACKEND if that names one, else "
        "every backend that can)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.epilog = (
        "Exit status: 0 if at least one row passed and none failed; 1 if one failed, if no kernel ran at all, or if "
        "the device or the backend asked for can't be used."
    )


def run(args: argparse.Namespace) -> int:
    """Runs all jobs and prints a row each; returns the exit status."""
    start = time.perf_counter()
    try:
        device = _environment.usable_device(args.device)
        chosen = _choose(args.backend, device)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    jobs = [job for backend in chosen for job in _jobs(backend, device)]
    rows = []
    with Progress(len(jobs)) as progress:
        for job in jobs:
            progress.step(f"{job.what} {job.case} {job.dtype}".strip())
            rows.append(_row(job))
    counts = Counter(row.status for row in rows)
    if args.json:
        print(json.dumps(_as_json(rows, counts, device), indent=2, ensure_ascii=False))
    else:
        _print(rows, counts, device, time.perf_counter() - start)
    return 0 if counts["pass"] and not counts["FAIL"] else 1


def _choose(backend: str | None, device: torch.device) -> list[str]:
    """The backends to check: the one asked for, or all that are not the reference."""
    backend = backends.requested(backend)
    if backend == "auto":
        return [name for name in backends.BACKENDS if name != "reference"]
    if reasons := backends.why_not(backend, device=device):
        raise RuntimeError(f"backend {backend!r} can't run on {device}: {' '.join(reasons)}")
    return [backend]


def _jobs(backend: str, device: torch.device) -> Iterator[Job]:
    """Every op and FusedInTI by one backend; where it can't run at all, one line that says why."""
    if reasons := backends.why_not(backend, device=device):
        for what in (*ops.OPS, "FusedInTI"):
            yield Job(what, f"backend {backend}", "", None, " ".join(reasons))
        return
    for op in ops.OPS:
        yield from _op_jobs(op, backend, device)
    yield from _module_jobs(backend, device)


def _op_jobs(op: str, backend: str, device: torch.device) -> Iterator[Job]:
    # Where the reference runs instead, one row says so.
    covered = backend in backends.HAS_KERNEL[op]
    interpreted = _interpreted(backend, device)
    sizes = INTERPRETED if interpreted else SIZES
    for dtype in DTYPES if covered else (torch.float32,):
        if reasons := backends.why_not(backend, op, device=device, dtype=dtype) if covered else []:
            yield Job(op, "", _name(dtype), None, " ".join(reasons))
            continue
        for case, options in _op_options(op, interpreted) if covered else [("", {})]:
            arguments = testing.op_cases(op, **{**sizes, **options}, dtype=dtype, device=device)
            yield Job(op, case, _name(dtype), _Comparisons(op, arguments, backend))
    if covered and device.type == "cpu":
        yield Job(op, "gradcheck", _name(torch.float64), _Gradcheck(op, backend, interpreted))


def _interpreted(backend: str, device: torch.device) -> bool:
    return backend in ("triton", "cuda") and device.type == "cpu"


def _op_options(op: str, interpreted: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    convolutions = CASES if op == "depthwise_conv3d" else CASES[:1]
    for prefix in PREFIXES[:1] if interpreted and op in _OF_SEVERAL_PASSES else PREFIXES:
        for kernel, stride in convolutions[:1] if interpreted and prefix != 1 else convolutions:
            options: dict[str, Any] = {"prefix": prefix}
            label = f"prefix {prefix}"
            if op == "depthwise_conv3d":
                options |= {"kernel": kernel, "temporal_stride": stride}
                label = f"{'×'.join(map(str, kernel))} / {stride}, {label}"
            yield label, options
    if not interpreted or op not in _OF_SEVERAL_PASSES:
        yield "no position", {"position": False}
    if op == "interpolation_head" and not interpreted:
        for context in ((), ("cube",), ("frame",)):
            yield f"context {_label(context)}", {"context": context}
    full = INTERPRETED_FULL if interpreted else FULL
    yield f"{'×'.join(map(str, full['grid']))}, dim {full['dim']}", full


def _module_jobs(backend: str, device: torch.device) -> Iterator[Job]:
    interpreted = _interpreted(backend, device)
    for ablation in ABLATIONS:
        # The others run the same kernels.
        if interpreted and ablation not in ({}, {"context": ()}, {"head": "sigmoid"}, {"prefix": 0}):
            continue
        case = ", ".join(f"{name} {_label(value)}" for name, value in ablation.items()) or "as in the paper"
        for dtype in (torch.float64, torch.float32) if not ablation else (torch.float32,):
            yield Job("FusedInTI", case, _name(dtype), _Module(ablation, backend, device, dtype, None))
    yield Job("FusedInTI", "recompute", "float32", _Module({}, backend, device, torch.float32, None, recompute=True))
    for dtype in AUTOCASTS:
        if reasons := backends.why_not(backend, device=device, dtype=dtype):
            yield Job("FusedInTI", "autocast", _name(dtype), None, " ".join(reasons))
            continue
        yield Job("FusedInTI", "autocast", _name(dtype), _Module({}, backend, device, torch.float32, dtype))


@dataclass
class _Comparisons:
    op: str
    arguments: testing.OpCase
    backend: str

    def __call__(self) -> list[testing.Comparison]:
        return testing.three_way(self.op, *self.arguments, backend=self.backend)


@dataclass
class _Gradcheck:
    """The kernels' own derivatives by finite differences, in float64; raises with the numbers if they are wrong."""

    op: str
    backend: str
    fast: bool

    def __call__(self) -> list[testing.Comparison]:
        # The LayerNorm of two channels has no gradient to speak of.
        dim = 4 if self.op == "token_features" else 2
        case = testing.op_cases(self.op, dim=dim, frames=4, grid=(2, 2), dtype=torch.float64)
        names = list(case.inputs)

        def call(*tensors: torch.Tensor) -> Any:
            return getattr(ops, self.op)(**dict(zip(names, tensors, strict=True)), **case.kwargs, backend=self.backend)

        leaves = tuple(tensor.requires_grad_() for tensor in case.inputs.values())
        torch.autograd.gradcheck(call, leaves, fast_mode=self.fast)
        return []


@dataclass
class _Module:
    ablation: dict[str, Any]
    backend: str
    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None
    recompute: bool = False

    def __call__(self) -> list[testing.Comparison]:
        interpreted = _interpreted(self.backend, self.device)
        sizes, draws = (INTERPRETED, INTERPRETED_DRAWS) if interpreted else (SIZES, None)
        inti, x = testing.module_case(**{**sizes, **self.ablation}, dtype=self.dtype, device=self.device)
        fused = FusedInTI.from_reference(inti, backend=self.backend, recompute=self.recompute)
        return testing.three_way_module(fused, x, autocast=self.autocast, draws=draws)


def _row(job: Job) -> Row:
    """Runs a job and says what became of it."""
    if job.run is None:
        return Row(job.what, job.case, job.dtype, "", "not run", note=job.why_not)
    try:
        with watch(job.what) as ran:
            comparisons = job.run()
    except Exception as error:  # whatever a kernel raises is a row that failed, not the end of the report
        return Row(job.what, job.case, job.dtype, "", "FAIL", note=f"{type(error).__name__}: {error}")
    row = Row(job.what, job.case, job.dtype, str(ran), "pass" if ran.covered else "not covered", comparisons, ran.note)
    if failed := [comparison for comparison in comparisons if not comparison.ok]:
        row.status, row.note = "FAIL", "; ".join(f"{comparison.name}: {comparison.note}" for comparison in failed)
    return row


def _print(rows: Sequence[Row], counts: Counter[str], device: torch.device, seconds: float) -> None:
    columns = ("case", "dtype", "executed", "rms/rms", "max error", "bound", "used", "worst", "status")
    print(f"Against the reference on {device}: {_environment.device_name(device)}")
    for what in dict.fromkeys(row.what for row in rows):
        cells = []
        for row in (row for row in rows if row.what == what):
            figures, worst = ("", "", "", "", ""), row.worst
            if worst is not None:
                figures = (f"{worst.relative:.1e}", f"{worst.error:.1e}", f"{worst.bound:.1e}", f"{worst.used:.0%}")
                figures = (*figures, worst.name)
            note = row.note if row.status not in ("FAIL", "not run") else ""
            status = f"{row.status}: {note}" if note else row.status
            cells.append((row.case, row.dtype, row.backend, *figures, status))
        print_table(what, columns, cells, right=columns[3:7], fold=("worst", "status"))
    print("rms/rms: RMS of the error over RMS of the reference. used: the largest share of its bound that the maximum,")
    print("RMS or mean error has; worst: the output or gradient where that is. Bounds: inti_kernels/testing.py.")
    # What is the same for many rows is said once.
    for status, note in dict.fromkeys((row.status, row.note) for row in rows if row.status in ("FAIL", "not run")):
        where = dict.fromkeys(row.what for row in rows if (row.status, row.note) == (status, note))
        print(f"{status}: {', '.join(where)}: {note}")
    print(", ".join(f"{counts[s]} {s}" for s in ("pass", "FAIL", "not covered", "not run")) + f" in {seconds:.0f} s")
    if not counts["pass"] and not counts["FAIL"]:
        print("No kernel ran here; `python -m inti_kernels info` says why.", file=sys.stderr)


def _as_json(rows: Sequence[Row], counts: Counter[str], device: torch.device) -> dict[str, Any]:
    listed = []
    for row in rows:
        entry = asdict(row)
        entry["comparisons"] = [asdict(comparison) for comparison in row.comparisons]
        listed.append(entry)
    return {"environment": _environment.summary(device), "counts": dict(counts), "rows": listed}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _label(value: Any) -> str:
    return ("+".join(value) or "none") if isinstance(value, tuple) else str(value)
