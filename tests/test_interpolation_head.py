"""interpolation_head: every backend against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import op_suite
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_subject import INTERPRETED, Subject, assert_same_bits, gradients, layouts
from op_suite import compiled_only, plain_only

from inti_kernels import backends, ops, reference
from inti_kernels.testing import assert_close_three_way, three_way

NETWORK = ("weight1", "bias1", "weight2", "bias2")
ARGUMENTS = ("features", "cube", "frame_context", "x", *NETWORK, "position")
SUBJECT = Subject("interpolation_head", ARGUMENTS, kept=2)
CONTEXTS = ((), ("cube",), ("frame",), ("cube", "frame"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A GEMM's tile is 64 or 128 rows, which are token pairs of one frame or of all.
GRIDS = st.one_of(st.tuples(st.integers(1, 7), st.integers(1, 7)), st.sampled_from(((8, 8), (9, 8), (13, 10))))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("check", op_suite.PRODUCT_CHECKS, ids=lambda check: check.__name__)
def test_recipe(check: Callable[[Subject], None], kernels: str) -> None:
    check(replace(SUBJECT, backend=kernels))


@given(
    batch=op_suite.sizes(st.integers(1, 2), st.just(1), st.integers(1, 2)),
    frames=op_suite.sizes(st.sampled_from((2, 4)), st.just(2), st.sampled_from((2, 4))),
    grid=op_suite.sizes(GRIDS, st.tuples(st.integers(1, 4), st.integers(1, 5)), GRIDS),
    # That many draws of six numbers are enough for the gradient of a frame's context too.
    dim=st.one_of(st.integers(6, 70), st.sampled_from((64, 96, 127, 128, 129, 136))),
    hidden=st.one_of(st.integers(1, 70), st.sampled_from((63, 64, 65, 127, 128, 129, 136, 200))),
    context=st.sampled_from(CONTEXTS),
    prefix=st.sampled_from((0, 1, 5)),
    dtype=st.sampled_from(DTYPES),
    position=st.booleans(),
    layout=st.sampled_from((None, "sequence first", "an offset and a wider row", "a slice of the tokens")),
    seed=st.integers(0, 9),
)
def test_kernels_match_reference(backend: str, **sizes: object) -> None:
    # Enough for the two numbers of bias2; the default takes every example 32 times.
    op_suite.compare_with_reference(SUBJECT, backend, draws=6 if INTERPRETED else 24, **sizes)


@compiled_only
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles_each_way(backend: str, dtype: torch.dtype, context: tuple[str, ...]) -> None:
    """Features of another width than the context, so that the seam between the two lies inside a tile."""
    inputs, _ = SUBJECT.case(dtype, dim=40, hidden=264, grid=(9, 8), context=context)
    width, h = 24, 264
    inner = width + (40 if context else 0)
    inputs["features"] = inputs["features"][..., :width].contiguous()
    inputs["weight1"] = (torch.randn(h, inner) * inner**-0.5).to(dtype)
    # The second bias's gradient is one number and its opposite: of two draws luck decides.
    assert_close_three_way(three_way(SUBJECT.name, inputs, {}, backend=backend, draws=16))


@pytest.mark.parametrize("where", ["features", "frame_context", "x"])
def test_nan_stays_nan(backend: str, where: str) -> None:
    inputs, kwargs = SUBJECT.case(dim=40)
    inputs[where].view(-1)[45] = float("nan")
    actual = ops.interpolation_head(**inputs, **kwargs, backend=backend)
    expected = reference.interpolation_head(**inputs, **kwargs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    assert bool(actual[0].isnan().any())


@compiled_only
def test_float64_in_one_of_x_and_the_network(backend: str) -> None:
    for wide in ("x", "network"):
        inputs, kwargs = SUBJECT.case()
        for name in ("x",) if wide == "x" else ("features", "cube", "frame_context", *NETWORK):
            inputs[name] = inputs[name].double()
        assert_close_three_way(three_way(SUBJECT.name, inputs, kwargs, backend=backend))


def test_the_backward_works_without_what_the_forward_keeps(kernels: str) -> None:
    """As a graph exported for inference, or a transform that wants_gradient doesn't see, leaves it."""
    subject = replace(SUBJECT, backend=kernels)
    args = list(subject.backward_args(SUBJECT.case(), torch.ones_like, [True] * 9, None))
    expected = torch.ops.inti_kernels.interpolation_head_backward(*args)
    args[-5:-3] = torch.empty(0), torch.empty(0)
    assert_same_bits(torch.ops.inti_kernels.interpolation_head_backward(*args), expected)


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_inference_keeps_no_hidden_layer(kernels: str, context: tuple[str, ...]) -> None:
    inputs, _ = SUBJECT.case(context=context, hidden=9)
    args = [inputs[name] for name in ARGUMENTS]
    full = torch.ops.inti_kernels.interpolation_head(*args, True, kernels)
    lean = torch.ops.inti_kernels.interpolation_head(*args, False, kernels)
    assert_same_bits(lean[:3], full[:3])
    assert [tuple(out.shape) for out in (*full[2:], lean[3])] == [(2, 2, 7), (2, 2, 7, 9), (0,)]


