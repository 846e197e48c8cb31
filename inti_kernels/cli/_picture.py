"""The demo's picture, after the paper's figure 4: frames, weight maps, aggregated frames, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ._video import require

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


def upsample(maps: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Patch maps [T, H·W] → pixel maps [T, size, size], bilinear: the sum over frames stays what it was."""
    x = maps.unflatten(1, grid)[:, None]
    return torch.nn.functional.interpolate(x, (size, size), mode="bilinear", align_corners=False)[:, 0]


def aggregate(pictures: Tensor, maps: Tensor, per_output: int) -> Tensor:
    """The weights applied to pixels: pictures [T, 3, S, S], maps [T, S, S] → [T/per_output, 3, S, S]."""
    return (pictures * maps[:, None]).unflatten(0, (-1, per_output)).sum(1)


def draw(
    path: Path,
    pictures: Tensor,
    weights: Sequence[Tensor],
    *,
    grid: tuple[int, int],
    prefix: int,
    indices: Sequence[int],
    losses: Sequence[float],
    title: str,
    note: str,
) -> None:
    """Write the picture as PNG to `path`.

    pictures: [T, 3, S, S] in [0, 1]. weights: one [T/2, prefix + H·W, 2] a compression. indices: the frames' numbers in
    the video. losses: one a training step. title, note: what stands above, and beside the loss.
    Raises RuntimeError without matplotlib.
    """
    figure_module = require("matplotlib.figure")
    product = frame_weights(weights)
    per_output = 2 ** len(weights)
    maps = upsample(product[:, prefix:], grid, pictures.shape[-1])
    outputs = aggregate(pictures, maps, per_output).clamp(0, 1)
    # White is the plain mean. The two sides have scales of their own: a weight is nearer to 0 than to 1.
    mean = 1 / per_output
    low, high = min(float(maps.min()), 0.99 * mean), max(float(maps.max()), 1.01 * mean)
    scale = require("matplotlib.colors").TwoSlopeNorm(mean, low, high)

    columns = max(1, min(_PER_LINE // per_output, len(outputs)))
    rows = -(-len(outputs) // columns)
    width = columns * (per_output + 2) * _INCH + 1.2
    figure = figure_module.Figure(figsize=(max(width, 9), rows * _GROUP_HEIGHT + 2.7), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=(rows * _GROUP_HEIGHT, 2.2))
    groups = top.subfigures(rows, columns, squeeze=False, wspace=0.02)
    overlay = None
    for number, output in enumerate(outputs):
        chosen = slice(number * per_output, (number + 1) * per_output)
        overlay = _draw_group(
            groups[number // columns, number % columns],
            number,
            pictures[chosen],
            maps[chosen],
            output,
            list(indices[chosen]),
            product[chosen, 0] if prefix else None,
            scale,
        )
    _draw_bottom(bottom, overlay, per_output, losses, note)
    # "x": never over an existing file.
    with path.open("xb") as file:
        figure.savefig(file, format="png", dpi=110)


def _draw_group(
    figure,
    number: int,
    pictures: Tensor,
    maps: Tensor,
    output: Tensor,
    indices: list[int],
    class_weights: Tensor | None,
    scale,
):
    """One output frame: its frames, their weight maps below, and the aggregated frame on the right."""
    frames = len(pictures)
    axes = figure.add_gridspec(2, frames + 2)
    overlay = None
    for column in range(frames):
        above, below = figure.add_subplot(axes[0, column]), figure.add_subplot(axes[1, column])
        above.imshow(_image(pictures[column]))
        above.set_title(f"frame {indices[column]}", fontsize=8, pad=3)
        below.imshow(_image(pictures[column].mean(0, keepdim=True).expand(3, -1, -1)))
        overlay = below.imshow(maps[column].numpy(), cmap="coolwarm", norm=scale, alpha=0.6)
        if class_weights is not None:
            below.set_xlabel(f"class token {class_weights[column]:.2f}", fontsize=7, labelpad=2)
        if column == 0:
            above.set_ylabel("frames", fontsize=8)
            below.set_ylabel("weight maps", fontsize=8)
    big = figure.add_subplot(axes[:, frames:])
    big.imshow(_image(output))
    big.set_title(f"aggregated frame {number + 1}", fontsize=9, pad=3)
    for axis in figure.axes:
        axis.set_xticks([])
        axis.set_yticks([])
    return overlay


def _draw_bottom(figure, overlay, per_output: int, losses: Sequence[float], note: str) -> None:
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    axis = left.add_subplot()
    axis.plot(range(len(losses)), losses, marker="o", markersize=3, color="tab:blue")
    axis.set(xlabel="training step", ylabel="error in frame spreads", ylim=(0, 1.08 * max(losses)))
    axis.set_title("distance to Naive's clip embedding", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    bar_axis, text_axis = right.subplots(2, 1, height_ratios=(1, 5))
    bar = figure.colorbar(overlay, cax=bar_axis, orientation="horizontal")
    bar.set_label(f"weight of a frame in its output frame ({Fraction(1, per_output)}: plain mean)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    text_axis.axis("off")
    text_axis.text(0, 0.75, note, fontsize=8, va="top", wrap=True)


def _image(picture: Tensor):
    return picture.permute(1, 2, 0).numpy()
