"""The whole module as a chain of the other ops' kernels, on every backend: one buffer for the gradient of x (two where
autocast on a GPU has kernels read converted tokens), and kept for the backward only what takes a product or a
convolution to compute again.

The frame and the global level work on B·T class tokens: on the CPU and in CUDA C++ by kernels of their own, elsewhere
in plain PyTorch, run again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import _module, implementation, settle
from ._arguments import all_as_dtypes, as_dtype, channels_contiguous, in_wide_dtype, wide_dtype
from ._class_levels import ClassLevels
from ._class_levels import Kept as KeptOfClassLevels


class Inputs(NamedTuple):
    """The tensors of the op `inti`, in its order; see :func:`inti_kernels.reference.functional.inti`."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor
    cube_weight: Tensor | None
    cube_bias: Tensor | None
    pair_norm_weight: Tensor | None
    pair_norm_bias: Tensor | None
    pair_weight: Tensor | None
    pair_bias: Tensor | None
    frame_norm_weight: Tensor | None
    frame_norm_bias: Tensor | None
    frame_weight: Tensor | None
    frame_bias: Tensor | None
    global_weight1: Tensor | None
    global_bias1: Tensor | None
    global_weight2: Tensor | None
    global_bias2: Tensor | None
    global_weight3: Tensor | None
    global_bias3: Tensor | None
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    position: Tensor | None


# Where the parameters of the frame level, the global level and the head stand among the inputs.
FRAME, GLOBAL, HEAD = slice(7, 15), slice(15, 21), slice(21, 25)


class Kept(NamedTuple):
    """What the forward leaves for the backward beside the inputs; empty tensors where it is computed again.

    Attributes:
        statistics: mean and 1/σ of the token level's LayerNorm [B, T, N, 2].
        token_preactivation: what the token level's GELU was taken of [B, T, N, D].
        cube: F_cube [B, T/2, N, C].
        difference: of the two logits [B, T/2, N].
        head_preactivation: what the head's GELU was taken of [B, T/2, N, h].
        frame_preactivation, pair_preactivation: what the frame level's GELUs were taken of [B, T, C/2] and
            [B, T/2, C], where kernels computed it.
        context: F_frame + F_global [B, T/2, C], where kernels computed it.
    """

    statistics: Tensor
    token_preactivation: Tensor
    cube: Tensor
    difference: Tensor
    head_preactivation: Tensor
    frame_preactivation: Tensor
    pair_preactivation: Tensor
    context: Tensor

    def of_class_levels(self) -> KeptOfClassLevels:
        return KeptOfClassLevels(*(tensor if tensor.numel() else None for tensor in self[-3:]))


class Sizes(NamedTuple):
    """What else the op takes.

    Attributes:
        grid: (H, W).
        prefix: tokens before the patches.
        eps: of the three LayerNorms.
        dtype: what the products of tokens are to be computed in: x's, or autocast's. Those of class tokens may be in
            the wide dtype.
    """

    grid: Sequence[int]
    prefix: int
    eps: Sequence[float]
    dtype: torch.dtype


