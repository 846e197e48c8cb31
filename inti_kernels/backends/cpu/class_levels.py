"""The frame and the global level by the compiled module: PyTorch's hundred small calls take longer than all they do.
See csrc/include/inti/class_levels.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .._arguments import (
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
from ._call import call

# In place of a level's parameters, and of their gradients, without the level.
_NO_FRAME, _NO_CONVOLUTIONS = [None] * 8, [None] * 6


def dtype_of_frame_level(x: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """Of what the frame level leaves, by class tokens, both levels' parameters and what the products are to be in."""
    return wide_dtype(x)


class ClassLevels(OfKernels):
    """As the one in PyTorch, with all in the wide dtype but the class tokens, and a forward that is kept."""

    def _computed(self, cls: Tensor) -> Kept:
        of_frames, of_pairs = self.shapes
        context, wide = empty(of_pairs, cls, self.dtype), []
        if self.frame:
            wide = [empty(of_frames, cls, self.dtype), empty(of_pairs, cls, self.dtype)]
        kept = Kept(*wide or (None, None), context)
        call("class_levels_forward", **self.shared, **kept._asdict())
        return kept

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        expect(grad, (grad, self.shapes[1]))
        expect_one_dtype(self.kept.context, grad)
        grad_cls, grads = empty(self.tokens, grad), [empty(parameter.shape, grad) for parameter in self.wide]
        count = len(self.frame)
        call(
            "class_levels_backward",
            **self.shared,
            frame_preactivation=self.kept.frame_preactivation,
            pair_preactivation=self.kept.pair_preactivation,
            grad_context=grad.contiguous(),
            grad_x=grad_cls,
            grad_frame=grads[:count] or _NO_FRAME,
            grad_convolutions=grads[count:] or _NO_CONVOLUTIONS,
        )
        return grad_cls, grads

    def _look_at(self, cls: Tensor, position: Tensor | None) -> None:
        batch, frames, dim = self.tokens = tuple(cls.shape)
        self.shapes = expect_class_levels(cls, position, self.frame, self.convolutions)
        self.dtype, half, count = wide_dtype(cls), self.shapes[0][2], len(self.frame)
        self.wide = [in_wide_dtype(parameter, cls) for parameter in (*self.frame, *self.convolutions)]
        cls, threads = channels_contiguous(cls), torch.get_num_threads()
        self.shared = {
            "shape": (batch, frames, dim, half),
            "dtypes": (name_of(cls.dtype), name_of(self.dtype)),
            "x": cls,
            "x_strides": cls.stride()[:2],
            "position": in_wide_dtype(position, cls),
            "frame": self.wide[:count] or _NO_FRAME,
            "convolutions": self.wide[count:] or _NO_CONVOLUTIONS,
            "eps": self.eps,
            "workspace": empty(
                (native.load().class_levels_workspace(batch, frames, dim, half, threads),), cls, self.dtype
            ),
        }
