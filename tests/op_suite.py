"""What must hold of every op, whatever it computes: its autograd recipe, its layouts, its threads.

A test file of an op describes the op by a `Subject` and runs CHECKS on it; see test_pair_interpolate.py.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from op_pytorch import (
    autocast_changes_nothing,
    checkpointed,
    checkpointed_with_create_graph,
    compile_fullgraph,
    compiled_transforms_are_right_or_raise,
    export,
    func_grad,
    further_derivatives_raise,
    inference_mode,
    opcheck,
    vmap,
)
from op_subject import (
    EMULATED,
    INTERPRETED,
    UNDER_TEST,
    Subject,
    allocate_by,
    as_tuple,
    assert_same_bits,
    gradients,
    layouts,
    loss,
    with_room,
)
from torch import Tensor

from inti_kernels import backends, ops
from inti_kernels.reference import functional
from inti_kernels.testing import OpCase, assert_close_three_way, three_way

# What is of the recipe, one for all backends, or of the cpu backend; and what is of CUDA. The rest of a run has no such
# tests (conftest.py), instead of skipping them.
plain_only = pytest.mark.only_under_test("cpu")
kernels_only = pytest.mark.only_under_test("cuda")
# What Triton's interpreter, where a load takes milliseconds, has in fewer cases elsewhere.
compiled_only = pytest.mark.only_under_test("cpu", "cuda")


def sizes(compiled: Any, interpreted: Any, emulated: Any = None) -> Any:
    """What Hypothesis draws from: for compiled kernels, for Triton's interpreter, or (the same by default) for the
    emulator of CUDA."""
    if EMULATED and emulated is not None:
        return emulated
    return compiled if UNDER_TEST == "cpu" else interpreted


# --- Values -----------------------------------------------------------------------------------------------------------


def gradcheck(subject: Subject) -> None:
    leaves, run = subject.leaves(torch.float64, batch=1, dim=subject.least_dim)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=UNDER_TEST != "cpu")


def runs_where_it_says(subject: Subject) -> None:
    leaves, run = subject.leaves()
    before = backends.executed.copy()
    gradients(run, leaves)
    gradients(lambda *values: run(*values, backend="reference"), leaves)
    ran = {what: times for what, times in (backends.executed - before).items() if subject.name in what[0]}
    kernels = {(subject.name, subject.backend): 1, (f"{subject.name}_backward", subject.backend): 1}
    assert ran == {**kernels, (subject.name, "reference"): 1}


def reference_backend_is_the_reference(subject: Subject) -> None:
    """Explicitly, and as what `auto` falls back to inside the op."""
    inputs, kwargs = subject.case()
    expected = getattr(functional, subject.name)(**inputs, **kwargs)
    assert_same_bits(getattr(ops, subject.name)(**inputs, **kwargs, backend="reference"), expected)
    case = subject.case()
    args = subject.custom_op_args(case, "reference")
    outputs = as_tuple(getattr(torch.ops.inti_kernels, subject.name)(*args))
    assert_same_bits(outputs[: len(outputs) - subject.kept], expected)


def fallback_differentiates(subject: Subject) -> None:
    """The reference run inside the op, as `auto` does where no kernel can run, has gradients too, and accumulates."""
    leaves, run = subject.leaves(torch.float64)
    expected = gradients(lambda *values: run(*values, backend="reference"), leaves)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.HAS_KERNEL, subject.name, ())
        patch.setattr(backends, "_noted", set())
        with pytest.warns(UserWarning, match="plain PyTorch"):
            actual = gradients(lambda *values: run(*values, backend="auto"), leaves)
        torch.testing.assert_close(actual, expected)
        torch._dynamo.reset()
        traced = torch.compile(lambda *values: run(*values, backend="auto"), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradients(traced, leaves), expected)
        case = subject.case(torch.float64)
        *args, _ = subject.custom_op_args(case)
        buffer = torch.ones_like(case.inputs["x"])
        needs = [case.inputs[name] is not None for name in subject.arguments]
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(subject.__class__, "custom_op_args", lambda self, case, backend=None: (*args, "auto"))
            number = subject.number_of_x
            fresh, accumulated = subject.backward(case, needs)[number], subject.backward(case, needs, buffer)[number]
    assert accumulated.numel() == 0
    torch.testing.assert_close(buffer, fresh + 1)


def only_what_is_needed(subject: Subject) -> None:
    """Each gradient alone has the same bits as all together, and the others are not computed."""
    case = subject.case()
    present = [case.inputs[name] is not None for name in subject.arguments]
    together = subject.backward(case, present)
    for number in range(len(present)):
        alone = subject.backward(case, [i == number for i in range(len(present))])
        for i, grad in enumerate(alone):
            assert grad.numel() == 0 if i != number else True
        assert_same_bits(alone[number], together[number])
    assert all(grad.numel() == 0 for grad in subject.backward(case, [False] * len(present)))


def frozen_inputs_get_no_gradient(subject: Subject) -> None:
    leaves, run = subject.leaves()
    for frozen in leaves:
        frozen.requires_grad_(False)
        others = [leaf for leaf in leaves if leaf is not frozen]
        grads = torch.autograd.grad(loss(run(*leaves)), others)
        assert all(grad.abs().sum() > 0 for grad in grads)
        frozen.requires_grad_(True)


def accumulates_into_a_buffer(subject: Subject) -> None:
    """grad_x_accumulate: old + new, other gradients unchanged, nothing written beside the buffer."""
    for dtype in (torch.float32, torch.bfloat16):
        case = subject.case(dtype)
        needs = [case.inputs[name] is not None for name in subject.arguments]
        fresh = list(subject.backward(case, needs))
        # Of the dispatcher's op: autograd would round whatever it gets.
        inputs = [case.inputs[name] for name in subject.arguments]
        assert [grad.dtype for grad in fresh] == [(case.inputs["x"] if t is None else t).dtype for t in inputs]
        fresh_x = fresh.pop(subject.number_of_x)
        x = case.inputs["x"]
        guarded = torch.full((x.numel() + 64,), 7.0, dtype=dtype)
        buffer = guarded[32:-32].view(x.shape)
        buffer.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
        old = buffer.clone()
        others = list(subject.backward(case, needs, buffer))
        assert others.pop(subject.number_of_x).numel() == 0
        torch.testing.assert_close(buffer, (old.double() + fresh_x.double()).to(dtype), rtol=1e-2, atol=1e-2)
        if dtype == torch.float32:
            torch.testing.assert_close(buffer, old + fresh_x)
        assert bool((guarded[:32] == 7).all())
        assert bool((guarded[-32:] == 7).all())
        assert_same_bits(tuple(others), tuple(fresh))
    for wrong in (torch.zeros(3), torch.zeros(x.shape), buffer[..., ::2]):
        with pytest.raises(ValueError, match="grad_x_accumulate must be contiguous"):
            subject.backward(case, needs, wrong)


# --- Layouts ----------------------------------------------------------------------------------------------------------


def any_strides(subject: Subject) -> None:
    _any_strides(subject, *subject.case(), assert_same_bits)
    if not INTERPRETED:
        # Rows of whole 16 bytes, which not every layout starts at: narrower accesses may add in another order.
        _any_strides(subject, *subject.case(dim=16), partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5))


def _any_strides(
    subject: Subject, inputs: dict[str, Tensor | None], kwargs: dict[str, Any], check: Callable[..., None]
) -> None:
    run = getattr(ops, subject.name)
    expected = run(**inputs, **kwargs, backend=subject.backend)
    wanted = gradients(
        lambda x: run(**{**inputs, "x": x}, **kwargs, backend=subject.backend), [inputs["x"].requires_grad_()]
    )
    for name, x in layouts(inputs["x"].detach()).items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends, "_noted", set())
            with pytest.warns(UserWarning, match="copied") if name.startswith("channels") else no_warnings():
                check(run(**{**inputs, "x": x}, **kwargs, backend=subject.backend), expected)
            with no_warnings():  # once a process is enough
                run(**{**inputs, "x": x}, **kwargs, backend=subject.backend)
        grads = gradients(lambda x: run(**{**inputs, "x": x}, **kwargs, backend=subject.backend), [x.requires_grad_()])
        check(grads, wanted)


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def zero_stride_gradients(subject: Subject) -> None:
    """What .sum() and .expand() hand to the backward."""
    leaves, run = subject.leaves()
    outputs = as_tuple(run(*leaves))
    ones = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], retain_graph=True)
    expanded = torch.autograd.grad(outputs, leaves, [torch.ones(()).expand(o.shape) for o in outputs])
    assert_same_bits(expanded, ones)


def offsets_beyond_32_bits(subject: Subject) -> None:
    """Two clips whose distance is more than 2³¹ elements, in a buffer of which only the touched pages exist."""
    case = subject.case(torch.bfloat16)
    x = case.inputs["x"]
    inner = x[0].numel()
    far = torch.empty(2**31 + 2 * inner, dtype=torch.bfloat16).as_strided(x.shape, (2**31 + 3, *x.stride()[1:]))
    far.copy_(x)
    run = getattr(ops, subject.name)
    expected = run(**case.inputs, **case.kwargs, backend=subject.backend)
    assert_same_bits(run(**{**case.inputs, "x": far}, **case.kwargs, backend=subject.backend), expected)
    wanted = subject.backward(case, [case.inputs[name] is not None for name in subject.arguments])
    far_case = OpCase({**case.inputs, "x": far}, case.kwargs)
    assert_same_bits(subject.backward(far_case, [far_case.inputs[n] is not None for n in subject.arguments]), wanted)


def no_clips(subject: Subject) -> None:
    leaves, run = subject.leaves()
    clips = [
        leaf.detach()[:0].requires_grad_() if leaf.shape[0] == 2 and leaf.dim() in (3, 4) else leaf for leaf in leaves
    ]
    outputs = as_tuple(run(*clips))
    assert all(out.shape[0] == 0 for out in outputs)
    for clip, grad in zip(clips, torch.autograd.grad([o.sum() for o in outputs], clips), strict=True):
        assert grad.shape == clip.shape
        assert not grad.abs().sum()


# --- Threads ----------------------------------------------------------------------------------------------------------

BIG = {"batch": 2, "frames": 6, "grid": (9, 7), "dim": 150, "prefix": 1}


def same_bits_at_any_thread_count(subject: Subject) -> None:
    leaves, run = subject.leaves(**BIG)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append((*as_tuple(run(*leaves)), *torch.autograd.grad(loss(run(*leaves)), leaves)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def two_python_threads(subject: Subject) -> None:
    work = [subject.leaves(seed=seed, **BIG) for seed in range(2)]
    expected = [gradients(run, leaves) for leaves, run in work]
    problems: list[BaseException] = []
    count = torch.get_num_threads()

    def repeat(number: int) -> None:
        torch.set_num_threads(count)  # a new thread has PyTorch's default, and products' bits depend on it
        leaves, run = work[number]
        try:
            for _ in range(5):
                assert_same_bits(gradients(run, leaves), expected[number])
        except BaseException as problem:
            problems.append(problem)

    both = [threading.Thread(target=repeat, args=(number,)) for number in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not problems, problems


# --- Bad input --------------------------------------------------------------------------------------------------------


def the_raw_op_reads_no_wrong_memory(subject: Subject) -> None:
    """An exported graph calls the op past the user's function and its checks."""
    for name in subject.arguments[1:]:
        case = subject.case()
        case.inputs[name] = case.inputs[name][..., :1].contiguous()
        with pytest.raises((ValueError, RuntimeError), match=r"expected \(|doesn't go with"):
            getattr(torch.ops.inti_kernels, subject.name)(*subject.custom_op_args(case))


