"""The CUDA kernels where there is a GPU and they were built for it: streams and graphs, which no emulator has.

Correctness on a GPU is `python -m inti_kernels check --device cuda`'s business.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inti_kernels import FusedInTI, backends, ops
from inti_kernels.testing import module_case, op_cases

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(backends.why_not("cuda", device="cuda", dtype=torch.float16)),
    reason="no GPU that the CUDA kernels were built for",
)


def step(module: FusedInTI, x: Tensor) -> tuple[Tensor, ...]:
    z, weights = module(x, return_weights=True)
    loss = z.float().square().mean() + weights.float().square().mean()
    return z, *torch.autograd.grad(loss, [x, *module.parameters()])


def test_a_training_step_in_a_cuda_graph() -> None:
    inti, x = module_case(dim=64, frames=4, grid=(4, 4), batch=2, dtype=torch.float16, device="cuda")
    fused = FusedInTI.from_reference(inti, backend="cuda")
    x.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capturing asks for a warm-up on a stream of its own
        for _ in range(3):
            step(fused, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(fused, x)
    for seed in range(2):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for ours, eager in zip(captured, step(fused, x), strict=True):
            torch.testing.assert_close(ours, eager, rtol=0, atol=0)


@pytest.mark.parametrize("op", ops.OPS)
def test_the_current_stream_is_taken(op: str) -> None:
    """Kernels started in another stream would read x before it is there."""
    inputs, kwargs = op_cases(op, dim=64, frames=4, grid=(4, 4), dtype=torch.float16, device="cuda")
    run = getattr(ops, op)
    expected = run(**inputs, **kwargs, backend="cuda")
    late = torch.zeros_like(inputs["x"])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(inputs["x"])
        actual = run(**{**inputs, "x": late}, **kwargs, backend="cuda")
    torch.cuda.synchronize()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_backward_in_autograds_threads_takes_the_forwards_stream() -> None:
    inputs, kwargs = op_cases("depthwise_conv3d", dim=64, frames=4, grid=(4, 4), dtype=torch.float16, device="cuda")
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    y = ops.depthwise_conv3d(**leaves, **kwargs, backend="cuda")
    expected = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = ops.depthwise_conv3d(**leaves, **kwargs, backend="cuda")
        upstream = torch.zeros_like(y)
        torch.cuda._sleep(50_000_000)
        upstream.fill_(1)
        actual = torch.autograd.grad(y, list(leaves.values()), upstream)
    torch.cuda.synchronize()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
