"""How a kernel is compared with the reference: the tolerance, random cases, and what runs them.

`python -m inti_kernels check`, `bench` (before it times anything) and the tests all decide by the functions of this
file, so that "correct" has one meaning. The tolerance is three-way. With

* ``k``  what the kernel returned,
* ``t``  what plain PyTorch returns for the same inputs in the same dtype, and
* ``r``  the reference in float64 for the same inputs,

every output and every gradient must satisfy::

    max|k - r|    <= 2 max|t - r|    + eps(dtype) max|r|
    rms(k - r)    <= 2 rms(t - r)    + eps(dtype) rms(r)
    |mean(k - r)| <= 2 |mean(t - r)| + eps(dtype) rms(r)

The maximum finds a wrong row, the RMS a wrong scale, the mean a bias too small for the other two. PyTorch's own error
sets the bound, so it is as tight as the dtype allows at any size. A reference gradient that is zero everywhere fails:
nothing would be compared. In float64 ``t`` is ``r``, so the rule would forbid another order of summation; there
``FIXED_TOLERANCE`` takes its place, and in float32 it applies on top.

Triton's interpreter, in which the triton backend runs on the CPU, truncates to bfloat16 where kernels round. Only
there, bfloat16 results are allowed one unit of truncation more: eps(bfloat16) times max|r| or rms(r) on top of each
bound. That the kernels' results are rounded is for the other backends, and a GPU, to show.

The rule compares two samples of rounding errors, which says little of a handful of numbers: of two errors of one law,
one is more than twice the other 3 times in 10. Small tensors are therefore compared over several random draws of the
inputs, stacked (``draws`` of `three_way` and `three_way_module`); the rule itself stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._cases import Draw, OpCase, module_case, op_cases, randomize, redraw, rms

__all__ = [
    "Comparison",
    "FIXED_TOLERANCE",
    "OpCase",
    "Upstream",
    "assert_close_three_way",
    "collect",
    "compare",
    "compare_runs",
    "enough_draws",
    "module_case",
    "op_cases",
    "plain_twin",
    "randomize",
    "three_way",
    "three_way_module",
]

# Largest error allowed, as a fraction of max|r|, whatever plain PyTorch's error is. 1e-5 is 84 float32 roundings: sums
# over tokens are kept as partial sums per block, whose errors grow with the square root of the number of terms.
# 1e-12 is 4500 float64 roundings, and far below what a wrong term could hide in.
FIXED_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

# Draws are added until the smallest compared tensor has MIN_SAMPLES numbers, up to MAX_DRAWS draws.
MIN_SAMPLES = 64
MAX_DRAWS = 32

Rows = dict[str, Tensor | None]  # what one run returned: outputs and gradients by name


@dataclass(frozen=True)
class Comparison:
    """One output or gradient held against its bounds; ``str()`` is the row that tests print."""

    name: str
    error: float  # max|k - r|
    bound: float
    rms_error: float  # rms(k - r)
    rms_bound: float
    mean_error: float  # |mean(k - r)|
    mean_bound: float
    reference_rms: float
    ok: bool
    note: str = ""  # why it failed, when it did

    @property
    def relative(self) -> float:
        """rms(k - r) / rms(r), the figure to read first."""
        return self.rms_error / self.reference_rms if self.reference_rms else math.nan

    @property
    def used(self) -> float:
        """The largest fraction of a bound that was used: above 1 is a failure."""
        pairs = ((self.error, self.bound), (self.rms_error, self.rms_bound), (self.mean_error, self.mean_bound))
        used = [error / bound if bound else (math.inf if error else 0.0) for error, bound in pairs]
        return math.inf if any(map(math.isnan, used)) else max(used)

    def __str__(self) -> str:
        return (
            f"{'ok  ' if self.ok else 'FAIL'} {self.name}: RMS(err)/RMS(ref) {self.relative:.2e}, "
            f"max {self.error:.2e} <= {self.bound:.2e}, rms {self.rms_error:.2e} <= {self.rms_bound:.2e}, "
            f"mean {self.mean_error:.2e} <= {self.mean_bound:.2e}" + (f" ({self.note})" if self.note else "")
        )


def compare(
    name: str,
    kernel: Tensor | None,
    plain: Tensor | None,
    reference: Tensor | None,
    dtype: torch.dtype | None = None,
    *,
    gradient: bool = False,
    truncated: bool = False,
) -> Comparison:
    """Holds one tensor of a kernel against plain PyTorch and the float64 reference, by the rule of this module.

    Args:
        name: what the row is called.
        kernel: the kernel's result, any shape; None (a gradient that never came) fails.
        plain: plain PyTorch's result; must have the kernel's shape and dtype.
        reference: the float64 result, of the same shape.
        dtype: what was computed in, where it isn't the tensor's own dtype (bfloat16 for autocast's float32 gradients).
        gradient: True for gradients, where a reference of zeros is a failure.
        truncated: the kernel ran in Triton's interpreter, which truncates to bfloat16.

    Returns:
        The row; wrong numbers never raise. Numbers that aren't finite must be where the reference has them, and equal.
    """
    if problem := _incomparable(kernel, plain, reference):
        return Comparison(name, *[math.nan] * 7, ok=False, note=problem)
    dtype = dtype or kernel.dtype
    k, t, r = (tensor.detach().double().flatten() for tensor in (kernel, plain, reference))
    finite = r.isfinite()
    problems = []
    if not torch.allclose(k[~finite], r[~finite], equal_nan=True):
        problems.append("the reference is NaN or infinite where the kernel is something else")
    k, t, r = k[finite], t[finite], r[finite]
    if wrong := int((~k.isfinite()).sum()):
        problems.append(f"{wrong} of {k.numel()} numbers are NaN or infinite, and finite in the reference")
    if not bool(t.isfinite().all()):
        problems.append("plain PyTorch overflows here, so there is no bound: use smaller inputs")
    size, eps = rms(r), torch.finfo(dtype).eps
    if gradient and size == 0:
        problems.append("the reference gradient is zero everywhere, so nothing was compared: choose other inputs")
    errors = (_max(k - r), rms(k - r), _mean(k - r))
    units = 2 * eps if truncated and dtype == torch.bfloat16 else eps
    bounds = (2 * _max(t - r) + units * _max(r), 2 * rms(t - r) + units * size, 2 * _mean(t - r) + units * size)
    if dtype in FIXED_TOLERANCE:
        fixed = FIXED_TOLERANCE[dtype] * _max(r)
        bounds = (fixed,) * 3 if dtype is torch.float64 else (min(bounds[0], fixed), *bounds[1:])
    for label, error, bound in zip(("max", "rms", "mean"), errors, bounds, strict=True):
        if not error <= bound:  # written so that NaN fails
            problems.append(f"{label} error {error:.3e} over its bound {bound:.3e}")
    pairs = (figure for pair in zip(errors, bounds, strict=True) for figure in pair)
    return Comparison(name, *pairs, reference_rms=size, ok=not problems, note="; ".join(problems))


def assert_close_three_way(comparisons: Iterable[Comparison], *, show: bool = True) -> None:
    """Prints every row (with ``show``); raises AssertionError with all of them if one failed or there is none."""
    rows = list(comparisons)
    text = "\n".join(map(str, rows))
    if show:
        print(text)
    if not rows or not all(row.ok for row in rows):
        raise AssertionError(f"{sum(not row.ok for row in rows)} of {len(rows)} comparisons failed\n{text}")


def three_way(
    op: str,
    inputs: Rows,
    kwargs: dict[str, Any],
    *,
    backend: str | None,
    needs: Sequence[str] | None = None,
    draws: int | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Compares an op run by ``backend`` with the reference in the same dtype and in float64.

    Args:
        op: a name of `inti_kernels.ops.OPS`.
        inputs: tensors by argument name, None for those left out; used with the strides they have, and not changed.
        kwargs: the other arguments.
        backend: what ``ops.<op>(backend=…)`` takes.
        needs: the inputs that require grad and whose gradients are compared; all by default.
        draws: number of random draws of the inputs that are stacked and then compared: the first is ``inputs`` itself,
            the others are contiguous and have its RMS. By default enough for 64 numbers in the smallest input.
        seed: of the upstream gradients and of the further draws.

    Returns:
        A row for each output ("out 0", …) and each gradient ("grad x", …).
    """
    from . import ops
    from .reference import functional

    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    needs = tuple(given) if needs is None else tuple(needs)

    def run(values: Rows, upstream: Upstream, function: Callable[..., Any], **more: Any) -> Rows:
        leaves = {name: value.detach().requires_grad_(name in needs) for name, value in values.items()}
        outputs = function(**{name: leaves.get(name) for name in inputs}, **kwargs, **more)
        return collect(outputs, {name: leaves[name] for name in needs}, upstream)

    results = []
    for number in range(draws or enough_draws(given.values())):
        values = {name: redraw(value, seed, number, name) for name, value in given.items()} if number else given
        exact = {name: value.double() for name, value in values.items()}
        upstream, plain = Upstream(seed + number), getattr(functional, op)
        k = run(values, upstream, getattr(ops, op), backend=backend)
        results.append((k, run(values, upstream, plain), run(exact, upstream, plain)))
    return compare_runs(results, truncated=_truncates(backend, given["x"], op))


def three_way_module(
    fused: nn.Module,
    x: Tensor,
    *,
    autocast: torch.dtype | None = None,
    draws: int | None = None,
    seed: int = 0,
    **forward: Any,
) -> list[Comparison]:
    """Compares a `FusedInTI` with the `InTI` of the same parameters, in the same dtype and in float64.

    Args:
        fused: the module; parameters and their ``.grad`` are left alone.
        x: [B, T, N, C].
        autocast: run the kernel and plain PyTorch under autocast of this dtype; the bounds are then of this dtype.
        draws, seed: as in `three_way`; a draw is new x and new upstream gradients at the same parameters.
        **forward: more keywords of ``forward``, such as ``grid``.

    Returns:
        A row for z ("out 0"), the weights ("out 1"), the gradients of x and of every parameter that requires grad.
    """
    plain = plain_twin(fused)
    exact = plain_twin(fused).double()

    def run(module: nn.Module, value: Tensor, upstream: Upstream, cast: torch.dtype | None) -> Rows:
        value = value.detach().requires_grad_()
        with torch.autocast(value.device.type, dtype=cast or torch.bfloat16, enabled=cast is not None):
            outputs = module(value, return_weights=True, **forward)
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        return collect(outputs, {"x": value, **parameters}, upstream)

    results = []
    for number in range(draws or enough_draws(fused.parameters())):
        value, upstream = redraw(x, seed, number) if number else x, Upstream(seed + number)
        k, t = (run(module, value, upstream, autocast) for module in (fused, plain))
        results.append((k, t, run(exact, value.double(), upstream, None)))
    return compare_runs(results, autocast, truncated=_truncates(fused.backend, x))


def plain_twin(fused: nn.Module) -> nn.Module:
    """An InTI with its own copy of the parameters."""
    from .reference import InTI

    ablation = {"context": fused.context, "fusion": fused.fusion, "head": fused.head_type, "hidden": fused.hidden}
    twin = InTI(fused.dim, fused.frames, fused.grid, prefix=fused.prefix, **ablation)
    twin.to(device=fused.position.device, dtype=fused.position.dtype).load_state_dict(fused.state_dict())
    for ours, theirs in zip(twin.parameters(), fused.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return twin


class Upstream:
    """The same random upstream gradients for all three runs, rounded to the dtype of the first run's outputs."""

    def __init__(self, seed: int) -> None:
        self.seed = seed + 104729
        self.gradients: list[Tensor] = []

    def __call__(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        if not self.gradients:
            self.gradients = [Draw(self.seed + n, o.dtype, o.device)(*o.shape) for n, o in enumerate(outputs)]
        return [gradient.to(out.dtype) for gradient, out in zip(self.gradients, outputs, strict=True)]


def collect(outputs: Tensor | Sequence[Tensor], leaves: dict[str, Tensor], upstream: Upstream) -> Rows:
    """What one run returned: its outputs ("out 0", …) and the gradients of ``leaves`` ("grad x", …)."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    rows: Rows = {f"out {number}": out.detach() for number, out in enumerate(outputs)}
    if leaves:
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream(outputs), allow_unused=True)
        rows |= {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return rows


def compare_runs(
    results: Sequence[tuple[Rows, Rows, Rows]], dtype: torch.dtype | None = None, *, truncated: bool = False
) -> list[Comparison]:
    """`compare` for every output and gradient of (kernel, plain, reference) runs, stacked over the runs."""
    rows = []
    for name in results[0][0]:
        k, t, r = (_stack([run[which][name] for run in results]) for which in range(3))
        rows.append(compare(name, k, t, r, dtype, gradient=name.startswith("grad "), truncated=truncated))
    return rows


def _truncates(backend: str | None, x: Tensor, op: str | None = None) -> bool:
    """Whether x goes through Triton's interpreter."""
    from . import backends

    has_kernel = op is None or "triton" in backends.HAS_KERNEL[op]
    return has_kernel and backends.requested(backend) == "triton" and x.device.type == "cpu"


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    if any(tensor is None for tensor in tensors):
        return None
    return tensors[0] if len(tensors) == 1 else torch.stack(tuple(tensors))


def enough_draws(tensors: Iterable[Tensor]) -> int:
    """How many draws give the smallest of the tensors MIN_SAMPLES numbers, MAX_DRAWS at most."""
    smallest = min((tensor.numel() for tensor in tensors if tensor.numel()), default=MIN_SAMPLES)
    return max(1, min(MAX_DRAWS, math.ceil(MIN_SAMPLES / smallest)))


def _incomparable(kernel: Tensor | None, plain: Tensor | None, reference: Tensor | None) -> str:
    runs = {"the kernel": kernel, "plain PyTorch": plain, "the reference": reference}
    if absent := [who for who, tensor in runs.items() if tensor is None]:
        return f"nothing came from {' and '.join(absent)}"
    if not kernel.shape == plain.shape == reference.shape:
        return "shapes differ: " + ", ".join(f"{who} {tuple(tensor.shape)}" for who, tensor in runs.items())
    if kernel.dtype != plain.dtype:
        return f"dtypes differ: the kernel {kernel.dtype}, plain PyTorch {plain.dtype}"
    return ""


def _max(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _mean(tensor: Tensor) -> float:
    return abs(float(tensor.mean())) if tensor.numel() else 0.0
