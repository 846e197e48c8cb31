"""`python -m inti_kernels cost`: multiply-accumulates and parameters, counted by running a model and by formula.

Without arguments, those of the models in the paper's tables, beside the published figures; with some, those of one
model. Nothing is computed: the models are of tensors without data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import adapter_for, compress
from ..models.cost import PARTS, by_formula, count_macs, count_parameters, total
from ..models.methods import METHODS, halves_frames
from ..models.temporal import TEMPORAL
from ._clip import AFTER, FRAMES, MODELS, NAMES, block_numbers, build_tower, places, tower_name
from ._published import CLASSES, Published, rows
from ._tables import Progress, print_table

# What makes one model, of which any asks for one.
ONE = ("model", "after", "method", "temporal", "frames", "classes", "gflops", "options")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("--model", type=tower_name, metavar="NAME", help=f"the tower: {NAMES} (default: vit_b_16)")
    parser.add_argument("--after", type=block_numbers, metavar="I,J", help=AFTER)
    parser.add_argument("--method", choices=("naive", *METHODS), help="of compression (default: inti)")
    parser.add_argument("--temporal", choices=TEMPORAL, help="temporal modules (default: none)")
    parser.add_argument("--frames", type=int, metavar="T", help=f"of a clip (default: {FRAMES})")
    parser.add_argument("--classes", type=int, metavar="N", help="of a classifier (default: features only)")
    parser.add_argument(
        "--gflops", type=float, metavar="G", help="find the method's setting that costs the most up to this"
    )
    parser.add_argument(
        "--options",
        type=_options,
        metavar="JSON",
        help='of the method and the temporal modules, as compress() takes them: \'{"inti": {"fusion": "add"}}\'',
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures to a new file; - prints nothing else")
    parser.epilog = (
        "With none of the options but --json: the models of the paper's tables. Exit status: 0; 1 if a count by "
        "running and one by formula disagree or what was asked for can't be done."
    )


def run(args: argparse.Namespace) -> int:
    """Counts and prints; returns the exit status."""
    one = any(getattr(args, name) is not None for name in ONE)
    try:
        if args.json not in (None, "-") and Path(args.json).exists():
            raise ValueError(f"{args.json} exists and is not overwritten; name another file, or remove it")
        found = [_one(args)] if one else paper()
    except (ValueError, TypeError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.json == "-":
        print(json.dumps({"rows": found}, indent=1, ensure_ascii=False))
    elif one:
        _show_one(found[0])
    else:
        _show_paper(found)
    if args.json not in (None, "-"):
        Path(args.json).write_text(json.dumps({"rows": found}, indent=1, ensure_ascii=False) + "\n")
    wrong = [row for row in found if not row["agree"]]
    for row in wrong:
        counted = f"counted {row['macs']} and {row['parameters']}, by formula {row['parts']}"
        print(f"FAIL: {row['name']}: {counted}", file=sys.stderr)
    return int(bool(wrong))


def paper(published: Sequence[Published] | None = None) -> list[dict[str, Any]]:
    """The models of the paper's tables: figures of :func:`price`, and the published ones under ``published``."""
    published = rows() if published is None else published
    towers = {name: _tower(name) for name in dict.fromkeys(row.model for row in published)}
    found = []
    with Progress(len(published)) as progress:
        for row in published:
            progress.step(row.name)
            figures = {"gflops": row.gflops, "parameters": row.parameters, "top1": row.top1, "top5": row.top5}
            about = {"table": row.table, "name": row.name, "model": row.model, "published": figures}
            found.append(about | price(towers[row.model], **_arguments(row)))
    return found


def _arguments(row: Published) -> dict[str, Any]:
    """Of :func:`inti_kernels.compress`, for a row."""
    arguments: dict[str, Any] = {"after": row.after, "method": row.method, **row.options}
    if row.temporal:
        arguments |= {"temporal": "uniformer_v2", "num_classes": CLASSES.get(row.table, 400)}
    if row.budget:
        arguments["gflops"] = row.gflops
    return arguments


def price(tower: nn.Module, frames: int = FRAMES, **arguments: Any) -> dict[str, Any]:
    """What a compressed model of a tower costs, as plain data.

    Args:
        tower: of tensors without data (on the device meta).
        frames, arguments: of :func:`inti_kernels.compress`.

    Returns:
        ``macs`` of one clip and ``parameters``, both counted by running the model; ``parts``: by formula (macs,
        parameters) of each part and "total", the parameters None for towers that aren't CLIP's; ``agree``: whether both
        ways do; ``settings`` of the model.
    """
    with torch.device("meta"):
        model = compress(tower, frames, **arguments).eval()
        video = torch.empty(1, frames, 3, *model.adapter.image)
    found = {"macs": count_macs(model, video), "parameters": count_parameters(model), "settings": model.settings}
    cost = by_formula(model)
    parts = {name: vars(work) for name, work in {**cost, "total": total(cost)}.items()}
    model.uncompress()
    if not hasattr(tower, "visual_projection"):
        parts = {name: {**work, "parameters": None} for name, work in parts.items()}
    agree = all(own in (None, found[kind]) for kind, own in parts["total"].items())
    return {**found, "parts": parts, "agree": agree}


