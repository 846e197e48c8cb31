"""What FusedInTI keeps for its backward, and what its forward takes at once: in bytes, counted in two ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inti_kernels import FusedInTI, InTI
from inti_kernels.cli._kept import Allocated, allocated_by, kept_for_backward
from inti_kernels.testing import module_case

pytestmark = pytest.mark.only_under_test("cpu")

# As between the blocks of ViT-B/16: 16 frames of 14×14 patches and the class token.
SIZES = {"dim": 768, "frames": 16, "grid": (14, 14), "prefix": 1}
AUTOCASTS = [pytest.param(None, id="float32"), pytest.param(torch.bfloat16, id="bfloat16 autocast")]


@pytest.fixture(scope="module")
def case() -> tuple[InTI, Tensor]:
    inti, x = module_case(**SIZES)
    return inti, x.requires_grad_()


def forward(module: nn.Module, x: Tensor, autocast: torch.dtype | None) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            return module(x)

    call()  # what only a first call takes is no memory of a step
    return call


def kept(module: nn.Module, x: Tensor, autocast: torch.dtype | None) -> tuple[float, float]:
    """Bytes kept for the backward, beyond x and the parameters, over those of x: as autograd's hooks see them, and as
    what is taken from the allocator when the forward is done, without z."""
    call = forward(module, x, autocast)
    with kept_for_backward([x, *module.parameters()]) as saved:
        z = call()
    by_hooks = sum(saved.everywhere.values())
    assert z.requires_grad
    del z
    return by_hooks / x.nbytes, allocated_by(call).live / x.nbytes


def peak(module: nn.Module, x: Tensor, autocast: torch.dtype | None) -> float:
    """The most bytes that a forward without gradients takes at once, beyond x and z, over those of x."""
    with torch.no_grad():
        return allocated_by(forward(module, x, autocast)).peak / x.nbytes


# The module


@pytest.mark.parametrize("autocast", AUTOCASTS)
def test_kept_by_default(case: tuple[InTI, Tensor], autocast: torch.dtype | None) -> None:
    """The two pre-activations and the cube level are half of x each; statistics and weights little beside them."""
    inti, x = case
    by_hooks, live = kept(FusedInTI.from_reference(inti, backend="cpu"), x, autocast)
    print(f"kept: {by_hooks:.4f} |x| by hooks, {live:.4f} |x| live")
    assert max(by_hooks, live) <= 1.6
    # What is kept and told to autograd is what is kept: nothing hangs on by other ways.
    assert live == pytest.approx(by_hooks, abs=0.01)


@pytest.mark.parametrize("autocast", AUTOCASTS)
def test_kept_with_recompute(case: tuple[InTI, Tensor], autocast: torch.dtype | None) -> None:
    inti, x = case
    by_hooks, live = kept(FusedInTI.from_reference(inti, backend="cpu", recompute=True), x, autocast)
    print(f"kept: {by_hooks:.4f} |x| by hooks, {live:.4f} |x| live")
    assert max(by_hooks, live) <= 0.05


@pytest.mark.parametrize("autocast", AUTOCASTS)
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["default", "recompute"])
def test_peak_without_gradients(
    case: tuple[InTI, Tensor], autocast: torch.dtype | None, options: dict[str, bool]
) -> None:
    inti, x = case
    found = peak(FusedInTI.from_reference(inti, backend="cpu", **options), x, autocast)
    print(f"peak: {found:.4f} |x|")
    assert found <= 1.5


# What counts


def test_inti_keeps_what_can_be_counted_by_hand(case: tuple[InTI, Tensor]) -> None:
    """x + σP, for the convolution, LayerNorm and the interpolation alike: |x|. The token level's Linear: its input,
    |x|, and its output, which GELU keeps, ½. The head's first Linear: its input, two tensors side by side, |x|, and its
    output, ½; the second's input ½. And 0.04 of the class tokens' levels, statistics and weights."""
    inti, x = case
    by_hooks, live = kept(inti, x, None)
    print(f"kept: {by_hooks:.4f} |x| by hooks, {live:.4f} |x| live")
    assert by_hooks == pytest.approx(1 + 1 + 0.5 + 1 + 0.5 + 0.5 + 0.04, abs=0.01)
    assert live == pytest.approx(by_hooks, abs=0.01)


class KeepsItsInput(torch.autograd.Function):
    """exp, kept as an attribute of ctx: what a saved-tensors hook never sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.hidden = x.exp()
        return ctx.hidden.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.hidden


def test_a_tensor_on_ctx_is_seen_by_the_allocator_alone() -> None:
    x = torch.randn(1000, requires_grad=True)
    with kept_for_backward([x]) as saved:
        out = KeepsItsInput.apply(x)
    assert out.requires_grad
    assert sum(saved.everywhere.values()) == 0
    assert allocated_by(lambda: KeepsItsInput.apply(x)).live == pytest.approx(4000, abs=64)


def test_live_and_peak_of_a_known_chain() -> None:
    x = torch.randn(1000)

    def chain() -> Tensor:
        first = x.exp()
        second = first.sin()
        del first
        return second.cos()

    assert allocated_by(chain) == Allocated(live=0, peak=4000)  # two at once, one of which is the output
    x.requires_grad_()
    assert allocated_by(chain) == Allocated(live=8000, peak=8000)  # exp's result, and cos's input


def test_outputs_that_share_a_storage_are_taken_off_once() -> None:
    x = torch.randn(1000)
    assert allocated_by(lambda: x.exp().chunk(2)) == Allocated(live=0, peak=0)
    assert allocated_by(lambda: x) == Allocated(live=-4000, peak=-4000)
