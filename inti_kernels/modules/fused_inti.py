"""FusedInTI: InTI on this package's ops, and the functions that swap one for the other inside a model."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, ops
from ..reference import InTI, functional
from ..reference.inti import Head, NormLinearGELU
from ._linear import linear

# Parts of the module that are plain PyTorch, and why.
PLAIN_PARTS = {
    "temporal position": "all levels have to see x + σ·P, so it is formed once for all",
    "token level": "token_features has a kernel on the cuda backend only; the attention head takes frames one by one",
    "frame level": "works on B·T class tokens only",
    "global level": "works on B·T class tokens only",
    "head": "interpolation_head has a kernel on the cuda backend only, on the others and for the heads sigmoid and "
    "attention all but the interpolation is plain",
    "sigmoid interpolation": "its weights don't sum to 1: pair_interpolate is another function",
}

M = TypeVar("M", bound=nn.Module)


class FusedInTI(InTI):
    """A drop-in for :class:`InTI` on this package's ops: same constructor, ``state_dict`` and ``forward``.

    The cube level (Eq. 10) is a depthwise convolution that reads the tokens where they lie, the interpolation (Eq. 7) a
    single pass over them. On the cuda backend the token level (Eq. 9) and the head are kernels too. Under autocast the
    cube level runs in the autocast dtype, as InTI's convolution does, and the weights have the dtype that InTI's would
    have.

    Args:
        backend: "auto", "reference", "cpu", "triton" or "cuda" for the ops of this module; None takes the choice in
            force at each call, see :func:`inti_kernels.use_backend`.
        *args, **kwargs: as :class:`InTI`.

    Raises:
        ValueError: as :class:`InTI`; an unknown backend.
        RuntimeError: in ``forward``, where the backend that was asked for can't run.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        backends.requested(backend)
        self.backend = backend

    @classmethod
    def from_reference(cls, inti: InTI, *, backend: str | None = None) -> FusedInTI:
        """A FusedInTI that shares the parameters of an InTI (the same objects: training one trains both).

        Hooks stay with the InTI; :func:`fuse` is what carries a module over whole.

        Args:
            inti: an InTI, not of a subclass, whose forward this couldn't know.
            backend: as in the constructor.

        Raises:
            TypeError: for another class.
        """
        if type(inti) not in (InTI, cls):
            raise TypeError(f"from_reference takes an InTI, got {type(inti).__name__}")
        with torch.device("meta"):  # no memory, and no random numbers, for parameters that aren't kept
            fused = cls(inti.dim, inti.frames, inti.grid, prefix=inti.prefix, context=inti.context, fusion=inti.fusion,
                        head=inti.head_type, hidden=inti.hidden, backend=backend)  # fmt: skip
        fused._parameters.update(inti._parameters)
        fused._modules.update(inti._modules)
        fused.training = inti.training
        return fused

    def plain_parts(self) -> list[str]:
        """The parts of this module that are plain PyTorch on its backend, where its parameters are now (keys of
        PLAIN_PARTS)."""
        token_level = self.head_type == "attention" or not self._runs("token_features", self.position)
        head = self.head_type != "softmax" or not self._runs("interpolation_head", self.position)
        parts = [
            "temporal position",
            *["token level"] * token_level,
            *(f"{level} level" for level in self.context if level != "cube"),
            *["head"] * head,
        ]
        return parts + ["sigmoid interpolation"] * (self.head_type == "sigmoid")

    def _forward(self, x: Tensor, position: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        head = self.head
        layers = () if self.head_type != "softmax" else (head.linear1, head.linear2)
        if not layers or not self._runs("interpolation_head", x) or not self._is_ours(head, Head, *layers):
            return super()._forward(x, position, grid)
        x = functional.add_position(x, position)
        levels = self._context_levels(x, grid)
        z, weights = ops.interpolation_head(
            *self._head_inputs(self._token_features(x), levels),
            x,
            head.linear1.weight,
            head.linear1.bias,
            head.linear2.weight,
            head.linear2.bias,
            backend=self.backend,
        )
        return z, weights.float() if _softmax_in_float32(x) else weights

    def _cube(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if not _untouched(self.cube, nn.Conv3d):
            return super()._cube(x, grid)
        dtype = _autocast_dtype(x)
        return ops.depthwise_conv3d(
            x if dtype is None else x.to(dtype),
            self.cube.weight,
            self.cube.bias,
            grid,
            prefix=self.prefix,
            backend=self.backend,
        )

    def _token_features(self, x: Tensor) -> Tensor:
        token = self.token
        if not self._is_ours(token, NormLinearGELU, token.linear):
            return super()._token_features(x)
        if self._runs("token_features", x) and _untouched(token.norm, nn.LayerNorm):
            parameters = (token.norm.weight, token.norm.bias, token.linear.weight, token.linear.bias)
            return ops.token_features(x, *parameters, eps=token.norm.eps, backend=self.backend)
        if backends.requested(self.backend) == "reference":
            return super()._token_features(x)
        frames = F.gelu(linear(token.norm(x), token.linear.weight, token.linear.bias))  # [B, T, N, C/2]
        # One copy there and one back: the gradients of two slices, concatenated, would be two tensors full of zeros.
        return frames.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)

    def _hidden(self, features: Tensor, cube: Tensor | None, frame_context: Tensor | None) -> Tensor:
        layer = self.head.linear1
        if backends.requested(self.backend) == "reference" or not self._is_ours(self.head, Head, layer):
            return super()._hidden(features, cube, frame_context)
        return F.gelu(linear(functional.head_inputs(features, cube, frame_context), layer.weight, layer.bias))

    def _is_ours(self, parent: nn.Module, kind: type[nn.Module], *linears: nn.Module) -> bool:
        """Whether Linears of a part of the module may be computed past its ``forward``."""
        return _untouched(parent, kind) and all(_untouched(layer, nn.Linear) for layer in linears)

    def _runs(self, op: str, x: Tensor) -> bool:
        """Whether an op that only some backends have would be a kernel."""
        return backends.runs_kernel(op, self.backend, x)

    def _interpolate(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return ops.pair_interpolate(x, logits.float() if _softmax_in_float32(logits) else logits, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}, plain PyTorch: {', '.join(self.plain_parts())}"


class Replaced(list[str]):
    """Names of the modules that :func:`fuse` or :func:`unfuse` replaced; ``skipped``: name → why it was left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, str] = {}


def fuse(model: nn.Module, *, backend: str | None = None) -> Replaced | FusedInTI:
    """Swaps every InTI inside a model for a FusedInTI, in place.

    Parameters, buffers, hooks (their handles stay valid), train/eval mode and requires_grad are the same objects and
    values as before, so optimizers and checkpoints go on working. An InTI that stands in several places stays one.
    The old modules are not to be used any more; references to them outside the model's submodules (a Python list) stay.
    Left alone, and reported by a warning and in ``skipped``, are subclasses of InTI, whose forward may differ, and
    modules whose ``forward`` was patched. What is fused already only takes the backend, if one is given.

    Args:
        model: any nn.Module.
        backend: of the new modules, as in :class:`FusedInTI`.

    Returns:
        The names of what was replaced; if the model itself is an InTI, the new module.
    """
    backends.requested(backend)
    return _swap(model, InTI, FusedInTI, backend)


def unfuse(model: nn.Module) -> Replaced | InTI:
    """Undoes :func:`fuse`: swaps every FusedInTI inside a model for an InTI, in place.

    Returns:
        The names of what was replaced; if the model itself is a FusedInTI, the new module.
    """
    return _swap(model, FusedInTI, InTI, None)


def _swap(model: nn.Module, old: type[InTI], new: type[InTI], backend: str | None) -> Any:
    replaced, made = Replaced(), {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is new and backend is not None:
            module.backend = backend
        elif reason := _why_leave(module, old, new):
            replaced.skipped[path] = reason
            warnings.warn(f"left alone: {path or 'the model itself'}: {reason}", stacklevel=3)
        elif type(module) is old:
            made[module] = made.get(module) or _become(module, new, backend)
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


def _become(module: nn.Module, cls: type[M], backend: str | None) -> M:
    """A module of another class around the same insides: parameters, submodules, hooks."""
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):  # the hooks' dicts stay shared: their handles know no other
        new.__dict__[name] = dict(module.__dict__[name])
    new.__dict__["_compiled_call_impl"] = None  # what Module.compile() made runs the old forward
    new.__dict__.pop("backend", None)
    if cls is FusedInTI:
        new.backend = backend
    return new


def _untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a submodule is as InTI made it. Adapters (LoRA), parametrizations, FSDP2 and hooks want to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in module.__dict__ and not any(map(len, hooks))


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast turns the inputs of a linear layer or convolution into, or None: float64 it leaves alone."""
    device = tensor.device.type
    if tensor.is_meta or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _softmax_in_float32(tensor: Tensor) -> bool:
    """Whether InTI's softmax would run in float32: autocast on CUDA, unlike that on the CPU, casts its input."""
    return tensor.device.type == "cuda" and _autocast_dtype(tensor) is not None
