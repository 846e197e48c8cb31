"""The CUDA entry points with sizes of zero: a C++ caller may have them, and a division by one would end the process.

INTI_CUDA_LIBRARY names the emulator, which asks for this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from inti_kernels.backends.cuda import load
from inti_kernels.backends.cuda._launch import launch

F = "float32"
Calls = Iterator[tuple[str, dict[str, Any]]]


def given(*shape: int) -> Tensor:
    return torch.ones(shape)


def written(*shape: int) -> Tensor:
    """NaN: what an entry point doesn't write shows."""
    return torch.full(shape, float("nan"))


def strides(*shape: int) -> tuple[int, int, int]:
    """Of a contiguous array of four axes but the last."""
    return shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3]


def pair_interpolate(batch: int, frames: int, tokens: int, dim: int) -> Calls:
    x, pairs = (batch, frames, tokens, dim), (batch, frames // 2, tokens)
    tiles = load().pair_interpolate_tiles(batch, frames, tokens)
    tokens_of = {"shape": (*x, F, F), "x": given(*x), "x_strides": strides(*x), "position": given(frames, dim)}
    tokens_of["logits"] = given(*pairs, 2)
    yield "pair_interpolate_forward", tokens_of | {"z": written(*pairs, dim), "weights": written(*pairs, 2)}
    yield (
        "pair_interpolate_backward",
        tokens_of
        | {"grad_z": given(*pairs, dim), "grad_z_strides": strides(*pairs, dim), "grad_weights": given(*pairs, 2)}
        | {"grad_x": written(*x), "accumulate": False, "grad_logits": written(*pairs, 2)}
        | {"grad_position": written(frames, dim), "partials": written(batch * tiles, frames, dim)},
    )


def depthwise_conv3d(batch: int, frames: int, height: int, width: int, dim: int, temporal_stride: int) -> Calls:
    shape = (batch, frames, 1, height, width, dim, temporal_stride, 3, F, F)
    x = (batch, frames, 1 + height * width, dim)
    y = (batch, frames // max(temporal_stride, 1), *x[2:])
    tokens_of = {"shape": shape, "x": given(*x), "x_strides": strides(*x), "position": given(frames, dim)}
    tokens_of["weight"] = given(dim, 3, 3, 3)
    yield "depthwise_conv3d_forward", tokens_of | {"bias": given(dim), "y": written(*y)}
    refused = min(frames, height, width, temporal_stride) == 0  # the tiling is too, as the next test sees
    tiles, runs = (1, 1) if refused else load().depthwise_conv3d_tiling(shape)
    yield (
        "depthwise_conv3d_backward",
        tokens_of
        | {"grad_y": given(*y), "grad_y_strides": strides(*y), "grad_x": written(*x), "accumulate": False}
        | {"grad_position": written(frames, dim), "position_partials": written(batch * tiles, frames, dim)}
        | {"grad_weight": written(dim, 3, 3, 3), "grad_bias": written(dim)}
        | {"weight_partials": written(batch * runs * tiles, dim, 28)},
    )


def token_features(batch: int, frames: int, tokens: int, dim: int, width: int) -> Calls:
    shape, x = (batch, frames, tokens, dim, width, F), (batch, frames, tokens, dim)
    rows, features = (batch, frames, tokens, width), (batch, frames // 2, tokens, 2 * width)
    tiles = load().token_features_tiles(shape)
    tokens_of = {"shape": shape, "x": given(*x), "x_strides": strides(*x), "position": given(frames, dim)}
    tokens_of |= {"norm_weight": given(dim), "norm_bias": given(dim)}
    kept = {"statistics": given(batch, frames, tokens, 2)}
    yield (
        "token_features_forward",
        tokens_of
        | {"weight": given(width, dim), "bias": given(width), "eps": 1e-5, "features": written(*features)}
        | {"statistics": written(batch, frames, tokens, 2), "preactivation": written(*rows)},
    )
    yield (
        "token_features_backward_activation",
        {"shape": shape, "grad_features": given(*features), "grad_features_pitch": 2 * width}
        | {"preactivation": given(*rows), "grad_preactivation": written(*rows)}
        | {"grad_bias": written(width), "partials": written(tiles, width)},
    )
    yield (
        "token_features_activation",
        {"shape": shape, "preactivation": given(*rows), "features": written(*features)},
    )
    yield "token_features_normalize", tokens_of | kept | {"normalized": written(*x)}
    yield (
        "token_features_backward_norm",
        tokens_of
        | kept
        | {"grad_normalized": given(*x), "grad_x": written(*x), "accumulate": False, "total": None}
        | {"grad_norm_weight": written(dim), "grad_norm_bias": written(dim), "norm_partials": written(tiles, 2, dim)}
        | {"grad_position": written(frames, dim), "position_partials": written(tiles, dim)},
    )


def interpolation_head(batch: int, frames: int, tokens: int, dim: int, width: int, context: int, hidden: int) -> Calls:
    shape = (batch, frames, tokens, dim, width, context, hidden, F, F)
    x, pairs = (batch, frames, tokens, dim), (batch, frames // 2, tokens)
    tokens_of = {"shape": shape, "x": given(*x), "x_strides": strides(*x), "position": given(frames, dim)}
    network = {"shape": shape, "features": given(*pairs, width), "cube": given(*pairs, context)}
    network |= {"frame_bias": given(*pairs[:2], hidden), "weight1": given(hidden, width + context)}
    network |= {"bias1": given(hidden), "preactivation": written(*pairs, hidden)}
    yield "interpolation_head_preactivation", network
    network["preactivation"] = written(*pairs, hidden)
    yield (
        "interpolation_head_forward",
        tokens_of
        | network
        | {"weight2": given(2, hidden), "bias2": given(2), "difference": written(*pairs)}
        | {"partials": written(load().interpolation_head_partials(shape), *pairs)}
        | {"z": written(*pairs, dim), "weights": written(*pairs, 2)},
    )
    tiles = load().pair_interpolate_tiles(batch, frames, tokens)
    hidden_tiles = load().interpolation_head_tiles(shape)
    yield (
        "interpolation_head_backward",
        tokens_of
        | {"difference": given(*pairs), "grad_z": given(*pairs, dim), "grad_z_strides": strides(*pairs, dim)}
        | {"grad_weights": given(*pairs, 2), "preactivation": given(*pairs, hidden), "weight2": given(2, hidden)}
        | {"grad_x": written(*x), "accumulate": False, "grad_position": written(frames, dim)}
        | {"position_partials": written(batch * tiles, frames, dim), "grad_difference": written(*pairs)}
        | {"grad_bias2": written(2), "grad_preactivation": written(*pairs, hidden)}
        | {"grad_frame_bias": written(*pairs[:2], hidden), "grad_bias1": written(hidden)}
        | {"frame_partials": written(hidden_tiles, hidden), "weight2_partials": written(hidden_tiles, hidden)}
        | {"grad_weight2": written(2, hidden)},
    )


def class_levels(batch: int, frames: int, dim: int, half: int) -> Calls:
    shape, x, pairs = (batch, frames, dim, half, F, F), (batch, frames, dim), (batch, frames // 2, dim)
    tokens_of = {"shape": shape, "x": given(*x), "x_strides": (frames * dim, dim, 0), "position": given(frames, dim)}
    kept, rows = given(batch, frames, half), batch * frames
    layers = (
        (None, (rows, dim), {"grad_x": written(*x), "grad_preactivation": None}),
        (kept, (rows // 2, 2 * half), {"grad_x": None, "grad_preactivation": written(batch, frames, half)}),
    )
    for preactivation, of_rows, gradients in layers:
        norm = {"norm_weight": given(of_rows[1]), "norm_bias": given(of_rows[1]), "eps": 1e-5}
        norm |= {"preactivation": preactivation}
        yield "class_levels_normalize", tokens_of | norm | {"normalized": written(*of_rows)}
        yield (
            "class_levels_backward_norm",
            tokens_of
            | norm
            | gradients
            | {"grad_normalized": given(*of_rows), "normalized": written(*of_rows), "accumulate": False}
            | {"statistics": written(of_rows[0], 2)},
        )
    context = tokens_of | {
        "pair_preactivation": given(*pairs),
        "convolutions": [given(dim, 3), given(dim)] * 3,
        "workspace": written(load().class_levels_workspace(shape)),
    }
    yield "class_levels_context", context | {"context": written(*pairs)}
    yield (
        "class_levels_backward_context",
        context
        | {"grad_context": given(*pairs), "grad_pair_preactivation": written(*pairs), "grad_pair_bias": written(dim)}
        | {
            "grad_x": written(*x),
            "grad_convolutions": [written(dim, 3) if i % 2 == 0 else written(dim) for i in range(6)],
        },
    )
    yield (
        "class_levels_backward_sums",
        tokens_of
        | {"preactivation": kept, "statistics": [given(rows, 2), given(rows // 2, 2)]}
        | {"grad_normalized": [given(rows, dim), given(rows // 2, 2 * half)], "grad_preactivation": kept}
        | {"grad_norm_weight": [written(dim), written(2 * half)], "grad_norm_bias": [written(dim), written(2 * half)]}
        | {"grad_bias": written(half)},
    )


SIZES = {
    pair_interpolate: {"batch": 2, "frames": 4, "tokens": 3, "dim": 5},
    depthwise_conv3d: {"batch": 2, "frames": 4, "height": 3, "width": 2, "dim": 5, "temporal_stride": 2},
    token_features: {"batch": 2, "frames": 4, "tokens": 3, "dim": 5, "width": 4},
    interpolation_head: {"batch": 2, "frames": 4, "tokens": 3, "dim": 5, "width": 4, "context": 3, "hidden": 6},
    class_levels: {"batch": 2, "frames": 4, "dim": 5, "half": 3},
}
# What a convolution can't be cut into runs and tiles of.
REFUSED = ("frames", "height", "width", "temporal_stride")


def check(entry: str, arguments: dict[str, Any]) -> None:
    """Everything that it writes it has written, the sums of no partial sums too."""
    tensors = [(name, one) for name, value in arguments.items() for one in (value if type(value) is list else [value])]
    outputs = [(name, one) for name, one in tensors if isinstance(one, Tensor) and one.isnan().any()]
    launch(entry, torch.empty(0), **arguments)
    for name, output in outputs:
        # Workspaces are the entry point's own business, and statistics of no channels, or for no features, are none.
        if "partials" not in name and name not in ("statistics", "workspace"):
            assert not output.isnan().any(), f"{entry}: {name}"


@pytest.mark.parametrize("op", SIZES, ids=lambda op: op.__name__)
def test_these_sizes_are_right(op: Callable[..., Calls]) -> None:
    for entry, arguments in op(**SIZES[op]):
        check(entry, arguments)


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, sizes in SIZES.items() for name in sizes],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_size_of_zero_is_no_work_or_an_error(op: Callable[..., Calls], name: str) -> None:
    for entry, arguments in op(**SIZES[op] | {name: 0}):
        if op is depthwise_conv3d and name in REFUSED:
            said = f"depthwise_conv3d takes height and width of 1 or more, .*; got .*{name} 0"
            with pytest.raises(ValueError, match=said):
                check(entry, arguments)
            with pytest.raises(ValueError, match=said):
                load().depthwise_conv3d_tiling(arguments["shape"])
        else:
            check(entry, arguments)


def test_a_convolution_needs_frames_for_a_step() -> None:
    with pytest.raises(ValueError, match="frames to fill a temporal_stride; got height 3, width 2, frames 1, temp.* 2"):
        load().depthwise_conv3d_tiling((1, 1, 0, 3, 2, 5, 2, 3, F, F))


@pytest.mark.parametrize(
    ("entry", "change", "said"),
    [
        ("class_levels_context", {"shape": (2, 3, 5, 3, F, F)}, "an even number of frames"),
        ("class_levels_context", {"shape": (2, 4, 5, 3, "float64", F)}, "float64 for all or for nothing"),
        ("class_levels_backward_context", {"grad_pair_bias": None}, "gives a level all of its gradients"),
        ("class_levels_backward_context", {"grad_x": None}, "gives a level all of its gradients"),
        ("class_levels_backward_context", {"convolutions": [None] * 5}, "expected 6 addresses, got 5"),
        ("token_features_backward_norm", {"total": given(2, 4, 3, 5)}, "takes a total for 16-bit dtypes"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(entry: str, change: dict[str, Any], said: str) -> None:
    op = class_levels if entry.startswith("class_levels") else token_features
    arguments = next(arguments for name, arguments in op(**SIZES[op]) if name == entry)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=said):
        launch(entry, torch.empty(0), **arguments | change)
