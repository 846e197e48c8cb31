"""`python -m inti_kernels bench`: ops, the module and a whole model, timed against PyTorch after they were verified.

How to read it is in benchmarks/README.md. A contender that fails its comparison, or that only ran the reference, gets a
row that says so and no time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import backends
from . import _environment
from ._clip import MODELS
from ._contest import contest, ticks
from ._stopwatch import COMPILE, EAGER, FLOOR, FUSED, MODEL, RECOMPUTE, Task, TimingFailed
from ._tables import Progress, kibibytes, print_table
from ._traffic import COUNTED, count, count_elsewhere

if TYPE_CHECKING:
    from ..benchmarks import Sizes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Installed from the folder benchmarks/ of the source tree (setup.py).
BENCHMARKS = "inti_kernels.benchmarks"
# benchmarks/__init__.py has the same list; this one is here so that --help needs no benchmark.
OPS = ("pair_interpolate", "depthwise_conv3d", "token_features", "interpolation_head", "inti")
# Whose defaults are those of benchmarks.Sizes; the model has its own.
SIZES = ("dim", "frames", "grid", "batch", "prefix")
REPEATS = 20
TOWER = "vit_b_16"  # of _clip.MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("--dim", type=_positive, help="C (default: 768)")
    parser.add_argument("--frames", type=_positive, help="T, even (default: 16)")
    parser.add_argument("--grid", type=_grid, metavar="HxW", help="patches (default: 14x14)")
    parser.add_argument("--batch", type=_positive, help="clips (default: 1)")
    parser.add_argument("--prefix", type=int, help="tokens before the patches (default: 1)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of an op's tensors; for the module and the model, bfloat16 and float16 mean autocast of float32 "
        "(default: float32)",
    )
    parser.add_argument(
        "--op",
        choices=("all", *OPS, MODEL),
        default="all",
        help="inti is the module; model, not among all, is CLIP ViT-B/16 with random weights on a clip of 16 frames, "
        "compressed by InTI, FusedInTI, InTI^temp and the paper's baselines, ÷ Naive (default: all)",
    )
    parser.add_argument(
        "--model", choices=MODELS, help=f"the tower of --op {MODEL}, which this implies (default: {TOWER})"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="time the module against its floor over frames, patches and batch, from the sizes given on, to see that "
        "time grows as they do; --plot draws the line",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--backend", choices=(*backends.BACKENDS, "auto"), help="of the fused contender")
    parser.add_argument("--threads", type=_positive, help="torch's threads (default: as torch starts)")
    parser.add_argument(
        "--repeats", type=_positive, metavar="N", help=f"timed rounds (default: {REPEATS}; 5 of the model)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--heap",
        choices=("system", "kept"),
        default="system",
        help="kept tells glibc to give no memory back to the system between steps (default: system, as it comes)",
    )
    parser.add_argument(
        "--traffic",
        action="store_true",
        help="time nothing: count the bytes that the Triton kernels move at these sizes, in its interpreter (needs "
        "no GPU; printed beside the times of the triton backend anyway); with --backend cuda, those of the CUDA "
        "kernels, in the emulator that INTI_CUDA_LIBRARY names",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to a new file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the medians into a new file, such as bench.png")
    parser.epilog = "Exit status: 0; 1 if a kernel failed its comparison or what was asked for can't be done."


def run(args: argparse.Namespace) -> int:
    """Verifies and times; returns the exit status."""
    if args.model and args.op == "all":
        args.op = MODEL
    try:
        device = _prepare(args)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    try:
        from ..benchmarks import Sizes
    except ModuleNotFoundError as error:
        if error.name != BENCHMARKS:
            raise
        print(
            f"the benchmarks are not installed: this package was imported from its sources, where {BENCHMARKS} is the "
            "folder benchmarks/. In the source tree, run `pip install -e .`, or `make bench`",
            file=sys.stderr,
        )
        return 1
    sizes = Sizes(**{name: value for name in SIZES if (value := getattr(args, name)) is not None})
    dtype = DTYPES[args.dtype]
    names = OPS if args.op == "all" else (args.op,)
    facts = {**_environment.summary(device), "heap": args.heap, "dtype": args.dtype, **vars(sizes)}
    if args.traffic:
        return _only_traffic(names, sizes, dtype, args.json, facts, "cuda" if args.backend == "cuda" else "triton")
    time = _time_model if args.op == MODEL else _time_sweep if args.sweep else _time_ops
    try:
        rows, plot = time(args, sizes, device, facts)
    except (TimingFailed, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1, ensure_ascii=False) + "\n")
    if args.plot:
        plot(rows, args.plot, _title(facts))
    in_triton = [name for name in names if any(r["op"] == name and "triton" in r["executed"] for r in rows)]
    if in_triton and not args.sweep and args.op != MODEL:
        # Last, and of one clip: in the interpreter a large batch takes as long as it is large.
        _only_traffic(in_triton, replace(sizes, batch=1), dtype, None, {**facts, "batch": 1}, "triton")
    return int(any(row["status"] == "FAIL" and row["contender"] != COMPILE for row in rows))


Plot = Callable[[Sequence[dict[str, Any]], Path, str], None]


def _time_ops(
    args: argparse.Namespace, sizes: Sizes, device: torch.device, facts: dict[str, Any]
) -> tuple[list[dict[str, Any]], Plot]:
    """Ops and the module against PyTorch: prints the tables, and returns the rows and what draws them."""
    from ._plot import plot

    names = OPS if args.op == "all" else (args.op,)
    start = (EAGER, *(() if args.no_compile else (COMPILE,)), FUSED)
    module = (*start, RECOMPUTE, FLOOR)
    tasks = [(_task(name, sizes, args, module if name == "inti" else start), sizes) for name in names]
    rows = [{**facts, **row} for row in _contests(tasks, args, device)]
    for name in names:
        _print(f"{name}, {_title(facts)}", [row for row in rows if row["op"] == name])
    print("GB/s and GFLOP/s are of the least bytes and multiply-accumulates (benchmarks/README.md).")
    return rows, plot


def _time_sweep(
    args: argparse.Namespace, sizes: Sizes, device: torch.device, facts: dict[str, Any]
) -> tuple[list[dict[str, Any]], Plot]:
    """The module against its floor at several sizes: prints the tables, and returns the rows and what draws them."""
    from . import _sweep

    swept = _sweep.sizes(sizes)
    tasks = [(_task("inti", each, args, (FUSED, FLOOR)), each) for _, each in swept]
    found = _contests(tasks, args, device)
    each_size = [(axis, each) for axis, each in swept for _ in range(len(found) // len(swept))]
    rows = [
        {**facts, **vars(each), "tokens": each.tokens, "axis": axis, **row}
        for (axis, each), row in zip(each_size, found, strict=True)
    ]
    _sweep.show(rows, _title(facts))
    return rows, _sweep.plot


def _time_model(
    args: argparse.Namespace, sizes: Sizes, device: torch.device, facts: dict[str, Any]
) -> tuple[list[dict[str, Any]], Plot]:
    """The whole model: prints the table, and returns the rows and what draws them."""
    from . import _towers

    model = args.model or TOWER
    task = _towers.task(model, args.dtype, device, args.backend, args.repeats)
    about, seconds = _towers.foretell(task, device)
    print(f"The matrix products of this run take {seconds / 60:.1f} minutes, the whole more.", file=sys.stderr)
    with Progress(_towers.ticks(task)) as progress:
        found = _towers.contest(task, about, kept_heap=args.heap == "kept", tick=progress.step)
    facts = facts | vars(_towers.compressed_sizes(model)[0])
    rows = [{**facts, **row} for row in found]
    title = f"{model}, {_title(facts)}"
    _towers.show(rows, title)
    return rows, lambda rows, path, _: _towers.plot(rows, path, title)


def _contests(
    tasks: Sequence[tuple[Task, Sizes]], args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """The rows of all workloads, in turn."""
    from ..benchmarks import load

    rows = []
    with Progress(sum(ticks(task) for task, _ in tasks)) as progress:
        for task, sizes in tasks:
            few_tokens = replace(sizes, frames=min(sizes.frames, 4), grid=(3, 3), batch=1)
            workload, small = (
                load(task.workload, s, DTYPES[args.dtype], device, args.backend) for s in (sizes, few_tokens)
            )
            rows += contest(workload, small, task, kept_heap=args.heap == "kept", tick=progress.step)
    return rows


def _only_traffic(
    names: Sequence[str], sizes: Sizes, dtype: torch.dtype, path: Path | None, facts: dict[str, Any], backend: str
) -> int:
    try:
        traffic = _traffic_rows(names, sizes, dtype, backend)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    _print_traffic(traffic, _title(facts), backend)
    if path:
        path.write_text(json.dumps({"traffic": traffic}, indent=1, ensure_ascii=False) + "\n")
    return 0


def _traffic_rows(names: Sequence[str], sizes: Sizes, dtype: torch.dtype, backend: str) -> list[dict[str, Any]]:
    """Of the ops that memory limits; the module's are those of its ops."""
    wanted = [op for op in COUNTED[backend] if op in names or "inti" in names]
    if backend == "triton":
        rows = [row for op in wanted for row in count_elsewhere(op, dtype, **vars(sizes))]
    else:
        rows = [row for op in wanted for row in count(op, dtype, backend=backend, **vars(sizes))]
    return [{"backend": backend, **asdict(row), **vars(sizes)} for row in rows]


