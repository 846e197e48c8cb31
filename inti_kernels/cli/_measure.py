"""What the demo measures of a tower: agreement, multiply-accumulates, bytes kept for the backward, latency."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ._clip import VideoTower


@dataclass
class Kept:
    """Storages that a forward keeps for its backward, by address: all of them, and those kept inside given modules."""

    everywhere: dict[int, int] = field(default_factory=dict)
    inside: dict[int, int] = field(default_factory=dict)


@contextmanager
def kept_for_backward(model: nn.Module, inside: Iterable[nn.Module] = ()) -> Iterator[Kept]:
    """Record the storages saved for the backward while the context is open, each once, parameters left out.

    Read the result while the forward's output is alive: a freed storage's address may be given out again.
    """
    kept = Kept()
    parameters = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    depth = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept.everywhere[storage._cdata] = storage.nbytes()
            if depth:
                kept.inside[storage._cdata] = storage.nbytes()
        return tensor

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1

    hooks = [hook for m in inside for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()


def count_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates of matrix products, convolutions and attention's two products in a forward of `model`.

    The convention of fvcore and of the papers that print "GFLOPs": element-wise work isn't counted. Nothing is
    computed: for the count, parameters and inputs are tensors without data, on which attention is two plain products.
    """
    mapping = {torch.ops.inti_kernels.depthwise_conv3d: _depthwise_conv3d_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    shapes = {name: tensor.to("meta") for name, tensor in tensors}
    with torch.no_grad(), counter:
        torch.func.functional_call(model, shapes, tuple(tensor.to("meta") for tensor in inputs))
    return counter.get_total_flops() // 2


def _depthwise_conv3d_flops(x: torch.Size, weight: torch.Size, *arguments: object, out_shape: torch.Size) -> int:
    """As PyTorch counts a convolution: every tap at every output, those on the padding too."""
    height, width = arguments[2]
    return 2 * out_shape[0] * out_shape[1] * height * width * math.prod(weight)


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, step: Callable[[str], None]) -> dict[str, list]:
    """Seconds of every run in each of `rounds` rounds; a round starts with another contender than the last."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            step(f"latency of {name}")
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


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
