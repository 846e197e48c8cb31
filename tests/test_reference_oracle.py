"""The reference against an oracle: PAPER.md written out as loops over clips, frames, tokens and taps, in NumPy.

Nothing here is vectorised but over channels, and no function of the package is used.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from inti_kernels import reference
from inti_kernels.testing import module_case, op_cases

CONTEXTS = [subset for n in range(4) for subset in itertools.combinations(("cube", "frame", "global"), n)]
ABLATIONS = [
    pytest.param(
        {"context": context, "fusion": fusion, "head": head}, id=f"{'+'.join(context) or 'none'}-{fusion}-{head}"
    )
    for context in CONTEXTS
    for fusion in ("separate", "add", "cat")
    for head in ("softmax", "sigmoid", "attention")
    if not (head == "attention" and fusion == "add" and context)
]
erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(v):
    return 0.5 * v * (1 + erf(v / math.sqrt(2)))


def transform(v, p, name):
    """T_{a→b}: LayerNorm → Linear → GELU."""
    normed = (v - v.mean()) / math.sqrt(v.var() + 1e-5) * p[f"{name}.norm.weight"] + p[f"{name}.norm.bias"]
    return gelu(p[f"{name}.linear.weight"] @ normed + p[f"{name}.linear.bias"])


def softmax(a, b):
    top = max(a, b)
    a, b = math.exp(a - top), math.exp(b - top)
    return a / (a + b), b / (a + b)


def cube_level(x, weight, bias, grid, prefix, stride=2):
    """A 3-D convolution, each channel on its own, zeros around; x [T, N, C] of one clip."""
    (frames, tokens, dim), (height, width) = x.shape, grid
    kt, kh, kw = weight.shape[2:]
    out = np.zeros((frames // stride, tokens, dim))
    for j, row, column in itertools.product(range(frames // stride), range(height), range(width)):
        total = np.zeros(dim) if bias is None else bias.copy()
        for dt, dh, dw in itertools.product(range(kt), range(kh), range(kw)):
            t, h, w = stride * j + dt - kt // 2, row + dh - kh // 2, column + dw - kw // 2
            if 0 <= t < frames and 0 <= h < height and 0 <= w < width:
                total += weight[:, 0, dt, dh, dw] * x[t, prefix + h * width + w]
        out[j, prefix + row * width + column] = total
    return out


def class_tokens(x, prefix):
    """Token 0, or the mean patch token where there is none; [T, C]."""
    return [frame[0] if prefix else sum(frame) / len(frame) for frame in x]


def frame_level(cls, p, j):
    halves = [transform(cls[2 * j + i], p, "frame_pair") for i in (0, 1)]
    return transform(np.concatenate(halves), p, "frame")


def temporal_convolution(clip, weight, bias):
    out = []
    for t in range(len(clip)):
        total = bias.copy()
        for tap in range(3):
            if 0 <= t + tap - 1 < len(clip):
                total += weight[:, 0, tap] * clip[t + tap - 1]
        out.append(total)
    return out


def global_level(cls, p):
    clip = cls
    for number in range(3):
        clip = temporal_convolution(clip, p[f"global_convs.{number}.weight"], p[f"global_convs.{number}.bias"])
        if number < 2:
            pooled = [np.max(clip[t : t + 2], axis=0) for t in range(0, len(clip), 2)]  # the last may have one frame
            clip = [gelu(v) for v in pooled]
    return gelu(sum(clip) / len(clip))


def fuse(token, levels, fusion):
    """The head's input for one token."""
    if fusion == "add":
        return token + sum(levels) if levels else token
    if fusion == "cat":
        return np.concatenate([token, *levels])
    return np.concatenate([token, sum(levels)]) if levels else token


