"""The specification of every op, in plain PyTorch: one function an op, any floating dtype, differentiable to any order.

Notation, here and everywhere in the package: ``x`` holds tokens [B, T, N, C] with B clips, T frames, N = prefix + H·W
tokens a frame (the prefix tokens first: the class token, then registers) and C channels. A *pair* is the frames
(2j, 2j+1); what belongs to a pair has T/2 in the place of T. Equation numbers are those of arXiv 2408.06840.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def check_pairs(frames: int) -> None:
    """Without it, slices of an odd number of frames would broadcast to a wrong answer where one frame is left.

    Raises:
        ValueError: frames is odd, or none.
    """
    if frames < 2 or frames % 2:
        raise ValueError(f"frames must be even to form pairs, got {frames}")


def check_whole(**sizes: int) -> None:
    """Sizes must be whole numbers.

    Raises:
        TypeError: one isn't an int.
    """
    for name, value in sizes.items():
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")


def check_at_least_1(**sizes: int) -> None:
    """Sizes must be whole numbers from 1 on.

    Raises:
        TypeError, ValueError: one isn't.
    """
    check_whole(**sizes)
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_prefix(prefix: int) -> None:
    """The number of tokens before the patches.

    Raises:
        TypeError, ValueError: it isn't a whole number, or is negative.
    """
    check_whole(prefix=prefix)
    if prefix < 0:
        raise ValueError(f"prefix must be 0 or more tokens, got {prefix}")


def check_grid(grid: tuple[int, int]) -> None:
    """The patches of a frame: (H, W), both at least 1.

    Raises:
        TypeError, ValueError: it isn't a pair of whole numbers, or one is below 1.
    """
    if not isinstance(grid, (tuple, list)):
        raise TypeError(f"grid must be (H, W), two whole numbers, got {grid!r}")
    for size in grid:
        check_whole(grid=size)
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (H, W), both at least 1, got {tuple(grid)}")


def add_position(x: Tensor, position: Tensor | None) -> Tensor:
    """Adds the temporal position to every token of a frame: x + σ·P (Eq. 8).

    Args:
        x: tokens [B, T, N, C], any floating dtype.
        position: σ·P [T, C], any floating dtype, or None for x unchanged.

    Returns:
        [B, T, N, C] in x's dtype; the sum is formed in float32 (float64 if either is) and rounded once.
    """
    if position is None:
        return x
    wide = torch.promote_types(torch.promote_types(x.dtype, position.dtype), torch.float32)
    return (x.to(wide) + position.to(wide)[:, None]).to(x.dtype)


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """z[j,k] = α·x[2j,k] + β·x[2j+1,k] (Eq. 7).

    Args:
        x: tokens [B, T, N, C], T even.
        weights: (α, β) of every token pair [B, T/2, N, 2].

    Returns:
        [B, T/2, N, C] in x's dtype.

    Raises:
        ValueError: T is odd.
    """
    check_pairs(x.shape[1])
    return (x[:, 0::2] * weights[..., 0:1] + x[:, 1::2] * weights[..., 1:2]).to(x.dtype)


def pair_interpolate(x: Tensor, logits: Tensor, position: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Replaces each pair of frames by their weighted sum, token by token: (α, β) = softmax(logits), then Eq. 7.

    Args:
        x: tokens [B, T, N, C], T even.
        logits: two numbers a token pair [B, T/2, N, 2]; their dtype may differ from x's.
        position: σ·P [T, C], added to x first (Eq. 8), or None.

    Returns:
        z [B, T/2, N, C] in x's dtype, and the weights (α, β) [B, T/2, N, 2] in the logits' dtype; α + β = 1.

    Raises:
        ValueError: T is odd.
    """
    weights = logits.softmax(dim=-1)
    return weighted_sum(add_position(x, position), weights), weights


def tokens_to_grid(x: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """[B, T, prefix + H·W, C] → the patches as convolutions take them, [B, C, T, H, W] (a view)."""
    return x[:, :, prefix:].unflatten(2, grid).permute(0, 4, 1, 2, 3)


def grid_to_tokens(cube: Tensor, prefix: int) -> Tensor:
    """[B, C, T, H, W] → [B, T, prefix + H·W, C], zeros in the prefix tokens' place."""
    return F.pad(cube.permute(0, 2, 3, 4, 1).flatten(2, 3), (0, 0, prefix, 0))


def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    *,
    temporal_stride: int = 2,
    prefix: int = 1,
    position: Tensor | None = None,
) -> Tensor:
    """Depthwise 3-D convolution over the patch tokens seen as [T, H, W], zero padding (the cube level, Eq. 10).

    Padding is (KT // 2, KH // 2, KW // 2), so output j is centred on frame temporal_stride·j. Prefix tokens have no
    place on the grid: their output is 0.

    Args:
        x: tokens [B, T, prefix + H·W, C]; T divisible by temporal_stride.
        weight: [C, 1, KT, KH, KW], as torch.nn.Conv3d has it with groups=C; odd kernel sizes; rounded to x's dtype.
        bias: [C] or None.
        grid: (H, W).
        temporal_stride: stride along T; 2 gives one output frame a pair.
        prefix: number of tokens before the patches.
        position: σ·P [T, C], added to x first (Eq. 8), or None. The zero padding stays zero.

    Returns:
        [B, T / temporal_stride, prefix + H·W, C] in x's dtype.

    Raises:
        ValueError: T is odd with temporal_stride 2.
    """
    if temporal_stride == 2:
        check_pairs(x.shape[1])
    patches = tokens_to_grid(add_position(x, position), grid, prefix)
    padding = tuple(size // 2 for size in weight.shape[2:])
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    cube = F.conv3d(patches, weight, bias, (temporal_stride, 1, 1), padding, groups=x.shape[-1])
    return grid_to_tokens(cube, prefix)


def norm_linear_gelu(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """T_{a→b} = LayerNorm(a) → Linear(a, b) → GELU, the exact one with erf (beside Eq. 9).

    Args:
        x: [..., a].
        norm_weight, norm_bias: [a].
        weight, bias: [b, a] and [b].
        eps: of the LayerNorm.

    Returns:
        [..., b].
    """
    return F.gelu(F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), weight, bias))


