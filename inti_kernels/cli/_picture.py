"""Pictures after the paper's figure 4: frames, weight maps, aggregated frames, and in the demo the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._video import require

COLOURS = "coolwarm"
OPACITY = 0.6
_PER_LINE = 8  # frames side by side at most, unless one output frame stands for more
_INCH = 1.25  # side of a frame
_GROUP_HEIGHT = 2 * _INCH + 0.42  # two rows and what is written at them


def frame_weights(weights: Sequence[Tensor]) -> Tensor:
    """Each original frame's weight in the output frame it ended in: the product over the compressions it went through.

    weights: one [T/2, N, 2] a compression, T halving from each to the next → [T, N]. Over the frames of one output
    frame they sum to one.
    """
    pairs = weights[0].shape[0]
    product = weights[0].new_ones(2 * pairs, weights[0].shape[1])
    frame = torch.arange(2 * pairs)
    for level, weight in enumerate(weights):
        number = frame >> level  # the frame's number among this compression's inputs
        product = product * weight[number >> 1, :, number & 1]
    return product


def upsample(maps: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Patch maps [T, H·W] → pixel maps [T, *size], bilinear: the sum over frames stays what it was."""
    x = maps.unflatten(1, grid)[:, None]
    return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)[:, 0]


def aggregate(pictures: Tensor, maps: Tensor, per_output: int) -> Tensor:
    """The weights applied to pixels: pictures [T, 3, H, W], maps [T, H, W] → [T/per_output, 3, H, W]."""
    return (pictures * maps[:, None]).unflatten(0, (-1, per_output)).sum(1)


@dataclass(frozen=True)
class Maps:
    """A clip and its weights, as both pictures show them.

    pictures: the clip [T, 3, H, W] in [0, 1]. indices: the frames' numbers in the video. pixels: each frame's weight in
    its output frame [T, H, W]. first: the first prefix token's [T], None without any. outputs: the aggregated frames
    [T/per_output, 3, H, W] in [0, 1]. scale: matplotlib's, of a weight's colour.
    """

    pictures: Tensor
    indices: Sequence[int]
    pixels: Tensor
    first: Tensor | None
    outputs: Tensor
    scale: Any

    @property
    def per_output(self) -> int:
        return len(self.pictures) // len(self.outputs)


def maps_of(
    pictures: Tensor, indices: Sequence[int], weights: Sequence[Tensor], grid: tuple[int, int], prefix: int
) -> Maps:
    """What is drawn of a clip; weights: one [T/2, prefix + H·W, 2] a compression, of a grid (H, W).

    Raises RuntimeError without matplotlib.
    """
    product = frame_weights(weights)
    per_output = 2 ** len(weights)
    pixels = upsample(product[:, prefix:], grid, pictures.shape[-2:])
    # White is the plain mean. The two sides have scales of their own: a weight is nearer to 0 than to 1.
    mean = 1 / per_output
    low, high = min(float(pixels.min()), 0.99 * mean), max(float(pixels.max()), 1.01 * mean)
    scale = require("matplotlib.colors").TwoSlopeNorm(mean, low, high)
    outputs = aggregate(pictures, pixels, per_output).clamp(0, 1)
    return Maps(pictures, indices, pixels, product[:, 0] if prefix else None, outputs, scale)


def title(video: str, frames: int, after: Sequence[int]) -> str:
    """What stands above a picture of InTI after these blocks."""
    *others, last = map(str, after)
    blocks = f"blocks {', '.join(others)} and {last}" if others else f"block {last}"
    return f"{video}: {frames} frames made {frames >> len(after)} by InTI after {blocks}"


def draw(
    path: Path, maps: Maps, *, title: str, note: str, losses: Sequence[float] | None = None, force: bool = False
) -> None:
    """Write the picture as PNG to `path`.

    title, note: what stands above and below. losses: one a training step, if there was any.
    force: also over an existing file. Raises RuntimeError without matplotlib.
    """
    figure_module = require("matplotlib.figure")
    per_output, outputs = maps.per_output, maps.outputs
    columns = max(1, min(_PER_LINE // per_output, len(outputs)))
    rows = -(-len(outputs) // columns)
    width = columns * (per_output + 2) * _INCH + 1.2
    below = 1.2 if losses is None else 2.2
    figure = figure_module.Figure(figsize=(max(width, 9), rows * _GROUP_HEIGHT + below + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=(rows * _GROUP_HEIGHT, below))
    groups = top.subfigures(rows, columns, squeeze=False, wspace=0.02)
    overlay = None
    for number in range(len(outputs)):
        overlay = _draw_group(groups[number // columns, number % columns], number, maps)
    _draw_bottom(bottom, overlay, per_output, losses, note)
    # "x": never over an existing file.
    with path.open("wb" if force else "xb") as file:
        figure.savefig(file, format="png", dpi=110)


def _draw_group(figure, number: int, maps: Maps):
    """One output frame: its frames, their weight maps below, and the aggregated frame on the right."""
    frames = maps.per_output
    axes = figure.add_gridspec(2, frames + 2)
    overlay = None
    for column in range(frames):
        frame = number * frames + column
        above, below = figure.add_subplot(axes[0, column]), figure.add_subplot(axes[1, column])
        above.imshow(_image(maps.pictures[frame]))
        above.set_title(f"frame {maps.indices[frame]}", fontsize=8, pad=3)
        below.imshow(_image(_grey(maps.pictures[frame])))
        overlay = below.imshow(maps.pixels[frame].numpy(), cmap=COLOURS, norm=maps.scale, alpha=OPACITY)
        if maps.first is not None:
            below.set_xlabel(f"class token {maps.first[frame]:.2f}", fontsize=7, labelpad=2)
        if column == 0:
            above.set_ylabel("frames", fontsize=8)
            below.set_ylabel("weight maps", fontsize=8)
    big = figure.add_subplot(axes[:, frames:])
    big.imshow(_image(maps.outputs[number]))
    big.set_title(f"aggregated frame {number + 1}", fontsize=9, pad=3)
    for axis in figure.axes:
        axis.set_xticks([])
        axis.set_yticks([])
    return overlay


def _draw_bottom(figure, overlay, per_output: int, losses: Sequence[float] | None, note: str) -> None:
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    bar_axis, text_axis = right.subplots(2, 1, height_ratios=(1, 5))
    if losses is None:
        text_axis.axis("off")
        text_axis = left.add_subplot()
    else:
        _draw_losses(left.add_subplot(), losses)
    bar = figure.colorbar(overlay, cax=bar_axis, orientation="horizontal")
    bar.set_label(f"weight of a frame in its output frame ({Fraction(1, per_output)}: plain mean)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    text_axis.axis("off")
    text_axis.text(0, 0.75, note, fontsize=8, va="top", wrap=True)


def _draw_losses(axis, losses: Sequence[float]) -> None:
    axis.plot(range(len(losses)), losses, marker="o", markersize=3, color="tab:blue")
    axis.set(xlabel="training step", ylabel="error in frame spreads", ylim=(0, 1.08 * max(losses)))
    axis.set_title("distance to Naive's clip embedding", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def _grey(picture: Tensor) -> Tensor:
    return picture.mean(0, keepdim=True).expand(3, -1, -1)


def _image(picture: Tensor):
    return picture.permute(1, 2, 0).numpy()
