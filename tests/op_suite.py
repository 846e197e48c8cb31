"""What must hold of every op, whatever it computes: its autograd recipe, its layouts, its threads.

A test file of an op describes the op by a `Subject` and runs CHECKS on it; see test_pair_interpolate.py.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from inti_kernels import backends, ops, reference
from inti_kernels.testing import OpCase, assert_close_three_way, op_cases, three_way

SMALL = {"batch": 2, "frames": 4, "grid": (3, 2), "dim": 5, "prefix": 1}


@dataclass(frozen=True)
class Subject:
    """An op as the checks see it.

    Attributes:
        name: of the op.
        arguments: the inputs in the order in which the custom op takes them.
        sizes: more arguments of `op_cases`, such as a kernel.
    """

    name: str
    arguments: tuple[str, ...]
    sizes: dict[str, Any] = field(default_factory=dict)

    def case(self, dtype: torch.dtype = torch.float32, **changes: Any) -> OpCase:
        return op_cases(self.name, dtype=dtype, **{**SMALL, **self.sizes, **changes})

    def leaves(self, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[list[Tensor], Callable[..., Any]]:
        """The inputs, requiring grad, and the user's function of them: run(*leaves, backend=…)."""
        inputs, kwargs = self.case(dtype, **changes)
        names = [name for name, value in inputs.items() if value is not None]

        def run(*values: Tensor, backend: str | None = "cpu") -> Any:
            return getattr(ops, self.name)(**dict(zip(names, values, strict=True)), **kwargs, backend=backend)

        return [inputs[name].requires_grad_() for name in names], run

    def custom_op_args(self, case: OpCase, backend: str = "cpu") -> tuple[Any, ...]:
        inputs, kwargs = case
        sizes = [list(v) if isinstance(v, tuple) else v for v in kwargs.values()]
        return (*(inputs[name] for name in self.arguments), *sizes, backend)

    def backward(self, case: OpCase, needs: list[bool], accumulate: Tensor | None = None, seed: int = 0) -> Any:
        """The private backward op on random upstream gradients."""
        *args, backend = self.custom_op_args(case)
        generator = torch.Generator().manual_seed(seed)
        outputs = as_tuple(getattr(torch.ops.inti_kernels, self.name)(*args, backend))
        upstream = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
        return getattr(torch.ops.inti_kernels, f"{self.name}_backward")(*upstream, *args, needs, accumulate, backend)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def loss(outputs: Any) -> Tensor:
    """A scalar in which every output counts, each element differently."""
    terms = []
    for number, out in enumerate(as_tuple(outputs)):
        scale = torch.linspace(0.5, 1.5 + number, out.numel(), dtype=torch.float64).reshape(out.shape)
        terms.append((out.double() * scale).sum())
    return torch.stack(terms).sum()


def gradients(run: Callable[..., Any], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(run(*leaves)), leaves)


