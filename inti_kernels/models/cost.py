"""What a compressed model costs: multiply-accumulates of one clip and parameters, counted by running it and by formula,
and the setting of a method that a budget allows.

The convention is fvcore's, and of the papers that print "GFLOPs": matrix products, convolutions (every tap at every
output, on the padding too) and attention's two products; element-wise work isn't counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from ..reference import InTI
from .adapters import Adapter
from .methods import ConvPooling, LinearPooling, TokenReduction, build_method, choices, reduces_tokens
from .temporal import STAdapter, TemporalModules, UniFormerV2, build_temporal

PARTS = ("embed", "blocks", "compression", "temporal", "head")


def count_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates in a forward of a model, counted by running it under torch's FlopCounterMode.

    Nothing is computed: for the count, parameters and inputs are tensors without data, on which attention is two plain
    products, and this package's ops are what they stand for (whatever their backend, which may be unable to run here).

    Args:
        model: parameters of any device; it is left as it is.
        inputs: of its forward, of any device. A compressed model takes one video [B, T, 3, H, W]; B clips cost B times
            as much.

    Returns:
        Half of what the counter calls flops.

    Raises:
        Whatever the model raises on inputs of other shapes.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from ..ops import _flops  # noqa: F401  (registers the ops with the counter)

    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, shapes, tuple(tensor.to("meta") for tensor in inputs))
    return counter.get_total_flops() // 2


def count_parameters(model: nn.Module) -> int:
    """Parameters of a compressed model; without those of the tower's head where temporal modules stand in for it."""
    unused = set(model.adapter.head_parameters()) if model.replaces_head else set()
    return sum(parameter.numel() for parameter in model.parameters() if parameter not in unused)


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one clip, and parameters."""

    macs: int = 0
    parameters: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.macs + other.macs, self.parameters + other.parameters)

    def __mul__(self, times: int) -> Work:
        return Work(self.macs * times, self.parameters * times)


def linear(rows: int, inputs: int, outputs: int, bias: bool = True) -> Work:
    """A Linear on so many rows."""
    return Work(rows * inputs * outputs, (inputs + bias) * outputs)


def depthwise(outputs: int, dim: int, taps: int) -> Work:
    """A depthwise convolution with bias, at so many places."""
    return Work(outputs * dim * taps, dim * (taps + 1))


def norm(dim: int) -> Work:
    """A LayerNorm or BatchNorm, with weight and bias."""
    return Work(0, 2 * dim)


@dataclass(frozen=True)
class Tower:
    """The sizes of a vision tower that its cost follows from.

    Args:
        dim: C.
        blocks: L.
        patch: (height, width) in pixels.
        grid: (H, W) patches.
        features: D of the head, a projection without bias of one token a frame; 0 without one.
        prefix: tokens before the patches.
        hidden: width of the MLP's hidden layer; None for 4·C.
        width: of an attention head, where something inside the blocks compares tokens by their keys.
        macs_of_head: of one frame, where the head is more than that projection.
    """

    dim: int
    blocks: int
    patch: tuple[int, int]
    grid: tuple[int, int]
    features: int
    prefix: int = 1
    hidden: int | None = None
    width: int | None = None
    macs_of_head: int | None = None

    @classmethod
    def of(cls, adapter: Adapter, heads: bool = False) -> Tower:
        """Of a real tower on pictures of its own size: of its blocks by the sizes of their matrices, whatever their MLP
        is made of (attention being two products); its head is run on tokens without data.

        Args:
            adapter: of the tower, all of whose blocks are as large as the first.
            heads: whether ``width`` is read, for a :class:`TokenReduction`, from keys of the first block.

        Raises:
            ValueError: with ``heads``, if the blocks can't be taken apart or their keys can't be read.
        """
        dim, block = adapter.dim, adapter.blocks[0]
        of_block, of_head = (
            sum(parameter.numel() for parameter in parameters if parameter.dim() > 1)
            for parameters in (block.parameters(), adapter.head_parameters())
        )
        # Of the dtype that the products are in: in a half-precision tower the norms may be wider.
        token = next(parameter for parameter in block.parameters() if parameter.dim() > 1).new_zeros(1, 1, dim)
        width = None
        if heads:
            with torch.no_grad():
                width = adapter.parts(block).qkv(token)[0].shape[-1]
        sizes = (dim, len(adapter.blocks), adapter.patch, adapter.own_grid, of_head // dim, adapter.prefix)
        tower = cls(*sizes, (of_block - 4 * dim**2) // (2 * dim), width)
        return replace(tower, macs_of_head=count_macs(_Head(adapter), token.expand(1, tower.tokens, dim)))

    @property
    def tokens(self) -> int:
        """N of a frame."""
        return self.prefix + self.grid[0] * self.grid[1]

    def embed(self, frames: int) -> Work:
        """Patches, class token and positions, and the LayerNorm before the blocks."""
        patches, area = self.tokens - self.prefix, self.patch[0] * self.patch[1]
        positions = Work(0, (self.prefix + self.tokens) * self.dim)
        return linear(frames * patches, 3 * area, self.dim, bias=False) + positions + norm(self.dim)

    def block(self, frames: int, tokens: int, tokens_of_mlp: int) -> Work:
        """One block, whose attention and MLP see so many tokens of each frame."""
        hidden = 4 * self.dim if self.hidden is None else self.hidden
        attention = linear(frames * tokens, self.dim, self.dim) * 4 + Work(frames * 2 * tokens**2 * self.dim)
        rows = frames * tokens_of_mlp
        return norm(self.dim) * 2 + attention + linear(rows, self.dim, hidden) + linear(rows, hidden, self.dim)

    def head(self, frames: int) -> Work:
        """The LayerNorm behind the blocks and the projection."""
        projection = linear(frames, self.dim, self.features, bias=False)
        macs = projection.macs if self.macs_of_head is None else frames * self.macs_of_head
        return norm(self.dim) + Work(macs, projection.parameters)


class _Head(nn.Module):
    """A tower's head as a module of its own: [F, N, C] → [F, D]."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.model, self.adapter = adapter.model, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter.head(x)


