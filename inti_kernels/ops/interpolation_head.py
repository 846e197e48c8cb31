"""interpolation_head: the network that predicts the weights, and the interpolation, in one (Eq. 13 and 7)."""

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends._arguments import wide_dtype
from ..reference import functional
from . import _recipe as recipe


@recipe.without_autocast
def _run_forward(
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, the weights, and for the backward the difference of the logits [B, T/2, N] and what the GELU was taken of
    [B, T/2, N, h], which is empty without ``keep``."""
    module = backends.implementation("interpolation_head", backend, x)
    return module.interpolation_head_forward(
        features, cube, frame_context, x, weight1, bias1, weight2, bias2, position, keep
    )


@recipe.without_autocast
def _run_backward(
    grad_z: Tensor,
    grad_weights: Tensor,
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None,
    difference: Tensor,
    preactivation: Tensor,
    needs: Sequence[bool],
    grad_x_accumulate: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the nine inputs; empty where ``needs`` says no, or where x's went into the accumulator."""
    recipe.check_accumulator(grad_x_accumulate, x)
    module = backends.implementation("interpolation_head", backend, x, direction="backward")
    inputs = (features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
    if any(needs) and not preactivation.numel():  # the forward was run where no gradient was in sight
        _, _, difference, preactivation = module.interpolation_head_forward(*inputs, True)
    grads = module.interpolation_head_backward(
        grad_z, grad_weights, *inputs, difference, preactivation, needs, grad_x_accumulate
    )
    return recipe.present(recipe.in_dtypes_of(inputs, grads), x)


@wraps(_run_backward)
def _run_backward_alone(*args: Any) -> tuple[Tensor, ...]:
    """The same for the dispatcher, whose ops' outputs must not share memory: backends may return the gradients of
    features and cube as columns of one matrix."""
    features, cube, *others = _run_backward(*args)
    if features.untyped_storage().data_ptr() == cube.untyped_storage().data_ptr():
        features, cube = (grad.clone(memory_format=torch.contiguous_format) for grad in (features, cube))
    return features.contiguous(), cube.contiguous(), *others


_forward = torch.library.custom_op("inti_kernels::interpolation_head", _run_forward, mutates_args=())
_backward = torch.library.custom_op(
    "inti_kernels::interpolation_head_backward", _run_backward_alone, mutates_args={"grad_x_accumulate"}
)


@_forward.register_fake
def _(features, cube, frame_context, x, weight1, bias1, weight2, bias2, position, keep, backend):  # type: ignore[no-untyped-def]
    pairs = (x.shape[0], x.shape[1] // 2, x.shape[2])
    difference = features.new_empty(pairs, dtype=wide_dtype(features))
    preactivation = features.new_empty((*pairs, weight1.shape[0]) if keep else 0)
    return x.new_empty(*pairs, x.shape[3]), features.new_empty(*pairs, 2), difference, preactivation


@_backward.register_fake
def _(grad_z, grad_weights, *args):  # type: ignore[no-untyped-def]
    inputs, needs, grad_x_accumulate = args[:9], args[11], args[12]
    written = (*needs[:3], needs[3] and grad_x_accumulate is None, *needs[4:])
    return recipe.present(
        [t.new_empty(t.shape) if w else None for t, w in zip(inputs, written, strict=True)], inputs[3]
    )


@_backward.register_vmap
def _(info, in_dims, *args):  # type: ignore[no-untyped-def]
    size, needs = info.batch_size, args[13]
    if any(needs[4:]) or any(axis is not None for axis in in_dims[6:11]):
        return recipe.one_by_one(_backward, size, in_dims, args), (0,) * 9
    tensors = (*range(6), 11, 12)
    folded = [
        recipe.fold(arg, in_dims[i], size) if i in tensors and arg is not None else arg for i, arg in enumerate(args)
    ]
    return recipe.unfold(_backward(*folded), size), (0,) * 9


@recipe.with_eager_twin(_run_forward)
class InterpolationHead(torch.autograd.Function):
    """The op with its backward, for autograd, torch.compile and torch.func alike."""

    @staticmethod
    def forward(
        features: Tensor,
        cube: Tensor | None,
        frame_context: Tensor | None,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        position: Tensor | None,
        keep: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(features, cube, frame_context, x, weight1, bias1, weight2, bias2, position, keep, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        recipe.keep_for_backward(ctx, inputs[:9], output[2:])
        ctx.backend = inputs[10]

    @staticmethod
    @recipe.differentiable_once("interpolation_head")
    def backward(ctx: Any, saved: tuple[Any, ...], grad_z: Tensor, grad_weights: Tensor, *_: Any) -> Any:
        needs = ctx.needs_input_grad[:9]
        run = _run_backward if recipe.plain_eager(grad_z) else _backward
        grads = run(grad_z, grad_weights, *saved, needs, None, ctx.backend)
        return *recipe.only_needed(grads, needs), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        if any(axis is not None for axis in in_dims[4:9]):
            return recipe.one_by_one(InterpolationHead.apply, size, in_dims, args), (0,) * 4
        folded = (None if args[i] is None else recipe.fold(args[i], in_dims[i], size) for i in range(4))
        return recipe.unfold(InterpolationHead.apply(*folded, *args[4:]), size), (0,) * 4


_forward.register_autograd(InterpolationHead.backward, setup_context=InterpolationHead.setup_context)


def interpolation_head(
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear over [features ; cube + frame_context] → GELU → Linear to two logits → softmax → interpolation.

    Backends: reference, cpu, triton, cuda. The concatenation is never written, nor is, without a gradient to come, the
    hidden layer as a whole. Sums in float32 (float64 for float64). Differentiable once, in every input; vmap,
    torch.func.grad and torch.compile work.

    Args:
        features: F_token [B, T/2, N, D].
        cube: F_cube [B, T/2, N, C'] or None.
        frame_context: F_frame + F_global [B, T/2, C'] or None.
        x: tokens [B, T, N, C], T even: what is interpolated; any floating dtype and strides.
        weight1, bias1: [h, D + C'] ([h, D] with neither cube nor frame_context) and [h].
        weight2, bias2: [2, h] and [2].
        position: σ·P [T, C], any floating dtype, added to x first (Eq. 8); or None.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None takes the choice in force, see
            :func:`inti_kernels.use_backend`.

    Returns:
        z [B, T/2, N, C] in x's dtype, and the weights (α, β) [B, T/2, N, 2] in the logits' dtype.

    Raises:
        ValueError: shapes that don't go together, odd T, tensors on different devices, an unknown backend.
        TypeError: an input that isn't a dense floating tensor; mixed dtypes outside autocast (x's and position's may
            be others).
        RuntimeError: the backend that was asked for can't run here; a second derivative, or forward-mode AD.
    """
    _check_input(features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
    backend = backends.resolve("interpolation_head", backend, x)
    if backend == "reference":
        backends.count_reference("interpolation_head")
        inputs = (features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
        return functional.interpolation_head(*inputs)
    network = recipe.cast_as_autocast(features, cube, frame_context, weight1, bias1, weight2, bias2)
    dtype, x_dtype = network[0].dtype, x.dtype
    if torch.float64 in (dtype, x_dtype):  # the kernels compute all in float64, or nothing
        *network, x = (None if tensor is None else tensor.double() for tensor in (*network, x))
    features, cube, frame_context, weight1, bias1, weight2, bias2 = network
    inputs = (features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
    recipe.leave_transforms_to_eager()
    z, weights, *_ = recipe.apply(InterpolationHead, *inputs, recipe.wants_gradient(*inputs), backend)
    return z.to(x_dtype), weights.to(dtype)


def _check_input(
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None,
) -> None:
    recipe.check_tokens(x)
    functional.check_pairs(x.shape[1])
    pairs = (x.shape[0], x.shape[1] // 2, x.shape[2])
    recipe.check_matrix(features, "features")
    recipe.check_like(features, "features", x, (*pairs, features.shape[-1]), "[B, T/2, N, D]")
    width = features.shape[-1]
    context = frame_context if cube is None else cube
    if context is not None:
        recipe.check_matrix(context, "cube and frame_context")
        recipe.check_like(cube, "cube", x, (*pairs, context.shape[-1]), "[B, T/2, N, C']", optional=True)
        recipe.check_like(
            frame_context, "frame_context", x, (*pairs[:2], context.shape[-1]), "[B, T/2, C']", optional=True
        )
        width += context.shape[-1]
    recipe.check_matrix(weight1, "weight1")
    recipe.check_like(weight1, "weight1", x, (weight1.shape[0], width), "[h, D + C']")
    recipe.check_like(bias1, "bias1", x, (weight1.shape[0],), "[h]")
    recipe.check_like(weight2, "weight2", x, (2, weight1.shape[0]), "[2, h]")
    recipe.check_like(bias2, "bias2", x, (2,), "[2]")
    recipe.check_like(position, "position", x, (x.shape[1], x.shape[3]), "[T, C]", optional=True)
    recipe.check_one_dtype(features=features, cube=cube, frame_context=frame_context, weight1=weight1, bias1=bias1,
                           weight2=weight2, bias2=bias2)  # fmt: skip
