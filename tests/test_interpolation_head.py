"""interpolation_head: a network in plain PyTorch before pair_interpolate, which runs on the backend asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import op_suite
import pytest
import torch
from op_subject import Subject, assert_same_bits, gradients, layouts

from inti_kernels import backends, ops, reference
from inti_kernels.testing import assert_close_three_way, three_way

NETWORK = ("weight1", "bias1", "weight2", "bias2")
SUBJECT = Subject("interpolation_head", ("features", "cube", "frame_context", "x", *NETWORK, "position"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RECIPE = (
    op_suite.frozen_inputs_get_no_gradient,
    op_suite.zero_stride_gradients,
    op_suite.export,
    op_suite.inference_mode,
    op_suite.checkpointed,
    op_suite.func_grad,
)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """These tensors are tiny: threads cost more than they give."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("check", RECIPE, ids=lambda check: check.__name__)
def test_recipe(check: Callable[[Subject], None]) -> None:
    check(SUBJECT)


@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("context", [(), ("cube",), ("frame",), ("cube", "frame")], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype, prefix: int, context: tuple[str, ...], position: bool) -> None:
    case = SUBJECT.case(dtype, dim=6, hidden=9, prefix=prefix, context=context, position=position)
    assert_close_three_way(three_way("interpolation_head", *case, backend="cpu"))


def test_any_strides() -> None:
    inputs, kwargs = SUBJECT.case()
    for name in ("x", "features", "cube"):
        for layout, value in layouts(inputs[name]).items():
            if (name, layout) != ("x", "channels not contiguous"):  # for which pair_interpolate has a note
                assert_close_three_way(three_way(SUBJECT.name, {**inputs, name: value}, kwargs, backend="cpu"))


@pytest.mark.parametrize(("backend", "ran"), [("cpu", "cpu"), ("auto", "cpu"), ("reference", "reference")])
def test_every_backend_agrees_and_is_counted(backend: str, ran: str) -> None:
    inputs, kwargs = SUBJECT.case()
    before = backends.executed.copy()
    actual = ops.interpolation_head(**inputs, **kwargs, backend=backend)
    assert backends.executed - before == {("interpolation_head", "reference"): 1, ("pair_interpolate", ran): 1}
    expected = reference.interpolation_head(**inputs, **kwargs)
    torch.testing.assert_close(actual, expected)
    if backend == "reference":
        assert_same_bits(actual, expected)


def test_x_and_position_of_other_dtypes_than_the_network() -> None:
    inputs, _ = SUBJECT.case()
    inputs |= {"x": inputs["x"].bfloat16(), "position": inputs["position"].half()}
    z, weights = ops.interpolation_head(**inputs)
    assert (z.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    assert_close_three_way(three_way("interpolation_head", inputs, {}, backend="cpu"))


def test_derivatives() -> None:
    leaves, run = SUBJECT.leaves(torch.float64, batch=1, frames=2, grid=(1, 1), dim=2)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(lambda *values: run(*values, backend="reference"), leaves)
    (grad,) = torch.autograd.grad(run(*leaves)[0].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="pair_interpolate can be differentiated once; .*backend='reference'"):
        torch.autograd.grad(grad.square().sum(), leaves[0])


@pytest.mark.parametrize("context", [(), ("frame",), ("cube", "frame")], ids=str)
def test_compile_in_training_has_no_graph_break(context: tuple[str, ...]) -> None:
    inputs, kwargs = SUBJECT.case(context=context)
    leaves = {name: value.requires_grad_() for name, value in inputs.items() if value is not None}

    def run(*values: torch.Tensor) -> Any:
        return ops.interpolation_head(**{**inputs, **dict(zip(leaves, values, strict=True))}, **kwargs, backend="cpu")

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, [*leaves.values()]), gradients(run, [*leaves.values()]))


def test_autocast() -> None:
    """The Linears run in autocast's dtype, which the weights then have; z keeps x's."""
    leaves, run = SUBJECT.leaves()
    exact = gradients(run, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        (z, weights), grads = run(*leaves), gradients(run, leaves)
        expected = run(*leaves, backend="reference")
    assert (z.dtype, weights.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close((z, weights), expected, rtol=0.02, atol=0.02)
    for a, b, leaf in zip(grads, exact, leaves, strict=True):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 * float(b.abs().max()))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_clips(backend: str) -> None:
    inputs, kwargs = SUBJECT.case()
    clips = {n: inputs[n][:0].requires_grad_() for n in ("features", "cube", "frame_context", "x")}
    z, weights = ops.interpolation_head(**{**inputs, **clips}, **kwargs, backend=backend)
    assert z.shape == (0, 2, 7, 5)
    assert weights.shape == (0, 2, 7, 2)
    gradients = torch.autograd.grad(z.sum() + weights.sum(), [*clips.values()])
    assert [gradient.shape for gradient in gradients] == [clip.shape for clip in clips.values()]


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
