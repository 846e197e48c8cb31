"""The weights of a clip as a moving picture: each frame, its weight map, and the frame that it ends in."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._picture import COLOURS, OPACITY, Maps
from ._video import require

SUFFIXES = (".gif", ".mp4")
RATE = 4  # frames a second: slow enough to read the labels
_SIDE = 224  # smaller pictures are enlarged to at least this
_GAP, _LABEL = 8, 20  # pixels between the panels, and for what is written above them


def animate(path: Path, maps: Maps, force: bool = False) -> None:
    """Write a GIF or an MP4, by the suffix of `path`, with one frame for each of the clip's.

    force: also over an existing file. Raises RuntimeError without Pillow, matplotlib or (for MP4) PyAV.
    """
    data = io.BytesIO()
    (_write_gif if path.suffix == ".gif" else _write_mp4)(data, list(_frames(maps)))
    with path.open("wb" if force else "xb") as file:
        file.write(data.getvalue())


def _frames(maps: Maps) -> Iterator[Any]:
    """Pillow's images, of even sizes: an MP4's colours have half the resolution."""
    colours = require("matplotlib").colormaps[COLOURS]
    for number, (picture, weights) in enumerate(zip(maps.pictures, maps.pixels, strict=True)):
        colour = torch.from_numpy(colours(maps.scale(weights.numpy()))[..., :3]).float().permute(2, 0, 1)
        overlay = (1 - OPACITY) * picture.mean(0) + OPACITY * colour
        output = number // maps.per_output + 1
        labels = (f"frame {maps.indices[number]}", f"weight, mean {weights.mean():.2f}", f"aggregated frame {output}")
        yield _panels((picture, overlay, maps.outputs[output - 1]), labels)


def _panels(pictures: Sequence[Tensor], labels: Sequence[str]) -> Any:
    """Pictures [3, H, W] in [0, 1] side by side on white, what they are written above."""
    height, width = pictures[0].shape[1:]
    times = -(-_SIDE // min(height, width))
    height, width = times * height, times * width
    step = width + _GAP
    canvas = torch.full((_even(height + _LABEL), _even(len(pictures) * step - _GAP), 3), 255, dtype=torch.uint8)
    for column, picture in enumerate(pictures):
        large = picture.repeat_interleave(times, 1).repeat_interleave(times, 2)
        canvas[_LABEL : _LABEL + height, column * step : column * step + width] = _bytes(large)
    image = require("PIL.Image").fromarray(canvas.numpy())
    pen = require("PIL.ImageDraw").Draw(image)
    for column, label in enumerate(labels):
        pen.text((column * step + 4, 4), label, fill="black")
    return image


def _even(size: int) -> int:
    return size + size % 2


def _bytes(picture: Tensor) -> Tensor:
    return (picture * 255).round().byte().permute(1, 2, 0)


def _write_gif(file: io.BytesIO, frames: Sequence[Any]) -> None:
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=1000 // RATE, loop=0)


def _write_mp4(file: io.BytesIO, frames: Sequence[Any]) -> None:
    av = require("av")
    try:
        av.codec.Codec("libx264", "w")
        codec = "libx264"
    except av.codec.codec.UnknownCodecError:
        # A PyAV built without x264; fewer players show this one.
        codec = "mpeg4"
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