def computed_in(x: Tensor, dtype: torch.dtype, backend: str) -> torch.dtype:
    """The dtype of the products and of what is kept of them: ``dtype``, but float32 for tokens in float32 where the
    machine has no products in autocast's. Tokens without data run nowhere, and no backend is settled for them."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and settle("inti", backend, x) == "cpu":
        from .cpu._products import product_dtype

        return product_dtype(dtype)
    return dtype


def kept_of_class_levels(inputs: Inputs, dtype: torch.dtype, backend: str) -> torch.dtype | None:
    """The dtype of what the forward keeps of the frame level, where kernels compute the class tokens' levels on this
    machine; None where it keeps nothing of them. Tokens on a device that isn't here run nowhere.

    Args:
        dtype: of the products, see :class:`Sizes`.
    """
    x = inputs.x
    here = x.device.type == "cpu" or (x.is_cuda and (x.device.index or 0) < torch.cuda.device_count())
    parameters = [tensor for tensor in inputs[FRAME.start : GLOBAL.stop] if tensor is not None]
    kernels = _kernels_of_class_levels(x, backend) if here and parameters else None
    return None if kernels is None else kernels.dtype_of_frame_level(x, parameters, dtype)


def _kernels_of_class_levels(x: Tensor, backend: str) -> ModuleType | None:
    """The module with the ClassLevels of kernels, or None where PyTorch runs."""
    chosen = settle("inti", backend, x)
    if chosen not in ("cpu", "cuda"):
        return None
    return _module(chosen, "class_levels")


def inti_forward(
    inputs: Inputs, sizes: Sizes, keep: bool, recompute: bool, backend: str
) -> tuple[Tensor, Tensor, Kept]:
    """z [B, T/2, N, C] in x's dtype, the weights [B, T/2, N, 2] in ``sizes.dtype``, and what is kept (nothing without
    ``keep``; with ``recompute`` only what is small beside x)."""
    run = _Chain(inputs, sizes, backend)
    # What is kept is no concern; else the cube level waits until the token level has freed what it worked in.
    cube = run.cube() if keep else None
    features, statistics, token_preactivation = run.token_features(keep and not recompute)
    cube = cube if keep else run.cube()
    class_levels = run.class_levels()
    context = run.in_dtype(class_levels.forward(run.class_tokens(), run.position))
    z, weights, difference, head_preactivation = run.head(features, cube, context, keep and not recompute)
    kept = Kept(statistics, token_preactivation, cube, difference, head_preactivation, *class_levels.kept)
    stays = () if not keep else ("difference",) if recompute else Kept._fields
    # An op's outputs may not be one tensor twice.
    kept = Kept(
        *(t if name in stays and t is not None else features.new_empty(0) for name, t in kept._asdict().items())
    )
    return z, as_dtype(weights, sizes.dtype), kept


def inti_backward(
    grad_z: Tensor,
    grad_weights: Tensor,
    inputs: Inputs,
    sizes: Sizes,
    kept: Kept,
    needs: Sequence[bool],
    grad_x_accumulate: Tensor | None,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs; None where ``needs`` says no, or where x's went into the accumulator."""
    if not any(needs):
        return (None,) * len(inputs)
    run, need = _Chain(inputs, sizes, backend), Inputs(*needs)
    given = [i for i in range(FRAME.start, GLOBAL.stop) if inputs[i] is not None]
    # Whoever sees x + σ·P has a part in both their gradients.
    tokens = need.x or need.position
    class_levels = run.class_levels()
    wide_context = class_levels.resume(run.class_tokens(), run.position, kept.of_class_levels())
    context = run.in_dtype(wide_context)
    kept, features = run.kept_and_features(kept, context)
    needs_of_token = (need.norm_weight, need.norm_bias, need.weight, need.bias)
    grads: dict[str, Tensor | None] = {}
    with run.sums_in_one_launch():
        of_head = run.head_backward(
            grad_z,
            grad_weights,
            features,
            context,
            kept,
            (
                tokens or any(needs_of_token),
                inputs.cube_weight is not None and (tokens or need.cube_weight or need.cube_bias),
                context is not None and bool(tokens or any(needs[FRAME.start : GLOBAL.stop])),
                need.x,
                *needs[HEAD],
                need.position,
            ),
            grad_x_accumulate,
        )
        grad_features, grad_cube, grad_context, grad_x, *of_network, of_position = of_head
        grads.update(zip(("weight1", "bias1", "weight2", "bias2"), of_network, strict=True))
        buffer = grad_x if grad_x_accumulate is None else grad_x_accumulate
        positions = [of_position]
        # Where the other kernels see the tokens in another dtype, they have a buffer in that; the last of them may be
        # able to bring it to the first.
        shared = buffer if run.tokens is run.inputs.x and need.x else None
        total = run.total(buffer) if shared is None and need.x else {}
        if grad_cube is not None:
            of_x, grads["cube_weight"], grads["cube_bias"], of_position = run.cube_backward(
                grad_cube, (need.x, need.cube_weight, need.cube_bias, need.position), shared
            )
            shared = of_x if shared is None else shared
            positions.append(of_position)
        if grad_features is not None:
            of_x, *of_token, of_position = run.token_features_backward(
                grad_features, kept, (need.x, *needs_of_token, need.position), shared, **total
            )
            grads.update(zip(("norm_weight", "norm_bias", "weight", "bias"), of_token, strict=True))
            shared = buffer if total else of_x if shared is None else shared
            positions.append(of_position)
    if need.x and shared is not buffer:
        buffer += shared
    if grad_context is not None:
        of_class, of_levels = class_levels.backward(as_dtype(grad_context, wide_context.dtype))
        grads.update(zip((Inputs._fields[i] for i in given), of_levels, strict=True))
        if need.x:
            _add_to_class_tokens(buffer, of_class, sizes.prefix)
        positions.append(of_class.sum(0) if need.position else None)
    if need.x and grad_x_accumulate is None:
        grads["x"] = buffer
    if need.position:
        parts = [as_dtype(part, wide_dtype(part)) for part in positions if part is not None]
        grads["position"] = sum(parts[1:], parts[0])
    wanted = [grads.get(name) if wanted else None for name, wanted in zip(Inputs._fields, needs, strict=True)]
    return tuple(all_as_dtypes(wanted, [None if tensor is None else tensor.dtype for tensor in inputs]))


