"""What temporal modules in a vision tower have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import backends
from ...reference import functional


class TemporalModules(nn.Module):
    """Modules that let the frames of a clip see each other, put in and beside the blocks of a tower.

    A compressed model calls, for every block (numbered from 1): :meth:`before_attention` if :meth:`precedes` says so,
    the block, with :meth:`before_mlp` in its middle if :meth:`splits` does, and :meth:`after_block` if :meth:`reads`
    does.

    **(choice)** Where a method has merged or dropped patches they stand in their places again for that
    (:meth:`~inti_kernels.models.TokenReduction.on_grid`): of merged ones each has the merged token, and one that was
    dropped is zero.

    Args:
        dim: width C of the tokens.
        blocks: how many the tower has.
        grid: (H, W), the patches of a frame that the tower was built for; every call says its own.
        prefix: tokens before the patches.
        backend: "auto", "reference", "cpu", "triton" or "cuda" for the depthwise convolutions; None takes the choice in
            force at each call, see :func:`inti_kernels.use_backend`.

    Raises:
        ValueError, TypeError: sizes below 1 or that aren't whole numbers, an unknown backend.
    """

    # Whether `features` takes the place of the tower's own head.
    replaces_head = False

    def __init__(
        self, dim: int, blocks: int, grid: tuple[int, int], *, prefix: int = 1, backend: str | None = None
    ) -> None:
        super().__init__()
        functional.check_at_least_1(dim=dim, blocks=blocks)
        functional.check_grid(grid)
        functional.check_prefix(prefix)
        backends.requested(backend)
        self.dim, self.blocks, self.grid, self.prefix, self.backend = dim, blocks, tuple(grid), prefix, backend

    def start(self, batch: int) -> Any:
        """What :meth:`after_block` hands on from block to block; None where nothing is."""
        return None

    def precedes(self, number: int) -> bool:
        """Whether :meth:`before_attention` does anything at this block."""
        return False

    def splits(self, number: int) -> bool:
        """Whether :meth:`before_mlp` does anything at this block."""
        return False

    def before_attention(self, number: int, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        """What stands before a block.

        Args:
            number: of the block, from 1.
            x: [B·T, N, C], the block's input, N = prefix + H·W.
            frames: T at this block; compression halves it.
            grid: (H, W) patches of these frames.

        Returns:
            The tokens that the block gets, [B·T, N, C].

        Raises:
            ValueError: N isn't prefix + H·W.
        """
        return x

    def before_mlp(self, number: int, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        """What stands in the middle of a block.

        Args:
            number, frames, grid: as :meth:`before_attention` has them.
            x: [B·T, N, C], behind the attention's residual.

        Returns:
            The tokens that norm2, and the MLP's residual, get, [B·T, N, C].

        Raises:
            ValueError: N isn't prefix + H·W.
        """
        return x

    def after_block(
        self, number: int, x: Tensor, frames: int, grid: tuple[int, int], present: Tensor | None, state: Any
    ) -> Any:
        """What stands beside a block.

        Args:
            number, frames, grid: as :meth:`before_attention` has them.
            x: [B·T, N, C], the block's output before any compression behind it.
            present: [B·T, N] (bool), which places have a token; None if all have.
            state: of :meth:`start`, or of the block before.

        Returns:
            The new state.

        Raises:
            ValueError: N isn't prefix + H·W.
        """
        return state

    def reads(self, number: int) -> bool:
        """Whether :meth:`after_block` does anything at this block."""
        return False

    def features(self, x: Tensor, state: Any) -> Tensor:
        """Where ``replaces_head``: the last block's tokens [B, T, N, C] and the state → [B, C]."""
        raise NotImplementedError

    def macs(self, number: int, frames: int, tokens: int | None = None) -> int:
        """Multiply-accumulates of what stands in and behind a block, for one clip: linear layers, convolutions (every
        tap at every output) and attention's two products.

        Args:
            number: of the block, from 1.
            frames: T at that block.
            tokens: N of a frame on its whole grid; None for prefix + H·W of ``grid``.
        """
        raise NotImplementedError

    def _patches(self, tokens: int | None) -> int:
        return self.grid[0] * self.grid[1] if tokens is None else tokens - self.prefix

    def extra_repr(self) -> str:
        return f"dim={self.dim}, blocks={self.blocks}, grid={self.grid}, prefix={self.prefix}, backend={self.backend!r}"
