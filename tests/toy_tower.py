"""A small pre-norm tower of blocks alone, for the tests of what works inside blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inti_kernels.models import Adapter, BlockParts, TokenReduction
from inti_kernels.testing import randomize

DIM, HEADS, FRAMES = 16, 2, 4


class Block(nn.Module):
    """A pre-norm block: attention written out, so that it is another way than the methods' own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.project = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT * (DIM // HEADS) ** -0.5
        return self.project((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ToyAdapter(Adapter):
    """Blocks alone."""

    library = "toy"
    dim = DIM

    def __init__(self, blocks: int, prefix: int = 1) -> None:
        super().__init__(nn.ModuleList(Block() for _ in range(blocks)))
        self.prefix = prefix
        randomize(self.model, 0)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    def take_apart(self, block: Block) -> BlockParts:
        return BlockParts(block.norm1, block.attention, block.heads, block.project, (DIM // HEADS) ** -0.5,
                          block.norm2, block.mlp)  # fmt: skip


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(adapter: ToyAdapter, method: TokenReduction, x: Tensor, frames: int = FRAMES) -> tuple[Tensor, Any]:
    """All blocks."""
    state = method.start(x, frames)
    for number, block in enumerate(adapter.blocks, 1):
        x, state = method.block(adapter, block, number, x, frames, state)
    return x, state