def test_inside_the_op_the_reference_has_gradients_too() -> None:
    """What an exported graph that says "auto" runs where no kernel can."""
    plain, needs = replace(SUBJECT, backend="reference"), [True] * 9
    case = plain.case()
    leaves = [value.clone().requires_grad_() for value in case.inputs.values()]
    outputs = ops.interpolation_head(*leaves, backend="reference")
    fresh = torch.ops.inti_kernels.interpolation_head_backward(*plain.backward_args(case, torch.ones_like, needs, None))
    expected = torch.autograd.grad([out.sum() for out in outputs], leaves)
    torch.testing.assert_close(tuple(fresh), expected)
    buffer = torch.ones_like(case.inputs["x"])
    plain.backward(case, needs, buffer, seed=1)
    torch.testing.assert_close(buffer, plain.backward(case, needs, seed=1)[3] + 1)


@compiled_only
@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(
    dtype: torch.dtype, prefix: int, context: tuple[str, ...], position: bool, backend: str
) -> None:
    case = SUBJECT.case(dtype, dim=6, hidden=9, prefix=prefix, context=context, position=position)
    assert_close_three_way(three_way("interpolation_head", *case, backend=backend))


@compiled_only
def test_any_strides(backend: str) -> None:
    inputs, kwargs = SUBJECT.case()
    for name in ("x", "features", "cube"):
        for layout, value in layouts(inputs[name]).items():
            if (name, layout) != ("x", "channels not contiguous"):  # for which pair_interpolate has a note
                assert_close_three_way(three_way(SUBJECT.name, {**inputs, name: value}, kwargs, backend=backend))


@plain_only
@pytest.mark.parametrize("backend", [None, "auto"])
def test_auto_takes_the_kernels(backend: str | None) -> None:
    inputs, kwargs = SUBJECT.case()
    before = backends.executed.copy()
    actual = ops.interpolation_head(**inputs, **kwargs, backend=backend)
    assert backends.executed - before == {("interpolation_head", "cpu"): 1}
    assert_same_bits(actual, ops.interpolation_head(**inputs, **kwargs, backend="cpu"))


def test_x_and_position_of_other_dtypes_than_the_network(kernels: str) -> None:
    inputs, _ = SUBJECT.case()
    inputs |= {"x": inputs["x"].bfloat16(), "position": inputs["position"].half()}
    z, weights = ops.interpolation_head(**inputs, backend=kernels)
    assert (z.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    draws = 6 if INTERPRETED else None
    assert_close_three_way(three_way("interpolation_head", inputs, {}, backend=kernels, draws=draws))


@plain_only
def test_the_reference_has_derivatives_of_any_order() -> None:
    leaves, run = SUBJECT.leaves(torch.float64, batch=1, frames=2, grid=(1, 1), dim=2)
    assert torch.autograd.gradgradcheck(lambda *values: run(*values, backend="reference"), leaves)


@pytest.mark.parametrize("context", [(), ("frame",), ("cube", "frame")], ids=str)
def test_compile_in_training_has_no_graph_break(context: tuple[str, ...], kernels: str) -> None:
    inputs, kwargs = SUBJECT.case(context=context)
    leaves = {name: value.requires_grad_() for name, value in inputs.items() if value is not None}

    def run(*values: torch.Tensor) -> Any:
        return ops.interpolation_head(**{**inputs, **dict(zip(leaves, values, strict=True))}, **kwargs, backend=kernels)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, [*leaves.values()]), gradients(run, [*leaves.values()]))


