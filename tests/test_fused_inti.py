"""FusedInTI against InTI: every ablation, dtype and autocast, the choice of backend, and which kernels really ran."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from inti_kernels import FusedInTI, InTI, backends, use_backend
from inti_kernels.testing import assert_close_three_way, module_case, three_way_module

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = [subset for n in range(4) for subset in itertools.combinations(("cube", "frame", "global"), n)]
HEADS = ("softmax", "sigmoid", "attention")
ABLATIONS = [
    pytest.param(
        {"context": context, "fusion": fusion, "head": head}, id=f"{'+'.join(context) or 'none'}-{fusion}-{head}"
    )
    for context, fusion, head in itertools.product(CONTEXTS, ("separate", "add", "cat"), HEADS)
    if not (head == "attention" and fusion == "add" and context)
]
# One of each kind, for what is expensive.
SOME = [
    pytest.param({}, id="default"),
    pytest.param({"fusion": "add", "head": "sigmoid", "context": ("cube", "global")}, id="add-sigmoid"),
    pytest.param({"fusion": "cat", "head": "attention"}, id="cat-attention"),
    pytest.param({"context": ()}, id="none"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def executed():
    """A fresh count of what ran."""
    backends.executed.clear()
    return backends.executed


def kernels(module: InTI, backward: bool = True) -> set[tuple[str, str]]:
    """The kernels that a module of this ablation must run."""
    return {
        (op + direction, "cpu") for op in ops_of(module) for direction in (("", "_backward") if backward else ("",))
    }


def ops_of(module: InTI) -> list[str]:
    """What this package computes of an ablation; the whole of it is one op, a chain of others."""
    ops = ["depthwise_conv3d"] * ("cube" in module.context) + ["token_features"] * (module.head_type != "attention")
    one_level = len(module.context) <= (module.fusion == "cat")
    if module.head_type == "softmax":
        return [*ops, "interpolation_head", *["inti"] * (module.fusion == "separate" or one_level)]
    return ops + ["pair_interpolate"] * (module.head_type == "attention")


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_in_float64(ablation, prefix, executed):
    """Held to the fixed tolerance: nothing but the order of summation may differ."""
    inti, x = module_case(dim=6, frames=4, grid=(2, 3), batch=2, prefix=prefix, dtype=torch.float64, **ablation)
    fused = FusedInTI.from_reference(inti, backend="cpu")
    assert_close_three_way(three_way_module(fused, x, draws=1), show=False)
    assert set(executed) == kernels(inti)


@pytest.mark.parametrize("ablation", SOME)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, ablation, executed):
    inti, x = module_case(dim=10, frames=4, grid=(2, 3), dtype=dtype, **ablation)
    rows = three_way_module(FusedInTI.from_reference(inti, backend="cpu"), x)
    assert_close_three_way(rows)
    assert len(rows) == 3 + len(list(inti.parameters()))
    assert set(executed) == kernels(inti)


@pytest.mark.parametrize("ablation", SOME)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast(dtype, ablation, executed):
    inti, x = module_case(dim=10, frames=4, grid=(2, 3), **ablation)
    assert_close_three_way(three_way_module(FusedInTI.from_reference(inti, backend="cpu"), x, autocast=dtype))
    assert set(executed) == kernels(inti)


@pytest.mark.parametrize("ablation", SOME)
@pytest.mark.parametrize("autocast", LOW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_autocast_gives_the_dtypes_that_inti_has(dtype, autocast, ablation):
    """Of outputs and x's gradient; also for float64, which autocast leaves alone, and for tokens in bfloat16."""
    inti, x = module_case(dim=6, frames=4, grid=(2, 3), **ablation)
    inti.to(torch.float64 if dtype == torch.float64 else torch.float32)
    results = []
    for module in (inti, FusedInTI.from_reference(inti, backend="cpu")):
        value = x.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=autocast):
            outputs = module(value, return_weights=True)
        gradient = torch.autograd.grad(sum(out.double().square().sum() for out in outputs), value)
        results.append((*outputs, *gradient))
    for plain, kernel in zip(*results, strict=True):
        assert kernel.dtype == plain.dtype
        eps = 1e-12 if dtype == torch.float64 else torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(kernel, plain, rtol=0, atol=16 * eps * float(plain.detach().abs().max()))