def inti(module, x):
    """The whole module: z and the weights, x [B, T, N, C]."""
    p = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    batch, frames, tokens, dim = x.shape
    z, weights = np.zeros((batch, frames // 2, tokens, dim)), np.zeros((batch, frames // 2, tokens, 2))
    for b in range(batch):
        clip = np.stack([x[b, t] + p["position_scale"] * p["position"][t] for t in range(frames)])
        cls = class_tokens(clip, module.prefix)
        if "cube" in module.context:
            cube = cube_level(clip, p["cube.weight"], p["cube.bias"], module.grid, module.prefix)
        whole = [global_level(cls, p)] if "global" in module.context else []
        for j in range(frames // 2):
            frame = [frame_level(cls, p, j)] if "frame" in module.context else []
            for k in range(tokens):
                levels = ([cube[j, k]] if "cube" in module.context else []) + frame + whole
                pair = clip[2 * j, k], clip[2 * j + 1, k]
                alpha, beta = predict(module, p, pair, levels)
                weights[b, j, k] = alpha, beta
                z[b, j, k] = alpha * pair[0] + beta * pair[1]
    return z, weights


def predict(module, p, pair, levels):
    """(α, β) of one token pair."""
    halves = [transform(token, p, "token") for token in pair]
    if module.head_type == "attention":
        scores = []
        for half in halves:
            inputs = fuse(half, levels, module.fusion)
            scores.append(p["head.query"] @ gelu(p["head.linear1.weight"] @ inputs + p["head.linear1.bias"]))
        return softmax(*scores)
    inputs = fuse(np.concatenate(halves), levels, module.fusion)
    hidden = gelu(p["head.linear1.weight"] @ inputs + p["head.linear1.bias"])
    logits = p["head.linear2.weight"] @ hidden + p["head.linear2.bias"]
    return [1 / (1 + math.exp(-v)) for v in logits] if module.head_type == "sigmoid" else softmax(*logits)


def assert_same(actual, expected):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-11, atol=1e-12)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation(ablation):
    module, x = module_case(dim=4, frames=4, grid=(2, 3), dtype=torch.float64, hidden=3, **ablation)
    z, weights = module(x, return_weights=True)
    expected_z, expected_weights = inti(module, x.numpy())
    assert expected_weights.std() > 1e-3, "weights that don't vary would compare nothing"
    assert_same(weights, expected_weights)
    assert_same(z, expected_z)


@pytest.mark.parametrize("frames", [2, 4, 6, 10, 16])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("head", ["softmax", "attention"])
def test_every_number_of_frames_and_prefix_tokens(head, prefix, frames):
    sizes = {"dim": 6, "frames": frames, "grid": (2, 2), "batch": 2, "prefix": prefix}
    module, x = module_case(**sizes, dtype=torch.float64, seed=frames, head=head)
    z, weights = module(x, return_weights=True)
    expected_z, expected_weights = inti(module, x.numpy())
    assert_same(weights, expected_weights)
    assert_same(z, expected_z)


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (3, 5)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), 2), ((3, 3, 3), 1), ((3, 1, 1), 1)], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["bias and position", "neither"])
def test_depthwise_conv3d(kernel, stride, prefix, grid, given):
    sizes = {"dim": 3, "frames": 4, "grid": grid, "batch": 2, "prefix": prefix, "dtype": torch.float64}
    inputs, kwargs = op_cases("depthwise_conv3d", **sizes, kernel=kernel, temporal_stride=stride)
    if not given:
        inputs |= {"bias": None, "position": None}
    actual = reference.depthwise_conv3d(**inputs, **kwargs)
    x = inputs["x"].numpy() + (inputs["position"].numpy()[:, None] if given else 0)
    bias = inputs["bias"].numpy() if given else None
    expected = [cube_level(clip, inputs["weight"].numpy(), bias, grid, prefix, stride) for clip in x]
    assert_same(actual, np.stack(expected))
    assert not actual[:, :, :prefix].any()


def test_the_cube_levels_output_is_centred_on_the_first_frame_of_the_pair():
    """A kernel that is one in the middle takes frame 2j; what it reads of the future ends with the pair."""
    x = torch.randn(1, 6, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(2, 1, 3, 3, 3, dtype=torch.float64)
    weight[:, :, 1, 1, 1] = 1
    assert torch.equal(reference.depthwise_conv3d(x, weight, None, (2, 2), prefix=0), x[:, 0::2])
    full = torch.ones_like(weight)
    before = reference.depthwise_conv3d(x, full, None, (2, 2), prefix=0)
    x[:, 4:] += 1
    after = reference.depthwise_conv3d(x, full, None, (2, 2), prefix=0)
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.equal(after[:, 2], before[:, 2])


@pytest.mark.parametrize("position", [True, False])
def test_pair_interpolate(position):
    sizes = {"dim": 5, "frames": 6, "grid": (2, 3), "batch": 2, "dtype": torch.float64}
    inputs, _ = op_cases("pair_interpolate", **sizes, position=position)
    z, weights = reference.pair_interpolate(**inputs)
    x, logits = inputs["x"].numpy(), inputs["logits"].numpy()
    if position:
        x = x + inputs["position"].numpy()[:, None]
    for b, j, k in itertools.product(range(2), range(3), range(7)):
        alpha, beta = softmax(*logits[b, j, k])
        assert_same(weights[b, j, k], [alpha, beta])
        assert_same(z[b, j, k], alpha * x[b, 2 * j, k] + beta * x[b, 2 * j + 1, k])


@pytest.mark.parametrize("position", [True, False])
def test_token_features(position):
    sizes = {"dim": 6, "frames": 4, "grid": (2, 2), "batch": 2, "dtype": torch.float64}
    inputs, _ = op_cases("token_features", **sizes, position=position)
    features = reference.token_features(**inputs)
    names = {
        "t.norm.weight": "norm_weight",
        "t.norm.bias": "norm_bias",
        "t.linear.weight": "weight",
        "t.linear.bias": "bias",
    }
    p = {name: inputs[key].numpy() for name, key in names.items()}
    x = inputs["x"].numpy() + (inputs["position"].numpy()[:, None] if position else 0)
    for b, j, k in itertools.product(range(2), range(2), range(5)):
        expected = np.concatenate([transform(x[b, 2 * j + i, k], p, "t") for i in (0, 1)])
        assert_same(features[b, j, k], expected)


@pytest.mark.parametrize("context", [("cube", "frame"), ("cube",), ("frame",), ()], ids=str)
def test_interpolation_head(context):
    sizes = {"dim": 4, "frames": 4, "grid": (1, 2), "batch": 2, "dtype": torch.float64}
    inputs, _ = op_cases("interpolation_head", **sizes, hidden=3, context=context)
    z, weights = reference.interpolation_head(**inputs)
    v = {name: None if tensor is None else tensor.numpy() for name, tensor in inputs.items()}
    x = v["x"] + v["position"][:, None]
    for b, j, k in itertools.product(range(2), range(2), range(3)):
        levels = [v["cube"][b, j, k]] if "cube" in context else []
        levels += [v["frame_context"][b, j]] if "frame" in context else []
        joined = fuse(v["features"][b, j, k], levels, "separate")
        alpha, beta = softmax(*(v["weight2"] @ gelu(v["weight1"] @ joined + v["bias1"]) + v["bias2"]))
        assert_same(weights[b, j, k], [alpha, beta])
        assert_same(z[b, j, k], alpha * x[b, 2 * j, k] + beta * x[b, 2 * j + 1, k])