def assert_same_bits(actual: Any, expected: Any) -> None:
    actual, expected = as_tuple(actual), as_tuple(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- Values -----------------------------------------------------------------------------------------------------------


def gradcheck(subject: Subject) -> None:
    leaves, run = subject.leaves(torch.float64, batch=1, dim=2)
    assert torch.autograd.gradcheck(run, leaves)


def runs_where_it_says(subject: Subject) -> None:
    leaves, run = subject.leaves()
    before = backends.executed.copy()
    gradients(run, leaves)
    gradients(lambda *values: run(*values, backend="reference"), leaves)
    ran = backends.executed - before
    assert ran == {(subject.name, "cpu"): 1, (f"{subject.name}_backward", "cpu"): 1, (subject.name, "reference"): 1}


def reference_backend_is_the_reference(subject: Subject) -> None:
    """Explicitly, and as what `auto` falls back to inside the op."""
    inputs, kwargs = subject.case()
    expected = getattr(reference, subject.name)(**inputs, **kwargs)
    assert_same_bits(getattr(ops, subject.name)(**inputs, **kwargs, backend="reference"), expected)
    case = subject.case()
    args = subject.custom_op_args(case, "reference")
    assert_same_bits(getattr(torch.ops.inti_kernels, subject.name)(*args), expected)


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
            inner.setattr(subject.__class__, "custom_op_args", lambda self, case, backend="auto": (*args, "auto"))
            fresh, accumulated = subject.backward(case, needs)[0], subject.backward(case, needs, buffer)[0]
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
        fresh = subject.backward(case, needs)
        x = case.inputs["x"]
        guarded = torch.full((x.numel() + 64,), 7.0, dtype=dtype)
        buffer = guarded[32:-32].view(x.shape)
        buffer.copy_(torch.randn(x.shape))
        old = buffer.clone()
        grad, *others = subject.backward(case, needs, buffer)
        assert grad.numel() == 0
        torch.testing.assert_close(buffer, (old.double() + fresh[0].double()).to(dtype), rtol=1e-2, atol=1e-2)
        if dtype == torch.float32:
            torch.testing.assert_close(buffer, old + fresh[0])
        assert bool((guarded[:32] == 7).all())
        assert bool((guarded[-32:] == 7).all())
        assert_same_bits(tuple(others), tuple(fresh[1:]))
    for wrong in (torch.zeros(3), torch.zeros(x.shape), buffer[..., ::2]):
        with pytest.raises(ValueError, match="grad_x_accumulate must be contiguous"):
            subject.backward(case, needs, wrong)


# --- Layouts ----------------------------------------------------------------------------------------------------------


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in other memory: strides and offsets that users' models have."""
    b, t, n, c = x.shape
    wide = torch.full((b, t, n, c + 3), float("nan"), dtype=x.dtype)
    wide[..., 2:-1] = x
    sliced = torch.full((b, t, n + 2, c), float("nan"), dtype=x.dtype)
    sliced[:, :, 1:-1] = x
    return {
        "sequence first": x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "an offset and a wider row": wide[..., 2:-1],
        "a slice of the tokens": sliced[:, :, 1:-1],
        "channels not contiguous": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


def any_strides(subject: Subject) -> None:
    inputs, kwargs = subject.case()
    run = getattr(ops, subject.name)
    expected = run(**inputs, **kwargs, backend="cpu")
    wanted = gradients(lambda x: run(**{**inputs, "x": x}, **kwargs, backend="cpu"), [inputs["x"].requires_grad_()])
    for name, x in layouts(inputs["x"].detach()).items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends, "_noted", set())
            with pytest.warns(UserWarning, match="copied") if name.startswith("channels") else no_warnings():
                assert_same_bits(run(**{**inputs, "x": x}, **kwargs, backend="cpu"), expected)
            with no_warnings():  # once a process is enough
                run(**{**inputs, "x": x}, **kwargs, backend="cpu")
        grads = gradients(lambda x: run(**{**inputs, "x": x}, **kwargs, backend="cpu"), [x.requires_grad_()])
        assert_same_bits(grads, wanted)


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
    expected = run(**case.inputs, **case.kwargs, backend="cpu")
    assert_same_bits(run(**{**case.inputs, "x": far}, **case.kwargs, backend="cpu"), expected)
    wanted = subject.backward(case, [case.inputs[name] is not None for name in subject.arguments])
    far_case = OpCase({**case.inputs, "x": far}, case.kwargs)
    assert_same_bits(subject.backward(far_case, [far_case.inputs[n] is not None for n in subject.arguments]), wanted)


def no_clips(subject: Subject) -> None:
    leaves, run = subject.leaves()
    clips = [leaf.detach()[:0].requires_grad_() if leaf.shape[0] == 2 and leaf.dim() == 4 else leaf for leaf in leaves]
    outputs = as_tuple(run(*clips))
    assert all(out.shape[0] == 0 for out in outputs)
    for clip, grad in zip(clips, torch.autograd.grad([o.sum() for o in outputs], clips), strict=True):
        assert grad.shape == clip.shape
        assert not grad.abs().sum()


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def opcheck(subject: Subject) -> None:
    for needs_grad in (False, True):
        case = subject.case()
        for value in case.inputs.values():
            value.requires_grad_(needs_grad)
        torch.library.opcheck(getattr(torch.ops.inti_kernels, subject.name).default, subject.custom_op_args(case))
    case = subject.case()
    *args, backend = subject.custom_op_args(case)
    outputs = as_tuple(getattr(torch.ops.inti_kernels, subject.name)(*args, backend))
    needs = [True] * len(subject.arguments)
    for buffer in (None, torch.zeros_like(case.inputs["x"])):
        backward = getattr(torch.ops.inti_kernels, f"{subject.name}_backward").default
        torch.library.opcheck(
            backward,
            (*map(torch.ones_like, outputs), *args, needs, buffer, backend),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def compile_fullgraph(subject: Subject) -> None:
    leaves, run = subject.leaves()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *values: run(*values, backend=None), fullgraph=True)
    before = backends.executed.copy()
    actual = gradients(compiled, leaves)
    assert (backends.executed - before)[f"{subject.name}_backward", "cpu"] == 1
    for a, b in zip(actual, gradients(run, leaves), strict=True):
        torch.testing.assert_close(a, b)


def export(subject: Subject) -> None:
    leaves, run = subject.leaves()

    class Module(torch.nn.Module):
        def forward(self, *values: Tensor) -> Any:
            return run(*values, backend="auto")

    values = tuple(leaf.detach() for leaf in leaves)
    assert_same_bits(torch.export.export(Module(), values).module()(*values), run(*values))


def autocast_changes_nothing(subject: Subject) -> None:
    leaves, run = subject.leaves()
    outputs, grads = run(*leaves), gradients(run, leaves)
    for backend in ("cpu", "auto"):
        with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
            if backend == "auto":  # what runs then is the reference, whose convolution autocast would cast
                patch.setitem(backends.HAS_KERNEL, subject.name, ())
                patch.setattr(backends, "note", lambda message: None)
            cast = run(*leaves, backend=backend)
            cast_grads = gradients(lambda *values: run(*values, backend=backend), leaves)  # noqa: B023
        torch.testing.assert_close(as_tuple(cast), as_tuple(outputs), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cast_grads, grads, rtol=1e-4, atol=1e-5)


def inference_mode(subject: Subject) -> None:
    leaves, run = subject.leaves()
    expected = tuple(o.detach() for o in as_tuple(run(*leaves)))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = as_tuple(run(*leaves))
        assert not any(out.requires_grad for out in outputs)
        assert_same_bits(outputs, expected)


def checkpointed(subject: Subject) -> None:
    leaves, run = subject.leaves()
    expected = gradients(run, leaves)
    for use_reentrant in (False, True):
        outputs = checkpoint(run, *leaves, use_reentrant=use_reentrant)
        for leaf in leaves:
            leaf.grad = None
        loss(outputs).backward()
        assert_same_bits(tuple(leaf.grad for leaf in leaves), expected)


def vmap(subject: Subject) -> None:
    """Over the tokens alone (folded into the batch) and over everything (one by one)."""
    runs = [subject.leaves(seed=seed) for seed in range(3)]
    run = runs[0][1]
    leaves = [[leaf.detach() for leaf in values] for values, _ in runs]
    everything = [torch.stack(tensors) for tensors in zip(*leaves, strict=True)]
    expected = [as_tuple(run(*values)) for values in leaves]
    actual = as_tuple(torch.func.vmap(run)(*everything))
    for number, out in enumerate(actual):
        torch.testing.assert_close(out, torch.stack([outputs[number] for outputs in expected]))
    shared = leaves[0][1:]
    expected = [as_tuple(run(values[0], *shared)) for values in leaves]
    actual = as_tuple(torch.func.vmap(lambda x: run(x, *shared), in_dims=1)(everything[0].movedim(0, 1)))
    for number, out in enumerate(actual):
        torch.testing.assert_close(out, torch.stack([outputs[number] for outputs in expected]))


def func_grad(subject: Subject) -> None:
    """torch.func.grad, alone and under vmap (gradients per sample), of each input and of all, whichever are mapped."""
    runs = [subject.leaves(seed=seed) for seed in range(3)]
    run = runs[0][1]
    leaves = [[leaf.detach() for leaf in values] for values, _ in runs]
    count = len(leaves[0])
    stacked = [torch.stack(tensors) for tensors in zip(*leaves, strict=True)]
    for wanted in (*((number,) for number in range(count)), tuple(range(count))):
        gradient = torch.func.grad(lambda *values: loss(run(*values)), argnums=wanted)
        for mapped in (*({number} for number in range(count)), set(range(count))):
            samples = [[leaves[s if i in mapped else 0][i] for i in range(count)] for s in range(3)]
            expected = []
            for values in samples:
                one = [value.clone().requires_grad_(i in wanted) for i, value in enumerate(values)]
                expected.append(torch.autograd.grad(loss(run(*one)), [one[i] for i in wanted]))
            torch.testing.assert_close(gradient(*samples[0]), expected[0])
            arguments = [stacked[i] if i in mapped else leaves[0][i] for i in range(count)]
            axes = tuple(0 if i in mapped else None for i in range(count))
            actual = torch.func.vmap(gradient, in_dims=axes)(*arguments)
            torch.testing.assert_close(actual, tuple(map(torch.stack, zip(*expected, strict=True))))


def further_derivatives_raise(subject: Subject) -> None:
    leaves, run = subject.leaves()
    x = leaves[0]
    for upstream_requires_grad in (False, True):
        outputs = as_tuple(run(*leaves))
        upstream = [torch.ones_like(out, requires_grad=upstream_requires_grad) for out in outputs]
        (grad,) = torch.autograd.grad(outputs, x, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{subject.name} can be differentiated once; .*backend='reference'"):
            torch.autograd.grad(grad.square().sum() + x.square().sum(), x)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: loss(run(x, *leaves[1:])))(x).square().sum())(x.detach())
    with pytest.raises(RuntimeError, match="forward mode AD"):
        torch.func.jvp(lambda x: run(x, *leaves[1:]), (x.detach(),), (torch.ones_like(x),))