def formula(
    tower: Tower,
    frames: int,
    insertions: Mapping[int, nn.Module] | None = None,
    reduction: TokenReduction | None = None,
    temporal: TemporalModules | None = None,
    classifier: tuple[int, int] | None = None,
) -> dict[str, Work]:
    """The cost of a compressed model by formula: what :func:`count_macs` and :func:`count_parameters` find.

    Args:
        tower: its multiply-accumulates are those of any tower of these sizes, its parameters those of a CLIP.
        frames: T of a clip.
        insertions: block number, counted from 1, → what stands behind it and halves the frames.
        reduction: what takes tokens out of frames inside the blocks.
        temporal: the temporal modules.
        classifier: (features, classes) of the classifier, if there is one.

    Returns:
        By part (PARTS), of one clip; a classifier is of the head.
    """
    insertions, count = insertions or {}, tower.tokens
    by_block = [(count, count)] * tower.blocks if reduction is None else reduction.tokens(count, tower.blocks)
    cost = dict.fromkeys(PARTS, Work()) | {"embed": tower.embed(frames)}
    if reduction is not None:
        cost["compression"] = Work(reduction.macs(frames, count, tower.blocks, tower.width))
    if temporal is not None:
        cost["temporal"] = Work(0, temporal_parameters(temporal))
    for number, tokens in enumerate(by_block, 1):
        cost["blocks"] += tower.block(frames, *tokens)
        if temporal is not None:
            cost["temporal"] += Work(temporal.macs(number, frames, count))
        if number in insertions:
            cost["compression"] += insertion(insertions[number], frames, count)
            frames //= 2
    if temporal is None or not temporal.replaces_head:
        cost["head"] = tower.head(frames)
    if classifier is not None:
        cost["head"] += linear(1, *classifier)
    return cost


def by_formula(model: nn.Module) -> dict[str, Work]:
    """:func:`formula` of a :class:`~inti_kernels.models.CompressedViT`, at its tower's own resolution."""
    insertions = {int(number): module for number, module in model.insertions.items()}
    linear = model.classifier
    classifier = None if linear is None else (linear.in_features, linear.out_features)
    tower = Tower.of(model.adapter, heads=model.reduction is not None)
    return formula(tower, model.frames, insertions, model.reduction, model.temporal, classifier)


def total(cost: Mapping[str, Work]) -> Work:
    """All parts."""
    return sum(cost.values(), Work())


@singledispatch
def insertion(module: nn.Module, frames: int, tokens: int) -> Work:
    """What stands between two blocks and gets ``frames`` frames of ``tokens`` tokens; another class registers its own
    formula."""
    raise TypeError(f"no formula for the cost of {type(module).__name__}; there is one for InTI and the poolings")


@insertion.register
def _(module: LinearPooling, frames: int, tokens: int) -> Work:
    return Work(module.macs(frames, tokens), 2)


@insertion.register
def _(module: ConvPooling, frames: int, tokens: int) -> Work:
    return Work(module.macs(frames, tokens), module.conv.weight.numel() + module.dim)


