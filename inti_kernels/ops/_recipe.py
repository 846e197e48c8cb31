"""What every op's autograd recipe shares: checks of the input, and the rules for vmap."""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..backends._arguments import as_dtype
from ..reference import functional


def check_tokens(x: Tensor) -> None:
    """x must be a dense floating tensor [B, T, N, C], empty in B only."""
    check_floating(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x must be tokens [B, T, N, C], got {x.dim()} dimensions: {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have at least one frame, token and channel, got {tuple(x.shape)}")


def check_floating(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating (float32, float64, bfloat16 or float16), got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}; call .to_dense() first")


def check_like(
    tensor: Tensor | None, name: str, x: Tensor, shape: Sequence[int], axes: str, *, optional: bool = False
) -> None:
    """A further input: floating, on x's device, of the shape that belongs to x; None only if it is optional."""
    if tensor is None and optional:
        return
    check_floating(tensor, name)
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device, {x.device}, got {tensor.device}")
    if tensor.shape != shape:
        axes = f"{axes} = " if axes else ""
        raise ValueError(f"{name} must be {axes}{tuple(shape)} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")


def check_matrix(tensor: Tensor, name: str) -> None:
    """What a shape can be read off: a floating tensor of two axes or more."""
    check_floating(tensor, name)
    if tensor.dim() < 2:
        raise ValueError(f"{name} must have two axes or more, got shape {tuple(tensor.shape)}")


def check_grid(x: Tensor, grid: tuple[int, int], prefix: int) -> None:
    """(H, W) and the number of prefix tokens: whole numbers, of as many tokens a frame as x has."""
    functional.check_grid(grid)
    functional.check_prefix(prefix)
    if x.shape[2] != prefix + grid[0] * grid[1]:
        raise ValueError(
            f"x must have prefix + H·W = {prefix} + {grid[0]}·{grid[1]} = {prefix + grid[0] * grid[1]} tokens a frame, "
            f"got {x.shape[2]}"
        )


def check_one_dtype(**tensors: Tensor | None) -> None:
    """The inputs of a product: of one dtype, unless autocast is on and makes it so."""
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (first, like), *others = there.items()
    if not like.is_meta and torch.is_autocast_enabled(like.device.type):
        return
    for name, tensor in others:
        if tensor.dtype != like.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first}, {like.dtype}, got {tensor.dtype}; convert one, or use autocast"
            )


def cast_as_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast would make of the inputs of a product, differentiably; unchanged where it is off. Like autocast, it
    leaves float64 alone."""
    return tuple(None if tensor is None else tensor.to(product_dtype(tensor)) for tensor in tensors)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast would make of an input of a product: float64 it leaves alone. Where it is off, nothing."""
    device = tensor.device.type
    if tensor.is_meta or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def check_accumulator(accumulate: Tensor | None, x: Tensor) -> None:
    if accumulate is None:
        return
    same = accumulate.shape == x.shape and accumulate.dtype == x.dtype and accumulate.device == x.device
    if not same or not accumulate.is_contiguous():
        raise ValueError(
            f"grad_x_accumulate must be contiguous, of x's shape {tuple(x.shape)}, dtype {x.dtype} and device "
            f"{x.device}, got {tuple(accumulate.shape)}, {accumulate.dtype}, {accumulate.device}, strides "
            f"{accumulate.stride()}"
        )


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """For implementations: autocast is still on inside a custom op's forward, and off in its backward."""

    @wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = next(argument.device.type for argument in args if isinstance(argument, Tensor))
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return run(*args, **kwargs)
        with torch.amp.autocast(device, enabled=False):
            return run(*args, **kwargs)

    return wrapped


def leave_transforms_to_eager() -> None:
    """To be called before a Function's apply: compiled code inside torch.func.grad, vmap or jvp runs eagerly.

    Dynamo inlines such a Function's forward into the transform, and the derivative comes out wrong or 0, silently.
    A graph break is right; with fullgraph=True it is an error.
    """
    if torch.compiler.is_compiling() and _transforming():
        torch._dynamo.graph_break()


def _transforming() -> bool:
    in_functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return in_functorch or torch.autograd.forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result does, less its import of all of Dynamo.
_transforming._dynamo_marked_constant = True


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward can be asked for, so that the forward should keep what it needs. A transform that this doesn't
    see costs a second forward, no more."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def keep_for_backward(ctx: Any, inputs: Sequence[Tensor | None], kept: Sequence[Tensor]) -> None:
    """For setup_context: saves inputs and those outputs that are there for the backward alone."""
    ctx.save_for_backward(*inputs, *kept)
    ctx.mark_non_differentiable(*kept)
    if not torch.compiler.is_compiling():  # which never makes zeros of the gradients of these
        ctx._materialize_non_diff_grads = False


def plain_eager(x: Tensor) -> bool:
    """Whether the dispatcher has nothing to add: no tracing, no transform, no dispatch mode, no tensor subclass.

    An op's Function then calls its implementation itself; 0.2 ms less for a forward and backward with cold caches.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


def with_eager_twin(run: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``function.eager``, which calls an op's implementation itself and has no setup_context of its own: of a
    function that has one PyTorch binds the arguments by name at every call, 0.1 ms for the 31 of the op `inti`. See
    :func:`apply`."""

    def decorate(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        def forward(ctx: Any, *args: Any) -> Any:
            output = run(*args)
            function.setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
        function.eager = type(function.__name__, (torch.autograd.Function,), methods)
        return function

    return decorate


def apply(function: type[torch.autograd.Function], x: Tensor, *args: Any) -> Any:
    """``function.apply(x, *args)``, by the twin where the dispatcher has nothing to add."""
    return (function.eager if plain_eager(x) else function).apply(x, *args)


def with_parameters(*names: str) -> Callable[..., Any]:
    """The signature of a function of any arguments: Dynamo counts the parameters."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        return function

    return decorate


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
    """For the backward of an op's Function, which then takes (ctx, saved tensors, *upstream gradients).

    torch.autograd.function.once_differentiable raises only where the upstream gradients require grad themselves: a
    gradient penalty, whose first backward starts from a constant, would lose its derivative without a word.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def wrapped(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # once: checkpointing and offloading unpack at every look
            with torch.no_grad():
                grads = backward(ctx, saved, *upstream)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                there = [grad for grad in grads if grad is not None]
                sources = [tensor for tensor in (*saved, *upstream) if tensor is not None]
                marked = iter(_OnceOnly.apply(op, len(there), *there, *sources))
                grads = tuple(None if grad is None else next(marked) for grad in grads)
            return grads

        return wrapped

    return decorate


def present(grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """A custom op can't return None: what isn't there goes out as an empty tensor."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def in_dtypes_of(inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Backends may return gradients in the dtype that they were added up in."""
    return tuple(None if g is None else as_dtype(g, t.dtype) for g, t in zip(grads, inputs, strict=True))


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
