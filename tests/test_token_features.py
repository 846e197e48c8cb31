"""token_features: every backend against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import op_suite
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_subject import INTERPRETED, Subject, assert_same_bits, gradients
from op_suite import compiled_only, plain_only

from inti_kernels import backends, ops, reference
from inti_kernels.testing import assert_close_three_way, three_way

ARGUMENTS = ("x", "norm_weight", "norm_bias", "weight", "bias", "position")
SUBJECT = Subject("token_features", ARGUMENTS, more=(1e-5,), kept=2, least_dim=4)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A GEMM's tile is 64 or 128 rows, which are tokens of one frame or of all.
GRIDS = st.one_of(st.tuples(st.integers(1, 7), st.integers(1, 7)), st.sampled_from(((8, 8), (9, 8), (13, 10))))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("check", op_suite.PRODUCT_CHECKS, ids=lambda check: check.__name__)
def test_recipe(check: Callable[[Subject], None], kernels: str) -> None:
    check(replace(SUBJECT, backend=kernels))


@given(
    batch=op_suite.sizes(st.integers(1, 2), st.just(1), st.integers(1, 2)),
    frames=op_suite.sizes(st.sampled_from((2, 4)), st.just(2), st.sampled_from((2, 4))),
    grid=op_suite.sizes(GRIDS, st.tuples(st.integers(1, 4), st.integers(1, 5)), GRIDS),
    dim=st.one_of(st.integers(8, 70), st.sampled_from((64, 96, 127, 128, 129, 136, 256, 264))),
    prefix=st.sampled_from((0, 1, 5)),
    dtype=st.sampled_from(DTYPES),
    position=st.booleans(),
    layout=st.sampled_from((None, "sequence first", "an offset and a wider row", "a slice of the tokens")),
    seed=st.integers(0, 9),
)
def test_kernels_match_reference(backend: str, **sizes: object) -> None:
    op_suite.compare_with_reference(SUBJECT, backend, draws=2 if INTERPRETED else None, **sizes)


@compiled_only
@pytest.mark.parametrize("width", [1, 7, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_around_a_tile(backend: str, dtype: torch.dtype, width: int) -> None:
    """Of the Linear's output, at dims that end in a tile of the inner axis and that don't."""
    for dim in (32, 37):
        inputs, kwargs = SUBJECT.case(dtype, dim=dim, grid=(5, 7))
        inputs |= {"weight": (torch.randn(width, dim) * dim**-0.5).to(dtype), "bias": torch.randn(width).to(dtype)}
        draws = 4 if width > 8 else 16
        assert_close_three_way(three_way("token_features", inputs, kwargs, backend=backend, draws=draws))


@pytest.mark.parametrize("dtype", op_suite.sizes(DTYPES, DTYPES[:1], DTYPES), ids=str)
def test_a_large_common_offset_of_a_token(backend: str, dtype: torch.dtype) -> None:
    """A variance by E[x²] - E[x]² would lose its digits; the activations of a ViT have such channels."""
    inputs, kwargs = SUBJECT.case(dtype, dim=40)
    inputs["x"] += 50
    assert_close_three_way(three_way("token_features", inputs, kwargs, backend=backend))


@pytest.mark.parametrize("where", ["x", "weight"])
def test_nan_stays_nan(backend: str, where: str) -> None:
    inputs, kwargs = SUBJECT.case(dim=40)
    inputs[where].view(-1)[45] = float("nan")
    actual = ops.token_features(**inputs, **kwargs, backend=backend)
    assert torch.equal(actual.isnan(), reference.token_features(**inputs, **kwargs).isnan())
    assert bool(actual.isnan().any())


def test_the_backward_works_without_what_the_forward_keeps(kernels: str) -> None:
    """As a graph exported for inference, or a transform that wants_gradient doesn't see, leaves it."""
    case = SUBJECT.case()
    args = list(replace(SUBJECT, backend=kernels).backward_args(case, torch.ones_like, [True] * 6, None))
    expected = torch.ops.inti_kernels.token_features_backward(*args)
    args[-5:-3] = torch.empty(0), torch.empty(0)
    assert_same_bits(torch.ops.inti_kernels.token_features_backward(*args), expected)


def test_inference_keeps_nothing(kernels: str) -> None:
    inputs, _ = SUBJECT.case()
    args = (*(inputs[name] for name in ARGUMENTS), 1e-5)
    full = torch.ops.inti_kernels.token_features(*args, True, kernels)
    lean = torch.ops.inti_kernels.token_features(*args, False, kernels)
    assert_same_bits(lean[0], full[0])
    assert [out.numel() for out in lean[1:]] == [0, 0]
    assert [tuple(out.shape) for out in full[1:]] == [(2, 4, 7, 2), (2, 4, 7, 2)]


def test_inside_the_op_the_reference_has_gradients_too() -> None:
    """What an exported graph that says "auto" runs where no kernel can."""
    case = SUBJECT.case()
    needs = [True] * 6
    plain = replace(SUBJECT, backend="reference")
    leaves, run = plain.leaves()
    for value, leaf in zip(case.inputs.values(), leaves, strict=True):
        value.copy_(leaf.detach())
    fresh = torch.ops.inti_kernels.token_features_backward(*plain.backward_args(case, torch.ones_like, needs, None))
    expected = torch.autograd.grad(run(*leaves).sum(), leaves)
    torch.testing.assert_close(tuple(fresh), expected)
    buffer = torch.ones_like(case.inputs["x"])
    plain.backward(case, needs, buffer, seed=1)
    torch.testing.assert_close(buffer, plain.backward(case, needs, seed=1)[0] + 1)


