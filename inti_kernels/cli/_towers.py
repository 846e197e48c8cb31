"""`bench --op model`: a whole CLIP vision tower on one clip, compressed in every way there is, ÷ Naive."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import FusedInTI, testing
from ..benchmarks import Sizes, load
from ..models import CompressedViT, compress
from ..models.cost import by_formula, count_macs, total
from . import _clip, _contest, _plot, _video
from ._stopwatch import EAGER, MODEL, Task, measure
from ._stopwatch import FUSED as FUSED_MODULE
from ._tables import kibibytes, print_table
from ._timing import Contender, autograd_contender, by_mode, quantiles

FRAMES = _clip.FRAMES
# Naive runs all blocks on all frames. "mean" replaces a pair by its average, which costs next to nothing: what is above
# it is the price of the others that halve frames, all after the model's blocks ``after``. The budget is InTI's cost:
# ToMe and STA, which take tokens out of frames instead, are set to it. A block earlier or later is a tenth of what a
# ViT-B costs, and none of the others is as far off where InTI stands: they stay there, and how far off is shown.
NAIVE, MEAN, LINEAR, CONV = "Naive", "mean", "LinearPooling", "ConvPooling"
TOME, STA, INTI, FUSED, TEMPORAL = "ToMe", "STA", "InTI", "FusedInTI", "InTI^temp"
WAYS = (NAIVE, MEAN, LINEAR, CONV, TOME, STA, INTI, FUSED, TEMPORAL)
OURS = (FUSED, TEMPORAL)
INFERENCE, TRAINING = "inference", "training step"
MODES = (INFERENCE, TRAINING)
# A round of ViT-B/16 takes minutes where it takes long, and one is enough to have every page.
WARM_UP = 1
REPEATS = 5
# Of the matrix products by which the length of a run is foretold: [tokens of a clip, 768] · [768, 4·768].
PRODUCT = (FRAMES * 197, 768, 4 * 768)


class PairMean(nn.Module):
    """The plain average of each pair of frames: [B, T, N, C] → [B, T/2, N, C]."""

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
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


def _towers(model: str, backend: str | None, device: torch.device) -> dict[str, CompressedViT]:
    """By way; random weights, which all share but InTI^temp, which freezes the tower's head."""
    clip, after = _clip.build_tower(model), _clip.MODELS[model].after
    towers = {INTI: compress(clip, FRAMES, after, "inti_reference")}
    inti, adapter = towers[INTI].insertions, towers[INTI].adapter
    for number, module in enumerate(inti.values()):
        testing.randomize(module, seed=number)

    def halving(make: Callable[[nn.Module], nn.Module]) -> CompressedViT:
        return CompressedViT(adapter, FRAMES, {int(block): make(module) for block, module in inti.items()})

    budget = total(by_formula(towers[INTI])).macs / 1e9
    own = {"backend": backend}
    towers |= {
        NAIVE: compress(clip, FRAMES, method="naive"),
        MEAN: halving(lambda _: PairMean()),
        LINEAR: compress(clip, FRAMES, after, "linear_pooling"),
        CONV: compress(clip, FRAMES, after, "conv_pooling"),
        TOME: compress(clip, FRAMES, method="tome", gflops=budget),
        STA: compress(clip, FRAMES, method="sta", gflops=budget),
        FUSED: halving(lambda module: FusedInTI.from_reference(module, backend=backend)),
        TEMPORAL: compress(_clip.build_tower(model), FRAMES, after, "inti", "uniformer_v2", inti=own, uniformer_v2=own),
    }
    towers[TEMPORAL].insertions.load_state_dict(inti.state_dict())
    return {way: towers[way].to(device) for way in WAYS}


def _setting(tower: CompressedViT) -> str:
    """What was found for the budget."""
    own = tower.settings[tower.settings["method"]] if tower.reduction is not None else {}
    return ", ".join(f"{name} = {value}" for name, value in own.items())


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

        def forward(tower: CompressedViT = tower) -> Tensor:
            with _autocast(dtype, device):
                return tower(video)

        found[f"{way}, {INFERENCE}"] = Contender(torch.no_grad()(forward), lambda _: None)
        found[f"{way}, {TRAINING}"] = autograd_contender(
            forward, [parameter for parameter in tower.parameters() if parameter.requires_grad]
        )
    return {name: found[name] for name in task.contenders}


@contextmanager
def _autocast(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    enabled = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, dtype=dtype if enabled else torch.bfloat16, enabled=enabled):
        yield


def ticks(task: Task) -> int:
    """How often `contest` calls its ``tick``."""
    return len(task.contenders) * (task.warm_up + task.repeats) + 2 * len(compressed_sizes(task.sizes["model"]))


