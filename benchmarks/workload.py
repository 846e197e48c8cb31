"""What a benchmark needs to know of an op: its inputs, who computes it, and the least work that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..reference import functional
from ..testing import Rows, Upstream, collect, op_cases

Outputs = Tensor | tuple[Tensor, ...]
MODES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Sizes:
    """x is [batch, frames, prefix + H·W, dim]."""

    dim: int = 768
    frames: int = 16
    grid: tuple[int, int] = (14, 14)
    batch: int = 1
    prefix: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of all frames: B·T·N."""
        return self.batch * self.frames * (self.prefix + self.grid[0] * self.grid[1])

    @property
    def pairs(self) -> int:
        """Token pairs: B·T/2·N."""
        return self.tokens // 2


@dataclass(frozen=True)
class Work:
    """The least that a pass can do: bytes to and from memory, and multiply-accumulates."""

    bytes: int
    macs: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.macs + other.macs)


@dataclass(frozen=True)
class Workload:
    """Something to time: by the reference and by the kernels, on the same tensors, all of which require grad.

    ``kernels`` has what runs on this package's kernels, by the contender's name in `bench`; ``bind`` gives the
    reference or one of them its arguments; ``exact`` returns outputs and gradients in float64.
    """

    name: str
    leaves: Mapping[str, Tensor]
    reference: Callable[..., Outputs]  # what torch.compile is given, too
    kernels: Mapping[str, Callable[..., Outputs]]
    bind: Callable[[Callable[..., Outputs]], Callable[[], Outputs]]
    exact: Callable[[Upstream], Rows]
    compute_dtype: torch.dtype
    autocast: bool
    forward_macs: int

    def work(self, outputs: Outputs) -> dict[str, Work]:
        """Least bytes and multiply-accumulates of every mode of MODES.

        Forward: every input is read and every output written once. Backward: the upstream gradient of the first output
        and every input are read once, every gradient is written once; two products for each of the forward's.
        """
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        inputs = nbytes(*self.leaves.values())
        forward = Work(inputs + nbytes(*outputs), self.forward_macs)
        backward = Work(nbytes(outputs[0]) + 2 * inputs, 2 * self.forward_macs)
        return dict(zip(MODES, (forward, backward, forward + backward), strict=True))


def op_workload(
    op: str,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None,
    forward_macs: int,
    **options: Any,
) -> Workload:
    """The workload of an op on the random inputs of `inti_kernels.testing.op_cases` (``options`` are its keywords)."""
    case = op_cases(
        op,
        dim=sizes.dim,
        frames=sizes.frames,
        grid=sizes.grid,
        batch=sizes.batch,
        prefix=sizes.prefix,
        dtype=dtype,
        device=device,
        **options,
    )
    leaves = {name: tensor.requires_grad_() for name, tensor in case.inputs.items() if tensor is not None}
    reference = getattr(functional, op)

    def exact(upstream: Upstream) -> Rows:
        wide = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
        return collect(reference(**wide, **case.kwargs), wide, upstream)

    return Workload(
        name=op,
        leaves=leaves,
        reference=reference,
        kernels={"fused": partial(getattr(ops, op), backend=backend)},
        bind=lambda function: partial(function, **leaves, **case.kwargs),
        exact=exact,
        compute_dtype=dtype,
        autocast=False,
        forward_macs=forward_macs,
    )


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