def test_autocast(kernels: str) -> None:
    """The Linears run in autocast's dtype, which the weights then have; z keeps x's."""
    leaves, run = replace(SUBJECT, backend=kernels).leaves()
    exact = gradients(run, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        (z, weights), grads = run(*leaves), gradients(run, leaves)
        expected = run(*leaves, backend="reference")
    assert (z.dtype, weights.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close((z, weights), expected, rtol=0.02, atol=0.02)
    for a, b, leaf in zip(grads, exact, leaves, strict=True):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 * float(b.abs().max()))


@pytest.mark.parametrize("backend", [op_suite.UNDER_TEST, "reference"])
def test_no_clips(backend: str) -> None:
    inputs, kwargs = SUBJECT.case()
    clips = {n: inputs[n][:0].requires_grad_() for n in ("features", "cube", "frame_context", "x")}
    z, weights = ops.interpolation_head(**{**inputs, **clips}, **kwargs, backend=backend)
    assert z.shape == (0, 2, 7, 5)
    assert weights.shape == (0, 2, 7, 2)
    gradients = torch.autograd.grad(z.sum() + weights.sum(), [*clips.values()])
    assert [gradient.shape for gradient in gradients] == [clip.shape for clip in clips.values()]


@plain_only
def test_bad_input() -> None:
    inputs, kwargs = SUBJECT.case()

    def fails(kind: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            ops.interpolation_head(**{**inputs, **kwargs, **changes})

    x = inputs["x"]
    fails(ValueError, "frames must be even to form pairs, got 3", x=x[:, :3])
    fails(ValueError, r"tokens \[B, T, N, C\], got 3 dimensions", x=x[0])
    fails(ValueError, "at least one frame, token and channel", x=x[:, :, :0])
    fails(ValueError, "backend must be one of", backend="fastest")
    for name, value in inputs.items():
        if name not in ("cube", "frame_context", "position"):
            fails(TypeError, f"{name} must be a tensor, got NoneType", **{name: None})
        fails(TypeError, f"{name}.* must be floating", **{name: value.int()})
        fails(ValueError, name, **{name: torch.tensor(1.0)})
        if name != "x":
            fails(ValueError, f"{name} must be on x's device, cpu, got meta", **{name: value.to("meta")})
            fails(ValueError, r" must be \[.*\] = \(.*\) for x \(2, 4, 7, 5\), got", **{name: value[..., :-1]})
    fails(ValueError, r"^weight1 must be \[h, D \+ C'\] = \(5, 5\)", cube=None, frame_context=None)
    fails(ValueError, r"^bias1 must be \[h\] = \(4,\)", weight1=inputs["weight1"][:-1])
    for name in ("cube", "frame_context", *NETWORK):
        said = f"{name} must have the dtype of features, torch.float32, got torch.bfloat16"
        fails(TypeError, said, **{name: inputs[name].bfloat16()})
    with pytest.raises(RuntimeError, match="this is float8_e5m2.*reference: can run here"):
        ops.interpolation_head(**{**inputs, "x": x.to(torch.float8_e5m2)}, backend="cpu")


def test_an_infinite_hidden_layer_is_no_answer(kernels: str) -> None:
    """Loss scaling has to see that the network has overflowed."""
    inputs, _ = SUBJECT.case(context=(), position=False)
    inputs["bias1"][0] = float("inf")
    z, weights = ops.interpolation_head(**inputs, backend=kernels)
    assert bool(weights.isnan().all())
    assert bool(z.isnan().all())
