"""The frame and the global level (Eq. 11 and 12) with their derivatives, for the op `inti`.

They work on B·T class tokens, in plain PyTorch; written out, because autograd is off inside an op and torch.func.vjp
takes longer than all the rest of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import as_dtype, expect, in_wide_dtype, wide_dtype

aten = torch.ops.aten


# A tensor that isn't contiguous goes through PyTorch's own kernels, a contiguous one in float32 on the CPU through
# oneDNN's, which take 50 µs to begin and with AVX-512 are four times as far off.


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x.mT).mT


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return aten.gelu_backward(grad.mT, x.mT).mT


class _Layer:
    """T_{a→b} of tokens [B, n, a]: LayerNorm → Linear → GELU."""

    def __init__(self, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.norm, self.weight, self.bias = (norm_weight, norm_bias), weight, bias

    def forward(self, x: Tensor, eps: float) -> Tensor:
        self.x = x
        self.normalized, *self.statistics = torch.native_layer_norm(x, x.shape[2:], *self.norm, eps)
        self.preactivation = F.linear(self.normalized, self.weight, self.bias)
        return _gelu(self.preactivation)

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        grad = _gelu_backward(grad, self.preactivation).flatten(0, 1)
        grad_weight, grad_bias = grad.t() @ self.normalized.flatten(0, 1), grad.sum(0)
        of_normalized = (grad @ self.weight).view_as(self.x)
        of_norm = aten.native_layer_norm_backward(
            of_normalized, self.x, self.x.shape[2:], *self.statistics, *self.norm, [True] * 3
        )
        return of_norm[0], [*of_norm[1:], grad_weight, grad_bias]


class _Convolution:
    """Depthwise in time, of a clip [B, T, C]: kernel 3, padding 1. As sums of products: these are few numbers, and
    PyTorch's depthwise convolutions take their time."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.taps, self.bias = weight[:, 0].unbind(1), bias  # three of [C], perhaps in another dtype than the clip

    def forward(self, clip: Tensor) -> Tensor:
        self.clip = clip
        y = torch.addcmul(self.bias, clip, self.taps[1])
        y[:, 1:].addcmul_(clip[:, :-1], self.taps[0])
        y[:, :-1].addcmul_(clip[:, 1:], self.taps[2])
        return y

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        clip, taps = self.clip, self.taps
        of_clip = grad * taps[1]
        of_clip[:, :-1].addcmul_(grad[:, 1:], taps[0])
        of_clip[:, 1:].addcmul_(grad[:, :-1], taps[2])
        of_taps = (clip[:, :-1] * grad[:, 1:], clip * grad, clip[:, 1:] * grad[:, :-1])
        return of_clip, [torch.stack([term.sum((0, 1)) for term in of_taps], dim=-1)[:, None], grad.sum((0, 1))]


class _GlobalLevel:
    """Three convolutions in time with max pooling → GELU between them, the mean over the frames, GELU: [B, C]."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.convolutions = [_Convolution(*parameters[i : i + 2]) for i in (0, 2, 4)]

    def forward(self, cls: Tensor, context: Tensor | None) -> Tensor:
        """``context`` [B, T/2, C] with the level added, perhaps in place; or the level, for every pair, without one."""
        first, second, third = self.convolutions
        self.pools = []
        clip = self._pool(first.forward(cls))
        clip = third.forward(self._pool(second.forward(clip)))
        self.steps, self.mean = clip.shape[1], clip.mean(1)
        of_clip = _gelu(self.mean)[:, None]
        return of_clip.expand(-1, cls.shape[1] // 2, -1) if context is None else context + of_clip

    def backward(self, grad: Tensor, grad_cls: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Of the context's gradient: that of the class tokens, added to ``grad_cls`` (perhaps in place) if there is
        one, and the parameters'."""
        first, second, third = self.convolutions
        of_clip = _gelu_backward(grad.sum(1), self.mean)[:, None] / self.steps
        of_clip, of_third = third.backward(of_clip.expand(-1, self.steps, -1))
        of_clip, of_second = second.backward(self._pool_backward(of_clip))
        of_clip, of_first = first.backward(self._pool_backward(of_clip))
        return of_clip if grad_cls is None else grad_cls + of_clip, [*of_first, *of_second, *of_third]

    def _pool(self, clip: Tensor) -> Tensor:
        """The larger of two neighbours, the first of equal ones; GELU. A last frame without a neighbour stays."""
        pairs = clip.shape[1] // 2
        first, second = clip[:, : 2 * pairs : 2], clip[:, 1::2]
        pooled = torch.maximum(first, second)
        if clip.shape[1] > 2 * pairs:
            pooled = torch.cat((pooled, clip[:, -1:]), dim=1)
        self.pools.append((clip, pooled))
        return _gelu(pooled)

    def _pool_backward(self, grad: Tensor) -> Tensor:
        clip, pooled = self.pools.pop()
        grad, pairs = _gelu_backward(grad, pooled), clip.shape[1] // 2
        first, second = clip[:, : 2 * pairs : 2], clip[:, 1::2]
        is_second = (second > first) | second.isnan()
        of_pairs, rest = grad[:, :pairs], grad[:, pairs:]
        of_two = (torch.where(is_second, 0, of_pairs), torch.where(is_second, of_pairs, 0))
        of_clip = torch.stack(of_two, dim=2).flatten(1, 2)
        return torch.cat((of_clip, rest), dim=1) if rest.shape[1] else of_clip


