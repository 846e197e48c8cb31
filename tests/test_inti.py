"""inti, the whole module as one op: against the reference on every backend, its autograd recipe, what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import op_suite
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_subject import UNDER_TEST, Subject, assert_same_bits, gradients, layouts
from torch import Tensor
from torch._subclasses import FakeTensorMode

from inti_kernels import backends, ops
from inti_kernels.backends._arguments import all_as_dtypes
from inti_kernels.backends.cpu import _products
from inti_kernels.backends.inti import Inputs, Kept
from inti_kernels.reference import functional
from inti_kernels.testing import OpCase, assert_close_three_way, three_way

LEVELS = ("cube", "frame", "global")
CONTEXTS = ((), ("cube",), ("frame",), ("global",), ("cube", "global"), LEVELS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALWAYS = ("x", "norm_weight", "norm_bias", "weight", "bias", "weight1", "bias1", "weight2", "bias2")


@dataclass(frozen=True)
class Inti(Subject):
    """The op has sizes that belong to its tensors (the products' dtype), and says how much to keep."""

    recompute: bool = False

    def custom_op_args(self, case: OpCase, backend: str | None = None) -> tuple[Any, ...]:
        inputs, kwargs = case
        sizes = (list(kwargs["grid"]), kwargs["prefix"], [1e-5] * 3, inputs["x"].dtype)
        return (*(inputs[name] for name in self.arguments), *sizes, True, self.recompute, backend or self.backend)

    def backward_args(
        self, case: OpCase, upstream: Callable[[Tensor], Tensor], needs: list[bool], accumulate: Tensor | None
    ) -> tuple[Any, ...]:
        *args, keep, recompute, backend = self.custom_op_args(case)
        outputs = torch.ops.inti_kernels.inti(*args, keep, recompute, backend)
        return (*map(upstream, outputs[:2]), *args, *outputs[2:], needs, accumulate, backend)


SUBJECT = Inti("inti", Inputs._fields, {"context": LEVELS}, backend=UNDER_TEST, kept=len(Kept._fields), least_dim=4)
SMALL = replace(SUBJECT, sizes={"context": ("cube",)})

KERNEL_CHECKS = (
    op_suite.gradcheck,
    op_suite.runs_where_it_says,
    op_suite.frozen_inputs_get_no_gradient,
    op_suite.accumulates_into_a_buffer,
    op_suite.any_strides,
    op_suite.zero_stride_gradients,
    op_suite.no_clips,
)
RECIPE_CHECKS = (
    op_suite.only_what_is_needed,
    op_suite.nothing_is_written_past_an_end,
    op_suite.opcheck,
    op_suite.compile_fullgraph,
    op_suite.inference_mode,
    op_suite.checkpointed,
    op_suite.vmap,
    op_suite.fallback_differentiates,
    op_suite.export,
    op_suite.further_derivatives_raise,
    op_suite.compiled_transforms_are_right_or_raise,
    op_suite.checkpointed_with_create_graph,
    op_suite.two_python_threads,
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "check", KERNEL_CHECKS + (RECIPE_CHECKS if UNDER_TEST == "cpu" else ()), ids=lambda check: check.__name__
)
def test_recipe(check: Callable[[Subject], None]) -> None:
    check(SUBJECT)


@pytest.mark.only_under_test("cpu")
def test_torch_func_grad() -> None:
    """Of each input and of all, whichever are mapped; with few inputs, for the pairs of them are many."""
    op_suite.func_grad(replace(SUBJECT, sizes={"context": (), "position": False}))


@given(
    batch=st.integers(1, 2),
    frames=st.sampled_from((2, 4, 6)),
    grid=op_suite.sizes(st.tuples(st.integers(1, 7), st.integers(1, 7)), st.sampled_from(((2, 2), (1, 3)))),
    dim=op_suite.sizes(st.integers(8, 40).map(lambda half: 2 * half), st.sampled_from((8, 20))),
    hidden=op_suite.sizes(st.integers(8, 70), st.sampled_from((5, 20))),
    context=st.sampled_from(CONTEXTS),
    prefix=st.sampled_from((0, 1, 5)),
    # In float32 the ops of the chain are held to their bounds one by one, and the module in test_cuda_emulated.py.
    # Here plain PyTorch that adds up in another order is over the bound of a maximum about as often as the kernels are,
    # and their RMS errors are below plain PyTorch's.
    dtype=op_suite.sizes(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES[1:])),
    position=st.booleans(),
    layout=st.sampled_from((None, "sequence first", "an offset and a wider row", "a slice of the tokens")),
    seed=st.integers(0, 9),
)
def test_kernels_match_reference(kernels: str, **sizes: Any) -> None:
    op_suite.compare_with_reference(replace(SUBJECT, backend=kernels), kernels, draws=24, **sizes)


