"""A short video for the tests of the commands that read one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import torch

FRAMES = 40


def write(path: Path, brightness: Callable[[int], int], side: int) -> Path:
    """40 frames, 96×64, each of a grey of its own (from 0 to 255), with a white square that moves."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 4_000_000
        for index in range(FRAMES):
            picture = torch.full((64, 96, 3), brightness(index), dtype=torch.uint8)
            picture[8 : 8 + side, 2 * index : 2 * index + side] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode())
    return path
