"""What PyTorch asks of every op: compile, export, autocast, checkpointing, torch.func, and clear errors past them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_subject import Subject, as_tuple, assert_same_bits, gradients, loss
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from inti_kernels import backends


def opcheck(subject: Subject) -> None:
    for needs_grad in (False, True):
        case = subject.case()
        for value in case.inputs.values():
            if value is not None:
                value.requires_grad_(needs_grad)
        torch.library.opcheck(getattr(torch.ops.inti_kernels, subject.name).default, subject.custom_op_args(case))
    case = subject.case()
    needs = [case.inputs[name] is not None for name in subject.arguments]
    for buffer in (None, torch.zeros_like(case.inputs["x"])):
        backward = getattr(torch.ops.inti_kernels, f"{subject.name}_backward").default
        torch.library.opcheck(
            backward,
            subject.backward_args(case, torch.ones_like, needs, buffer),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def _chosen(subject: Subject) -> str:
    """The choice that takes the backend under test: what has to be asked for is, for `auto` never takes it."""
    return subject.backend if subject.backend != "cpu" else "auto"


def compile_fullgraph(subject: Subject) -> None:
    leaves, run = subject.leaves()
    torch._dynamo.reset()
    with backends.use_backend(_chosen(subject)):
        compiled = torch.compile(lambda *values: run(*values, backend=None), fullgraph=True)
        before = backends.executed.copy()
        actual = gradients(compiled, leaves)
    assert (backends.executed - before)[f"{subject.name}_backward", subject.backend] == 1
    for a, b in zip(actual, gradients(run, leaves), strict=True):
        torch.testing.assert_close(a, b)


def export(subject: Subject) -> None:
    leaves, run = subject.leaves()

    class Module(torch.nn.Module):
        def forward(self, *values: Tensor) -> Any:
            return run(*values, backend=_chosen(subject))

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
        return loss(run(x, *others, backend=_chosen(subject)))

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
