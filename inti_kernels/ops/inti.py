"""inti: the whole module as one node of the autograd graph (Eq. 7 to 13).

Its backends are chains of the other ops' kernels: `backends/inti.py`. x + σ·P is never written, and one buffer takes
the gradients of x from all who read it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends._arguments import wide_dtype
from ..backends.inti import (
    FRAME,
    GLOBAL,
    Inputs,
    Kept,
    Sizes,
    computed_in,
    inti_backward,
    inti_forward,
    kept_of_class_levels,
)
from ..reference import functional
from . import _recipe as recipe

_COUNT, _KEPT = len(Inputs._fields), len(Kept._fields)
_ALWAYS = ("x", "norm_weight", "norm_bias", "weight", "bias", "weight1", "bias1", "weight2", "bias2")
_TENSORS = ", ".join(f"Tensor{'' if name in _ALWAYS else '?'} {name}" for name in Inputs._fields)
_OF_FORWARD = ", ".join(f"Tensor {name}" for name in Kept._fields)
_SIZES = "SymInt[] grid, SymInt prefix, float[] eps, ScalarType dtype"


@recipe.without_autocast
def _run_forward(*args: Any) -> tuple[Tensor, ...]:
    """z, the weights, and what the backward needs (:class:`Kept`): empty without ``keep``, and what is as large as
    half of x with ``recompute``."""
    inputs, sizes, (keep, recompute, backend) = Inputs(*args[:_COUNT]), Sizes(*args[_COUNT:-3]), args[-3:]
    backend = _settle("inti", backend, inputs.x)
    z, weights, kept = inti_forward(inputs, sizes, keep, recompute, backend)
    return z, weights, *kept


@recipe.without_autocast
def _run_backward(grad_z: Tensor, grad_weights: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of the inputs; empty where ``needs`` says no, or where x's went into the accumulator."""
    *args, needs, grad_x_accumulate, backend = args
    inputs, sizes, kept = Inputs(*args[:_COUNT]), Sizes(*args[_COUNT:-_KEPT]), Kept(*args[-_KEPT:])
    recipe.check_accumulator(grad_x_accumulate, inputs.x)
    backend = _settle("inti_backward", backend, inputs.x)
    grads = inti_backward(grad_z, grad_weights, inputs, sizes, kept, needs, grad_x_accumulate, backend)
    return recipe.present(grads, inputs.x)


def _settle(counted: str, backend: str, x: Tensor) -> str:
    """Counts what runs. `auto` is left to the ops of the chain, each of which knows best, unless none has kernels."""
    chosen = backends.settle("inti", backend, x)
    backends.count(counted, chosen)
    return chosen if chosen == "reference" else backend


_forward = torch.library.custom_op(
    "inti_kernels::inti",
    _run_forward,
    mutates_args=(),
    schema=f"({_TENSORS}, {_SIZES}, bool keep, bool recompute, str backend) -> ({', '.join(['Tensor'] * (2 + _KEPT))})",
)
_backward = torch.library.custom_op(
    "inti_kernels::inti_backward",
    _run_backward,
    mutates_args={"grad_x_accumulate"},
    schema=f"(Tensor grad_z, Tensor grad_weights, {_TENSORS}, {_SIZES}, {_OF_FORWARD}, "
    f"bool[] needs, Tensor(a!)? grad_x_accumulate, str backend) -> ({', '.join(['Tensor'] * _COUNT)})",
)


