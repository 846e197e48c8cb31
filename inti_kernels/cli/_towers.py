"""`bench --op model`: a whole CLIP vision tower on one clip, its frames halved twice in several ways, ÷ Naive."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import FusedInTI, InTI, testing
from ..benchmarks import Sizes, load
from . import _clip, _contest, _measure, _video
from ._stopwatch import EAGER, MODEL, Task, measure
from ._stopwatch import FUSED as FUSED_MODULE
from ._tables import print_table
from ._timing import Contender, autograd_contender, by_mode, quantiles

FRAMES = 16
# Naive runs all blocks on all frames; the others halve the frames after the model's blocks ``after``. "mean" replaces
# a pair by its average, which costs next to nothing: what is above it is the price of interpolation.
NAIVE, INTI, FUSED, MEAN = "Naive", "InTI", "FusedInTI", "mean"
WAYS = (NAIVE, INTI, FUSED, MEAN)
INFERENCE, TRAINING = "inference", "training step"
MODES = (INFERENCE, TRAINING)
# A round of ViT-B/16 takes a minute where it takes long, and one is enough to have every page.
WARM_UP = 1
REPEATS = 5
# Of the matrix products by which the length of a run is foretold: [tokens of a clip, 768] · [768, 4·768].
PRODUCT = (FRAMES * 197, 768, 4 * 768)


class PairMean(nn.Module):
    """The plain average of each pair of frames: [B, T, N, C] → [B, T/2, N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, 0::2] + x[:, 1::2]) / 2


def task(model: str, dtype: str, device: torch.device, backend: str | None, repeats: int | None) -> Task:
    """All ways and modes of a model (a name of `_clip.MODELS`)."""
    return Task(
        workload=MODEL,
        sizes={"model": model},
        dtype=dtype,
        device=str(device),
        backend=backend,
        contenders=tuple(f"{way}, {mode}" for mode in MODES for way in WAYS),
        repeats=repeats or REPEATS,
        threads=torch.get_num_threads(),
        warm_up=WARM_UP,
    )


