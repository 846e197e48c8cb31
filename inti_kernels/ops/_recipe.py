"""What every op's autograd recipe shares: checks of the input, and the rules for vmap."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def check_tokens(x: Tensor, name: str = "x") -> None:
    """x must be a dense floating tensor [B, T, N, C], empty in B only."""
    check_floating(x, name)
    if x.dim() != 4:
        raise ValueError(f"{name} must be tokens [B, T, N, C], got {x.dim()} dimensions: {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must have at least one frame, token and channel, got {tuple(x.shape)}")


def check_floating(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating (float32, float64, bfloat16 or float16), got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}; call .to_dense() first")


def check_like(tensor: Tensor | None, name: str, x: Tensor, shape: Sequence[int], axes: str) -> None:
    """A further input: floating, on x's device, of the shape that belongs to x. None passes."""
    if tensor is None:
        return
    check_floating(tensor, name)
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device, {x.device}, got {tensor.device}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {axes} = {tuple(shape)} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")


def check_accumulator(accumulate: Tensor | None, x: Tensor) -> None:
    if accumulate is None:
        return
    if accumulate.shape != x.shape or accumulate.dtype != x.dtype or not accumulate.is_contiguous():
        raise ValueError(
            f"grad_x_accumulate must be contiguous, of x's shape {tuple(x.shape)} and dtype {x.dtype}, got "
            f"{tuple(accumulate.shape)}, {accumulate.dtype}, strides {accumulate.stride()}"
        )


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """For implementations: autocast is still on inside a custom op's forward, and off in its backward."""

    @wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = next(argument.device.type for argument in args if isinstance(argument, Tensor))
        with torch.amp.autocast(device, enabled=False):
            return run(*args, **kwargs)

    return wrapped


class _OnceOnly(torch.autograd.Function):
    """Hands gradients on as they are; differentiating them is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"inti_kernels.{ctx.op} can be differentiated once; for higher derivatives use backend='reference', "
            "which is plain PyTorch"
        )


def differentiable_once(op: str) -> Callable[..., Any]:
    """For the backward of an op's Function, which takes (ctx, *upstream gradients).

    torch.autograd.function.once_differentiable raises only where the upstream gradients require grad themselves: a
    gradient penalty, whose first backward starts from a constant, would lose its derivative without a word.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def wrapped(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                grads = backward(ctx, *upstream)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                there = [grad for grad in grads if grad is not None]
                sources = [tensor for tensor in (*ctx.saved_tensors, *upstream) if tensor is not None]
                marked = iter(_OnceOnly.apply(op, len(there), *there, *sources))
                grads = tuple(None if grad is None else next(marked) for grad in grads)
            return grads

        return wrapped

    return decorate


def present(grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """A custom op can't return None: what isn't there goes out as an empty tensor."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def only_needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def fold(tensor: Tensor, axis: int | None, size: int) -> Tensor:
    """Moves vmap's axis to the front (or repeats the tensor along one) and folds it into the batch."""
    tensor = tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return tensor.flatten(0, 1)


def unfold(output: Any, size: int) -> Any:
    """The reverse of :func:`fold`, for a tensor or a tuple of them."""
    if isinstance(output, Tensor):
        return output.unflatten(0, (size, -1)) if output.numel() else output.reshape(size, -1, *output.shape[1:])
    return tuple(unfold(tensor, size) for tensor in output)


def one_by_one(run: Callable[..., Any], size: int, axes: Sequence[Any], args: Sequence[Any]) -> Any:
    """vmap as a loop, for a mapped parameter: its gradients must stay apart, so the batch can't be folded."""
    runs = []
    for i in range(size):  # the axis of a list is a list of None
        one = (arg.select(axis, i) if isinstance(axis, int) else arg for arg, axis in zip(args, axes, strict=True))
        runs.append(run(*one))
    if isinstance(runs[0], Tensor):
        return torch.stack(runs)
    return tuple(torch.stack(tensors) for tensors in zip(*runs, strict=True))