@_forward.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    inputs, sizes, (keep, recompute, backend) = Inputs(*args[:_COUNT]), Sizes(*args[_COUNT:-3]), args[-3:]
    x, dtype = inputs.x, computed_in(inputs.x, sizes.dtype, backend)
    batch, frames, tokens, dim = x.shape
    pairs = (batch, frames // 2, tokens)
    outputs = x.new_empty(*pairs, dim), x.new_empty((*pairs, 2), dtype=sizes.dtype)
    nothing, large = x.new_empty(0, dtype=dtype), keep and not recompute
    wide, of_class = wide_dtype(nothing), kept_of_class_levels(inputs, sizes.dtype, backend) if large else None
    of_frame = of_class is not None and inputs.pair_weight is not None

    def kept_if(there: bool, shape: Sequence[int], of_dtype: torch.dtype) -> Tensor:
        return x.new_empty(shape, dtype=of_dtype) if there else nothing

    kept = Kept(
        statistics=kept_if(large, (batch, frames, tokens, 2), wide),
        token_preactivation=kept_if(large, (batch, frames, tokens, inputs.weight.shape[0]), dtype),
        cube=kept_if(large and inputs.cube_weight is not None, (*pairs, dim), dtype),
        difference=kept_if(keep, pairs, wide),
        head_preactivation=kept_if(large, (*pairs, inputs.weight1.shape[0]), dtype),
        frame_preactivation=kept_if(
            of_frame, (batch, frames, inputs.pair_weight.shape[0] if of_frame else 0), of_class
        ),
        pair_preactivation=kept_if(of_frame, (*pairs[:2], dim), of_class),
        context=kept_if(of_class is not None, (*pairs[:2], dim), wide),
    )
    return *outputs, *kept


@_backward.register_fake
def _(grad_z, grad_weights, *args):  # type: ignore[no-untyped-def]
    inputs, (needs, grad_x_accumulate, _) = args[:_COUNT], args[-3:]
    written = (needs[0] and grad_x_accumulate is None, *needs[1:])
    return recipe.present(
        [t.new_empty(t.shape) if w else None for t, w in zip(inputs, written, strict=True)], inputs[0]
    )


@_backward.register_vmap
def _(info, in_dims, *args):  # type: ignore[no-untyped-def]
    size, needs = info.batch_size, args[-3]
    out_dims = (0,) * _COUNT
    of_tokens = (0, 1, 2, *range(len(args) - 3 - _KEPT, len(args) - 3))
    if any(needs[1:]) or any(axis is not None for axis in in_dims[3 : 2 + _COUNT]):
        return recipe.one_by_one(_backward, size, in_dims, args), out_dims
    folded = [recipe.fold(arg, in_dims[i], size) if i in of_tokens else arg for i, arg in enumerate(args)]
    return recipe.unfold(_backward(*folded), size), out_dims


@recipe.with_eager_twin(_run_forward)
class Inti(torch.autograd.Function):
    """The op with its backward, for autograd, torch.compile and torch.func alike: :class:`Inputs`, :class:`Sizes`,
    keep, recompute, backend."""

    @staticmethod
    @recipe.with_parameters(*Inputs._fields, *Sizes._fields, "keep", "recompute", "backend")
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        recipe.keep_for_backward(ctx, inputs[:_COUNT], output[2:])
        ctx.sizes, ctx.backend = inputs[_COUNT:-3], inputs[-1]

    @staticmethod
    @recipe.differentiable_once("inti")
    def backward(ctx: Any, saved: tuple[Any, ...], grad_z: Tensor, grad_weights: Tensor, *_: Any) -> Any:
        needs = ctx.needs_input_grad[:_COUNT]
        run = _run_backward if recipe.plain_eager(grad_z) else _backward
        grads = run(grad_z, grad_weights, *saved[:_COUNT], *ctx.sizes, *saved[_COUNT:], needs, None, ctx.backend)
        return *recipe.only_needed(grads, needs), *(None,) * (len(ctx.sizes) + 3)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *others: Any) -> Any:
        size, out_dims = info.batch_size, (0,) * (2 + _KEPT)
        if any(axis is not None for axis in in_dims[1:_COUNT]):
            return recipe.one_by_one(Inti.apply, size, in_dims, (x, *others)), out_dims
        return recipe.unfold(Inti.apply(recipe.fold(x, in_dims[0], size), *others), size), out_dims


_forward.register_autograd(Inti.backward, setup_context=Inti.setup_context)