def _tower(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_tower(name)


def _one(args: argparse.Namespace) -> dict[str, Any]:
    name, method = args.model or "vit_b_16", args.method or "inti"
    tower = _tower(name)
    arguments: dict[str, Any] = {"method": method, "temporal": args.temporal}
    if args.after is not None or (halves_frames(method) and args.gflops is None):
        arguments["after"] = places(args.after, len(adapter_for(tower).blocks))
    arguments |= {"num_classes": args.classes, "gflops": args.gflops, **(args.options or {})}
    found = price(tower, FRAMES if args.frames is None else args.frames, **arguments)
    return {"name": f"{name}, {method}" + f", {args.temporal}" * bool(args.temporal), "model": name, **found}


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is no JSON: {error}") from None
    if not isinstance(options, dict) or not all(isinstance(value, dict) for value in options.values()):
        raise argparse.ArgumentTypeError(f"must be an object of objects, by name, got {text}")
    return options


def _show_one(row: dict[str, Any]) -> None:
    cells = []
    for part in (*PARTS, "total"):
        work = row["parts"][part]
        cells.append((part, _giga(work["macs"]), _mega(work["parameters"])))
    cells.append(("counted by running", _giga(row["macs"]), _mega(row["parameters"])))
    columns = ("part", "GFLOPs", "parameters (M)")
    settings = row["settings"]
    shown = {name: value for name, value in settings.items() if value not in (None, False, [])}
    title = f"{row['name']}: " + ", ".join(f"{name}={value}" for name, value in shown.items() if name != "method")
    print_table(title, columns, cells, right=columns[1:])
    print("GFLOPs are multiply-accumulates ×1e9 of one clip.")


def _show_paper(found: Sequence[dict[str, Any]]) -> None:
    columns = ("model", "GFLOPs: paper", "counted", "by formula", "params (M): paper", "counted ", "by formula ")
    columns += ("top-1", "top-5", "setting")
    for table in dict.fromkeys(row["table"] for row in found):
        cells = []
        for row in (row for row in found if row["table"] == table):
            ours, published = _ours(row), row["published"]
            counts = [text for kind, own in zip(("gflops", "parameters"), ours, strict=True)
                      for text in (_text(published[kind]), *own)]  # fmt: skip
            setting = _setting(row)
            cells.append([row["name"], *counts, _text(published["top1"]), _text(published["top5"]), setting])
        print_table(table, columns, cells, right=columns[1:-1], fold=("setting",))
    _show_parts(found)
    print(
        "GFLOPs are multiply-accumulates ×1e9 of one clip of 16 frames. The models with ^temp have a classifier, the "
        "others give CLIP's projection; accuracies are the paper's. ToMe and STA have the setting that costs the most "
        "up to the published GFLOPs."
    )


def _show_parts(found: Sequence[dict[str, Any]]) -> None:
    """Where the work of InTI_{5,7} is, without the head: what follows from the equations alone."""
    rows = {row["name"]: row["parts"] for row in found}
    cells = []
    for size, model in (("B", MODELS["vit_b_16"]), ("L", MODELS["vit_l_14"])):
        naive, inti = rows[f"Naive-{size}"], rows[f"InTI-{size} 5,7"]
        tower = inti["embed"]["macs"] + inti["blocks"]["macs"]
        # Half of the frames, then a quarter, are what pairs become.
        pairs = (FRAMES // 2 + FRAMES // 4) * (1 + (model.image // model.patch) ** 2)
        work = (naive["embed"]["macs"] + naive["blocks"]["macs"], tower, tower + 3 * model.dim**2 * pairs)
        cells.append([f"ViT-{size}", *map(_giga, (*work, tower + inti["compression"]["macs"]))])
    columns = ("tower", "Naive", "InTI 5,7: tower alone", "with 3·C² a token pair", "with all of the module")
    print_table("GFLOPs without CLIP's projection, by formula", columns, cells, right=columns[1:])


def _ours(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(counted, by formula) of multiply-accumulates and of parameters."""
    formula = row["parts"]["total"]
    return [
        (_giga(row["macs"]), _giga(formula["macs"])),
        (_mega(row["parameters"]), _mega(formula["parameters"])),
    ]


def _setting(row: dict[str, Any]) -> str:
    """What the budget set, or where the frames are halved."""
    settings = row["settings"]
    if settings["after"]:
        return f"after {', '.join(map(str, settings['after']))}"
    return ", ".join(f"{name} = {value}" for name, value in settings.get(settings["method"], {}).items())


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.2f}"


def _mega(parameters: int | None) -> str:
    return "" if parameters is None else f"{parameters / 1e6:.2f}"


def _text(figure: float | None) -> str:
    return "" if figure is None else f"{figure:g}" if isinstance(figure, int) else f"{figure:.1f}"
