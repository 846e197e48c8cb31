"""The frame and the global level by the compiled module: PyTorch's hundred small calls take longer than all they do.
See csrc/include/inti/class_levels.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .._arguments import channels_contiguous, expect, expect_one_dtype, in_wide_dtype, name_of, wide_dtype
from .._class_levels import Kept
from .._memory import empty
from ._call import call

# In place of a level's parameters, and of their gradients, without the level.
_NO_FRAME, _NO_CONVOLUTIONS = [None] * 8, [None] * 6


def dtype_of_frame_level(x: Tensor, parameter: Tensor) -> torch.dtype:
    """Of what the frame level leaves, by class tokens and a parameter."""
    return wide_dtype(x)


class ClassLevels:
    """As the one in PyTorch, with all in the wide dtype but the class tokens, and a forward that is kept."""

    def __init__(
        self, frame: Sequence[Tensor] | None, convolutions: Sequence[Tensor] | None, eps: Sequence[float]
    ) -> None:
        self.frame, self.convolutions, self.eps = frame or [], convolutions or [], tuple(eps)

    def forward(self, cls: Tensor, position: Tensor | None = None) -> Tensor | None:
        self.kept = Kept(None, None, None)
        if not (self.frame or self.convolutions):
            return None
        self._look_at(cls, position)
        of_frames, of_pairs = self._shapes()
        context, wide = empty(of_pairs, cls, self.dtype), []
        if self.frame:
            wide = [empty(of_frames, cls, self.dtype), empty(of_pairs, cls, self.dtype)]
        self.kept = Kept(*wide or (None, None), context)
        call("class_levels_forward", **self.shared, **self.kept._asdict())
        return context

    def resume(self, cls: Tensor, position: Tensor | None, kept: Kept) -> Tensor | None:
        # With C/2 rounded down to 0 a frame has no preactivation to keep, nor any a clip that isn't there.
        needed = kept if self.frame else kept[2:]
        if any(tensor is None for tensor in needed):
            return self.forward(cls, position)
        self._look_at(cls, position)
        of_frames, of_pairs = self._shapes()
        expect(cls, *zip(needed, (of_frames, of_pairs, of_pairs)[-len(needed) :], strict=True))
        self.kept = Kept(*(None if tensor is None else in_wide_dtype(tensor, cls) for tensor in kept))
        return self.kept.context

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        expect(grad, (grad, self._shapes()[1]))
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
        """Sets what both directions hand over."""
        batch, frames, dim = self.tokens = tuple(cls.shape)
        self.dtype, self.half = wide_dtype(cls), self.frame[2].shape[0] if self.frame else 0
        half, parameters, count = self.half, (*self.frame, *self.convolutions), len(self.frame)
        of_frame = ((dim,), (dim,), (half, dim), (half,), (2 * half,), (2 * half,), (dim, 2 * half), (dim,))
        of_parameters = (*of_frame[:count], *((dim, 1, 3), (dim,)) * (len(self.convolutions) // 2))
        expect(cls, (cls, (batch, frames // 2 * 2, dim)), (position, (frames, dim)))
        expect(cls, *zip(parameters, of_parameters, strict=True))
        self.wide, cls = [in_wide_dtype(parameter, cls) for parameter in parameters], channels_contiguous(cls)
        threads = torch.get_num_threads()
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

    def _shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Of what is of a frame in the frame level, and of a pair."""
        batch, frames, dim = self.tokens
        return (batch, frames, self.half), (batch, frames // 2, dim)
