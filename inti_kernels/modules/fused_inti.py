"""FusedInTI: InTI on this package's ops, and the functions that swap one for the other inside a model."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import backends, ops
from ..ops import _recipe as recipe
from ..reference import InTI, functional
from ..reference.inti import Head, NormLinearGELU

# Parts of the module that are plain PyTorch, and why.
PLAIN_PARTS = {
    "temporal position": "outside the op inti all levels have to see x + σ·P, so it is formed once for all",
    "token level": "the attention head takes frames one by one; adapters and hooks on the Linear want to be called; "
    "the backend is the reference",
    "cube level": "adapters and hooks on the convolution want to be called; the backend is the reference",
    "frame level": "works on B·T class tokens only; on the CPU and in CUDA C++ the op inti has kernels for it",
    "global level": "works on B·T class tokens only; on the CPU and in CUDA C++ the op inti has kernels for it",
    "head": "the heads sigmoid and attention, and adapters and hooks on a Linear (all but the interpolation is plain); "
    "the backend is the reference",
    "sigmoid interpolation": "its weights don't sum to 1: pair_interpolate is another function",
}

# The module's parts as InTI makes them, and what is in them.
_KINDS = {
    "token": (NormLinearGELU,),
    "cube": (nn.Conv3d,),
    "frame_pair": (NormLinearGELU,),
    "frame": (NormLinearGELU,),
    "global_convs": (nn.ModuleList,),
    "head": (Head,),
}
_INNER = (nn.LayerNorm, nn.Linear, nn.Conv1d)

M = TypeVar("M", bound=nn.Module)


class FusedInTI(InTI):
    """A drop-in for :class:`InTI` on this package's ops: same constructor, ``state_dict`` and ``forward``.

    As the paper has it, with any subset of the context, the module is one node of the autograd graph, the op
    :func:`inti_kernels.ops.inti`: x + σ·P is never written, one buffer takes the gradients of x, and 1.5 times the size
    of x is kept for the backward (in autocast's dtype under autocast). The other fusions and heads, and submodules that
    adapters or hooks have changed, run as the ops that they consist of, and plain PyTorch (:meth:`plain_parts`). Under
    autocast the weights have the dtype that InTI's would have.

    Args:
        backend: "auto", "reference", "cpu", "triton" or "cuda" for the ops of this module; None takes the choice in
            force at each call, see :func:`inti_kernels.use_backend`.
        recompute: keep only x and a few numbers a token for the backward, which then does the forward's products again.
            Takes effect where the module is one node.
        *args, **kwargs: as :class:`InTI`.

    Raises:
        ValueError: as :class:`InTI`; an unknown backend.
        RuntimeError: in ``forward``, where the backend that was asked for can't run.
    """

    def __init__(self, *args: Any, backend: str | None = None, recompute: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        backends.requested(backend)
        self.backend, self.recompute = backend, recompute

    @classmethod
    def from_reference(cls, inti: InTI, *, backend: str | None = None, recompute: bool = False) -> FusedInTI:
        """A FusedInTI that shares the parameters of an InTI (the same objects: training one trains both).

        Hooks stay with the InTI; :func:`fuse` is what carries a module over whole.

        Args:
            inti: an InTI, not of a subclass, whose forward this couldn't know.
            backend, recompute: as in the constructor.

        Raises:
            TypeError: for another class.
        """
        if type(inti) not in (InTI, cls):
            raise TypeError(f"from_reference takes an InTI, got {type(inti).__name__}")
        with torch.device("meta"):  # no memory, and no random numbers, for parameters that aren't kept
            fused = cls(inti.dim, inti.frames, inti.grid, prefix=inti.prefix, context=inti.context, fusion=inti.fusion,
                        head=inti.head_type, hidden=inti.hidden, backend=backend, recompute=recompute)  # fmt: skip
        fused._parameters.update(inti._parameters)
        fused._modules.update(inti._modules)
        fused.training = inti.training
        return fused

    def plain_parts(self) -> list[str]:
        """The parts of this module that are plain PyTorch where its ops are kernels (keys of PLAIN_PARTS, which says
        where they aren't after all); all that it has, if its backend is the reference."""
        levels, plain = [f"{level} level" for level in self.context if level != "cube"], self._is_reference()
        if self._is_one_node() and not plain:
            return levels
        if "cube" in self.context and (plain or not self._is_ours("cube")):
            levels.insert(0, "cube level")
        token_level = plain or self.head_type == "attention" or not self._is_ours("token")
        head = plain or self.head_type != "softmax" or not self._is_ours("head")
        parts = ["temporal position", *["token level"] * token_level, *levels, *["head"] * head]
        return parts + ["sigmoid interpolation"] * (self.head_type == "sigmoid")

    def _forward(self, x: Tensor, position: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if self._is_reference():
            return super()._forward(x, position, grid)
        if self._is_one_node():
            z, weights = ops.inti(
                x,
                *self._parameters_of_ops(),
                position,
                grid=grid,
                prefix=self.prefix,
                eps=self._eps(),
                recompute=self.recompute,
                backend=self.backend,
            )
        elif self.head_type == "softmax" and self._is_ours("head"):
            x = functional.add_position(x, position)
            levels = self._context_levels(x, grid)
            inputs = self._head_inputs(self._token_features(x), levels)
            z, weights = ops.interpolation_head(*inputs, x, *self._parameters_of_head(), backend=self.backend)
        else:
            return super()._forward(x, position, grid)
        return z, weights.float() if _softmax_in_float32(x) else weights

    def _is_reference(self) -> bool:
        return backends.requested(self.backend) == "reference"

    def _is_one_node(self) -> bool:
        """Whether this is what the op inti computes, with no submodule that wants to be called."""
        # One level concatenated is what "separate" does, and with none all fusions are one.
        fusion = self.fusion == "separate" or len(self.context) <= (self.fusion == "cat")
        return (
            fusion
            and self.head_type == "softmax"
            and all(self._is_ours(name) for name in _KINDS if name in self._modules)
        )

    def _is_ours(self, name: str) -> bool:
        """Whether a part of the module, and all in it, is as InTI made it, so that it may be computed past its
        ``forward``."""
        part = self._modules[name]
        return _untouched(part, _KINDS[name]) and all(_untouched(module, _INNER) for module in part._modules.values())

    def _parameters_of_ops(self) -> tuple[Tensor | None, ...]:
        """What the op inti takes between x and the position."""
        cube, frame, convolutions = (None,) * 2, (None,) * 8, (None,) * 6
        if "cube" in self.context:
            cube = (self.cube.weight, self.cube.bias)
        if "frame" in self.context:
            frame = (*_parameters_of(self.frame_pair), *_parameters_of(self.frame))
        if "global" in self.context:
            convolutions = tuple(p for convolution in self.global_convs for p in (convolution.weight, convolution.bias))
        return (*_parameters_of(self.token), *cube, *frame, *convolutions, *self._parameters_of_head())

    def _parameters_of_head(self) -> tuple[Tensor, ...]:
        linear1, linear2 = self.head.linear1, self.head.linear2
        return linear1.weight, linear1.bias, linear2.weight, linear2.bias

    def _eps(self) -> tuple[float, float, float]:
        """Of the LayerNorms of the token level, the frame level's frames and its pairs."""
        frame = ("frame_pair", "frame") if "frame" in self.context else ("token", "token")
        return tuple(getattr(self, name).norm.eps for name in ("token", *frame))

    def _cube(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if not self._is_ours("cube"):
            return super()._cube(x, grid)
        x = x.to(recipe.product_dtype(x))
        parameters = (self.cube.weight, self.cube.bias)
        return ops.depthwise_conv3d(x, *parameters, grid, prefix=self.prefix, backend=self.backend)

    def _token_features(self, x: Tensor) -> Tensor:
        if not self._is_ours("token"):
            return super()._token_features(x)
        return ops.token_features(x, *_parameters_of(self.token), eps=self.token.norm.eps, backend=self.backend)

    def _interpolate(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return ops.pair_interpolate(x, logits.float() if _softmax_in_float32(logits) else logits, backend=self.backend)

    def extra_repr(self) -> str:
        recompute = ", recompute=True" * self.recompute
        plain = ", ".join(self.plain_parts()) or "nothing"
        return f"{super().extra_repr()}, backend={self.backend!r}{recompute}, plain PyTorch: {plain}"


class Replaced(list[str]):
    """Names of the modules that :func:`fuse` or :func:`unfuse` replaced; ``skipped``: name → why it was left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, str] = {}


def fuse(model: nn.Module, *, backend: str | None = None, recompute: bool | None = None) -> Replaced | FusedInTI:
    """Swaps every InTI inside a model for a FusedInTI, in place.

    Parameters, buffers, hooks (their handles stay valid), train/eval mode and requires_grad are the same objects and
    values as before, so optimizers and checkpoints go on working. An InTI that stands in several places stays one.
    The old modules are not to be used any more; references to them outside the model's submodules (a Python list) stay.
    Left alone, and reported by a warning and in ``skipped``, are subclasses of InTI, whose forward may differ, and
    modules whose ``forward`` was patched. What is fused already only takes the backend and ``recompute``, if given.

    Args:
        model: any nn.Module.
        backend, recompute: of the new modules, as in :class:`FusedInTI` (recompute False if not given).

    Returns:
        The names of what was replaced; if the model itself is an InTI, the new module.
    """
    backends.requested(backend)
    return _swap(model, InTI, FusedInTI, backend, recompute)


def unfuse(model: nn.Module) -> Replaced | InTI:
    """Undoes :func:`fuse`: swaps every FusedInTI inside a model for an InTI, in place.

    Returns:
        The names of what was replaced; if the model itself is a FusedInTI, the new module.
    """
    return _swap(model, FusedInTI, InTI)


def _swap(
    model: nn.Module, old: type[InTI], new: type[InTI], backend: str | None = None, recompute: bool | None = None
) -> Any:
    replaced, made = Replaced(), {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is new and new is FusedInTI:
            module.backend = module.backend if backend is None else backend
            module.recompute = module.recompute if recompute is None else recompute
        elif reason := _why_leave(module, old, new):
            replaced.skipped[path] = reason
            warnings.warn(f"left alone: {path or 'the model itself'}: {reason}", stacklevel=3)
        elif type(module) is old:
            made[module] = made.get(module) or _become(module, new, backend, bool(recompute))
            replaced.append(path)
            parent, _, name = path.rpartition(".")
            if path:
                model.get_submodule(parent)._modules[name] = made[module]
    return made.get(model, model) if type(model) in (old, new) else replaced


def _why_leave(module: nn.Module, old: type[InTI], new: type[InTI]) -> str:
    """Why a module that is some kind of InTI can't be replaced; "" if it can, or is none."""
    if not isinstance(module, InTI) or type(module) is new:
        return ""
    if type(module) is not old:
        return f"{type(module).__name__} is a subclass, whose forward may differ (fuse before fully_shard)"
    if "forward" in module.__dict__:
        return (
            "its forward was patched on the instance (accelerate's hooks do that), and would still run the old module"
        )
    return ""


def _become(module: nn.Module, cls: type[M], backend: str | None, recompute: bool) -> M:
    """A module of another class around the same insides: parameters, submodules, hooks."""
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):  # the hooks' dicts stay shared: their handles know no other
        new.__dict__[name] = dict(module.__dict__[name])
    new.__dict__["_compiled_call_impl"] = None  # what Module.compile() made runs the old forward
    for name in ("backend", "recompute"):
        new.__dict__.pop(name, None)
    if cls is FusedInTI:
        new.backend, new.recompute = backend, recompute
    return new


def _untouched(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a submodule is as InTI made it. Adapters (LoRA), parametrizations, FSDP2 and hooks want to be called."""
    return (
        type(module) in kinds
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def _parameters_of(part: NormLinearGELU) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return part.norm.weight, part.norm.bias, part.linear.weight, part.linear.bias


def _softmax_in_float32(tensor: Tensor) -> bool:
    """Whether InTI's softmax would run in float32: autocast on CUDA, unlike that on the CPU, casts its input."""
    return tensor.device.type == "cuda" and tensor.dtype != torch.float64 and torch.is_autocast_enabled("cuda")