def foretell(task: Task, device: torch.device) -> tuple[dict[str, dict[str, Any]], float]:
    """By way ``macs`` of an inference, also over the budget's, parameters and the setting, and the seconds that the
    products of the whole run take at least.

    A training step is three inferences. The products' speed is that of one product of the tower's MLP.
    """
    model = task.sizes["model"]
    meta = torch.device("meta")
    video, found = _video_of(model, meta), {}
    for way, tower in _towers(model, task.backend, meta).items():
        macs, parameters = count_macs(tower, video), sum(parameter.numel() for parameter in tower.parameters())
        found[way] = {"macs": macs, "parameters": parameters, "setting": _setting(tower)}
    for facts in found.values():
        facts["over_budget"] = facts["macs"] / found[INTI]["macs"]
    dtype = getattr(torch, task.dtype)
    rows, inner, columns = PRODUCT
    a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        float(torch.mm(a, b)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    rate = rows * inner * columns / min(seconds)
    macs = sum(facts["macs"] for facts in found.values())
    return found, 4 * macs * (task.warm_up + task.repeats) / rate


def contest(
    task: Task, facts: dict[str, dict[str, Any]], *, kept_heap: bool, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Verifies FusedInTI on tokens of every compression's size, and times all ways.

    Args:
        task: of `task`.
        facts: of `foretell`.
        kept_heap, tick: as in `_contest.contest`.

    Returns:
        Rows of plain data, for every way and mode; figures of time are None where nothing was timed.
    """
    fused = _verified(task, tick)
    contenders = tuple(name for name in task.contenders if fused.status == "ok" or not name.startswith(OURS))
    timed = Task(**{**vars(task), "contenders": contenders})
    measured = measure(timed, lambda name: tick(f"{MODEL}: {name}"), kept_heap)
    rows = []
    for mode in MODES:
        steps = {way: measured[name].steps for way in WAYS if (name := f"{way}, {mode}") in measured}
        found = {way: quantiles(by_mode(own)["forward+backward"]) for way, own in steps.items()}
        for way in WAYS:
            row: dict[str, Any] = {"op": MODEL, "mode": mode, "contender": way, "model": task.sizes["model"]}
            row |= {"executed": "torch", "status": "ok", "note": "", **facts[way]}
            row |= dict.fromkeys(("ms_20", "ms_50", "ms_80", "over_naive", "rounds", "page_faults", "peak_bytes"))
            if way in OURS:
                row |= {"executed": fused.executed, "status": fused.status, "note": fused.note}
            if way in found:
                row |= zip(("ms_20", "ms_50", "ms_80"), (1e3 * q for q in found[way]), strict=True)
                row |= {"over_naive": found[way][1] / found[NAIVE][1], "rounds": len(steps[way])}
                row |= {"page_faults": statistics.median_low(step.page_faults for step in steps[way])}
                row |= {"peak_bytes": measured[f"{way}, {mode}"].peak_bytes}
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
    columns = ("mode", "way", "GMAC", "ms 20 %", "50 %", "80 %", "÷ Naive", "GMAC ÷ Naive", "GMAC ÷ InTI", "peak")
    columns += ("faults", "setting", "status")
    cells = []
    for row in rows:
        mode = row["mode"] if row["contender"] == NAIVE else ""
        name = row["contender"] if row["executed"] == "torch" else f"{row['contender']} ({row['executed']})"
        times = ["" if row[key] is None else format(row[key], ".0f") for key in ("ms_20", "ms_50", "ms_80")]
        ratio = "" if row["over_naive"] is None else format(row["over_naive"], ".3f")
        faults = "" if row["page_faults"] is None else str(row["page_faults"])
        ratios = (ratio, f"{row['macs'] / rows[0]['macs']:.3f}", f"{row['over_budget']:.3f}")
        memory = (kibibytes(row["peak_bytes"]), faults)
        operations = f"{row['macs'] / 1e9:.1f}"
        cells.append([mode, name, operations, *times, *ratios, *memory, row["setting"], row["status"]])
    print_table(title, columns, cells, right=columns[2:-2], fold=("status",))
    for note in sorted({f"{row['contender']}, {row['status']}: {row['note']}" for row in rows if row["note"]}):
        print(note)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws latency against GFLOPs (multiply-accumulates ×1e9), a panel a mode, with a line at the budget; rows without
    a time are left out."""
    budget = rows[0]["macs"] / rows[0]["over_budget"] / 1e9
    with _plot.saved(path, title, panels=len(MODES)) as axes:
        for axis, mode in zip(axes, MODES, strict=True):
            axis.axvline(budget, color="#bbbbbb", linewidth=1, linestyle="dotted", zorder=0)
            for row in (row for row in rows if row["mode"] == mode and row["ms_50"] is not None):
                x, below, above = row["macs"] / 1e9, row["ms_50"] - row["ms_20"], row["ms_80"] - row["ms_50"]
                style = {"color": _plot.COLOURS[row["contender"]], "label": row["contender"], "capsize": 2}
                axis.errorbar(x, row["ms_50"], ([below], [above]), fmt="o", **style)
            axis.set(title=mode, xlabel="GFLOPs of a clip", xlim=(0, None), ylim=(0, None))
        axes[-1].legend(fontsize=7, frameon=False, loc="lower left")