def compiled_transforms_are_right_or_raise(subject: Subject) -> None:
    """torch.func inside torch.compile: Dynamo would inline the Function's forward and differentiate nothing."""
    leaves, run = subject.leaves()
    x, others = leaves[0], leaves[1:]

    def scalar(x: Tensor) -> Tensor:
        return loss(run(x, *others, backend=None))

    def penalty(x: Tensor) -> Tensor:
        return torch.func.grad(scalar)(x).square().sum()

    def tangent(x: Tensor) -> Any:
        return torch.func.jvp(scalar, (x,), (torch.ones_like(x),))

    torch._dynamo.reset()
    expected = torch.func.grad(scalar)(x.detach())
    torch.testing.assert_close(torch.compile(torch.func.grad(scalar), backend="aot_eager")(x).detach(), expected)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.compile(penalty, backend="aot_eager")(x).backward()
    with pytest.raises(RuntimeError, match="forward mode AD"):
        torch.compile(tangent, backend="aot_eager")(x.detach())


def checkpointed_with_create_graph(subject: Subject) -> None:
    """Checkpointing unpacks what is saved once only."""
    leaves, run = subject.leaves()
    expected = gradients(run, leaves)
    value = loss(checkpoint(run, *leaves, use_reentrant=False))
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    assert_same_bits(tuple(grad.detach() for grad in grads), expected)


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

    def repeat(number: int) -> None:
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


