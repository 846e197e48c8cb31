"""The frame and the global level by the compiled module: PyTorch's hundred small calls take longer than all they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _class_levels, native
from .._arguments import name_of
from .._memory import empty
from . import _few_rows
from ._call import call


class _Layer:
    def __init__(self, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.norm = (norm_weight.contiguous(), norm_bias.contiguous())
        self.weight, self.bias = weight, bias.contiguous()

    def forward(self, x: Tensor, eps: float) -> Tensor:
        self.shape, rows = x.shape, x.flatten(0, 1).contiguous()
        y, self.kept = _few_rows.forward(rows, self.weight, self.bias, self.norm, eps, gelu=True)
        return y.view(*x.shape[:2], y.shape[1])

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        out, width = self.weight.shape
        grad_x, *of_norm = (empty(shape, grad) for shape in (self.shape, (width,), (width,)))
        grad_weight, grad_bias = empty((out, width), grad), empty((out,), grad)
        _few_rows.backward(
            grad.flatten(0, 1).contiguous(),
            self.kept,
            self.weight,
            self.norm[0],
            grad_x=grad_x,
            grad_norm=of_norm,
            grad_weight=grad_weight,
            grad_bias=grad_bias,
        )
        return grad_x, [*of_norm, grad_weight, grad_bias]


class _GlobalLevel:
    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters

    def forward(self, cls: Tensor, context: Tensor | None) -> Tensor:
        self.cls = cls.contiguous()
        to = empty((len(cls), cls.shape[1] // 2, cls.shape[2]), cls) if context is None else context
        call("global_level_forward", **self._shared(), context=to, accumulate=context is not None)
        return to

    def backward(self, grad: Tensor, grad_cls: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        to = empty(self.cls.shape, grad) if grad_cls is None else grad_cls
        grads = [empty(parameter.shape, grad) for parameter in self.parameters]
        call(
            "global_level_backward",
            **self._shared(),
            grad_context=grad.contiguous(),
            grad_x=to,
            accumulate=grad_cls is not None,
            grad_weights=[of.data_ptr() for of in grads[::2]],
            grad_biases=[of.data_ptr() for of in grads[1::2]],
        )
        return to, grads

    def _shared(self) -> dict[str, object]:
        self.wide = [parameter.to(self.cls.dtype).contiguous() for parameter in self.parameters]
        return {
            "shape": tuple(self.cls.shape),
            "dtype": name_of(self.cls.dtype),
            "x": self.cls,
            "weights": [weight.data_ptr() for weight in self.wide[::2]],
            "biases": [bias.data_ptr() for bias in self.wide[1::2]],
            "workspace": empty(
                (native.load().global_level_workspace(self.cls.shape[1], torch.get_num_threads()),), self.cls
            ),
        }


class ClassLevels(_class_levels.ClassLevels):
    """As the one in PyTorch, with class tokens and the frame level's parameters in the wide dtype."""

    layer, global_level = _Layer, _GlobalLevel
