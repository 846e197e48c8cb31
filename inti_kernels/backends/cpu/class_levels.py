"""The frame and the global level by the compiled module: PyTorch's hundred small calls take longer than all they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _class_levels, native
from .._arguments import as_dtype, expect, expect_one_dtype, name_of
from .._memory import empty
from . import _few_rows
from ._call import call


class _Layer:
    def __init__(self, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.norm = (norm_weight.contiguous(), norm_bias.contiguous())
        self.weight, self.bias = weight, bias.contiguous()

    def forward(self, x: Tensor, eps: float) -> Tensor:
        out, width = self.weight.shape
        expect(x, (x, (*x.shape[:2], width)), *((norm, (width,)) for norm in self.norm), (self.bias, (out,)))
        self.shape, rows = x.shape, x.flatten(0, 1).contiguous()
        y, self.kept = _few_rows.forward(rows, self.weight, self.bias, self.norm, eps, gelu=True)
        return y.view(*x.shape[:2], y.shape[1])

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        out, width = self.weight.shape
        expect(grad, (grad, (*self.shape[:2], out)))
        expect_one_dtype(self.kept.x, grad)
        grad_x, of_norm = empty(self.shape, grad), (empty((width,), grad), empty((width,), grad))
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
    """What is added to is added to in place: nobody else has it."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters

    def forward(self, cls: Tensor, context: Tensor | None) -> Tensor:
        batch, frames, dim = cls.shape
        pairs = (batch, frames // 2, dim)
        expect(cls, (cls, (batch, 2 * pairs[1], dim)), (context, pairs))
        expect(cls, *((p, shape) for i, shape in enumerate([(dim, 1, 3), (dim,)]) for p in self.parameters[i::2]))
        self.cls = cls.contiguous()
        to = empty(pairs, cls) if context is None else context
        call("global_level_forward", **self._shared(), context=to, accumulate=context is not None)
        return to

    def backward(self, grad: Tensor, grad_cls: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        batch, frames, dim = self.cls.shape
        expect(grad, (grad, (batch, frames // 2, dim)), (grad_cls, self.cls.shape))
        expect_one_dtype(self.cls, grad, grad_cls)
        to = empty(self.cls.shape, grad) if grad_cls is None else grad_cls
        grads = [empty(parameter.shape, grad) for parameter in self.parameters]
        call(
            "global_level_backward",
            **self._shared(),
            grad_context=grad.contiguous(),
            grad_x=to,
            accumulate=grad_cls is not None,
            grad_weights=grads[::2],
            grad_biases=grads[1::2],
        )
        return to, grads

    def _shared(self) -> dict[str, object]:
        wide = [as_dtype(parameter, self.cls.dtype).contiguous() for parameter in self.parameters]
        return {
            "shape": tuple(self.cls.shape),
            "dtype": name_of(self.cls.dtype),
            "x": self.cls,
            "weights": wide[::2],
            "biases": wide[1::2],
            "workspace": empty(
                (native.load().global_level_workspace(self.cls.shape[1], torch.get_num_threads()),), self.cls
            ),
        }


class ClassLevels(_class_levels.ClassLevels):
    """As the one in PyTorch, with class tokens and the frame level's parameters in the wide dtype."""

    layer, global_level = _Layer, _GlobalLevel