def test_conversions_at_once_are_of_one_dtype_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several, PyTorch's kernel for GPUs writes past the end of some."""
    calls, convert = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (calls.append((to, of)), convert(to, of)))
    sources = [
        torch.randn(3),
        torch.randn(2).half(),
        None,
        torch.randn(4).half(),
        torch.randn(5),
        torch.randn(1).double(),
    ]
    dtypes = [torch.bfloat16, torch.float32, None, torch.bfloat16, torch.float32, torch.bfloat16]
    converted = all_as_dtypes(sources, dtypes)
    for source, dtype, tensor in zip(sources, dtypes, converted, strict=True):
        assert tensor is None if source is None else torch.equal(tensor, source.to(dtype)) and tensor.dtype == dtype
    assert converted[4] is sources[4]
    assert len(calls) == 4
    for tensors in (tensors for call in calls for tensors in call):
        assert len({tensor.dtype for tensor in tensors}) == 1


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("context", CONTEXTS, ids="+".join)
def test_recompute_gives_the_same_and_keeps_little(kernels: str, context: tuple[str, ...], recompute: bool) -> None:
    subject = replace(SMALL, backend=kernels, recompute=recompute)
    case = subject.case(context=context)
    needs = [case.inputs[name] is not None for name in subject.arguments]
    kept = Kept(*torch.ops.inti_kernels.inti(*subject.custom_op_args(case))[2:])
    x = case.inputs["x"]
    large = (kept.token_preactivation.numel(), kept.cube.numel(), kept.head_preactivation.numel())
    half = x.numel() // 2
    # D is half of 5 channels, rounded down.
    assert large == ((0, 0, 0) if recompute else (half * 2 // 5 * 2, half if "cube" in context else 0, half))
    assert kept.statistics.numel() == (0 if recompute else 2 * x[..., 0].numel())
    assert kept.difference.shape == (x.shape[0], x.shape[1] // 2, x.shape[2])
    has_frame, has_any = ("frame" in context), ("frame" in context or "global" in context)
    batch, frames, _, dim = x.shape
    of_class = [has_frame * batch * frames * (dim // 2), has_frame * batch * frames * dim // 2]
    of_class = [*of_class, has_any * batch * frames * dim // 2]
    by_kernels = kernels in ("cpu", "cuda") and not recompute
    assert [tensor.numel() for tensor in kept[-3:]] == (of_class if by_kernels else [0] * 3)
    grads = subject.backward(case, needs)
    for again in (replace(subject, recompute=not recompute).backward(case, needs), _without_keep(subject, case, needs)):
        torch.testing.assert_close(again, grads, rtol=1e-5, atol=1e-5)


@pytest.mark.only_under_test("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("named", ["triton", "cuda"])
def test_tokens_without_data_on_a_gpu_that_is_not_here(named: str, dtype: torch.dtype) -> None:
    inputs, sizes = SUBJECT.case(dtype)
    with FakeTensorMode():
        faked = {
            name: None if t is None else torch.empty(t.shape, dtype=dtype, device="cuda", requires_grad=True)
            for name, t in inputs.items()
        }
        z, weights = ops.inti(**faked, **sizes, backend=named)
    batch, frames, tokens, dim = inputs["x"].shape
    assert (z.shape, z.dtype, z.requires_grad) == ((batch, frames // 2, tokens, dim), dtype, True)
    assert weights.shape == (batch, frames // 2, tokens, 2)


def _without_keep(subject: Inti, case: OpCase, needs: list[bool]) -> Any:
    """The backward of a forward that was told to keep nothing."""
    *args, _, _, backend = subject.custom_op_args(case)
    outputs = torch.ops.inti_kernels.inti(*args, False, False, backend)
    assert not any(tensor.numel() for tensor in outputs[2:])
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(out.shape, generator=generator) for out in outputs[:2]]
    return torch.ops.inti_kernels.inti_backward(*upstream, *args, *outputs[2:], needs, None, backend)


@pytest.mark.parametrize("products", ["of this machine", "in 16 bits"] if UNDER_TEST == "cpu" else ["in 16 bits"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_float32(
    kernels: str, dtype: torch.dtype, recompute: bool, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x and parameters in float32, products in the other dtype (on a CPU without such products in float32): within what
    rounding to it allows, and every gradient in its tensor's dtype."""
    if products == "in 16 bits":  # on a CPU that has them, though here they are slow
        monkeypatch.setattr(_products, "product_dtype", lambda dtype: dtype)
    subject = replace(SUBJECT, backend=kernels)
    leaves, run = subject.leaves(dim=20)
    exact, outputs = gradients(run, leaves), run(*leaves)
    with torch.autocast("cpu", dtype):
        case = run(*leaves)
        actual = torch.autograd.grad(op_suite.loss(case), leaves)
    assert (case[0].dtype, case[1].dtype) == (torch.float32, dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(case[0], outputs[0], rtol=0, atol=8 * eps * float(outputs[0].abs().max()))
    for gradient, right, leaf in zip(actual, exact, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert float((gradient - right).norm()) <= 8 * eps * float(right.norm())


def test_gradients_of_some_only(kernels: str) -> None:
    """Whole levels frozen, x frozen, the position alone: what is asked for is as if all were."""
    subject = replace(SUBJECT, backend=kernels)
    case = subject.case(torch.float64, dim=8)
    everything = subject.backward(case, [True] * len(subject.arguments))
    for wanted in (("position",), ("global_weight2",), ("pair_norm_bias", "bias2"), ("cube_bias",), ALWAYS[1:], ("x",)):
        needs = [name in wanted for name in subject.arguments]
        for name, gradient, whole in zip(subject.arguments, subject.backward(case, needs), everything, strict=True):
            assert (gradient.numel() > 0) == (name in wanted)
            if name in wanted:
                torch.testing.assert_close(gradient, whole)


def test_every_layout_of_x(kernels: str) -> None:
    inputs, kwargs = SUBJECT.case(torch.float32, dim=8)
    for value in layouts(inputs["x"]).values():
        assert_close_three_way(
            three_way("inti", {**inputs, "x": value}, kwargs, backend=kernels, needs=["x", "weight"])
        )


@pytest.mark.only_under_test("cpu")
def test_the_raw_op_reads_no_wrong_memory() -> None:
    """An exported graph calls the op past the user's function and its checks. What the kernels read is looked at
    again."""
    for name in SUBJECT.arguments[1:]:
        case = SUBJECT.case()
        case.inputs[name] = case.inputs[name][..., :1].contiguous()
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.inti_kernels.inti(*SUBJECT.custom_op_args(case))


@pytest.mark.only_under_test("cpu")
@pytest.mark.parametrize(("backend", "ran"), [("cpu", "cpu"), ("auto", "cpu"), ("reference", "reference")])
def test_every_backend_agrees_and_is_counted(backend: str, ran: str) -> None:
    inputs, kwargs = SUBJECT.case()
    before = backends.executed.copy()
    actual = ops.inti(**inputs, **kwargs, backend=backend)
    ran_ops = ("inti",) if ran == "reference" else ("inti", "token_features", "depthwise_conv3d", "interpolation_head")
    assert backends.executed - before == {(op, ran): 1 for op in ran_ops}
    expected = functional.inti(**inputs, **kwargs)
    torch.testing.assert_close(actual, expected)
    if backend == "reference":
        assert_same_bits(actual, expected)


@pytest.mark.only_under_test("cpu")
def test_bad_input() -> None:
    inputs, kwargs = SUBJECT.case()

    def fails(kind: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            ops.inti(**{**inputs, **kwargs, **changes})

    x = inputs["x"]
    fails(ValueError, "frames must be even to form pairs, got 3", x=x[:, :3])
    fails(ValueError, r"tokens \[B, T, N, C\], got 3 dimensions", x=x[0])
    fails(ValueError, r"prefix \+ H·W = 1 \+ 3·3 = 10 tokens a frame, got 7", grid=(3, 3))
    fails(ValueError, "backend must be one of", backend="fastest")
    fails(ValueError, "eps must be three numbers", eps=(1e-5,))
    for name, value in inputs.items():
        if name in ALWAYS:
            fails(TypeError, f"{name} must be a tensor, got NoneType", **{name: None})
        fails(TypeError, f"{name}.* must be floating", **{name: value.int()})
        if name != "x":
            fails(ValueError, f"{name} must be on x's device, cpu, got meta", **{name: value.to("meta")})
            fails(ValueError, r" must be .*\(.*\) for x \(2, 4, 7, 5\), got", **{name: value[..., :-1]})
        if name not in ("x", "position"):
            fails(TypeError, "must have the dtype of x, torch.float32, got torch.bfloat16", **{name: value.bfloat16()})
    for name in ("pair_norm_bias", "frame_weight", "global_bias2"):
        fails(ValueError, f"all of its parameters or none; not given: {name}", **{name: None})
    fails(ValueError, r"^weight1 must be \(5, 4\) for", **dict.fromkeys(Inputs._fields[5:21]))
    given = {name: value.to(torch.float8_e5m2) for name, value in inputs.items()}
    fails(RuntimeError, "this is float8_e5m2.*reference: can run here", **given, backend="cpu")