def _print_traffic(rows: Sequence[dict[str, Any]], title: str, backend: str) -> None:
    unit = "programs" if backend == "triton" else "blocks"
    columns = ("op", "pass", unit, "traffic", "through 6 MiB L2")
    cells = [
        (f"{r['op']} {r['case']}", r["stage"], str(r["programs"]), f"{r['traffic']:.2f}", f"{r['through_l2']:.2f}")
        for r in rows
    ]
    kernels, where = {
        "triton": ("Triton", "V100's launch settings touch in Triton's interpreter"),
        "cuda": ("CUDA", "the kernels touch in the emulator"),
    }[backend]
    heading = f"Bytes moved by the {kernels} kernels over the least possible, {title}"
    print_table(heading, columns, cells, right=columns[2:])
    print(f"Counted from the addresses that {where} (benchmarks/README.md).")


def _task(name: str, sizes: Sizes, args: argparse.Namespace, contenders: tuple[str, ...]) -> Task:
    return Task(
        workload=name,
        sizes=vars(sizes),
        dtype=args.dtype,
        device=args.device,
        backend=args.backend,
        contenders=contenders,
        repeats=args.repeats or REPEATS,
        threads=torch.get_num_threads(),
    )


def _prepare(args: argparse.Namespace) -> torch.device:
    """Checks what was asked for, before minutes are spent on it; returns the device."""
    if args.op == MODEL and (given := [f"--{name}" for name in SIZES if getattr(args, name) is not None]):
        raise ValueError(f"--op {MODEL} is a model of one size: leave out {', '.join(given)}")
    if args.model and args.op != MODEL:
        raise ValueError(f"--model is the tower of --op {MODEL}, got --op {args.op}")
    if args.sweep and args.op not in ("all", "inti"):
        raise ValueError(f"--sweep is of the module: --op inti, got {args.op}")
    if args.traffic and (args.sweep or args.op == MODEL):
        raise ValueError(f"--traffic counts at one size of an op or the module: no --sweep, no --op {MODEL}")
    if args.frames is not None and args.frames % 2:
        raise ValueError(f"--frames must be even to form pairs, got {args.frames}")
    if args.dim is not None and args.dim % 2:
        raise ValueError(f"--dim must be even (the token level makes dim/2 of each frame), got {args.dim}")
    if args.prefix is not None and args.prefix < 0:
        raise ValueError(f"--prefix must be 0 or more, got {args.prefix}")
    for path in (args.json, args.plot):
        if path is not None and path.exists():
            raise ValueError(f"{path} exists and is not overwritten; name another file, or remove it")
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} for {path.name}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib: pip install 'inti_kernels[bench]'")
    device = _environment.usable_device(args.device)
    if args.backend and (reasons := backends.why_not(args.backend, device=device, dtype=DTYPES[args.dtype])):
        raise RuntimeError(f"backend {args.backend!r} can't run on {device}: {' '.join(reasons)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    return device


def _title(facts: dict[str, Any]) -> str:
    grid = "×".join(map(str, facts["grid"]))
    where = facts["device_name"] + (f", {facts['threads']} threads" if "threads" in facts else "")
    where += ", kept heap" if facts["heap"] == "kept" else ""
    return (
        f"{facts['dtype']}, x [{facts['batch']}, {facts['frames']}, {facts['prefix']} + {grid}, {facts['dim']}], "
        f"{where}, torch {facts['torch']}"
    )


def _print(title: str, rows: Sequence[dict[str, Any]]) -> None:
    columns = ["mode", "contender", "ms 20 %", "50 %", "80 %", "GB/s", "GFLOP/s", "× eager", "× best", "/ floor"]
    columns += ["kept", "peak", "faults", "of bound", "status"]
    formats = {"ms_20": ".3f", "ms_50": ".3f", "ms_80": ".3f", "gb_per_s": ".1f", "gflop_per_s": ".1f"}
    formats |= {"speedup_eager": ".2f", "speedup_best": ".2f", "over_floor": ".2f"}
    cells, notes = [], {}
    for row in rows:
        figures = ["" if row[key] is None else format(row[key], form) for key, form in formats.items()]
        memory = [kibibytes(row["kept_bytes"]), kibibytes(row["peak_bytes"])]
        memory.append("" if row["page_faults"] is None else str(row["page_faults"]))
        share = "" if row["share_of_bound"] is None else f"{row['share_of_bound']:.0%}"
        mode = {"forward+backward": "both"}.get(row["mode"], row["mode"]) if row["contender"] == EAGER else ""
        name = row["contender"] if row["executed"] == "torch" else f"{row['contender']} ({row['executed']})"
        cells.append([mode, name, *figures, *memory, share, row["status"]])
        if row["note"]:
            notes[row["contender"]] = f"{row['status']}: {row['note']}"
    empty = [index for index in range(len(columns)) if not any(line[index] for line in cells)]
    cells = [[cell for index, cell in enumerate(line) if index not in empty] for line in cells]
    columns = [column for index, column in enumerate(columns) if index not in empty]
    autocast = " (autocast)" if rows[0]["autocast"] else ""
    print_table(title + autocast, columns, cells, right=columns[2:-1], fold=("status",))
    for name, note in notes.items():
        print(f"{name}, {note}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _grid(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be HxW, such as 14x14, got {text!r}") from None
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1x1, got {text!r}")
    return height, width
