"""What every backend with kernels does to its arguments before it hands their addresses over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import note
from ._memory import empty


def expect(x: Tensor, *pairs: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """The last look before addresses are handed over. The user's functions have checked, and say more; an exported
    graph or a vmap rule calls the op itself.

    Args:
        x: the tokens, whose device all others must be on.
        *pairs: each a tensor (or None) and the shape it must have.

    Raises:
        ValueError: one has another shape, or is elsewhere.
    """
    for tensor, shape in pairs:
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.device != x.device):
            raise ValueError(f"expected {shape} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}")


def expect_one_dtype(x: Tensor, *others: Tensor | None) -> None:
    """`expect` for what the kernels read as numbers of one dtype.

    Raises:
        ValueError: another dtype than x's.
    """
    for tensor in others:
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"expected {x.dtype}, got {tensor.dtype}")


def expect_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    grid: Sequence[int],
    temporal_stride: int,
    prefix: int,
) -> None:
    """`expect` for depthwise_conv3d."""
    batch, frames, tokens, dim = x.shape
    space = weight.shape[-1]
    expect(x, (weight, (dim, 1, 3, space, space)), (bias, (dim,)), (position, (frames, dim)))
    if (
        (space, temporal_stride) not in ((3, 2), (3, 1), (1, 1))
        or frames % temporal_stride
        or min(*grid, prefix + 1) < 1
        or tokens != prefix + grid[0] * grid[1]
    ):
        raise ValueError(
            f"x {tuple(x.shape)} doesn't go with weight {tuple(weight.shape)}, grid {tuple(grid)}, prefix {prefix} and "
            f"temporal_stride {temporal_stride}"
        )


def expect_result_dtype(x: Tensor, dtype: torch.dtype) -> None:
    """`expect` for a convolution's result and its gradient: of x's dtype, or of 16 bits where x has 32."""
    if dtype != x.dtype and not (x.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)):
        raise ValueError(f"expected {x.dtype}, or 16 bits beside float32, got {dtype} beside {x.dtype}")


def expect_token_features(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None
) -> None:
    """`expect` for token_features; the tokens and their LayerNorm may be of another dtype than the Linear."""
    _, frames, _, dim = x.shape
    if frames % 2:
        raise ValueError(f"expected pairs of frames, got {frames} frames")
    width = weight.shape[0]
    expect(
        x,
        (norm_weight, (dim,)),
        (norm_bias, (dim,)),
        (weight, (width, dim)),
        (bias, (width,)),
        (position, (frames, dim)),
    )
    expect_one_dtype(weight, bias)
    _expect_float64_in_all_or_none(x, weight)


def expect_interpolation_head(
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None,
) -> None:
    """`expect` for interpolation_head; x may be of another dtype than the network."""
    batch, frames, tokens, dim = x.shape
    pairs, (hidden, width) = (batch, frames // 2, tokens), weight1.shape
    context = width - features.shape[-1]
    expect(
        x,
        (features, (*pairs, features.shape[-1])),
        (cube, (*pairs, context)),
        (frame_context, (*pairs[:2], context)),
        (weight1, (hidden, features.shape[-1] + (context if cube is not None or frame_context is not None else 0))),
        (bias1, (hidden,)),
        (weight2, (2, hidden)),
        (bias2, (2,)),
        (position, (frames, dim)),
    )
    expect_one_dtype(features, cube, frame_context, weight1, bias1, weight2, bias2)
    _expect_float64_in_all_or_none(x, features)


def expect_class_levels(
    cls: Tensor, position: Tensor | None, frame: Sequence[Tensor], convolutions: Sequence[Tensor]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """`expect` for the levels of class tokens [B, T, C], of parameters as ClassLevels has them or none; the shapes of
    what is of a frame in the frame level, and of what is of a pair."""
    batch, frames, dim = cls.shape
    half = frame[2].shape[0] if frame else 0
    of_frame = ((dim,), (dim,), (half, dim), (half,), (2 * half,), (2 * half,), (dim, 2 * half), (dim,))
    of_parameters = (*of_frame[: len(frame)], *((dim, 1, 3), (dim,)) * (len(convolutions) // 2))
    expect(cls, (cls, (batch, frames // 2 * 2, dim)), (position, (frames, dim)))
    expect(cls, *zip((*frame, *convolutions), of_parameters, strict=True))
    return (batch, frames, half), (batch, frames // 2, dim)


def _expect_float64_in_all_or_none(x: Tensor, network: Tensor) -> None:
    if wide_dtype(network) != wide_dtype(x):
        raise ValueError(f"expected float64 for x and the network, or for neither, got {x.dtype} and {network.dtype}")


@cache
def name_of(dtype: torch.dtype) -> str:
    """As the compiled modules name a dtype."""
    return str(dtype).removeprefix("torch.")


def wide_dtype(x: Tensor) -> torch.dtype:
    """What kernels compute x's dtype in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes microseconds to do nothing: a step has a hundred of them."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def all_as_dtypes(tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    """`as_dtype` of each: on a GPU one launch for all that go from one dtype to one other."""
    converted, pending = list(tensors), defaultdict(list)
    for i, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        if tensor is not None and tensor.dtype != dtype:
            pending[tensor.dtype, dtype].append(i)
    for (_, dtype), places in pending.items():
        # Never of several dtypes at once: up to torch 2.10 all targets on a GPU are written as if they had the first
        # one's (pytorch issue 173383).
        sources = [tensors[i] for i in places]
        targets = [empty(source.shape, source, dtype) for source in sources]
        torch._foreach_copy_(targets, sources)
        for i, target in zip(places, targets, strict=True):
            converted[i] = target
    return converted


def in_wide_dtype(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """Contiguous, in what kernels compute x's dtype in."""
    return None if tensor is None else as_dtype(tensor, wide_dtype(x)).contiguous()


def taps_first(weight: Tensor) -> Tensor:
    """[C, 1, KT, KH, KW] → [KT·KH·KW, C]: the channels, along which kernels vectorise, contiguous."""
    return weight.reshape(weight.shape[0], -1).t().contiguous()


def gradient_buffer(x: Tensor, need: bool, accumulate: Tensor | None) -> Tensor | None:
    """Where the gradient of x goes: the buffer to add to if there is one, else fresh memory; None if not needed."""
    if not need:
        return None
    return empty(x.shape, x) if accumulate is None else accumulate


def channels_contiguous(tensor: Tensor, op: str | None = None) -> Tensor:
    """Any strides but the last, which must be 1; a copy of tokens (not of a gradient) is worth a note."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    if op is not None:
        note(
            f"{op}: the channels of x are not contiguous (strides {tuple(tensor.stride())}), so x is copied at every "
            "call; x.contiguous() once before, or a layout with channels last, avoids it."
        )
    return tensor.contiguous()
