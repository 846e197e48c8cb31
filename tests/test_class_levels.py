"""The frame and the global level as the op `inti` has them, against autograd of the reference; on a GPU the frame level
runs in 16 bits, which is tried here on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inti_kernels import InTI
from inti_kernels.backends._class_levels import ClassLevels
from inti_kernels.reference import functional

DIM, EPS = 12, (1e-5, 1e-3)
LEVELS = [(True, True), (True, False), (False, True)]


def parameters(frames: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Of the frame level and of the global level, random."""
    torch.manual_seed(frames)
    inti = InTI(DIM, frames, (1, 1))
    parts = [inti.frame_pair, inti.frame]
    frame = [p for part in parts for p in (part.norm.weight, part.norm.bias, part.linear.weight, part.linear.bias)]
    convolutions = [p for convolution in inti.global_convs for p in (convolution.weight, convolution.bias)]
    return tuple([(0.5 * torch.randn(p.shape)).to(dtype).requires_grad_() for p in ps] for ps in (frame, convolutions))


def wanted(cls: Tensor, frame: list[Tensor] | None, convolutions: list[Tensor] | None, grad: Tensor) -> list[Tensor]:
    """The context and all gradients, in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (cls, *(frame or []), *(convolutions or []))]
    of_frame, of_convolutions = leaves[1:9] if frame else None, leaves[-6:] if convolutions else None
    context = functional.frame_context(leaves[0], of_frame, of_convolutions, EPS)
    return [context, *torch.autograd.grad(context, leaves, grad.double())]


def computed(cls: Tensor, frame: list[Tensor] | None, convolutions: list[Tensor] | None, grad: Tensor) -> list[Tensor]:
    with torch.no_grad():
        levels = ClassLevels(frame, convolutions, EPS)
        context = levels.forward(cls)
        of_cls, of_parameters = levels.backward(grad)
    return [context, of_cls, *of_parameters]


@pytest.mark.parametrize("which", LEVELS, ids=["both", "frame", "global"])
@pytest.mark.parametrize("frames", [2, 4, 6, 10, 14])
def test_levels_and_their_derivatives(frames: int, which: tuple[bool, bool]) -> None:
    """Of 6, 10 and 14 frames a pooling leaves one without a neighbour."""
    frame, convolutions = (
        level if has else None for level, has in zip(parameters(frames, torch.float64), which, strict=True)
    )
    cls, grad = torch.randn(2, frames, DIM).double(), torch.randn(2, frames // 2, DIM).double()
    torch.testing.assert_close(
        computed(cls, frame, convolutions, grad), wanted(cls, frame, convolutions, grad), rtol=1e-10, atol=1e-12
    )


def test_of_equal_neighbours_the_first_counts() -> None:
    """Frames that are all the same, and convolutions that leave them so: nothing but ties."""
    _, convolutions = parameters(8, torch.float64)
    with torch.no_grad():
        for weight in convolutions[::2]:
            weight[:, :, ::2] = 0
    cls, grad = torch.randn(1, 1, DIM).double().expand(2, 8, DIM), torch.randn(2, 4, DIM).double()
    torch.testing.assert_close(computed(cls, None, convolutions, grad), wanted(cls, None, convolutions, grad))


@pytest.mark.parametrize("frame", range(4))
def test_nan_comes_out_where_the_reference_has_it(frame: int) -> None:
    _, convolutions = parameters(4, torch.float64)
    cls, grad = torch.randn(2, 4, DIM).double(), torch.randn(2, 2, DIM).double()
    cls[0, frame, 3] = float("nan")
    ours, right = (run(cls, None, convolutions, grad)[:2] for run in (computed, wanted))
    for a, b in zip(ours, right, strict=True):  # the context and its gradient
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_frame_level_in_16_bits_rounds_as_plain_pytorch_does(dtype: torch.dtype) -> None:
    """Beside tokens and a global level in float32, whose gradients are those of float32."""
    frame, convolutions = parameters(16, torch.float32)
    cls, grad = torch.randn(8, 16, DIM), torch.randn(8, 8, DIM)
    halves = [p.detach().to(dtype) for p in frame]
    right = wanted(cls, halves, convolutions, grad)
    ours = computed(cls, halves, convolutions, grad)
    leaves = [cls.to(dtype).requires_grad_(), *(p.requires_grad_() for p in halves)]
    context = functional.frame_level(*leaves, eps=EPS)
    plain = torch.autograd.grad(context, leaves, grad.to(dtype))
    assert [t.dtype for t in ours] == [torch.float32] * 2 + [dtype] * 8 + [torch.float32] * 6
    for a, b, r in zip(ours[2:10], plain[1:], right[2:10], strict=True):
        assert (a.double() - r).norm() <= 1.5 * (b.double() - r).norm()
    torch.testing.assert_close(ours[10:], [r.float() for r in right[10:]], rtol=1e-5, atol=1e-5)