def compressed_sizes(model: str) -> list[Sizes]:
    """The tokens that each compression of the model gets."""
    size = _clip.MODELS[model]
    grid = (size.image // size.patch,) * 2
    return [Sizes(size.dim, FRAMES >> level, grid) for level in range(len(size.after))]


def _towers(model: str, backend: str | None, device: torch.device) -> dict[str, _clip.VideoTower]:
    """By way; random weights, which all share."""
    clip, after = _clip.build_clip(model), _clip.MODELS[model].after
    inti = [InTI(sizes.dim, sizes.frames, sizes.grid) for sizes in compressed_sizes(model)]
    for number, module in enumerate(inti):
        testing.randomize(module, seed=number)
    compressions = {
        INTI: inti,
        FUSED: [FusedInTI.from_reference(module, backend=backend) for module in inti],
        MEAN: [PairMean() for _ in inti],
    }
    modules = {NAIVE: {}} | {way: dict(zip(after, each, strict=True)) for way, each in compressions.items()}
    return {way: _clip.VideoTower(clip, modules[way]).to(device) for way in WAYS}


def _video_of(model: str, device: torch.device) -> Tensor:
    """One clip of noise, normalised as pictures are: [1, T, 3, S, S]."""
    side = _clip.MODELS[model].image
    pictures = torch.rand(FRAMES, 3, side, side, generator=torch.Generator().manual_seed(0))
    return _video.normalise(pictures)[None].to(device)


def contenders(task: Task, device: torch.device) -> dict[str, Contender]:
    """Every way's inference, which has no backward, and its training step with every parameter trainable."""
    model = task.sizes["model"]
    video = _video_of(model, device)
    dtype = getattr(torch, task.dtype)
    found = {}
    for way, tower in _towers(model, task.backend, device).items():

        def forward(tower: _clip.VideoTower = tower) -> Tensor:
            with _autocast(dtype, device):
                return tower(video)

        found[f"{way}, {INFERENCE}"] = Contender(torch.no_grad()(forward), lambda _: None)
        found[f"{way}, {TRAINING}"] = autograd_contender(forward, list(tower.parameters()))
    return {name: found[name] for name in task.contenders}


@contextmanager
def _autocast(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    enabled = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, dtype=dtype if enabled else torch.bfloat16, enabled=enabled):
        yield


def ticks(task: Task) -> int:
    """How often `contest` calls its ``tick``."""
    return len(task.contenders) * (task.warm_up + task.repeats) + 2 * len(compressed_sizes(task.sizes["model"]))


def foretell(task: Task, device: torch.device) -> tuple[dict[str, int], float]:
    """Multiply-accumulates of an inference by way, and the seconds that the products of the whole run take at least.

    A training step is three inferences. The products' speed is that of one product of the tower's MLP.
    """
    model = task.sizes["model"]
    meta = torch.device("meta")
    video = _video_of(model, meta)
    macs = {way: _measure.count_macs(tower, video) for way, tower in _towers(model, "reference", meta).items()}
    dtype = getattr(torch, task.dtype)
    rows, inner, columns = PRODUCT
    a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        float(torch.mm(a, b)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    rate = rows * inner * columns / min(seconds)
    return macs, 4 * sum(macs.values()) * (task.warm_up + task.repeats) / rate


def contest(task: Task, macs: dict[str, int], *, kept_heap: bool, tick: Callable[[str], None]) -> list[dict[str, Any]]:
    """Verifies FusedInTI on tokens of every compression's size, and times all ways.

    Args:
        task: of `task`.
        macs: of `foretell`.
        kept_heap, tick: as in `_contest.contest`.

    Returns:
        Rows of plain data, for every way and mode; figures of time are None where nothing was timed.
    """
    fused = _verified(task, tick)
    contenders = tuple(n for n in task.contenders if fused.status == "ok" or not n.startswith(FUSED))
    timed = Task(**{**vars(task), "contenders": contenders})
    measured = measure(timed, lambda name: tick(f"{MODEL}: {name}"), kept_heap)
    rows = []
    for mode in MODES:
        steps = {way: measured[name].steps for way in WAYS if (name := f"{way}, {mode}") in measured}
        found = {way: quantiles(by_mode(own)["forward+backward"]) for way, own in steps.items()}
        for way in WAYS:
            row: dict[str, Any] = {"op": MODEL, "mode": mode, "contender": way, "model": task.sizes["model"]}
            row |= {"executed": "torch", "status": "ok", "note": "", "macs": macs[way]}
            row |= dict.fromkeys(("ms_20", "ms_50", "ms_80", "over_naive", "rounds", "page_faults"))
            if way == FUSED:
                row |= {"executed": fused.executed, "status": fused.status, "note": fused.note}
            if way in found:
                row |= zip(("ms_20", "ms_50", "ms_80"), (1e3 * q for q in found[way]), strict=True)
                row |= {"over_naive": found[way][1] / found[NAIVE][1], "rounds": len(steps[way])}
                row |= {"page_faults": statistics.median_low(step.page_faults for step in steps[way])}
            rows.append(row)
    return rows


def _verified(task: Task, tick: Callable[[str], None]) -> _contest.Entry:
    """What `bench --op inti` finds out about FusedInTI, at every compression's size; the first failure if there is
    one."""
    dtype, device = getattr(torch, task.dtype), torch.device(task.device)
    found = []
    for sizes in compressed_sizes(task.sizes["model"]):
        few_tokens = Sizes(sizes.dim, min(sizes.frames, 4), (3, 3))
        workload, small = (load("inti", s, dtype, device, task.backend) for s in (sizes, few_tokens))
        functions = {EAGER: workload.reference, FUSED_MODULE: workload.kernels[FUSED_MODULE]}
        entries = {name: _contest.Entry(workload.bind(function)) for name, function in functions.items()}
        _contest.verify(workload, small, entries, tick)
        found.append(entries[FUSED_MODULE])
    return next((entry for entry in found if entry.status != "ok"), found[0])


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the table."""
    columns = ("mode", "way", "GMAC", "ms 20 %", "50 %", "80 %", "÷ Naive", "GMAC ÷ Naive", "faults", "status")
    cells = []
    for row in rows:
        mode = row["mode"] if row["contender"] == NAIVE else ""
        name = row["contender"] if row["executed"] == "torch" else f"{row['contender']} ({row['executed']})"
        times = ["" if row[key] is None else format(row[key], ".0f") for key in ("ms_20", "ms_50", "ms_80")]
        ratio = "" if row["over_naive"] is None else format(row["over_naive"], ".3f")
        faults = "" if row["page_faults"] is None else str(row["page_faults"])
        operations = (f"{row['macs'] / 1e9:.1f}", f"{row['macs'] / rows[0]['macs']:.3f}")
        cells.append([mode, name, operations[0], *times, ratio, operations[1], faults, row["status"]])
    print_table(title, columns, cells, right=columns[2:-1], fold=("status",))
    for note in sorted({f"{row['contender']}, {row['status']}: {row['note']}" for row in rows if row["note"]}):
        print(note)