@insertion.register
def inti(module: InTI, frames: int, tokens: int) -> Work:
    """An InTI with any context, fusion and head (Eq. 7 to 13)."""
    dim, hidden, context = module.dim, module.hidden, module.context
    pairs, attention = frames // 2, module.head_type == "attention"
    work = Work(0, module.frames * dim + 1) + norm(dim) + linear(frames * tokens, dim, dim // 2)
    if "cube" in context:
        work += depthwise(pairs * (tokens - module.prefix), dim, 27)
    if "frame" in context:
        work += norm(dim) + linear(frames, dim, dim // 2) + norm(dim) + linear(pairs, dim, dim)
    if "global" in context:
        for steps in (frames, -(-frames // 2), -(-frames // 4)):
            work += depthwise(steps, dim, 3)
    width = {"separate": dim * bool(context), "add": 0, "cat": dim * len(context)}[module.fusion]
    rows = pairs * tokens
    if attention:  # once a frame of the pair, and one query for all
        twice = 2 * rows
        return work + linear(twice, dim // 2 + width, hidden) + Work(twice * hidden, hidden)
    return work + linear(rows, dim + width, hidden) + linear(rows, hidden, 2)


@singledispatch
def temporal_parameters(modules: TemporalModules) -> int:
    """How many parameters temporal modules have; another class registers its own formula."""
    raise TypeError(f"no formula for the parameters of {type(modules).__name__}")


@temporal_parameters.register
def _(modules: STAdapter) -> int:
    return modules.blocks * _bottleneck(modules.dim, modules.width)


@temporal_parameters.register
def _(modules: UniFormerV2) -> int:
    dim = modules.dim
    local = {False: 0, True: 1, "double": 2}[modules.local] * modules.blocks
    count = local * (norm(dim).parameters + _bottleneck(dim, int(dim / 1.5)))
    if modules.replaces_head:
        of_mlp = modules.global_blocks[0].mlp[0].out_features
        one = depthwise(0, dim, 27) + linear(0, dim, dim) * 4 + norm(dim) * 3
        one += linear(0, dim, of_mlp) + linear(0, of_mlp, dim)
        # The global token, its balance with the class tokens, and the LayerNorm of both.
        count += len(modules.global_blocks) * one.parameters + 2 * dim + norm(dim).parameters
    return count


def _bottleneck(dim: int, width: int) -> int:
    return (linear(0, dim, width) + depthwise(0, width, 3) + linear(0, width, dim)).parameters


def setting_for(
    adapter: Adapter,
    gflops: float,
    method: str,
    options: Mapping[str, Any],
    frames: int,
    temporal: str | None = None,
    temporal_options: Mapping[str, Any] | None = None,
    classes: int | None = None,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The costliest setting of a method whose multiply-accumulates of one clip are within a budget, by formula.

    Args:
        adapter: of the tower.
        gflops: the budget in units of 1e9.
        method, options, frames, temporal, temporal_options, classes: as :func:`inti_kernels.compress` has them; the
            method's ``choices`` are the settings to choose from.

    Returns:
        ``after`` (empty for methods that halve no frames) and the method's options, the setting among them.

    Raises:
        ValueError: even the cheapest setting is above the budget, the tower has too few blocks for any, or its blocks
            can't be taken apart as the method needs it.
        TypeError: the options hold what the budget is to set.
    """
    tower = Tower.of(adapter, heads=reduces_tokens(method))
    settings = choices(method, tower.blocks, tower.tokens, tower.prefix)
    if taken := sorted({name for setting in settings for name in setting} & set(options)):
        raise TypeError(f"gflops= sets {', '.join(taken)} of {method}: give one or the other")
    costs = []
    with torch.device("meta"):  # sizes are all that is asked of them
        modules = build_temporal(temporal, adapter, temporal_options or {})
        replaced = modules is not None and modules.replaces_head
        classifier = None if classes is None else (adapter.dim if replaced else adapter.out_features, classes)
        for setting in settings:
            after, own = setting.get("after", ()), {**options, **{k: v for k, v in setting.items() if k != "after"}}
            parts = build_method(method, adapter, frames, after, own)
            costs.append((total(formula(tower, frames, *parts, modules, classifier)).macs, after, own))
    if not costs:
        raise ValueError(f"a tower of {tower.blocks} blocks has no place for two {method}: leave out gflops=")
    within = [cost for cost in costs if cost[0] <= gflops * 1e9]
    if not within:
        least = min(macs for macs, _, _ in costs) / 1e9
        raise ValueError(f"gflops={gflops:g} can't be reached by {method} in this tower: the least is {least:.4g}")
    _, after, own = max(within, key=lambda cost: cost[0])
    return after, own