@compiled_only
@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype, prefix: int, position: bool, backend: str) -> None:
    case = SUBJECT.case(dtype, dim=10, prefix=prefix, position=position)
    assert_close_three_way(three_way("token_features", *case, backend=backend))


@plain_only
@pytest.mark.parametrize("backend", [None, "auto"])
def test_auto_takes_the_kernels(backend: str | None) -> None:
    inputs, kwargs = SUBJECT.case()
    before = backends.executed.copy()
    actual = ops.token_features(**inputs, **kwargs, backend=backend)
    assert backends.executed - before == {("token_features", "cpu"): 1}
    assert_same_bits(actual, ops.token_features(**inputs, **kwargs, backend="cpu"))


def test_eps_any_width_and_a_position_of_another_dtype(kernels: str) -> None:
    inputs, _ = SUBJECT.case()
    inputs |= {"weight": torch.randn(7, 5), "bias": torch.randn(7), "position": inputs["position"].bfloat16()}
    actual = ops.token_features(**inputs, eps=0.5, backend=kernels)
    assert actual.shape == (2, 2, 7, 14)
    torch.testing.assert_close(actual, reference.token_features(**inputs, eps=0.5))
    assert not torch.allclose(actual, ops.token_features(**inputs, backend=kernels))
    assert_close_three_way(
        three_way("token_features", inputs, {"eps": 0.5}, backend=kernels, draws=4 if INTERPRETED else None)
    )


@plain_only
def test_the_reference_has_derivatives_of_any_order() -> None:
    leaves, run = SUBJECT.leaves(torch.float64, batch=1, frames=2, grid=(1, 2), dim=4)
    assert torch.autograd.gradgradcheck(lambda *values: run(*values, backend="reference"), leaves)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(x_dtype: torch.dtype, kernels: str) -> None:
    """The Linear runs in autocast's dtype, as the reference's does; the parameters stay float32."""
    leaves, run = replace(SUBJECT, backend=kernels).leaves()
    leaves[0] = leaves[0].detach().to(x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual, grads = run(*leaves), gradients(run, leaves)
        expected = reference.token_features(*leaves)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    exact = gradients(run, [leaf.detach().float().requires_grad_() for leaf in leaves])
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=0.05 * float(b.abs().max()))


@plain_only
def test_bad_input() -> None:
    inputs, kwargs = SUBJECT.case()

    def fails(kind: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            ops.token_features(**{**inputs, **kwargs, **changes})

    x, weight = inputs["x"], inputs["weight"]
    fails(ValueError, "frames must be even to form pairs, got 3", x=x[:, :3])
    fails(ValueError, r"tokens \[B, T, N, C\], got 3 dimensions", x=x[0])
    fails(ValueError, "at least one frame, token and channel", x=x[:, :, :0])
    fails(TypeError, "x must be a tensor, got NoneType", x=None)
    fails(TypeError, "x must be floating", x=x.long())
    fails(TypeError, "dense tensor", x=x.to_sparse())
    fails(ValueError, "backend must be one of", backend="fastest")
    for name in ("norm_weight", "norm_bias", "weight", "bias"):
        fails(TypeError, f"{name} must be a tensor, got NoneType", **{name: None})
        fails(ValueError, f"^{name} must", **{name: torch.tensor(1.0)})
    for name in ("norm_weight", "norm_bias", "weight", "bias", "position"):
        fails(TypeError, f"{name} must be floating", **{name: inputs[name].int()})
        fails(ValueError, f"{name} must be on x's device, cpu, got meta", **{name: inputs[name].to("meta")})
    for name in ("norm_weight", "norm_bias", "bias", "position"):
        fails(ValueError, rf"^{name} must be \[", **{name: inputs[name][:-1]})
    fails(ValueError, r"^weight must be \[D, C\] = \(2, 5\)", weight=weight[:, :-1])
    fails(ValueError, r"^bias must be \[D\] = \(1,\)", weight=weight[:-1])
    for name in ("norm_weight", "norm_bias", "weight", "bias"):
        said = f"{name} must have the dtype of x, torch.float32, got torch.bfloat16"
        fails(TypeError, said, **{name: inputs[name].bfloat16()})
    fails(TypeError, "must have the dtype of x, torch.float64, got torch.float32", x=x.double())
    with pytest.raises(RuntimeError, match="this is float8_e5m2.*reference: can run here"):
        ops.token_features(**{name: value.to(torch.float8_e5m2) for name, value in inputs.items()}, backend="cpu")


def test_the_raw_op_refuses_half_a_pair(kernels: str) -> None:
    """An exported graph calls the op past the user's function and its checks."""
    case = SUBJECT.case()
    case.inputs["x"] = case.inputs["x"][:, :-1]
    if case.inputs["position"] is not None:
        case.inputs["position"] = case.inputs["position"][:-1]
    with pytest.raises((ValueError, RuntimeError), match="expected pairs of frames"):
        torch.ops.inti_kernels.token_features(*SUBJECT.custom_op_args(case, kernels))
