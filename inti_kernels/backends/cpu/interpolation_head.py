"""interpolation_head on the CPU kernels: PyTorch's products of the first Linear, and one pass over the token pairs
behind them; or, where that is faster, one kernel for the whole forward. See
csrc/include/inti/interpolation_head.h.

Features and cube are multiplied one after the other, into the same sums: their concatenation is never written. What the
frames' context adds to the first Linear is computed once a frame, not once a token. Products and pass take a part of
the frames at a time, so that without a backward the hidden layer never stands in memory whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import native
from .._arguments import (
    as_dtype,
    channels_contiguous,
    expect,
    expect_interpolation_head,
    expect_one_dtype,
    gradient_buffer,
    in_wide_dtype,
    name_of,
    wide_dtype,
)
from .._memory import empty
from . import _few_rows, _products
from ._call import add_up, call, chunks, largest
from ._products import add_product, add_product_over_rows, product

Gradients = tuple[Tensor | None, ...]


def interpolation_head_forward(
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expect_interpolation_head(features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
    pairs, hidden = features.shape[:3], weight1.shape[0]
    layer = _FirstLinear(features, cube, frame_context, weight1, bias1)
    x = channels_contiguous(x, "interpolation_head")
    z, weights = empty((*pairs, x.shape[3]), x), empty((*pairs, 2), features)
    difference = empty(pairs, features, wide_dtype(features))
    preactivation = empty((*pairs, hidden), features) if keep else None
    wide2, (of_first, of_second), wide_position = _difference(weight2), bias2.tolist(), in_wide_dtype(position, x)
    behind = {
        "weight2": wide2,
        "bias2": of_first - of_second,
        "x": x,
        "x_strides": x.stride()[:3],
        "position": wide_position,
        "preactivation": preactivation,
        "z": z,
        "weights": weights,
        "difference": difference,
    }
    if layer.is_one_pass:
        layer.in_one_pass(x.dtype, x.shape[3], **behind)
    else:
        for first, count, products in layer.products(preactivation):
            shape = _shape(features, x, weight1, layer.dtype, first, count)
            call("interpolation_head_forward", **shape, product=products, **layer.bias_of_frames(), **behind)
    return z, weights, difference, features.new_empty(0) if preactivation is None else preactivation


def interpolation_head_preactivation(
    features: Tensor, cube: Tensor | None, frame_context: Tensor | None, weight1: Tensor, bias1: Tensor
) -> Tensor:
    """What the forward keeps of its first Linear: [B, T/2, N, h]."""
    tokens, hidden = features.shape[2], weight1.shape[0]
    layer = _FirstLinear(features, cube, frame_context, weight1, bias1)
    preactivation = empty((*features.shape[:3], hidden), features)
    if layer.is_one_pass:
        nothing = dict.fromkeys(("weight2", "x", "position", "z", "weights", "difference"))
        layer.in_one_pass(features.dtype, 0, bias2=0.0, x_strides=(0, 0, 0), preactivation=preactivation, **nothing)
        return preactivation
    frames = preactivation.view(-1, tokens, hidden)
    for first, count, products in layer.products(preactivation):
        added = layer.frame_bias[first : first + count, None] if layer.frame_bias.dim() == 2 else layer.frame_bias
        torch.add(products.view(count, tokens, hidden), added, out=frames[first : first + count])
    return preactivation


def interpolation_head_backward(
    grad_z: Tensor,
    grad_weights: Tensor,
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None,
    difference: Tensor,
    preactivation: Tensor,
    needs: Sequence[bool],
    grad_x_accumulate: Tensor | None,
) -> Gradients:
    """The gradients of features and cube are column slices of one matrix; the network's are in the wide dtype."""
    if not any(needs):
        return (None,) * 9
    expect_interpolation_head(features, cube, frame_context, x, weight1, bias1, weight2, bias2, position)
    batch, frames, tokens, dim = x.shape
    pairs, hidden, width = (batch, frames // 2, tokens), weight1.shape[0], features.shape[3]
    expect(
        x, (grad_z, (*pairs, dim)), (grad_weights, (*pairs, 2)), (difference, pairs), (preactivation, (*pairs, hidden))
    )
    expect_one_dtype(x, grad_z)
    expect_one_dtype(features, grad_weights, preactivation)
    dtype, wide = _products.product_dtype(features.dtype), wide_dtype(features)
    x, grad_z = channels_contiguous(x, "interpolation_head"), channels_contiguous(grad_z)
    grad_weights, difference = grad_weights.contiguous(), difference.contiguous()
    preactivation, wide2, wide_position = preactivation.contiguous(), _difference(weight2), in_wide_dtype(position, x)
    count_frames = batch * (frames // 2)
    blocks = native.load().token_blocks(tokens)
    grad_x = gradient_buffer(x, needs[3], grad_x_accumulate)
    position_partials = empty((count_frames, blocks, 2 * dim), x, wide) if needs[8] else None
    # The hidden layer's gradient is what all gradients of the network but the last bias's are made of.
    of_network = any(needs[:3]) or any(needs[4:7])
    of_frames = needs[2] or needs[5] or (needs[4] and frame_context is not None)
    hidden_partials = empty((count_frames, blocks, 2, hidden), x, wide) if of_frames or needs[6] else None
    grad_difference = empty(pairs, features, wide)
    # One product for features and cube.
    inputs = width if cube is None else weight1.shape[1]
    grad_inputs = empty((features.shape[:3].numel(), inputs), features) if needs[0] or needs[1] else None
    grad_weight1 = empty(weight1.shape, features, wide) if needs[4] else None
    matrix = as_dtype(weight1[:, :inputs], dtype)
    cut = list(chunks(count_frames, tokens, 1, dtype))
    rows = largest(cut) * tokens
    grad_hidden = empty((rows, hidden), features, dtype) if of_network else None
    results = empty((rows, inputs), features, dtype) if grad_inputs is not None and dtype != features.dtype else None
    for first, count in cut:
        begin, end = first * tokens, (first + count) * tokens
        call(
            "interpolation_head_backward",
            **_shape(features, x, weight1, dtype, first, count),
            x=x,
            x_strides=x.stride()[:3],
            position=wide_position,
            difference=difference,
            grad_z=grad_z,
            grad_z_strides=grad_z.stride()[:3],
            grad_weights=grad_weights,
            preactivation=preactivation,
            weight2=wide2,
            grad_x=grad_x,
            accumulate=grad_x_accumulate is not None,
            position_partials=position_partials,
            grad_difference=grad_difference,
            grad_hidden=grad_hidden,
            hidden_partials=hidden_partials,
        )
        if not of_network:
            continue
        upstream = grad_hidden[: end - begin]
        if grad_inputs is not None:
            own = grad_inputs[begin:end]
            result = product(upstream, matrix, own if results is None else results[: end - begin])
            if result.data_ptr() != own.data_ptr():
                own.copy_(result)
        if grad_weight1 is not None:
            for of_columns, rows_of in _columns(grad_weight1, features, cube):
                part = as_dtype(rows_of[begin:end], dtype)
                add_product_over_rows(of_columns, upstream, part, first == 0)
    sums = of_all = None
    if hidden_partials is not None:
        sums = add_up(hidden_partials)  # [B·T/2, 2, h]
        of_all = add_up(sums[None])[0]  # [2, h]
    grad_frame_context = None
    if frame_context is not None and (needs[2] or needs[4]):
        rows = as_dtype(frame_context, wide).flatten(0, 1).contiguous()
        grad_rows = empty(rows.shape, rows) if needs[2] else None
        _few_rows.backward(
            sums[:, 0],
            rows,
            weight1[:, width:],
            grad_x=grad_rows,
            grad_weight=grad_weight1[:, width:] if needs[4] else None,
            accumulate=cube is not None,
        )
        if needs[2]:
            grad_frame_context = as_dtype(grad_rows, frame_context.dtype).view(frame_context.shape)
    total = grad_difference.sum()
    grad_position = None
    if needs[8]:
        of_clips = add_up(position_partials).view(1, batch, frames, dim)
        grad_position = add_up(of_clips)[0].to(position.dtype)
    return (
        grad_inputs[:, :width].view(features.shape) if needs[0] else None,
        grad_inputs[:, width:].view(cube.shape) if needs[1] else None,
        grad_frame_context,
        None if grad_x_accumulate is not None else grad_x,
        grad_weight1,
        of_all[0].clone() if needs[5] else None,
        torch.stack((of_all[1], -of_all[1])) if needs[6] else None,
        torch.stack((total, -total)) if needs[7] else None,
        grad_position,
    )


class _FirstLinear:
    """The first Linear before its GELU, a chunk of frames at a time.

    Attributes:
        dtype: of its products.
        widths: of the features and of the cube.
        is_one_pass: whether the compiled module multiplies too, which takes matrices that have numbers.
        frame_bias: [h] or [B·T/2, h], not rounded to 16 bits: its bias, and what the frames' context adds, the only
            term that all of a frame's tokens share.
    """

    def __init__(
        self, features: Tensor, cube: Tensor | None, frame_context: Tensor | None, weight1: Tensor, bias1: Tensor
    ) -> None:
        self.dtype = _products.product_dtype(features.dtype)
        self.shape, width = features.shape[:3], features.shape[3]
        self.widths = (width, 0 if cube is None else cube.shape[3])
        self.is_one_pass = _products.in_one_pass(self.dtype) and weight1.shape[0] * sum(self.widths) > 0
        self.frames, self.tokens = features.shape[0] * features.shape[1], features.shape[2]
        self.features = features.flatten(0, 2)
        self.cube = None if cube is None else cube.flatten(0, 2)
        self.matrix = as_dtype(weight1, self.dtype)
        self.of_features, self.of_context = self.matrix[:, :width].t(), self.matrix[:, width:].t()
        self.frame_bias = in_wide_dtype(bias1, features)
        if frame_context is not None:
            wide = wide_dtype(features)
            rows = as_dtype(frame_context, wide).flatten(0, 1).contiguous()
            self.frame_bias = _few_rows.forward(rows, weight1[:, width:], self.frame_bias)

    def bias_of_frames(self) -> dict[str, object]:
        """``frame_bias`` as the compiled module takes it."""
        return {
            "frame_bias": self.frame_bias,
            "frame_bias_pitch": self.frame_bias.stride(0) * (self.frame_bias.dim() - 1),
        }

    def in_one_pass(self, x_dtype: torch.dtype, dim: int, **behind: object) -> None:
        """All products and what is behind them, by one kernel."""
        (batch, pairs, tokens), matrix = self.shape, self.matrix.contiguous()
        rows, threads = batch * pairs * tokens, torch.get_num_threads()
        call(
            "interpolation_head_network",
            shape=(batch, 2 * pairs, tokens, dim, matrix.shape[0], 0, self.frames),
            dtypes=tuple(name_of(d) for d in (x_dtype, self.features.dtype, self.dtype)),
            widths=self.widths,
            features=self.features.contiguous(),
            cube=None if self.cube is None else self.cube.contiguous(),
            weight1=matrix,
            weight1_pitch=matrix.stride(0),
            workspace=empty(
                (native.load().network_workspace(matrix.shape[0], sum(self.widths), rows, threads),),
                matrix,
                torch.float32,
            ),
            **self.bias_of_frames(),
            **behind,
        )

    def products(self, preactivation: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
        """(first frame, count, the products [count·N, h] less the frame's bias): inside ``preactivation`` [B, T/2, N,
        h] where there is one of the products' dtype, else in memory that the next chunk has too."""
        cut = list(chunks(self.frames, self.tokens, 1, self.dtype, halve=preactivation is None))
        hidden = self.of_features.shape[1]
        inside = preactivation is not None and preactivation.dtype == self.dtype
        fresh = None if inside else empty((largest(cut) * self.tokens, hidden), self.features, self.dtype)
        for first, count in cut:
            begin, end = first * self.tokens, (first + count) * self.tokens
            out = preactivation.flatten(0, 2)[begin:end] if inside else fresh[: end - begin]
            out = product(as_dtype(self.features[begin:end], self.dtype), self.of_features, out)
            if self.cube is not None:
                add_product(out, as_dtype(self.cube[begin:end], self.dtype), self.of_context)
            yield first, count, out


def _columns(weight1: Tensor, features: Tensor, cube: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Parts of a matrix like weight1 and the rows that they are multiplied with."""
    width = features.shape[3]
    parts = [(weight1[:, :width], features.flatten(0, 2))]
    return parts if cube is None else [*parts, (weight1[:, width:], cube.flatten(0, 2))]


def _difference(weight2: Tensor) -> Tensor:
    """Of the two logits' rows [h], in the wide dtype."""
    first, second = in_wide_dtype(weight2, weight2).unbind(0)
    return first - second


def _shape(
    features: Tensor, x: Tensor, weight1: Tensor, dtype: torch.dtype, first: int, count: int
) -> dict[str, object]:
    """What the passes over pairs of frames [first, first + count) share; ``dtype`` is the products'."""
    return {
        "shape": (*x.shape, weight1.shape[0], first, count),
        "dtypes": tuple(name_of(d) for d in (x.dtype, features.dtype, dtype)),
    }
