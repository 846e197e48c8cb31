"""What the demo measures of a tower: agreement and multiply-accumulates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import FusedInTI
from ._clip import VideoTower


def count_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates of matrix products, convolutions and attention's two products in a forward of `model`.

    The convention of fvcore and of the papers that print "GFLOPs": element-wise work isn't counted. Nothing is
    computed: for the count, parameters and inputs are tensors without data, on which attention is two plain products,
    and a FusedInTI is the InTI that it stands for: every tap of a convolution at every output, on the padding too.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    shapes = {name: tensor.to("meta") for name, tensor in tensors}
    with torch.no_grad(), _as_reference(model), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, shapes, tuple(tensor.to("meta") for tensor in inputs))
    return counter.get_total_flops() // 2


@contextmanager
def _as_reference(model: nn.Module) -> Iterator[None]:
    """Every FusedInTI in the model is plain PyTorch while the context is open."""
    backends = {module: module.backend for module in model.modules() if isinstance(module, FusedInTI)}
    try:
        for module in backends:
            module.backend = "reference"
        yield
    finally:
        for module, backend in backends.items():
            module.backend = backend


@dataclass(frozen=True)
class Agreement:
    """One tensor of FusedInTI against InTI's: RMS of the difference over the RMS of InTI's, and whether it is small."""

    name: str
    error: float
    ok: bool


# Both ways end in the same float32 products, summed in another order; through the blocks of a ViT and back, rounding
# grows to some 1e-6. `check` holds every op to the bounds of float64; this only has to find a wrong one.
AGREEMENT_BOUND = 1e-4


def agreement(inti: VideoTower, fused: VideoTower, tokens: Tensor, start: int) -> list[Agreement]:
    """Run two towers from block `start` on and back, and compare embedding, weights and every gradient.

    tokens: [B, T, N, C] after block `start`. The gradients: of the tokens and of the compressions' parameters.
    """
    want, got = (_forward_backward(tower, tokens, start) for tower in (inti, fused))
    rows = []
    for name, reference in want.items():
        scale = reference.double().square().mean().sqrt()
        error = float((got[name].double() - reference.double()).square().mean().sqrt() / scale)
        # A vanishing reference gives nan or inf, which is not small.
        rows.append(Agreement(name, error, error <= AGREEMENT_BOUND))
    return rows


def _forward_backward(tower: VideoTower, tokens: Tensor, start: int) -> dict[str, Tensor]:
    leaf = tokens.detach().requires_grad_()
    weights: list[Tensor] = []
    embedding = tower.pool(tower.run(leaf, start, weights=weights))
    parameters = dict(tower.compressions.named_parameters())
    upstream = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(embedding, (leaf, *parameters.values()), upstream)
    outputs = {"clip embedding": embedding.detach()}
    outputs |= {f"weights after block {key}": w.detach() for key, w in zip(tower.compressions, weights, strict=True)}
    names = ("tokens", *parameters)
    return outputs | {f"gradient of {name}": g for name, g in zip(names, gradients, strict=True)}