def nothing_is_written_past_an_end(subject: Subject) -> None:
    """What lies before and behind each output and workspace is as it was."""
    around = []

    def guarded(*args, **kwargs):  # type: ignore[no-untyped-def]
        inside, *rooms = with_room(*args, **kwargs)
        around.extend(rooms)
        return inside

    with pytest.MonkeyPatch.context() as patch:
        allocate_by(patch, guarded)
        # A row that one thread has, and one with an edge.
        for dtype, dim in ((torch.float32, 8), (torch.float32, 40), (torch.float16, 40)):
            leaves, run = subject.leaves(dtype, dim=dim)
            gradients(run, leaves)
    assert around
    assert all(bool((memory == 7).all()) for memory in around)


def bad_input(subject: Subject) -> None:
    inputs, kwargs = subject.case()
    run = getattr(ops, subject.name)

    def fails(kind: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            run(**{**inputs, **kwargs, **changes})

    x = inputs["x"]
    fails(ValueError, "frames must be even to form pairs, got 3", x=x[:, :3])
    fails(ValueError, r"tokens \[B, T, N, C\], got 3 dimensions", x=x[0])
    fails(ValueError, "at least one frame, token and channel", x=x[:, :, :, :0])
    fails(ValueError, "at least one frame, token and channel", x=x[:, :0])
    fails(TypeError, "must be floating", x=x.long())
    fails(TypeError, "must be floating", x=x.to(torch.complex64))
    fails(TypeError, "x must be a tensor, got list", x=[1.0])
    fails(TypeError, "dense tensor", x=x.to_sparse())
    fails(ValueError, "backend must be one of", backend="fastest")
    for name, value in inputs.items():
        if name != "x":
            fails(TypeError, f"{name} must be floating", **{name: value.int()})
            if name not in ("bias", "position"):
                fails(TypeError, f"{name} must be a tensor, got NoneType", **{name: None})
            fails(ValueError, f"{name} must be on x's device, cpu, got meta", **{name: value.to("meta")})
            fails(ValueError, f"{name}", **{name: value[:-1]})
    # A dtype that PyTorch has and no kernel takes: refused by name where it was asked for.
    with pytest.raises(RuntimeError, match="this is float8_e5m2. The others: reference: can run here"):
        run(**{**inputs, **kwargs, "x": x.to(torch.float8_e5m2)}, backend="cpu")


# What depends on the kernels. Triton's interpreter, where a launch takes a second, and the emulator of CUDA go through
# these; the others are of the recipe, which is one for all backends, and are shown on the cpu backend.
KERNEL_CHECKS = (
    gradcheck,
    runs_where_it_says,
    only_what_is_needed,
    frozen_inputs_get_no_gradient,
    accumulates_into_a_buffer,
    any_strides,
    zero_stride_gradients,
    offsets_beyond_32_bits,
    no_clips,
    opcheck,
    compile_fullgraph,
    inference_mode,
    checkpointed,
    vmap,
    the_raw_op_reads_no_wrong_memory,
    nothing_is_written_past_an_end,
)
RECIPE_CHECKS = (
    reference_backend_is_the_reference,
    fallback_differentiates,
    export,
    autocast_changes_nothing,
    func_grad,
    further_derivatives_raise,
    compiled_transforms_are_right_or_raise,
    checkpointed_with_create_graph,
    same_bits_at_any_thread_count,
    two_python_threads,
    bad_input,
)
CHECKS = KERNEL_CHECKS if UNDER_TEST != "cpu" else KERNEL_CHECKS + RECIPE_CHECKS
# Of an op whose matrix products are torch's, whose bits are those of a number of threads; the op's own test has what it
# does under autocast.
_LEFT_OUT = (autocast_changes_nothing, same_bits_at_any_thread_count, bad_input)
# Of many launches, which in the interpreter is seconds; its other ops show them of the same recipe.
_LEFT_OUT += (checkpointed, vmap, frozen_inputs_get_no_gradient) if UNDER_TEST == "triton" else ()
PRODUCT_CHECKS = tuple(check for check in CHECKS if check not in _LEFT_OUT)


def compare_with_reference(
    subject: Subject, backend: str, layout: str | None = None, draws: int | None = None, **sizes: Any
) -> None:
    """Outputs and all gradients against plain PyTorch and the float64 reference, by the three-way rule."""
    case = subject.case(**sizes)
    if layout is not None:
        case.inputs["x"] = layouts(case.inputs["x"])[layout]
    before = backends.executed.copy()
    assert_close_three_way(three_way(subject.name, *case, backend=backend, draws=draws))
    ran = backends.executed - before
    assert ran[subject.name, backend]
    assert ran[f"{subject.name}_backward", backend]
