"""The frame and the global level by the CUDA kernels: in PyTorch they are a hundred and more launches, each of a few
thousand numbers. See csrc/include/inti/cuda/class_levels.h.

The products of the frame level's two Linears are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import (
    all_as_dtypes,
    channels_contiguous,
    expect,
    expect_class_levels,
    expect_one_dtype,
    in_wide_dtype,
    name_of,
    wide_dtype,
)
from .._class_levels import Kept, OfKernels
from .._memory import empty
from . import load
from ._launch import launch

# In place of the global level's parameters, and of their gradients, without the level.
_NO_CONVOLUTIONS = [None] * 6


def dtype_of_frame_level(x: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """Of the Linears and of what they leave, by class tokens, both levels' parameters and what the products are to be
    in: the parameters', so that none is converted, unless that is narrower than asked for; then the wide one."""
    (own, *others), wide = {parameter.dtype for parameter in parameters}, wide_dtype(x)
    return own if own in (dtype, wide) and not others and wide_dtype(parameters[0]) == wide else wide


class ClassLevels(OfKernels):
    """As the one in PyTorch, with the frame level's Linears and what they leave in :func:`dtype_of_frame_level`, and a
    forward that is kept."""

    def _computed(self, cls: Tensor) -> Kept:
        of_frames = of_pairs = None
        if self.frame:
            normalized = empty(self.tokens, cls, self.dtype)
            self._normalize(0, normalized, None)
            of_frames = torch.addmm(self.parameters[3], normalized.flatten(0, 1), self.parameters[2].t())
            of_frames = of_frames.view(self.shapes[0])
            normalized = empty((self.shapes[1][0] * self.shapes[1][1], 2 * self.half), cls, self.dtype)
            self._normalize(1, normalized, of_frames)
            of_pairs = torch.addmm(self.parameters[7], normalized, self.parameters[6].t()).view(self.shapes[1])
        context = empty(self.shapes[1], cls, wide_dtype(cls))
        self._launch("class_levels_context", **self._of_context(of_pairs), context=context)
        return Kept(of_frames, of_pairs, context)

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        expect(grad, (grad, self.shapes[1]))
        expect_one_dtype(self.kept.context, grad)
        grads = [empty(parameter.shape, parameter) for parameter in self.parameters]
        of_frame, of_convolutions = grads[: len(self.frame)], grads[len(self.frame) :]
        grad_cls, of_pairs = empty(self.tokens, grad), None
        if self.frame:
            of_pairs = empty(self.shapes[1], grad, self.dtype)
        self._launch(
            "class_levels_backward_context",
            **self._of_context(self.kept.pair_preactivation),
            grad_context=grad.contiguous(),
            grad_pair_preactivation=of_pairs,
            grad_pair_bias=of_frame[7] if self.frame else None,
            grad_x=grad_cls,
            grad_convolutions=of_convolutions or _NO_CONVOLUTIONS,
        )
        if self.frame:
            self._frame_level_backward(of_pairs, grad_cls, of_frame)
        return grad_cls, grads

    def _frame_level_backward(self, of_pairs: Tensor, grad_cls: Tensor, grads: list[Tensor]) -> None:
        """Of the pairs' preactivation. The gradient of the class tokens is added to that of the global level."""
        batch, frames, dim = self.tokens
        of_frames = empty(self.shapes[0], of_pairs)
        statistics, grads_of_normalized = [], []
        for layer, rows, columns, upstream in (
            (1, batch * frames // 2, 2 * self.half, of_pairs),
            (0, batch * frames, dim, of_frames),
        ):
            upstream = upstream.flatten(0, 1)
            grad_normalized = upstream @ self.parameters[4 * layer + 2]
            normalized = empty((rows, columns), of_pairs)
            measured = empty((rows, 2), grad_cls)
            self._launch(
                "class_levels_backward_norm",
                **self._of_norm(layer, self.kept.frame_preactivation if layer else None),
                grad_normalized=grad_normalized,
                normalized=normalized,
                statistics=measured,
                grad_preactivation=of_frames if layer else None,
                grad_x=None if layer else grad_cls,
                accumulate=bool(self.convolutions),
            )
            torch.mm(upstream.t(), normalized, out=grads[4 * layer + 2])
            statistics.insert(0, measured)
            grads_of_normalized.insert(0, grad_normalized)
        self._launch(
            "class_levels_backward_sums",
            preactivation=self.kept.frame_preactivation,
            statistics=statistics,
            grad_normalized=grads_of_normalized,
            grad_preactivation=of_frames,
            grad_norm_weight=grads[0:8:4],
            grad_norm_bias=grads[1:8:4],
            grad_bias=grads[3],
        )

    def _look_at(self, cls: Tensor, position: Tensor | None) -> None:
        self.tokens, parameters = tuple(cls.shape), (*self.frame, *self.convolutions)
        self.shapes = expect_class_levels(cls, position, self.frame, self.convolutions)
        self.half = self.shapes[0][2]
        self.dtype = dtype_of_frame_level(cls, parameters, self.products or parameters[0].dtype)
        converted = all_as_dtypes(parameters, [self.dtype] * len(parameters))
        self.parameters = [parameter.contiguous() for parameter in converted]
        cls = channels_contiguous(cls)
        self.tokens_of = {
            "shape": (*self.tokens, self.half, name_of(cls.dtype), name_of(self.dtype)),
            "x": cls,
            "x_strides": (*cls.stride()[:2], 0),
            "position": in_wide_dtype(position, cls),
        }

    def _launch(self, entry: str, **arguments: object) -> None:
        launch(entry, self.tokens_of["x"], **self.tokens_of, **arguments)

    def _of_norm(self, layer: int, preactivation: Tensor | None) -> dict[str, object]:
        """Of the frames' LayerNorm, 0, or of the pairs', 1."""
        weight, bias = self.parameters[4 * layer : 4 * layer + 2]
        return {
            "preactivation": preactivation,
            "norm_weight": weight,
            "norm_bias": bias,
            "eps": self.eps[layer],
        }

    def _normalize(self, layer: int, normalized: Tensor, preactivation: Tensor | None) -> None:
        self._launch("class_levels_normalize", **self._of_norm(layer, preactivation), normalized=normalized)

    def _of_context(self, pair_preactivation: Tensor | None) -> dict[str, object]:
        x, convolutions = self.tokens_of["x"], self.parameters[len(self.frame) :]
        numbers = load().class_levels_workspace(self.tokens_of["shape"]) if convolutions else 0
        return {
            "pair_preactivation": pair_preactivation,
            "convolutions": convolutions or _NO_CONVOLUTIONS,
            "workspace": empty((numbers,), x, wide_dtype(x)),
        }