def token_features(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """F_token[j,k] = concat(T_{C→C/2}(x[2j,k]), T_{C→C/2}(x[2j+1,k])), one T for both frames (Eq. 9).

    Args:
        x: tokens [B, T, N, C], T even.
        norm_weight, norm_bias: the LayerNorm's [C].
        weight, bias: the Linear's [C/2, C] and [C/2] (any output width D is taken).
        position: σ·P [T, C], added to x first (Eq. 8), or None.
        eps: of the LayerNorm.

    Returns:
        [B, T/2, N, C] (2·D in general).

    Raises:
        ValueError: T is odd.
    """
    check_pairs(x.shape[1])
    frames = norm_linear_gelu(add_position(x, position), norm_weight, norm_bias, weight, bias, eps)
    return torch.cat((frames[:, 0::2], frames[:, 1::2]), dim=-1)


def head_inputs(features: Tensor, cube: Tensor | None, frame_context: Tensor | None) -> Tensor:
    """[features ; cube + frame_context], the context being Eq. 13.

    Args:
        features: [B, T/2, N, D].
        cube: F_cube [B, T/2, N, C] or None.
        frame_context: F_frame + F_global [B, T/2, C] or None.

    Returns:
        [B, T/2, N, D + C]; features alone with neither cube nor frame_context.
    """
    if frame_context is not None:
        frame_context = frame_context[:, :, None]  # [B, T/2, 1, C]
        context = frame_context.expand(*features.shape[:-1], -1) if cube is None else cube + frame_context
    else:
        context = cube
    return features if context is None else torch.cat((features, context), dim=-1)


def head_hidden(
    features: Tensor, cube: Tensor | None, frame_context: Tensor | None, weight1: Tensor, bias1: Tensor
) -> Tensor:
    """GELU(Linear(D [+ C], h)([features ; cube + frame_context])).

    Args:
        features, cube, frame_context: as :func:`head_inputs`.
        weight1, bias1: [h, D + C] ([h, D] with neither cube nor frame_context) and [h].

    Returns:
        [B, T/2, N, h].
    """
    return F.gelu(F.linear(head_inputs(features, cube, frame_context), weight1, bias1))


def interpolation_head(
    features: Tensor,
    cube: Tensor | None,
    frame_context: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The network that predicts the weights, and the interpolation, in one: Eq. 13, two linear layers, softmax, Eq. 7.

    Args:
        features: F_token [B, T/2, N, D].
        cube: F_cube [B, T/2, N, C] or None.
        frame_context: F_frame + F_global [B, T/2, C] or None.
        x: tokens [B, T, N, C], what is interpolated.
        weight1, bias1: [h, D + C] ([h, D] with neither cube nor frame_context) and [h].
        weight2, bias2: [2, h] and [2].
        position: σ·P [T, C], added to x first (Eq. 8), or None.

    Returns:
        z [B, T/2, N, C] in x's dtype, and the weights [B, T/2, N, 2].

    Raises:
        ValueError: T is odd.
    """
    logits = F.linear(head_hidden(features, cube, frame_context, weight1, bias1), weight2, bias2)
    return pair_interpolate(x, logits, position)


def frame_level(
    cls: Tensor,
    pair_norm_weight: Tensor,
    pair_norm_bias: Tensor,
    pair_weight: Tensor,
    pair_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: Sequence[float] = (1e-5, 1e-5),
) -> Tensor:
    """F_frame[j] = T_{C→C}(concat(T_{C→C/2}(cls[2j]), T_{C→C/2}(cls[2j+1]))) (Eq. 11).

    Args:
        cls: class tokens [B, T, C], T even.
        pair_norm_weight, pair_norm_bias, pair_weight, pair_bias: of T_{C→C/2}: [C], [C], [C/2, C] and [C/2].
        norm_weight, norm_bias, weight, bias: of T_{C→C}: [C], [C], [C, C] and [C].
        eps: of the two LayerNorms.

    Returns:
        [B, T/2, C].
    """
    halves = norm_linear_gelu(cls, pair_norm_weight, pair_norm_bias, pair_weight, pair_bias, eps[0])
    pairs = torch.cat((halves[:, 0::2], halves[:, 1::2]), dim=-1)
    return norm_linear_gelu(pairs, norm_weight, norm_bias, weight, bias, eps[1])


def global_level(
    cls: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
) -> Tensor:
    """F_global: depthwise convolutions in time over the class tokens, pooled to one vector a clip (Eq. 12).

    Args:
        cls: class tokens [B, T, C].
        weight1, weight2, weight3: [C, 1, 3], as nn.Conv1d has them with groups=C.
        bias1, bias2, bias3: [C].

    Returns:
        [B, C].
    """
    clip = cls.transpose(1, 2)  # [B, C, T]
    for weight, bias in ((weight1, bias1), (weight2, bias2)):
        clip = F.conv1d(clip, weight, bias, padding=1, groups=clip.shape[1])
        clip = F.gelu(F.max_pool1d(clip, 2, ceil_mode=True))
    return F.gelu(F.conv1d(clip, weight3, bias3, padding=1, groups=clip.shape[1]).mean(dim=-1))


def class_tokens(x: Tensor, prefix: int) -> Tensor:
    """What the frame and the global level see of x [B, T, N, C]: token 0, or the mean one without prefix: [B, T, C]."""
    return x[:, :, 0] if prefix else x.mean(dim=2)


def frame_context(
    cls: Tensor, frame: Sequence[Tensor] | None, global_: Sequence[Tensor] | None, eps: Sequence[float] = (1e-5, 1e-5)
) -> Tensor | None:
    """F_frame + F_global, those that are there: what Eq. 13 adds to all tokens of a pair of frames.

    Args:
        cls: class tokens [B, T, C].
        frame: the eight parameters of :func:`frame_level`, or None.
        global_: the six of :func:`global_level`, or None.
        eps: of the frame level's LayerNorms.

    Returns:
        [B, T/2, C], or None with neither level.
    """
    levels = []
    if frame is not None:
        levels.append(frame_level(cls, *frame, eps=eps))
    if global_ is not None:
        levels.append(global_level(cls, *global_)[:, None].expand(-1, cls.shape[1] // 2, -1))
    return sum(levels[1:], levels[0]) if levels else None


def inti(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    cube_weight: Tensor | None,
    cube_bias: Tensor | None,
    pair_norm_weight: Tensor | None,
    pair_norm_bias: Tensor | None,
    pair_weight: Tensor | None,
    pair_bias: Tensor | None,
    frame_norm_weight: Tensor | None,
    frame_norm_bias: Tensor | None,
    frame_weight: Tensor | None,
    frame_bias: Tensor | None,
    global_weight1: Tensor | None,
    global_bias1: Tensor | None,
    global_weight2: Tensor | None,
    global_bias2: Tensor | None,
    global_weight3: Tensor | None,
    global_bias3: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    position: Tensor | None = None,
    *,
    grid: tuple[int, int],
    prefix: int = 1,
    eps: Sequence[float] = (1e-5, 1e-5, 1e-5),
) -> tuple[Tensor, Tensor]:
    """The whole module, with the fusion "separate" and the softmax head (Eq. 7 to 13).

    Args:
        x: tokens [B, T, prefix + H·W, C], T even.
        norm_weight, norm_bias, weight, bias: of the token level, :func:`token_features`.
        cube_weight, cube_bias: of the cube level, :func:`depthwise_conv3d` with stride 2; None without the level.
        pair_*, frame_*: of the frame level, :func:`frame_level`; all None without it.
        global_*: of the global level, :func:`global_level`; all None without it.
        weight1, bias1, weight2, bias2: of the head, :func:`interpolation_head`.
        position: σ·P [T, C], added to x first (Eq. 8), or None.
        grid: (H, W).
        prefix: tokens before the patches.
        eps: of the LayerNorms of the token level, the frame level's frames and the frame level's pairs.

    Returns:
        z [B, T/2, N, C] in x's dtype, and the weights [B, T/2, N, 2].

    Raises:
        ValueError: T is odd.
    """
    x = add_position(x, position)
    features = token_features(x, norm_weight, norm_bias, weight, bias, eps=eps[0])
    cube = None if cube_weight is None else depthwise_conv3d(x, cube_weight, cube_bias, grid, prefix=prefix)
    of_pair = (pair_norm_weight, pair_norm_bias, pair_weight, pair_bias)
    frame = (*of_pair, frame_norm_weight, frame_norm_bias, frame_weight, frame_bias)
    convolutions = (global_weight1, global_bias1, global_weight2, global_bias2, global_weight3, global_bias3)
    context = frame_context(
        class_tokens(x, prefix),
        None if pair_weight is None else frame,
        None if global_weight1 is None else convolutions,
        eps[1:],
    )
    return interpolation_head(features, cube, context, x, weight1, bias1, weight2, bias2)
