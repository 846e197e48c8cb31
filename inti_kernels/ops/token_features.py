"""token_features: LayerNorm, Linear and GELU of every token, written as concatenated pairs (Eq. 9)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends._arguments import wide_dtype
from ..reference import functional
from . import _recipe as recipe


@recipe.without_autocast
def _run_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    eps: float,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """F_token, and for the backward, or empty without ``keep``: the LayerNorm's mean and 1/σ [B, T, N, 2], and what the
    GELU was taken of [B, T, N, D]."""
    module = backends.implementation("token_features", backend, x)
    return module.token_features_forward(x, norm_weight, norm_bias, weight, bias, position, eps, keep)


@recipe.without_autocast
def _run_backward(
    grad_features: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    eps: float,
    statistics: Tensor,
    preactivation: Tensor,
    needs: Sequence[bool],
    grad_x_accumulate: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six inputs; empty where ``needs`` says no, or where x's went into the accumulator."""
    recipe.check_accumulator(grad_x_accumulate, x)
    module = backends.implementation("token_features", backend, x, direction="backward")
    inputs = (x, norm_weight, norm_bias, weight, bias, position, eps)
    if any(needs) and not statistics.numel():  # the forward was run where no gradient was in sight
        _, statistics, preactivation = module.token_features_forward(*inputs, True)
    grads = module.token_features_backward(grad_features, *inputs, statistics, preactivation, needs, grad_x_accumulate)
    return recipe.present(recipe.in_dtypes_of(inputs[:-1], grads), x)


_forward = torch.library.custom_op("inti_kernels::token_features", _run_forward, mutates_args=())
_backward = torch.library.custom_op(
    "inti_kernels::token_features_backward", _run_backward, mutates_args={"grad_x_accumulate"}
)


@_forward.register_fake
def _(x, norm_weight, norm_bias, weight, bias, position, eps, keep, backend):  # type: ignore[no-untyped-def]
    batch, frames, tokens, _ = x.shape
    width = weight.shape[0]
    features = x.new_empty(batch, frames // 2, tokens, 2 * width)
    if not keep:
        return features, x.new_empty(0), x.new_empty(0)
    statistics = x.new_empty((batch, frames, tokens, 2), dtype=wide_dtype(x))
    return features, statistics, x.new_empty(batch, frames, tokens, width)


@_backward.register_fake
def _(
    grad_features, x, norm_weight, norm_bias, weight, bias, position, eps, statistics, preactivation, needs,
    grad_x_accumulate, backend,
):  # type: ignore[no-untyped-def]  # fmt: skip
    written = (needs[0] and grad_x_accumulate is None, *needs[1:])
    inputs = (x, norm_weight, norm_bias, weight, bias, position)
    return recipe.present([t.new_empty(t.shape) if w else None for t, w in zip(inputs, written, strict=True)], x)


@_backward.register_vmap
def _(info, in_dims, *args):  # type: ignore[no-untyped-def]
    size, needs = info.batch_size, args[10]
    out_dims = (0,) * 6
    if any(needs[1:]) or any(axis is not None for axis in in_dims[2:7]):
        return recipe.one_by_one(_backward, size, in_dims, args), out_dims
    grad_features, x, statistics, preactivation = (recipe.fold(args[i], in_dims[i], size) for i in (0, 1, 8, 9))
    grads = _backward(grad_features, x, *args[2:8], statistics, preactivation, *args[10:])
    return recipe.unfold(grads, size), out_dims


@recipe.with_eager_twin(_run_forward)
class TokenFeatures(torch.autograd.Function):
    """The op with its backward, for autograd, torch.compile and torch.func alike."""

    @staticmethod
    def forward(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        position: Tensor | None,
        eps: float,
        keep: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(x, norm_weight, norm_bias, weight, bias, position, eps, keep, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        recipe.keep_for_backward(ctx, inputs[:6], output[1:])
        ctx.eps, ctx.backend = inputs[6], inputs[8]

    @staticmethod
    @recipe.differentiable_once("token_features")
    def backward(ctx: Any, saved: tuple[Any, ...], grad_features: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:6]
        run = _run_backward if recipe.plain_eager(grad_features) else _backward
        grads = run(grad_features, *saved[:6], ctx.eps, *saved[6:], needs, None, ctx.backend)
        return *recipe.only_needed(grads, needs), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *others: Any) -> Any:
        size = info.batch_size
        if any(axis is not None for axis in in_dims[1:6]):
            return recipe.one_by_one(TokenFeatures.apply, size, in_dims, (x, *others)), (0, 0, 0)
        return recipe.unfold(TokenFeatures.apply(recipe.fold(x, in_dims[0], size), *others), size), (0, 0, 0)


_forward.register_autograd(TokenFeatures.backward, setup_context=TokenFeatures.setup_context)


def token_features(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """F_token[j,k] = concat(T_{C→D}(x[2j,k]), T_{C→D}(x[2j+1,k])), T = LayerNorm → Linear → GELU (Eq. 9; D = C/2).

    Backends: reference, cpu, triton, cuda. The LayerNorm's statistics and all sums are in float32 (float64 for
    float64). Differentiable once, in every input; vmap, torch.func.grad and torch.compile work.

    Args:
        x: tokens [B, T, N, C], T even, any floating dtype and strides.
        norm_weight, norm_bias: the LayerNorm's [C].
        weight, bias: the Linear's [D, C] and [D].
        position: σ·P [T, C], any floating dtype, added to x first (Eq. 8); or None.
        eps: of the LayerNorm.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None takes the choice in force, see
            :func:`inti_kernels.use_backend`.

    Returns:
        [B, T/2, N, 2·D] in the dtype of the Linear's output: under autocast, autocast's.

    Raises:
        ValueError: shapes that don't go together, odd T, tensors on different devices, an unknown backend.
        TypeError: an input that isn't a dense floating tensor; mixed dtypes outside autocast.
        RuntimeError: the backend that was asked for can't run here; a second derivative, or forward-mode AD.
    """
    recipe.check_tokens(x)
    frames, dim = x.shape[1], x.shape[3]
    functional.check_pairs(frames)
    recipe.check_like(norm_weight, "norm_weight", x, (dim,), "[C]")
    recipe.check_like(norm_bias, "norm_bias", x, (dim,), "[C]")
    recipe.check_matrix(weight, "weight")
    recipe.check_like(weight, "weight", x, (weight.shape[0], dim), "[D, C]")
    recipe.check_like(bias, "bias", x, (weight.shape[0],), "[D]")
    recipe.check_like(position, "position", x, (frames, dim), "[T, C]", optional=True)
    recipe.check_one_dtype(x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    backend = backends.resolve("token_features", backend, x)
    if backend == "reference":
        backends.count_reference("token_features")
        return functional.token_features(x, norm_weight, norm_bias, weight, bias, position, eps=eps)
    tensors = recipe.cast_as_autocast(x, norm_weight, norm_bias, weight, bias)
    recipe.leave_transforms_to_eager()
    keep = recipe.wants_gradient(*tensors, position)
    return recipe.apply(TokenFeatures, *tensors, position, float(eps), keep, backend)[0]
