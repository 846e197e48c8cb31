"""pair_interpolate: every backend against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import op_suite
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_subject import Subject, assert_same_bits
from op_suite import sizes

from inti_kernels import ops, reference
from inti_kernels.testing import assert_close_three_way, compare, three_way

SUBJECT = Subject("pair_interpolate", ("x", "logits", "position"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("check", op_suite.CHECKS, ids=lambda check: check.__name__)
def test_recipe(check: Callable[[Subject], None], kernels: str, threads: None) -> None:
    check(replace(SUBJECT, backend=kernels))


@given(
    batch=sizes(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)),
    frames=st.sampled_from((2, 4, 6)),
    grid=st.tuples(st.integers(1, 7), sizes(st.integers(1, 11), st.integers(1, 3), st.integers(1, 11))),
    dim=sizes(
        st.one_of(st.integers(1, 70), st.sampled_from((96, 127, 128, 682))),
        st.one_of(st.integers(16, 70), st.sampled_from((1, 127, 128, 129, 260, 682))),  # a block is 128 channels
        # 16-byte accesses of every width of row, and of none.
        st.one_of(st.integers(1, 70), st.sampled_from((96, 127, 128, 256, 264, 682, 1032))),
    ),
    prefix=st.sampled_from((0, 1, 5)),
    dtype=st.sampled_from(DTYPES),
    position=st.booleans(),
    layout=st.sampled_from((None, "sequence first", "an offset and a wider row", "a slice of the tokens")),
    seed=st.integers(0, 9),
)
def test_matches_reference(backend: str, **sizes: object) -> None:
    op_suite.compare_with_reference(SUBJECT, backend, **sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_at_the_real_width(backend: str, dtype: torch.dtype) -> None:
    grid = (4, 5) if backend == "triton" else (14, 14)
    op_suite.compare_with_reference(SUBJECT, backend, frames=4, grid=grid, dim=768, batch=1, dtype=dtype)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_and_position_of_another_dtype(backend: str, dtype: torch.dtype, logits_dtype: torch.dtype) -> None:
    inputs, kwargs = SUBJECT.case(dtype, dim=33)
    inputs["logits"], inputs["position"] = inputs["logits"].to(logits_dtype), inputs["position"].float()
    assert_close_three_way(three_way("pair_interpolate", inputs, kwargs, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float64_logits(backend: str, dtype: torch.dtype) -> None:
    """The weights keep float64's digits; the sums over channels are in float32, as x's dtype asks for."""
    inputs, _ = SUBJECT.case(dtype, dim=33)
    results = []
    for logits in (inputs["logits"].double().requires_grad_(), inputs["logits"].float().requires_grad_()):
        z, weights = ops.pair_interpolate(inputs["x"], logits, backend=backend)
        results.append((z, *torch.autograd.grad(z.float().square().sum(), logits)))
        assert weights.dtype == logits.dtype
        tolerance = 1e-12 if logits.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(weights, logits.softmax(-1), rtol=tolerance, atol=0)
    assert results[0][1].dtype == torch.float64
    if backend == "cpu":  # always float64 inside; the others take the logits' own precision
        assert_same_bits(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1].float(), results[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_finite_logit_gives_finite_weights(backend: str, dtype: torch.dtype) -> None:
    largest, x = torch.finfo(dtype).max, torch.randn(1, 2, 6, 20, dtype=dtype)
    pairs = [[largest, -largest], [-largest, largest], [largest, largest], [-largest, -largest], [80, -80], [0, 0]]
    logits = torch.tensor(pairs, dtype=dtype)[None, None].requires_grad_()
    z, weights = ops.pair_interpolate(x, logits, backend=backend)
    expected = torch.tensor([[1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5], [1, 0], [0.5, 0.5]], dtype=dtype)[None, None]
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-60)
    assert torch.equal(z[0, 0, 0], x[0, 0, 0])
    assert torch.equal(z[0, 0, 1], x[0, 1, 1])
    (grad,) = torch.autograd.grad(z.sum(), logits)
    assert bool(grad.isfinite().all())
    assert bool((grad[0, 0, :2] == 0).all())


def test_small_weights_keep_their_digits(backend: str) -> None:
    logits = torch.tensor([[[[-30.0, 30.0], [30.0, -30.0]]]])
    _, weights = ops.pair_interpolate(torch.randn(1, 2, 2, 4), logits, backend=backend)
    torch.testing.assert_close(weights.double(), logits.double().softmax(-1), rtol=1e-7, atol=0)


def test_infinite_logits_are_what_softmax_says(backend: str) -> None:
    """NaN for +inf, so that loss scaling sees an overflow of the network."""
    values = [float("inf"), -float("inf"), float("nan"), 1.0]
    logits = torch.tensor([[a, b] for a in values for b in values])[None, None]
    x = torch.randn(1, 2, 16, 5)
    for ours, theirs in zip(
        ops.pair_interpolate(x, logits, backend=backend), reference.pair_interpolate(x, logits), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dim", [5, 64], ids=["one by one", "16 bytes at a time"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_gradient_stays_infinite(backend: str, dtype: torch.dtype, dim: int) -> None:
    """Of the last token, which a kernel may take for tokens that aren't there: infinity times zero would be NaN."""
    inputs, _ = SUBJECT.case(dtype, batch=1, frames=2, grid=(1, 6), dim=dim, prefix=0)
    leaves = [inputs[name].requires_grad_() for name in ("x", "position")]
    grad_z = torch.ones(1, 1, 6, dim, dtype=dtype)
    grad_z[0, 0, -1, 1], grad_z[0, 0, -1, 3] = float("inf"), -float("inf")
    ours, theirs = (
        torch.autograd.grad(z, leaves, grad_z)
        for z in (ops.pair_interpolate(**inputs, backend=backend)[0], reference.pair_interpolate(**inputs)[0])
    )
    for a, b in zip(ours, theirs, strict=True):
        assert bool(b.isinf().any())
        assert not bool(a.isnan().any())
        assert torch.equal(a.isinf(), b.isinf())
        assert torch.equal(a.sign(), b.sign())


@pytest.mark.parametrize("where", ["x", "logits"])
def test_nan_stays_nan(backend: str, where: str) -> None:
    inputs, _ = SUBJECT.case(dim=37)
    inputs[where].view(-1)[7] = float("nan")
    k, t = ops.pair_interpolate(**inputs, backend=backend), reference.pair_interpolate(**inputs)
    for ours, theirs in zip(k, t, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    assert bool(k[0].isnan().any())


def test_half_of_each_when_the_logits_are_equal(backend: str) -> None:
    x = torch.randn(2, 4, 5, 19)
    z, weights = ops.pair_interpolate(x, torch.full((2, 2, 5, 2), 3.25), backend=backend)
    assert bool((weights == 0.5).all())
    rows = compare("z", z, (x[:, 0::2] + x[:, 1::2]) / 2, (x[:, 0::2].double() + x[:, 1::2].double()) / 2)
    assert_close_three_way([rows])


def test_gradients_through_the_weights_alone(backend: str) -> None:
    """A loss on the weights, as a regulariser has: z's gradient never comes."""
    inputs, _ = SUBJECT.case(torch.float64)
    logits = inputs["logits"].requires_grad_()
    grads = []
    for run in (ops.pair_interpolate, reference.pair_interpolate):
        kwargs = {"backend": backend} if run is ops.pair_interpolate else {}
        _, weights = run(inputs["x"], logits, inputs["position"], **kwargs)
        grads += torch.autograd.grad(weights.square().sum(), logits)
    torch.testing.assert_close(grads[0], grads[1])
