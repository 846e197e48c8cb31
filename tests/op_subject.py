"""An op as its tests see it, and what they compare by."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from inti_kernels import backends, ops
from inti_kernels.testing import OpCase, op_cases

# Triton's interpreter asks for the triton backend, naming the emulator for the cuda backend: conftest.py then has no
# other.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = bool(os.environ.get("INTI_CUDA_LIBRARY")) and not INTERPRETED
UNDER_TEST = "triton" if INTERPRETED else "cuda" if EMULATED else "cpu"

SMALL = {"batch": 2, "frames": 4, "grid": (3, 2), "dim": 5, "prefix": 1}


def allocating() -> list[ModuleType]:
    """The modules that take outputs and workspaces from ``empty``: what is common, and those of the backend under test
    and of the cpu backend."""
    names = ["_memory", "_arguments", *(f"cpu.{name}" for name in ("_call", "_few_rows", "_products", "class_levels"))]
    names += [f"cpu.{op}" for op in ops.OPS]
    if UNDER_TEST != "cpu":
        names += [f"{UNDER_TEST}.{name}" for name in ("_launch", *ops.OPS)]
    return [import_module(f"{backends.__name__}.{name}") for name in names]


def allocate_by(patch: pytest.MonkeyPatch, empty: Callable[..., Tensor]) -> None:
    """Has the kernels' outputs and workspaces come from another function."""
    for module in allocating():
        patch.setattr(module, "empty", empty)


def with_room(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Memory of NaN, and what lies before and behind it: a number, since what a kernel computes of what it shouldn't
    have read may well be NaN."""
    size = math.prod(shape)
    memory = torch.full((64 + size + 1024,), 7.0, dtype=dtype or like.dtype, device=like.device)
    inside = memory[64 : 64 + size].fill_(float("nan"))
    return inside.view(tuple(shape)), memory[:64], memory[64 + size :]


@dataclass(frozen=True)
class Subject:
    """An op as the checks see it.

    Attributes:
        name: of the op.
        arguments: the inputs in the order in which the custom op takes them.
        sizes: more arguments of `op_cases`, such as a kernel.
        backend: the backend under test.
        more: arguments of the custom op behind the inputs that `op_cases` doesn't give, such as eps.
        kept: how many of the custom op's outputs are there for its backward alone, and last; the custom op is told
            whether to return them.
        least_dim: the smallest dim at which every gradient is one to speak of.
    """

    name: str
    arguments: tuple[str, ...]
    sizes: dict[str, Any] = field(default_factory=dict)
    backend: str = "cpu"
    more: tuple[Any, ...] = ()
    kept: int = 0
    least_dim: int = 2

    def case(self, dtype: torch.dtype = torch.float32, **changes: Any) -> OpCase:
        return op_cases(self.name, dtype=dtype, **{**SMALL, **self.sizes, **changes})

    def leaves(self, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[list[Tensor], Callable[..., Any]]:
        """The inputs, requiring grad, and the user's function of them: run(*leaves), or of another backend=…."""
        inputs, kwargs = self.case(dtype, **changes)
        names = [name for name, value in inputs.items() if value is not None]

        def run(*values: Tensor, backend: str | None = self.backend) -> Any:
            given = {**dict.fromkeys(inputs), **dict(zip(names, values, strict=True))}
            return getattr(ops, self.name)(**given, **kwargs, backend=backend)

        return [inputs[name].requires_grad_() for name in names], run

    def custom_op_args(self, case: OpCase, backend: str | None = None) -> tuple[Any, ...]:
        inputs, kwargs = case
        sizes = [list(v) if isinstance(v, tuple) else v for v in kwargs.values()]
        keep = (True,) * bool(self.kept)
        return (*(inputs[name] for name in self.arguments), *sizes, *self.more, *keep, backend or self.backend)

    def backward_args(
        self, case: OpCase, upstream: Callable[[Tensor], Tensor], needs: list[bool], accumulate: Tensor | None
    ) -> tuple[Any, ...]:
        """What the private backward op takes; the forward is run for it."""
        *args, backend = self.custom_op_args(case)
        outputs = as_tuple(getattr(torch.ops.inti_kernels, self.name)(*args, backend))
        own, kept = outputs[: len(outputs) - self.kept], outputs[len(outputs) - self.kept :]
        args = args[:-1] if self.kept else args
        return (*map(upstream, own), *args, *kept, needs, accumulate, backend)

    def backward(self, case: OpCase, needs: list[bool], accumulate: Tensor | None = None, seed: int = 0) -> Any:
        """The private backward op on random upstream gradients."""
        generator = torch.Generator().manual_seed(seed)
        args = self.backward_args(
            case, lambda out: torch.randn(out.shape, generator=generator).to(out.dtype), needs, accumulate
        )
        return getattr(torch.ops.inti_kernels, f"{self.name}_backward")(*args)

    @property
    def number_of_x(self) -> int:
        return self.arguments.index("x")


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def loss(outputs: Any) -> Tensor:
    """A scalar in which every output counts, each element differently."""
    terms = []
    for number, out in enumerate(as_tuple(outputs)):
        scale = torch.linspace(0.5, 1.5 + number, out.numel(), dtype=torch.float64).reshape(out.shape)
        terms.append((out.double() * scale).sum())
    return torch.stack(terms).sum()


def gradients(run: Callable[..., Any], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(run(*leaves)), leaves)


def assert_same_bits(actual: Any, expected: Any) -> None:
    actual, expected = as_tuple(actual), as_tuple(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in other memory: strides and offsets that users' models have."""
    b, t, n, c = x.shape
    wide, aligned = (torch.full((b, t, n, c + 3), float("nan"), dtype=x.dtype) for _ in range(2))
    wide[..., 2:-1] = x
    aligned[..., :-3] = x
    sliced = torch.full((b, t, n + 2, c), float("nan"), dtype=x.dtype)
    sliced[:, :, 1:-1] = x
    return {
        "sequence first": x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "an offset and a wider row": wide[..., 2:-1],
        "a wider row": aligned[..., :-3],
        "a slice of the tokens": sliced[:, :, 1:-1],
        "channels not contiguous": x.transpose(2, 3).contiguous().transpose(2, 3),
    }