class Kept(NamedTuple):
    """Of a forward, with which a backward elsewhere needn't do it again; all None where it has to.

    Attributes:
        frame_preactivation, pair_preactivation: what the frame level's GELUs were taken of [B, T, C/2] and
            [B, T/2, C]; None without the level.
        context: [B, T/2, C].
    """

    frame_preactivation: Tensor | None
    pair_preactivation: Tensor | None
    context: Tensor | None


class ClassLevels:
    """F_frame + F_global of the class tokens: the context [B, T/2, C] and, once it is computed, its gradients.

    Context, gradients and the global level are in the wide dtype, whatever its parameters are in: sums of three
    products gain nothing by 16 bits. The frame level is in the dtype of its parameters.

    Args:
        frame: the eight parameters of :func:`inti_kernels.reference.functional.frame_level`, or None without the level.
        convolutions: the six of :func:`inti_kernels.reference.functional.global_level`, or None without it.
        eps: of the frame level's two LayerNorms.

    Attributes:
        kept: of the forward.
    """

    kept = Kept(None, None, None)

    def __init__(
        self, frame: Sequence[Tensor] | None, convolutions: Sequence[Tensor] | None, eps: Sequence[float]
    ) -> None:
        self.frame_layer, self.pair_layer = (None, None) if frame is None else (_Layer(*frame[:4]), _Layer(*frame[4:]))
        self.clip_level = None if convolutions is None else _GlobalLevel(convolutions)
        self.eps = eps

    def forward(self, cls: Tensor, position: Tensor | None = None) -> Tensor | None:
        """The context, or None with neither level.

        Args:
            cls: class tokens [B, T, C], any strides.
            position: σ·P [T, C] in the wide dtype, added to them; or None.
        """
        context, cls = None, as_dtype(cls, wide_dtype(cls))
        # Contiguous, since the bits of PyTorch's sums of products depend on the strides.
        cls = (cls if position is None else cls + position).contiguous()
        if self.frame_layer is not None:
            halves = self.frame_layer.forward(cls.to(self.frame_layer.weight.dtype), self.eps[0])
            pairs = halves.reshape(len(cls), cls.shape[1] // 2, 2 * halves.shape[2])
            context = self.pair_layer.forward(pairs, self.eps[1]).to(cls.dtype)
        return context if self.clip_level is None else self.clip_level.forward(cls, context)

    def resume(self, cls: Tensor, position: Tensor | None, kept: Kept) -> Tensor | None:
        """The context for a backward, of what another's forward has kept of the same inputs."""
        return self.forward(cls, position)

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of the context's gradient: that of the class tokens, and those of the parameters in order."""
        grad_cls, grads = None, []
        if self.frame_layer is not None:
            of_pairs, grads_of_pairs = self.pair_layer.backward(grad.to(self.pair_layer.weight.dtype))
            of_frames = of_pairs.reshape(len(grad), 2 * grad.shape[1], of_pairs.shape[2] // 2)
            grad_cls, grads = self.frame_layer.backward(of_frames)
            grad_cls, grads = grad_cls.to(grad.dtype), grads + grads_of_pairs
        if self.clip_level is None:
            return grad_cls, grads
        grad_cls, of_clip = self.clip_level.backward(grad, grad_cls)
        return grad_cls, [*grads, *of_clip]


class OfKernels:
    """What the ClassLevels of the compiled modules have in common.

    Args:
        dtype: what the products are to be in, and may be in a wider one; the first parameter's if not given.

    Attributes:
        kept: of the forward.
        dtype: what the frame level is computed in; set, like ``shapes``, by what either direction begins with.
        shapes: of what the frame level has of a frame and of a pair.
    """

    kept: Kept
    dtype: torch.dtype
    shapes: tuple[tuple[int, int, int], tuple[int, int, int]]

    def __init__(
        self,
        frame: Sequence[Tensor] | None,
        convolutions: Sequence[Tensor] | None,
        eps: Sequence[float],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.frame, self.convolutions, self.eps, self.products = frame or [], convolutions or [], tuple(eps), dtype

    def forward(self, cls: Tensor, position: Tensor | None = None) -> Tensor | None:
        self.kept = Kept(None, None, None)
        if self.frame or self.convolutions:
            self._look_at(cls, position)
            self.kept = self._computed(cls)
        return self.kept.context

    def resume(self, cls: Tensor, position: Tensor | None, kept: Kept) -> Tensor | None:
        # With C/2 rounded down to 0 a frame has no preactivation to keep, nor any a clip that isn't there.
        needed = kept if self.frame else kept[2:]
        if not (self.frame or self.convolutions) or any(tensor is None for tensor in needed):
            return self.forward(cls, position)
        self._look_at(cls, position)
        of_frames, of_pairs = self.shapes
        expect(cls, *zip(needed, (of_frames, of_pairs, of_pairs)[-len(needed) :], strict=True))
        preactivations = [as_dtype(tensor, self.dtype).contiguous() for tensor in needed[:-1]]
        self.kept = Kept(*preactivations or (None, None), in_wide_dtype(kept.context, cls))
        return self.kept.context

    def _look_at(self, cls: Tensor, position: Tensor | None) -> None:
        """Sets ``dtype``, ``shapes`` and what both directions hand over."""
        raise NotImplementedError

    def _computed(self, cls: Tensor) -> Kept:
        raise NotImplementedError
