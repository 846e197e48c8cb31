"""The reference InTI: constructor, ablations, initial state, input checks, dtypes, and parameter counts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from inti_kernels import InTI, reference
from inti_kernels.testing import module_case

LEVELS = ("cube", "frame", "global")
CONTEXTS = [subset for n in range(4) for subset in itertools.combinations(LEVELS, n)]
HEADS = ("softmax", "sigmoid", "attention")
# The attention head's feature has half the width of the context, so the two can't be added.
ABLATIONS = [
    pytest.param(
        {"context": context, "fusion": fusion, "head": head}, id=f"{'+'.join(context) or 'none'}-{fusion}-{head}"
    )
    for context, fusion, head in itertools.product(CONTEXTS, ("separate", "add", "cat"), HEADS)
    if not (head == "attention" and fusion == "add" and context)
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("one_thread")


def _transform(name: str, a: int, b: int) -> dict[str, tuple[int, ...]]:
    """Parameters of T_{a→b}."""
    return {
        f"{name}.norm.weight": (a,),
        f"{name}.norm.bias": (a,),
        f"{name}.linear.weight": (b, a),
        f"{name}.linear.bias": (b,),
    }


def _expected_shapes(c: int, t: int, hidden: int, context, fusion: str, head: str) -> dict[str, tuple[int, ...]]:
    """Every parameter of the method, from PAPER.md."""
    shapes = {"position": (t, 1, c), "position_scale": (1,), **_transform("token", c, c // 2)}
    if "cube" in context:
        shapes |= {"cube.weight": (c, 1, 3, 3, 3), "cube.bias": (c,)}
    if "frame" in context:
        shapes |= _transform("frame_pair", c, c // 2) | _transform("frame", c, c)
    if "global" in context:
        for number in range(3):
            shapes |= {f"global_convs.{number}.weight": (c, 1, 3), f"global_convs.{number}.bias": (c,)}
    token = c // 2 if head == "attention" else c
    width = token + {"separate": c if context else 0, "add": 0, "cat": len(context) * c}[fusion]
    shapes |= {"head.linear1.weight": (hidden, width), "head.linear1.bias": (hidden,)}
    if head == "attention":
        return shapes | {"head.query": (hidden,)}
    return shapes | {"head.linear2.weight": (2, hidden), "head.linear2.bias": (2,)}


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_has_the_papers_parameters_and_runs(ablation, prefix, hidden):
    module = InTI(8, 4, (2, 3), prefix=prefix, hidden=hidden, **ablation)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == _expected_shapes(8, 4, hidden or 8, **ablation)
    assert not list(module.buffers())
    assert all(parameter.requires_grad for parameter in module.parameters())
    x = torch.randn(2, 4, prefix + 6, 8)
    z, weights = module(x, return_weights=True)
    assert z.shape == (2, 2, prefix + 6, 8)
    assert weights.shape == (2, 2, prefix + 6, 2)
    assert torch.equal(module(x), z)


def test_attributes_say_what_was_built():
    module = InTI(8, 4, [2, 3], prefix=2, context=["global", "cube", "cube"], fusion="cat", head="sigmoid", hidden=3)
    assert (module.dim, module.frames, module.grid, module.prefix) == (8, 4, (2, 3), 2)
    assert module.context == ("cube", "global"), "in the paper's order, each once"
    assert (module.fusion, module.head_type, module.hidden) == ("cat", "sigmoid", 3)
    for part in ("dim=8", "frames=4", "grid=(2, 3)", "prefix=2", "'cube', 'global'", "'cat'", "'sigmoid'", "hidden=3"):
        assert part in repr(module)
    default = InTI(8, 4, (2, 3))
    assert (default.context, default.fusion, default.head_type) == (LEVELS, "separate", "softmax")
    assert (default.prefix, default.hidden) == (1, 8)
    assert InTI(8, 4, (2, 3), context="frame").context == ("frame",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 7}, "dim must be even.*got 7"),
        ({"dim": 0}, "dim must be even and positive.*got 0"),
        ({"frames": 7}, "frames must be even to form pairs, got 7"),
        ({"frames": 0}, "frames must be even.*got 0"),
        ({"frames": -2}, "frames must be even.*got -2"),
        ({"grid": (0, 3)}, r"grid must be \(H, W\).*got \(0, 3\)"),
        ({"grid": (3,)}, r"grid must be \(H, W\)"),
        ({"grid": (2, 2, 2)}, r"grid must be \(H, W\)"),
        ({"prefix": -1}, "prefix must be 0 or more tokens, got -1"),
        ({"context": ("cube", "patch")}, "context must be a subset of .*'patch'"),
        ({"context": "all"}, "context must be a subset of .*'all'"),
        ({"fusion": "sum"}, "fusion must be one of .*'sum'"),
        ({"head": "tanh"}, "head must be one of .*'tanh'"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"head": "attention", "fusion": "add"}, "use fusion='separate' or 'cat'"),
    ],
    ids=str,
)
def test_constructor_errors(change, message):
    with pytest.raises(ValueError, match=message):
        InTI(**{"dim": 8, "frames": 4, "grid": (2, 3), **change})


@pytest.mark.parametrize("head", HEADS)
def test_initial_state(head):
    torch.manual_seed(0)
    module = InTI(256, 16, (2, 2), head=head)
    assert torch.equal(module.position_scale, torch.zeros(1))
    assert float(module.position.detach().std()) == pytest.approx(0.02, rel=0.05)  # 4096 numbers: 1 % is one σ
    assert abs(float(module.position.detach().mean())) < 5 * 0.02 / 64
    last = [module.head.query] if head == "attention" else [module.head.linear2.weight, module.head.linear2.bias]
    assert not any(parameter.any() for parameter in last)
    others = {name for name, p in module.named_parameters() if p.dim() > 1 and p not in set(last)}
    assert all(module.get_parameter(name).any() for name in others)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_a_new_module_is_the_plain_mean_of_the_pair(ablation, prefix):
    module = InTI(6, 4, (2, 2), prefix=prefix, **ablation)
    x = torch.randn(2, 4, prefix + 4, 6, requires_grad=True)
    z, weights = module(x, return_weights=True)
    assert torch.equal(z, (x[:, 0::2] + x[:, 1::2]) / 2)
    assert torch.equal(weights, torch.full_like(weights, 0.5))
    # And there only the last Linear (the query) learns, as PAPER.md notes.
    (z * torch.randn_like(z)).sum().backward()
    moving = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert moving - {"position_scale"} == (
        {"head.query"} if ablation["head"] == "attention" else {"head.linear2.weight", "head.linear2.bias"}
    )
    assert "position_scale" in moving, "σ moves through the interpolated sum"


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 6, 7, 8), None, r"built for 4 frames, got 6; resize_position\(6\)"),
        ((2, 5, 7, 8), None, "frames must be even to form pairs, got 5"),
        ((2, 4, 7, 6), None, "must have dim 8, got 6"),
        ((2, 4, 8, 8), None, r"1 prefix tokens \+ the grid \(2, 3\) = 7 tokens a frame, got 8.*grid=\(H, W\)"),
        ((2, 4, 7, 8), (2, 2), r"the grid \(2, 2\) = 5 tokens a frame, got 7"),
        ((2, 4, 7, 8), (-2, -3), r"grid must be \(H, W\), both at least 1, got \(-2, -3\)"),
        ((2, 4, 1, 8), (0, 3), r"grid must be \(H, W\), both at least 1"),
        ((2, 4, 7, 8), (6,), r"grid must be \(H, W\)"),
        ((2, 4, 7, 8), (), r"grid must be \(H, W\)"),
        ((4, 7, 8), None, r"must be \[B, frames, prefix \+ H·W, dim\], got 3 dimensions: \(4, 7, 8\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("context", [LEVELS, ()], ids=str)
def test_forward_errors(context, shape, grid, message):
    module = InTI(8, 4, (2, 3), context=context)
    with pytest.raises(ValueError, match=message):
        module(torch.randn(shape), grid=grid)


@pytest.mark.parametrize("x", [torch.zeros(2, 4, 7, 8, dtype=torch.int64), np.zeros((2, 4, 7, 8)), None], ids=type)
def test_forward_takes_floating_tensors_only(x):
    with pytest.raises(TypeError, match="x must be a floating tensor, got"):
        InTI(8, 4, (2, 3))(x)


@pytest.mark.parametrize("ablation", [{}, {"fusion": "cat", "head": "attention"}, {"context": ("cube",)}], ids=str)
@pytest.mark.parametrize("grid", [(3, 2), (1, 6), (6, 1), (4, 5)])
def test_another_grid_is_as_if_built_for_it(grid, ablation):
    built, _ = module_case(dim=6, frames=4, grid=(2, 3), dtype=torch.float64, **ablation)
    other = InTI(6, 4, grid, **ablation).double()
    other.load_state_dict(built.state_dict())
    x = torch.randn(2, 4, 1 + math.prod(grid), 6, dtype=torch.float64)
    assert torch.equal(built(x, grid=grid), other(x))
    assert built.grid == (2, 3)
    if math.prod(grid) == 6:
        assert not torch.allclose(built(x, grid=grid), built(x)), "the grid given must be the one used"


def test_resize_position_interpolates_along_time():
    module, _ = module_case(dim=6, frames=4, grid=(2, 2), dtype=torch.float64)
    before = module.position.detach().clone()
    for frames in (6, 2, 16):
        module.position, module.frames = torch.nn.Parameter(before.clone()), 4
        assert module.resize_position(frames) is module
        assert module.frames == frames
        assert module.position.shape == (frames, 1, 6)
        assert module.position.is_contiguous()
        after = module.position.detach()
        assert torch.equal(after[0], before[0])
        assert torch.allclose(after[-1], before[-1], rtol=0, atol=1e-15)
        for channel in range(6):
            expected = np.interp(np.linspace(0, 3, frames), np.arange(4), before[:, 0, channel].numpy())
            np.testing.assert_allclose(after[:, 0, channel].numpy(), expected, rtol=0, atol=1e-14)
        assert module(torch.randn(1, frames, 5, 6, dtype=torch.float64)).shape == (1, frames // 2, 5, 6)
        with pytest.raises(ValueError, match=r"resize_position\(4\)"):
            module(torch.randn(1, 4, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trainable", [True, False])
def test_resize_position_keeps_values_dtype_and_requires_grad(dtype, trainable):
    module = InTI(6, 4, (2, 2)).to(dtype)
    module.position.requires_grad_(trainable)
    before = module.position.detach().clone()
    assert torch.equal(module.resize_position(4).position, before), "the same number of frames changes nothing"
    module.resize_position(8)
    assert isinstance(module.position, torch.nn.Parameter)
    assert module.position.dtype == dtype
    assert module.position.requires_grad == trainable
    assert "position" in dict(module.named_parameters())
    assert "position" in module.state_dict()


@pytest.mark.parametrize("frames", [0, 1, 5, -4])
def test_resize_position_errors_change_nothing(frames):
    module = InTI(6, 4, (2, 2))
    with pytest.raises(ValueError, match=f"frames must be even to form pairs, got {frames}"):
        module.resize_position(frames)
    assert module.frames == 4
    assert module.position.shape[0] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("ablation", ABLATIONS[-3:] + ABLATIONS[:1], ids=str)
def test_dtypes_agree_with_float64(dtype, ablation):
    module, x = module_case(dim=16, frames=4, grid=(2, 3), dtype=dtype, **ablation)
    z, weights = module(x.requires_grad_(), return_weights=True)
    assert z.dtype == weights.dtype == dtype
    z.float().square().mean().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in (x, *module.parameters()))
    exact, exact_weights = module.double()(x.double(), return_weights=True)
    eps = torch.finfo(dtype).eps
    # Some 20 roundings between x and the logits, whose error reaches z through x, of order 1 to 3.
    assert torch.allclose(z.double(), exact, rtol=0, atol=40 * eps)
    assert torch.allclose(weights.double(), exact_weights, rtol=0, atol=20 * eps)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("head", HEADS)
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(head, prefix):
    module, _ = module_case(dim=6, frames=6, grid=(2, 2), prefix=prefix, head=head)
    x = torch.empty(0, 6, prefix + 4, 6, requires_grad=True)
    z, weights = module(x, return_weights=True)
    assert z.shape == (0, 3, prefix + 4, 6)
    assert weights.shape == (0, 3, prefix + 4, 2)
    z.sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_any_strides_are_the_same_numbers(prefix):
    module, x = module_case(dim=6, frames=4, grid=(2, 3), batch=2, prefix=prefix, dtype=torch.float64)
    expected = module(x)
    layouts = {
        "channels first": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "time outermost": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": torch.stack((x, torch.full_like(x, math.nan)), dim=-1).flatten(3)[..., ::2],
    }
    for name, layout in layouts.items():
        assert not layout.is_contiguous()
        assert torch.allclose(module(layout), expected, rtol=0, atol=1e-13), name


def test_add_position_rounds_once():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 8, generator=generator)
    position = torch.randn(4, 8, generator=generator)
    assert reference.add_position(x, None) is x
    assert torch.equal(reference.add_position(x, position)[:, 1, 2], x[:, 1, 2] + position[1])
    low = x.bfloat16()
    assert torch.equal(reference.add_position(low, position), (low.float() + position[:, None]).bfloat16())
    double = reference.add_position(low, position.double())
    assert torch.equal(double, (low.double() + position.double()[:, None]).bfloat16())
    assert reference.add_position(x.double(), position.bfloat16()).dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_finite_logits_stay_finite(dtype):
    big = torch.finfo(dtype).max
    logits = torch.tensor([[big, -big], [-big, big], [big, big], [-big, -big], [big, 0.0], [0.0, 0.0]], dtype=dtype)
    logits = logits[None, None].requires_grad_()  # [1, 1, 6, 2]
    x = torch.randn(1, 2, 6, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    z, weights = reference.pair_interpolate(x, logits)
    expected = torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5], [0.5, 0.5], [1, 0], [0.5, 0.5]], dtype=dtype)
    assert torch.equal(weights[0, 0], expected)
    assert torch.equal(z[0, 0, 0], x[0, 0, 0])
    assert torch.equal(z[0, 0, 1], x[0, 1, 1])
    (gradient,) = torch.autograd.grad(z.float().sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan_and_stays_where_it_is(dtype):
    x = torch.ones(1, 2, 3, 4, dtype=dtype)
    logits = torch.zeros(1, 1, 3, 2, dtype=dtype)
    logits[0, 0, 1, 0] = math.nan
    z, weights = reference.pair_interpolate(x, logits)
    assert weights[0, 0, 1].isnan().all()
    assert z[0, 0, 1].isnan().all()
    assert torch.equal(z[0, 0, ::2], x[0, 0, ::2])
    x[0, 0, 2, 3] = math.nan
    z, _ = reference.pair_interpolate(x, torch.zeros_like(logits))
    assert z.isnan().nonzero().tolist() == [[0, 0, 2, 3]]


@pytest.mark.parametrize(
    ("ablation", "millions"),
    [
        ({"context": ()}, 116.3),
        ({"context": ("cube",)}, 117.6),
        ({"context": ("frame",)}, 119.3),
        ({"context": ("global",)}, 117.5),
        ({"context": ("cube", "frame")}, 119.3),
        ({"context": ("frame", "global")}, 119.3),
        ({}, 119.4),
        ({"fusion": "add"}, 118.2),
        ({"fusion": "cat"}, 121.7),
    ],
    ids=str,
)
def test_parameter_counts_are_those_the_equations_give(ablation, millions):
    """UniFormerV2-B's 114.55 M and the two modules of 16 → 8 → 4 frames at dim 768, to the rounding printed."""
    with torch.device("meta"):
        modules = [InTI(768, frames, (14, 14), **ablation) for frames in (16, 8)]
    count = 114.55e6 + sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert round(count / 1e6, 1) == millions
