"""depthwise_conv3d: depthwise 3-D convolution over the patch tokens, read where they lie (Eq. 10)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..reference import functional
from . import _recipe as recipe

# (kernel size, temporal stride): the cube level, and the temporal modules' position encoding and local aggregation.
CASES = (((3, 3, 3), 2), ((3, 3, 3), 1), ((3, 1, 1), 1))


@recipe.without_autocast
def _run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    grid: Sequence[int],
    temporal_stride: int,
    prefix: int,
    backend: str,
) -> Tensor:
    module = backends.implementation("depthwise_conv3d", backend, x)
    return module.depthwise_conv3d_forward(x, weight, bias, position, grid, temporal_stride, prefix)


@recipe.without_autocast
def _run_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    grid: Sequence[int],
    temporal_stride: int,
    prefix: int,
    needs: Sequence[bool],
    grad_x_accumulate: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs; empty where ``needs`` says no, or where x's went into the accumulator."""
    recipe.check_accumulator(grad_x_accumulate, x)
    module = backends.implementation("depthwise_conv3d", backend, x, direction="backward")
    grads = module.depthwise_conv3d_backward(
        grad_y, x, weight, bias, position, grid, temporal_stride, prefix, needs, grad_x_accumulate
    )
    return recipe.present(grads, x)


_forward = torch.library.custom_op("inti_kernels::depthwise_conv3d", _run_forward, mutates_args=())
_backward = torch.library.custom_op(
    "inti_kernels::depthwise_conv3d_backward", _run_backward, mutates_args={"grad_x_accumulate"}
)


@_forward.register_fake
def _(x, weight, bias, position, grid, temporal_stride, prefix, backend):  # type: ignore[no-untyped-def]
    batch, frames, tokens, dim = x.shape
    return x.new_empty(batch, frames // temporal_stride, tokens, dim)


@_backward.register_fake
def _(grad_y, x, weight, bias, position, grid, temporal_stride, prefix, needs, grad_x_accumulate, backend):  # type: ignore[no-untyped-def]
    written = (needs[0] and grad_x_accumulate is None, *needs[1:])
    inputs = (x, weight, bias, position)
    return recipe.present([t.new_empty(t.shape) if w else None for t, w in zip(inputs, written, strict=True)], x)


@_backward.register_vmap
def _(
    info, in_dims, grad_y, x, weight, bias, position, grid, temporal_stride, prefix, needs, grad_x_accumulate, backend
):  # type: ignore[no-untyped-def]
    size, sizes = info.batch_size, (grid, temporal_stride, prefix, needs, grad_x_accumulate, backend)
    if any(needs[1:]) or any(axis is not None for axis in in_dims[2:5]):
        args = (grad_y, x, weight, bias, position, *sizes)
        return recipe.one_by_one(_backward, size, in_dims, args), (0, 0, 0, 0)
    folded = recipe.fold(grad_y, in_dims[0], size), recipe.fold(x, in_dims[1], size)
    return recipe.unfold(_backward(*folded, weight, bias, position, *sizes), size), (0, 0, 0, 0)


@recipe.with_eager_twin(_run_forward)
class DepthwiseConv3d(torch.autograd.Function):
    """The op with its backward, for autograd, torch.compile and torch.func alike."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        position: Tensor | None,
        grid: Sequence[int],
        temporal_stride: int,
        prefix: int,
        backend: str,
    ) -> Tensor:
        return _forward(x, weight, bias, position, grid, temporal_stride, prefix, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.sizes, ctx.backend = inputs[4:7], inputs[7]

    @staticmethod
    @recipe.differentiable_once("depthwise_conv3d")
    def backward(ctx: Any, saved: tuple[Any, ...], grad_y: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        run = _run_backward if recipe.plain_eager(grad_y) else _backward
        grads = run(grad_y, *saved, *ctx.sizes, needs, None, ctx.backend)
        return *recipe.only_needed(grads, needs), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *parameters: Any) -> Any:
        size = info.batch_size
        if any(axis is not None for axis in in_dims[1:4]):
            return recipe.one_by_one(DepthwiseConv3d.apply, size, in_dims, (x, *parameters)), 0
        return recipe.unfold(DepthwiseConv3d.apply(recipe.fold(x, in_dims[0], size), *parameters), size), 0


_forward.register_autograd(DepthwiseConv3d.backward, setup_context=DepthwiseConv3d.setup_context)


def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    *,
    temporal_stride: int = 2,
    prefix: int = 1,
    position: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Depthwise 3-D convolution over the patch tokens seen as [T, H, W], zero padding (the cube level, Eq. 10).

    The tokens are read where they lie: no permute, no copy. Prefix tokens have no place on the grid; their output is 0.
    Padding is half the kernel, so output j is centred on frame temporal_stride·j.

    Backends: reference, cpu, triton, cuda. Sums in float32 (float64 for float64). Differentiable once in x, weight,
    bias and position; vmap, torch.func.grad and torch.compile work.

    Args:
        x: tokens [B, T, prefix + H·W, C]; float32, float64, bfloat16 or float16; any strides (other than contiguous
            channels cost one copy).
        weight: [C, 1, KT, KH, KW], as torch.nn.Conv3d has it with groups=C; any floating dtype.
        bias: [C] or None.
        grid: (H, W).
        temporal_stride: with a kernel of 3×3×3, 2 (one output frame a pair) or 1; with 3×1×1, 1.
        prefix: number of tokens before the patches.
        position: σ·P [T, C], added to x while it is loaded (Eq. 8); or None.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None takes the choice in force, see
            :func:`inti_kernels.use_backend`.

    Returns:
        [B, T / temporal_stride, prefix + H·W, C] in x's dtype.

    Raises:
        ValueError: shapes that don't go together, another kernel or stride than those above, tensors on different
            devices, an unknown backend.
        TypeError: an input that isn't a dense floating tensor, sizes that aren't whole numbers.
        RuntimeError: the backend that was asked for can't run here; a second derivative, or forward-mode AD.
    """
    recipe.check_tokens(x)
    recipe.check_grid(x, grid, prefix)
    functional.check_whole(temporal_stride=temporal_stride)
    if temporal_stride == 2:
        functional.check_pairs(x.shape[1])
    recipe.check_floating(weight, "weight")
    frames, dim = x.shape[1], x.shape[3]
    kernel = tuple(weight.shape[2:])
    if (kernel, temporal_stride) not in CASES:
        known = ", ".join(f"{'×'.join(map(str, size))} with stride {stride}" for size, stride in CASES)
        raise ValueError(
            f"expected a kernel and temporal stride out of: {known}; got weight {tuple(weight.shape)} with stride "
            f"{temporal_stride}"
        )
    recipe.check_like(weight, "weight", x, (dim, 1, *kernel), "[C, 1, KT, KH, KW]")
    recipe.check_like(bias, "bias", x, (dim,), "[C]", optional=True)
    recipe.check_like(position, "position", x, (frames, dim), "[T, C]", optional=True)
    backend = backends.resolve("depthwise_conv3d", backend, x)
    if backend == "reference":
        backends.count_reference("depthwise_conv3d")
        return recipe.without_autocast(functional.depthwise_conv3d)(
            x, weight, bias, grid, temporal_stride=temporal_stride, prefix=prefix, position=position
        )
    recipe.leave_transforms_to_eager()
    return recipe.apply(DepthwiseConv3d, x, weight, bias, position, list(grid), temporal_stride, prefix, backend)