def inti(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    cube_weight: Tensor | None,
    cube_bias: Tensor | None,
    pair_norm_weight: Tensor | None,
    pair_norm_bias: Tensor | None,
    pair_weight: Tensor | None,
    pair_bias: Tensor | None,
    frame_norm_weight: Tensor | None,
    frame_norm_bias: Tensor | None,
    frame_weight: Tensor | None,
    frame_bias: Tensor | None,
    global_weight1: Tensor | None,
    global_bias1: Tensor | None,
    global_weight2: Tensor | None,
    global_bias2: Tensor | None,
    global_weight3: Tensor | None,
    global_bias3: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None = None,
    *,
    grid: tuple[int, int],
    prefix: int = 1,
    eps: Sequence[float] = (1e-5, 1e-5, 1e-5),
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole module, with the fusion "separate" and the softmax head (Eq. 7 to 13), as one node of the graph.

    Backends: reference, cpu, triton, cuda. The products run in x's dtype, under autocast in autocast's (on a CPU
    without products in that dtype in float32, if x is in float32; those of class tokens in float32 where parameters
    are); sums in float32 (float64 for float64). For the
    backward it keeps what the two GELUs were taken of and the cube level, 1.5 times the size of x in the products'
    dtype, two numbers a token and, on the CPU and with cuda, 1.5·C a frame. Differentiable once, in every input;
    vmap, torch.func.grad and torch.compile work.

    Args:
        x: tokens [B, T, prefix + H·W, C], T even; float32, float64, bfloat16 or float16; any strides (other than
            contiguous channels cost a copy).
        norm_weight, norm_bias, weight, bias: the token level's LayerNorm [C] and [C], and Linear [D, C] and [D] (Eq. 9;
            D = C/2).
        cube_weight, cube_bias: the cube level's convolution [C, 1, 3, 3, 3] and [C] (Eq. 10), or None without it.
        pair_norm_weight, pair_norm_bias, pair_weight, pair_bias: the frame level's LayerNorm [C] and [C], and Linear
            [C/2, C] and [C/2] of one class token (Eq. 11), or None without the level.
        frame_norm_weight, frame_norm_bias, frame_weight, frame_bias: those of a pair of class tokens, [C], [C], [C, C]
            and [C]; or None.
        global_weight1, …, global_bias3: the global level's three depthwise convolutions in time, [C, 1, 3] and [C]
            (Eq. 12), or None without it.
        weight1, bias1: the head's first Linear [h, 2·D + C] ([h, 2·D] without any level) and [h].
        weight2, bias2: its second [2, h] and [2].
        position: σ·P [T, C], added to x while it is loaded (Eq. 8), or None.
        grid: (H, W).
        prefix: tokens before the patches; without any the mean token stands in for the class token.
        eps: of the LayerNorms of the token level, the frame level's frames and its pairs.
        recompute: keep none of that but a number a pair of tokens; the backward then does the forward's products again.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None takes the choice in force, see
            :func:`inti_kernels.use_backend`.

    Returns:
        z [B, T/2, N, C] in x's dtype, and the weights (α, β) [B, T/2, N, 2] in the products' dtype.

    Raises:
        ValueError: shapes that don't go together, odd T, a level of which only a part is given, tensors on different
            devices, an unknown backend.
        TypeError: an input that isn't a dense floating tensor; mixed dtypes outside autocast (position's may be
            another).
        RuntimeError: the backend that was asked for can't run here; a second derivative, or forward-mode AD.
    """
    tensors = Inputs(
        x, norm_weight, norm_bias, weight, bias, cube_weight, cube_bias, pair_norm_weight, pair_norm_bias, pair_weight,
        pair_bias, frame_norm_weight, frame_norm_bias, frame_weight, frame_bias, global_weight1, global_bias1,
        global_weight2, global_bias2, global_weight3, global_bias3, weight1, bias1, weight2, bias2, position,
    )  # fmt: skip
    _check_input(tensors, grid, prefix)
    if len(eps) != 3:
        raise ValueError(f"eps must be three numbers, of the three LayerNorms, got {eps!r}")
    backend = backends.resolve("inti", backend, x)
    if backend == "reference":
        backends.count_reference("inti")
        return functional.inti(*tensors, grid=grid, prefix=prefix, eps=eps)
    recipe.leave_transforms_to_eager()
    keep = recipe.wants_gradient(*tensors)
    sizes = (list(grid), prefix, [float(value) for value in eps], recipe.product_dtype(x))
    z, weights, *_ = recipe.apply(Inti, *tensors, *sizes, keep, recompute, backend)
    return z, weights


def _check_input(inputs: Inputs, grid: tuple[int, int], prefix: int) -> None:
    x = inputs.x
    recipe.check_tokens(x)
    recipe.check_grid(x, grid, prefix)
    frames, dim = x.shape[1], x.shape[3]
    functional.check_pairs(frames)
    recipe.check_matrix(inputs.weight, "weight")
    recipe.check_matrix(inputs.weight1, "weight1")
    width, hidden = inputs.weight.shape[0], inputs.weight1.shape[0]
    levels = (inputs.cube_weight is not None, _is_there(inputs, FRAME), _is_there(inputs, GLOBAL))
    half = dim // 2 if inputs.pair_weight is None else inputs.pair_weight.shape[0]
    shapes = Inputs(
        x=(*x.shape,),
        norm_weight=(dim,), norm_bias=(dim,), weight=(width, dim), bias=(width,),
        cube_weight=(dim, 1, 3, 3, 3), cube_bias=(dim,),
        pair_norm_weight=(dim,), pair_norm_bias=(dim,), pair_weight=(half, dim), pair_bias=(half,),
        frame_norm_weight=(2 * half,), frame_norm_bias=(2 * half,), frame_weight=(dim, 2 * half), frame_bias=(dim,),
        global_weight1=(dim, 1, 3), global_bias1=(dim,),
        global_weight2=(dim, 1, 3), global_bias2=(dim,),
        global_weight3=(dim, 1, 3), global_bias3=(dim,),
        weight1=(hidden, 2 * width + dim * any(levels)), bias1=(hidden,), weight2=(2, hidden), bias2=(2,),
        position=(frames, dim),
    )  # fmt: skip
    # Most of the time all is well, which one look each can tell; what is to be said of the rest takes longer.
    dtype, device = inputs.weight.dtype, x.device
    rest = {
        name: (tensor, shape)
        for name, tensor, shape in zip(Inputs._fields, inputs, shapes, strict=True)
        if not isinstance(tensor, Tensor)
        or tensor.shape != shape
        or tensor.dtype != dtype
        or tensor.device != device
        or tensor.layout != torch.strided
    }
    for name, (tensor, shape) in rest.items():
        recipe.check_like(tensor, name, x, shape, "", optional=name not in _ALWAYS)
    if any(tensor is not None for name, (tensor, _) in rest.items() if name != "position"):
        recipe.check_one_dtype(**{name: tensor for name, tensor in inputs._asdict().items() if name != "position"})


def _is_there(inputs: Inputs, level: slice) -> bool:
    """Whether all parameters of a level are given; False for none."""
    missing = [name for name in Inputs._fields[level] if getattr(inputs, name) is None]
    if missing and len(missing) < level.stop - level.start:
        raise ValueError(f"a level takes all of its parameters or none; not given: {', '.join(missing)}")
    return not missing
