"""What the demo measures of two towers: whether they agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import CompressedViT


@dataclass(frozen=True)
class Agreement:
    """One tensor of FusedInTI against InTI's: RMS of the difference over the RMS of InTI's, and whether it is small."""

    name: str
    error: float
    ok: bool


# Both ways end in the same float32 products, summed in another order; through the blocks of a ViT and back, rounding
# grows to some 1e-6. `check` holds every op to the bounds of float64; this only has to find a wrong one.
AGREEMENT_BOUND = 1e-4


def agreement(inti: CompressedViT, fused: CompressedViT, tokens: Tensor, start: int) -> list[Agreement]:
    """Run two towers from block `start` on and back, and compare embedding, weights and every gradient.

    tokens: [B, T, N, C] after block `start`. The gradients: of the tokens and of the insertions' parameters.
    """
    want, got = (_forward_backward(tower, tokens, start) for tower in (inti, fused))
    rows = []
    for name, reference in want.items():
        scale = reference.double().square().mean().sqrt()
        error = float((got[name].double() - reference.double()).square().mean().sqrt() / scale)
        # A vanishing reference gives nan or inf, which is not small.
        rows.append(Agreement(name, error, error <= AGREEMENT_BOUND))
    return rows


def _forward_backward(tower: CompressedViT, tokens: Tensor, start: int) -> dict[str, Tensor]:
    leaf = tokens.detach().requires_grad_()
    weights: list[Tensor] = []
    embedding = tower.pool(tower.run(leaf, start, weights=weights))
    parameters = dict(tower.insertions.named_parameters())
    upstream = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(embedding, (leaf, *parameters.values()), upstream)
    outputs = {"clip embedding": embedding.detach()}
    outputs |= {f"weights after block {key}": w.detach() for key, w in zip(tower.insertions, weights, strict=True)}
    names = ("tokens", *parameters)
    return outputs | {f"gradient of {name}": g for name, g in zip(names, gradients, strict=True)}
