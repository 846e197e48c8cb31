"""FusedInTI's linear layer is torch.nn.functional.linear, whichever product computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inti_kernels.modules import _linear
from inti_kernels.testing import assert_close_three_way, compare


@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(("shape", "out"), [((2, 3, 50, 40), 24), ((1, 1), 1), ((7, 33), 65)], ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], out: int, layout: str, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_onednn and not torch.backends.mkldnn.is_available():
        by_onednn = False  # then there is one way only
    monkeypatch.setattr(_linear, "_BY_ONEDNN", by_onednn)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(size, generator=generator) for size in (shape, (out, shape[-1]), (out,))]
    upstream = torch.randn(*shape[:-1], out, generator=generator)
    if layout == "transposed":
        leaves[0] = leaves[0].transpose(0, -1).contiguous().transpose(0, -1)
    results = []
    for run, dtype in ((_linear.linear, torch.float32), (F.linear, torch.float32), (F.linear, torch.float64)):
        values = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        y = run(*values)
        results.append((y, *torch.autograd.grad(y, values, upstream.to(dtype))))
    names = ("y", "grad x", "grad weight", "grad bias")
    rows = [compare(name, *three) for name, *three in zip(names, *results, strict=True) if three[0].numel() >= 64]
    if rows:  # the three-way rule says nothing of a handful of numbers
        assert_close_three_way(rows)
    for kernel, _, exact in zip(*results, strict=True):
        torch.testing.assert_close(kernel.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["float64", "bfloat16", "empty", "autocast", "export"])
def test_what_only_torch_linear_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "_BY_ONEDNN", True)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    x = torch.randn(0 if case == "empty" else 3, 5, dtype=dtype)
    weight, bias = torch.randn(4, 5, dtype=dtype), torch.randn(4, dtype=dtype)
    if case == "export":

        class Layer(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return _linear.linear(x, weight, bias)

        program = torch.export.export(Layer(), (x,))
        assert not [node for node in program.graph.nodes if "conv" in str(node.target)]
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        torch.testing.assert_close(_linear.linear(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=0)
