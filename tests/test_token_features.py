"""token_features: plain PyTorch on every backend, under the same rules as the ops that have kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import op_suite
import pytest
import torch
from op_subject import Subject, assert_same_bits, gradients, layouts

from inti_kernels import backends, ops, reference
from inti_kernels.testing import assert_close_three_way, three_way

SUBJECT = Subject("token_features", ("x", "norm_weight", "norm_bias", "weight", "bias", "position"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RECIPE = (
    op_suite.frozen_inputs_get_no_gradient,
    op_suite.zero_stride_gradients,
    op_suite.no_clips,
    op_suite.export,
    op_suite.inference_mode,
    op_suite.checkpointed,
    op_suite.vmap,
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
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype, prefix: int, position: bool) -> None:
    case = SUBJECT.case(dtype, dim=10, prefix=prefix, position=position)
    assert_close_three_way(three_way("token_features", *case, backend=None))


def test_any_strides() -> None:
    inputs, kwargs = SUBJECT.case()
    for x in layouts(inputs["x"]).values():
        assert_close_three_way(three_way("token_features", {**inputs, "x": x}, kwargs, backend="cpu"))


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
def test_every_backend_is_the_reference_and_is_counted_as_such(backend: str) -> None:
    inputs, kwargs = SUBJECT.case()
    before = backends.executed.copy()
    actual = ops.token_features(**inputs, **kwargs, backend=backend)
    assert backends.executed - before == {("token_features", "reference"): 1}
    assert_same_bits(actual, reference.token_features(**inputs, **kwargs))


def test_eps_any_width_and_a_position_of_another_dtype() -> None:
    inputs, _ = SUBJECT.case()
    inputs |= {"weight": torch.randn(7, 5), "bias": torch.randn(7), "position": inputs["position"].bfloat16()}
    actual = ops.token_features(**inputs, eps=0.5)
    assert actual.shape == (2, 2, 7, 14)
    assert_same_bits(actual, reference.token_features(**inputs, eps=0.5))
    assert not torch.allclose(actual, ops.token_features(**inputs))


def test_derivatives_of_any_order() -> None:
    leaves, run = SUBJECT.leaves(torch.float64, batch=1, frames=2, grid=(1, 2), dim=4)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_compile_in_training_has_no_graph_break(backend: str | None) -> None:
    leaves, run = SUBJECT.leaves()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *values: run(*values, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, leaves), gradients(run, leaves))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(x_dtype: torch.dtype) -> None:
    """The Linear runs in autocast's dtype, as the reference's does; the parameters stay float32."""
    leaves, run = SUBJECT.leaves()
    leaves[0] = leaves[0].detach().to(x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual, grads = run(*leaves), gradients(run, leaves)
        expected = reference.token_features(*leaves)
    assert actual.dtype == torch.bfloat16
    assert_same_bits(actual, expected)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    exact = gradients(run, [leaf.detach().float().requires_grad_() for leaf in leaves])
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=0.05 * float(b.abs().max()))


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