CHECKS = (
    gradcheck,
    runs_where_it_says,
    reference_backend_is_the_reference,
    fallback_differentiates,
    only_what_is_needed,
    frozen_inputs_get_no_gradient,
    accumulates_into_a_buffer,
    any_strides,
    zero_stride_gradients,
    offsets_beyond_32_bits,
    no_clips,
    opcheck,
    compile_fullgraph,
    export,
    autocast_changes_nothing,
    inference_mode,
    checkpointed,
    vmap,
    func_grad,
    further_derivatives_raise,
    compiled_transforms_are_right_or_raise,
    checkpointed_with_create_graph,
    same_bits_at_any_thread_count,
    two_python_threads,
    bad_input,
    the_raw_op_reads_no_wrong_memory,
)


def compare_with_reference(subject: Subject, backend: str, layout: str | None = None, **sizes: Any) -> None:
    """Outputs and all gradients against plain PyTorch and the float64 reference, by the three-way rule."""
    case = subject.case(**sizes)
    if layout is not None:
        case.inputs["x"] = layouts(case.inputs["x"])[layout]
    before = backends.executed.copy()
    assert_close_three_way(three_way(subject.name, *case, backend=backend))
    ran = backends.executed - before
    assert ran[subject.name, backend]
    assert ran[f"{subject.name}_backward", backend]