class _Chain:
    """The kernels of the chain, and the inputs as they take them.

    Attributes:
        tokens: x as the convolution and the token level read it: in the products' dtype, but for kernels that read
            float32 beside it.
        position: σ·P in what kernels add it in, converted once for all.
    """

    def __init__(self, inputs: Inputs, sizes: Sizes, backend: str) -> None:
        x = channels_contiguous(inputs.x, "inti")
        inputs = inputs._replace(x=x)
        self.inputs, self.sizes, self.backend = inputs, sizes, backend
        self.dtype = computed_in(x, sizes.dtype, backend)
        reads_both = x.dtype == torch.float32 and settle("token_features", backend, x) == "cpu"
        self.tokens = x if reads_both else as_dtype(x, self.dtype)
        # Such kernels' cube level comes and goes in the products' dtype.
        self.dtype_of_cube = {"dtype": self.dtype} if reads_both else {}
        parameters = (inputs.norm_weight, inputs.norm_bias, inputs.weight, inputs.bias, *inputs[HEAD])
        parameters = all_as_dtypes(parameters, [self.tokens.dtype] * 2 + [self.dtype] * 6)
        self.norm, self.linear, self.network = parameters[:2], parameters[2:4], parameters[4:]
        self.position = in_wide_dtype(inputs.position, x)

    def _module(self, op: str, x: Tensor, direction: str | None) -> ModuleType:
        return implementation(op, self.backend, x, direction=direction)

    def in_dtype(self, context: Tensor | None) -> Tensor | None:
        """The frames' context as the head takes it."""
        return None if context is None else as_dtype(context, self.dtype)

    def class_levels(self) -> ClassLevels:
        x, eps = self.inputs.x, self.sizes.eps[1:]
        frame, convolutions = (
            None if level[0] is None else level for level in (self.inputs[FRAME], self.inputs[GLOBAL])
        )
        kernels = _kernels_of_class_levels(x, self.backend)
        if kernels is not None:
            return kernels.ClassLevels(frame, convolutions, eps, self.sizes.dtype)
        # PyTorch's 16-bit products of a few rows are slow on the CPU.
        dtype = self.dtype if x.is_cuda else wide_dtype(x)
        return ClassLevels(frame and [as_dtype(parameter, dtype) for parameter in frame], convolutions, eps)

    def class_tokens(self) -> Tensor:
        """Of x [B, T, C], as they are; of tokens without any their mean, in the wide dtype."""
        x = self.inputs.x
        return x[:, :, 0] if self.sizes.prefix else x.mean(dim=2, dtype=wide_dtype(x))

    def token_features(self, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        module = self._module("token_features", self.tokens, "forward")
        return module.token_features_forward(
            self.tokens, *self.norm, *self.linear, self.position, self.sizes.eps[0], keep
        )

    def cube(self) -> Tensor | None:
        if self.inputs.cube_weight is None:
            return None
        module = self._module("depthwise_conv3d", self.tokens, "forward")
        parameters = (self.inputs.cube_weight, self.inputs.cube_bias, self.position)
        sizes = (self.sizes.grid, 2, self.sizes.prefix)
        return module.depthwise_conv3d_forward(self.tokens, *parameters, *sizes, **self.dtype_of_cube)

    def head(
        self, features: Tensor, cube: Tensor | None, context: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        module = self._module("interpolation_head", self.inputs.x, "forward")
        return module.interpolation_head_forward(
            features, cube, context, self.inputs.x, *self.network, self.position, keep
        )

    def kept_and_features(self, kept: Kept, context: Tensor | None) -> tuple[Kept, Tensor]:
        """What the forward kept, with what it didn't computed again, and F_token."""
        if kept.token_preactivation.numel():
            module = self._module("token_features", self.tokens, None)
            features = module.token_features_activation(kept.token_preactivation)
            return kept, features
        features, statistics, token_preactivation = self.token_features(True)
        cube = self.cube()
        head = self._module("interpolation_head", self.inputs.x, None)
        if kept.difference.numel():
            preactivation = head.interpolation_head_preactivation(features, cube, context, *self.network[:2])
            difference = kept.difference
        else:  # the forward was run where no gradient was in sight
            _, _, difference, preactivation = self.head(features, cube, context, True)
        nothing = features.new_empty(0)
        cube = nothing if cube is None else cube
        return Kept(statistics, token_preactivation, cube, difference, preactivation, *kept[-3:]), features

    def sums_in_one_launch(self) -> AbstractContextManager[None]:
        """On the cuda backend the ordered sums of all partial sums are one launch, at the end of the block."""
        if settle("interpolation_head", self.backend, self.inputs.x) == "cuda":
            from .cuda._launch import deferred_sums

            return deferred_sums()
        return nullcontext()

    def head_backward(
        self,
        grad_z: Tensor,
        grad_weights: Tensor,
        features: Tensor,
        context: Tensor | None,
        kept: Kept,
        needs: Sequence[bool],
        accumulate: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        module = self._module("interpolation_head", self.inputs.x, "backward")
        return module.interpolation_head_backward(
            grad_z,
            as_dtype(grad_weights, self.dtype),
            features,
            None if self.inputs.cube_weight is None else kept.cube,
            context,
            self.inputs.x,
            *self.network,
            self.position,
            kept.difference,
            kept.head_preactivation,
            needs,
            accumulate,
        )

    def cube_backward(
        self, grad_cube: Tensor, needs: Sequence[bool], accumulate: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        module = self._module("depthwise_conv3d", self.tokens, "backward")
        parameters = (self.inputs.cube_weight, self.inputs.cube_bias, self.position)
        sizes = (self.sizes.grid, 2, self.sizes.prefix)
        return module.depthwise_conv3d_backward(grad_cube, self.tokens, *parameters, *sizes, needs, accumulate)

    def total(self, buffer: Tensor) -> dict[str, Tensor]:
        """What has token_features' backward add x's gradient to a buffer in the wide dtype, where it can."""
        in_cuda = settle("token_features", self.backend, self.tokens) == "cuda"
        sixteen_bits = self.tokens.dtype.itemsize == 2 and buffer.dtype == torch.float32
        return {"total": buffer} if in_cuda and sixteen_bits else {}

    def token_features_backward(
        self, grad_features: Tensor, kept: Kept, needs: Sequence[bool], accumulate: Tensor | None, **total: Tensor
    ) -> tuple[Tensor | None, ...]:
        module = self._module("token_features", self.tokens, "backward")
        inputs = (self.tokens, *self.norm, *self.linear, self.position, self.sizes.eps[0])
        of_forward = (kept.statistics, kept.token_preactivation)
        return module.token_features_backward(grad_features, *inputs, *of_forward, needs, accumulate, **total)


def _add_to_class_tokens(grad_x: Tensor, of_class: Tensor, prefix: int) -> None:
    if prefix:
        grad_x[:, :, 0].add_(of_class)  # += would copy the slice onto itself besides
    else:
        grad_x += of_class[:, :, None] / grad_x.shape[2]