@pytest.mark.parametrize(
    "sizes",
    [
        {"frames": 2, "grid": (1, 1), "prefix": 0},
        {"frames": 2, "grid": (1, 1), "batch": 1},
        {"frames": 6, "grid": (1, 5), "prefix": 5},
        {"frames": 4, "grid": (7, 1)},
        {"frames": 10, "grid": (3, 2), "prefix": 0, "batch": 3},
        {"frames": 4, "grid": (2, 2), "dim": 2},
        {"frames": 2, "grid": (2, 2), "dim": 682, "hidden": 4},
        {"frames": 4, "grid": (5, 7), "dim": 62, "batch": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("head", ["softmax", "attention"])
def test_odd_sizes(sizes, head):
    sizes = {"dim": 6, "batch": 2, **sizes}
    inti, x = module_case(dtype=torch.float64, head=head, **sizes)
    fused = FusedInTI.from_reference(inti, backend="cpu")
    with torch.no_grad():
        for actual, expected in zip(fused(x, return_weights=True), inti(x, return_weights=True), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if sizes["dim"] > 2:  # the LayerNorm of two channels has no gradient to speak of
        assert_close_three_way(three_way_module(fused, x, draws=1))


@pytest.mark.parametrize("ablation", SOME)
@pytest.mark.parametrize("grid", [(3, 2), (1, 6), (4, 5)])
def test_another_grid(grid, ablation, executed):
    inti, _ = module_case(dim=6, frames=4, grid=(2, 3), dtype=torch.float64, **ablation)
    x = torch.randn(2, 4, 1 + math.prod(grid), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused = FusedInTI.from_reference(inti, backend="cpu")
    assert_close_three_way(three_way_module(fused, x, draws=1, grid=grid))
    assert set(executed) == kernels(inti)
    with pytest.raises(ValueError, match=r"the grid \(9, 9\)"):
        fused(x, grid=(9, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_backend_reference_gives_the_same_bits(ablation, dtype, executed):
    inti, x = module_case(dim=6, frames=4, grid=(2, 3), dtype=dtype, **ablation)
    results = []
    for module in (inti, FusedInTI.from_reference(inti, backend="reference")):
        value = x.detach().requires_grad_()
        outputs = module(value, return_weights=True)
        leaves = [value, *module.parameters()]
        results.append([*outputs, *torch.autograd.grad(sum(out.sum() for out in outputs), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert set(executed) == reference_of(inti)


def reference_of(module: InTI) -> set[tuple[str, str]]:
    """What is counted where the reference runs."""
    ops = {"depthwise_conv3d"} if "cube" in module.context else set()
    ops |= {"token_features"} if module.head_type != "attention" else set()
    ops |= {"pair_interpolate"} if module.head_type != "sigmoid" else set()
    return {(op, "reference") for op in ops}


@pytest.mark.parametrize("ablation", SOME)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_backend_reference_gives_the_same_bits_under_autocast(dtype, ablation):
    inti, x = module_case(dim=6, frames=4, grid=(2, 3), **ablation)
    with torch.autocast("cpu", dtype=dtype):
        expected = inti(x, return_weights=True)
        actual = FusedInTI.from_reference(inti, backend="reference")(x, return_weights=True)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_the_constructor_is_intis_with_a_backend():
    options = {"prefix": 2, "context": ("cube", "frame"), "fusion": "cat", "head": "sigmoid", "hidden": 5}
    torch.manual_seed(3)
    inti = InTI(6, 4, (2, 3), **options)
    torch.manual_seed(3)
    fused = FusedInTI(6, 4, (2, 3), backend="cpu", **options)
    assert isinstance(fused, InTI)
    assert list(fused.state_dict()) == list(inti.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), inti.parameters(), strict=True))
    for name in ("dim", "frames", "grid", "prefix", "context", "fusion", "head_type", "hidden"):
        assert getattr(fused, name) == getattr(inti, name)
    assert FusedInTI(6, 4, (2, 3)).backend is None
    with pytest.raises(ValueError, match="frames must be even"):
        FusedInTI(6, 5, (2, 3))
    assert fused.resize_position(8).position.shape == (8, 1, 6)
    assert fused(torch.randn(1, 8, 8, 6)).shape == (1, 4, 8, 6)


@pytest.mark.parametrize("make", [FusedInTI, lambda *a, backend: FusedInTI.from_reference(InTI(*a), backend=backend)])
def test_an_unknown_backend_is_an_error_when_built(make):
    with pytest.raises(ValueError, match=r"backend must be one of \('auto', 'reference', 'cpu'.*got 'tpu'"):
        make(6, 4, (2, 3), backend="tpu")


def test_extra_repr_lists_what_is_plain_pytorch():
    text = repr(FusedInTI(6, 4, (2, 3), backend="cpu", head="sigmoid", context=("cube", "frame")))
    assert "backend='cpu'" in text
    assert "plain PyTorch: temporal position, frame level, head, sigmoid interpolation" in text
    assert "recompute" not in text
    assert "recompute=True, plain PyTorch: frame level" in repr(
        FusedInTI(6, 4, (2, 3), context=("cube", "frame"), recompute=True)
    )
    attention = FusedInTI(6, 4, (2, 3), head="attention", context=("global",))
    assert attention.plain_parts() == ["temporal position", "token level", "global level", "head"]
    fused = FusedInTI(6, 4, (2, 3))
    assert fused.plain_parts() == ["frame level", "global level"]
    fused.cube.register_forward_hook(lambda *_: None)
    assert fused.plain_parts() == ["temporal position", "cube level", "frame level", "global level"]
    with use_backend("reference"):
        plain = ["temporal position", "token level", "cube level", "frame level", "global level", "head"]
        assert FusedInTI(6, 4, (2, 3)).plain_parts() == plain
    assert "plain PyTorch: nothing" in repr(FusedInTI(6, 4, (2, 3), context=()))


@pytest.mark.parametrize(("own", "chosen", "runs"), [
    (None, "cpu", "cpu"), (None, "reference", "reference"), ("cpu", "reference", "cpu"),
    ("reference", "cpu", "reference"), ("auto", "reference", "cpu"), (None, "auto", "cpu"),
])  # fmt: skip
def test_the_modules_own_backend_comes_before_use_backend(own, chosen, runs, executed):
    inti, x = module_case(dim=6, frames=4, grid=(2, 3))
    fused = FusedInTI.from_reference(inti, backend=own)
    before = backends.active_backend()
    with use_backend(chosen):
        fused(x)
    expected = reference_of(inti) if runs == "reference" else kernels(inti, backward=False)
    assert set(executed) == expected
    assert backends.active_backend() == before


def test_the_environment_chooses_the_backend():
    code = """
import torch, inti_kernels
from inti_kernels.backends import executed
inti_kernels.FusedInTI(6, 4, (2, 3))(torch.randn(1, 4, 7, 6))
print(sorted(executed))
"""
    environment = {**os.environ, "INTI_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    ran = eval(done.stdout)
    assert ran == sorted(reference_of(InTI(6, 4, (2, 3)))), done.stderr


def test_a_wrong_name_in_the_environment_is_an_error_when_used(monkeypatch):
    monkeypatch.setattr(backends, "_active", "tpu")
    with pytest.raises(ValueError, match="INTI_BACKEND must be one of .*got 'tpu'"):
        FusedInTI(6, 4, (2, 3))
    FusedInTI(6, 4, (2, 3), backend="cpu")(torch.randn(1, 4, 7, 6))


@pytest.mark.parametrize("ablation", SOME)
def test_shapes_can_be_inferred_on_the_meta_device(ablation):
    with torch.device("meta"):
        fused, x = FusedInTI(6, 4, (2, 3), **ablation), torch.empty(1, 4, 7, 6)
    z, weights = fused(x, return_weights=True)
    assert z.device.type == "meta"
    assert (z.shape, weights.shape) == ((1, 2, 7, 6), (1, 2, 7, 2))


def test_an_explicit_backend_that_cannot_run_says_why(monkeypatch):
    """It never falls back; `auto` does, and says so once."""
    monkeypatch.setattr("inti_kernels.backends.native.why_not_native", lambda: ["it was never built."])
    monkeypatch.setattr(backends, "_noted", set())
    monkeypatch.setattr(backends, "_usable", {})
    inti, x = module_case(dim=6, frames=4, grid=(2, 3))
    with pytest.raises(RuntimeError, match="inti can't run on .*cpu.*it was never built"):
        FusedInTI.from_reference(inti, backend="cpu")(x)
    fused = FusedInTI.from_reference(inti, backend="auto")
    with pytest.warns(UserWarning, match="runs as plain PyTorch.*it was never built"):
        z = fused(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fused(x), z)
    assert torch.equal(z, inti(x))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("ablation", SOME)
def test_inference(guard, ablation, executed):
    inti, x = module_case(dim=6, frames=4, grid=(2, 3), dtype=torch.float64, **ablation)
    fused = FusedInTI.from_reference(inti, backend="cpu")
    expected = fused(x)
    with guard():
        z, weights = fused(x, return_weights=True)
    assert not z.requires_grad
    assert not weights.requires_grad
    assert torch.equal(z, expected)
    assert set(executed) == kernels(inti, backward=False)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch(dtype, head):
    inti, _ = module_case(dim=6, frames=4, grid=(2, 3), dtype=dtype, head=head)
    fused = FusedInTI.from_reference(inti, backend="cpu")
    x = torch.empty(0, 4, 7, 6, dtype=dtype, requires_grad=True)
    z, weights = fused(x, return_weights=True)
    assert z.shape == (0, 2, 7, 6)
    assert weights.shape == (0, 2, 7, 2)
    z.sum().backward()
    assert x.grad.shape == x.shape
    assert fused.cube.weight.grad is not None
    assert not any(p.grad.any() for p in fused.parameters() if p.grad is not None)


@pytest.mark.parametrize("ablation", SOME)
def test_any_strides_are_the_same_numbers(ablation):
    inti, x = module_case(dim=6, frames=4, grid=(2, 3), batch=2, dtype=torch.float64, **ablation)
    fused = FusedInTI.from_reference(inti, backend="cpu")
    expected = fused(x)
    layouts = {
        "channels first": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "time outermost": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": torch.stack((x, torch.full_like(x, math.nan)), dim=-1).flatten(3)[..., ::2],
        "inside a larger tensor": torch.nn.functional.pad(x, (3, 2, 1, 4), value=math.nan)[:, :, 1:-4, 3:-2],
    }
    for name, layout in layouts.items():
        assert not layout.is_contiguous()
        assert torch.allclose(fused(layout), expected, rtol=0, atol=1e-13), name


def test_only_one_derivative_and_the_reference_for_more():
    inti, x = module_case(dim=6, frames=4, grid=(2, 3), dtype=torch.float64)

    def penalty(module):
        value = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(module(value).square().sum(), value, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), value)[0]

    with pytest.raises(RuntimeError, match="inti can be differentiated once.*backend='reference'"):
        penalty(FusedInTI.from_reference(inti, backend="cpu"))
    assert torch.equal(penalty(FusedInTI.from_reference(inti, backend="reference")), penalty(inti))
