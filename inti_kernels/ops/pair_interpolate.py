"""pair_interpolate: the softmax over each token pair's logits and the sum of its frames by it, in one pass (Eq. 7)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..reference import functional
from . import _recipe as recipe


@recipe.without_autocast
def _run_forward(x: Tensor, logits: Tensor, position: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return backends.implementation("pair_interpolate", backend, x).pair_interpolate_forward(x, logits, position)


@recipe.without_autocast
def _run_backward(
    grad_z: Tensor,
    grad_weights: Tensor,
    x: Tensor,
    logits: Tensor,
    position: Tensor | None,
    needs: Sequence[bool],
    grad_x_accumulate: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, logits and position; empty where ``needs`` says no, or where x's went into the accumulator."""
    recipe.check_accumulator(grad_x_accumulate, x)
    module = backends.implementation("pair_interpolate", backend, x, direction="backward")
    grads = module.pair_interpolate_backward(grad_z, grad_weights, x, logits, position, needs, grad_x_accumulate)
    return recipe.present(grads, x)


_forward = torch.library.custom_op("inti_kernels::pair_interpolate", _run_forward, mutates_args=())
_backward = torch.library.custom_op(
    "inti_kernels::pair_interpolate_backward", _run_backward, mutates_args={"grad_x_accumulate"}
)


@_forward.register_fake
def _(x: Tensor, logits: Tensor, position: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    batch, frames, tokens, dim = x.shape
    return x.new_empty(batch, frames // 2, tokens, dim), logits.new_empty(logits.shape)


@_backward.register_fake
def _(grad_z, grad_weights, x, logits, position, needs, grad_x_accumulate, backend):  # type: ignore[no-untyped-def]
    written = (needs[0] and grad_x_accumulate is None, *needs[1:])
    inputs = (x, logits, position)
    return recipe.present([t.new_empty(t.shape) if w else None for t, w in zip(inputs, written, strict=True)], x)


@_backward.register_vmap
def _(info, in_dims, grad_z, grad_weights, x, logits, position, needs, grad_x_accumulate, backend):  # type: ignore[no-untyped-def]
    args = (grad_z, grad_weights, x, logits, position, needs, grad_x_accumulate, backend)
    size = info.batch_size
    if needs[2] or in_dims[4] is not None:
        return recipe.one_by_one(_backward, size, in_dims, args), (0, 0, 0)
    folded = [recipe.fold(arg, axis, size) for arg, axis in zip(args[:4], in_dims, strict=False)]
    return recipe.unfold(_backward(*folded, position, needs, grad_x_accumulate, backend), size), (0, 0, 0)


@recipe.with_eager_twin(_run_forward)
class PairInterpolate(torch.autograd.Function):
    """The op with its backward, for autograd, torch.compile and torch.func alike."""

    @staticmethod
    def forward(x: Tensor, logits: Tensor, position: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        return _forward(x, logits, position, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @recipe.differentiable_once("pair_interpolate")
    def backward(ctx: Any, saved: tuple[Any, ...], grad_z: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        run = _run_backward if recipe.plain_eager(grad_z) else _backward
        grads = run(grad_z, grad_weights, *saved, needs, None, ctx.backend)
        return *recipe.only_needed(grads, needs), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, logits: Tensor, position: Tensor | None, backend: str) -> Any:
        size, args = info.batch_size, (x, logits, position, backend)
        if in_dims[2] is not None:
            return recipe.one_by_one(PairInterpolate.apply, size, in_dims, args), (0, 0)
        x, logits = recipe.fold(x, in_dims[0], size), recipe.fold(logits, in_dims[1], size)
        return recipe.unfold(PairInterpolate.apply(x, logits, position, backend), size), (0, 0)


_forward.register_autograd(PairInterpolate.backward, setup_context=PairInterpolate.setup_context)


def pair_interpolate(
    x: Tensor, logits: Tensor, position: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Replaces each pair of frames by their weighted sum, token by token: (α, β) = softmax(logits), then Eq. 7.

    Backends: reference, cpu, triton, cuda. Sums in float32 (float64 for float64); the weights are computed in float64
    on the CPU, on a GPU in float32 unless x or the logits are float64, and rounded.
    Differentiable once in x, logits and position; vmap, torch.func.grad and torch.compile work.

    Args:
        x: tokens [B, T, N, C], T even; float32, float64, bfloat16 or float16; any strides (other than contiguous
            channels cost one copy).
        logits: [B, T/2, N, 2], any floating dtype.
        position: σ·P [T, C], any floating dtype, added to x while it is loaded (Eq. 8); or None.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None takes the choice in force, see
            :func:`inti_kernels.use_backend`.

    Returns:
        z [B, T/2, N, C] in x's dtype, and the weights (α, β) [B, T/2, N, 2] in the logits' dtype.

    Raises:
        ValueError: shapes that don't go together, odd T, tensors on different devices, an unknown backend.
        TypeError: an input that isn't a dense floating tensor.
        RuntimeError: the backend that was asked for can't run here; a second derivative, or forward-mode AD.
    """
    recipe.check_tokens(x)
    batch, frames, tokens, dim = x.shape
    functional.check_pairs(frames)
    recipe.check_like(logits, "logits", x, (batch, frames // 2, tokens, 2), "[B, T/2, N, 2]")
    recipe.check_like(position, "position", x, (frames, dim), "[T, C]", optional=True)
    backend = backends.resolve("pair_interpolate", backend, x)
    if backend == "reference":
        backends.count_reference("pair_interpolate")
        return recipe.without_autocast(functional.pair_interpolate)(x, logits, position)
    recipe.leave_transforms_to_eager()
    return recipe.apply(PairInterpolate, x, logits, position, backend)
