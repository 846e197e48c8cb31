"""What the methods of compression have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..adapters import Adapter, attend


def insertion_choices(blocks: int) -> list[dict[str, tuple[int, int]]]:
    """Where two insertions can stand in a tower, for a budget of cost: ``after`` from the costliest to the cheapest.

    The two stand as far apart as the paper has them, two blocks of 12 or four of 24 (rounded down in other towers, but
    at least one). The later they stand, the more blocks run on all frames.

    Returns:
        Arguments of :func:`inti_kernels.compress`: [{"after": (i, j)}, …]. Behind the last block there would be nothing
        to save, so j < blocks; none if there are fewer than 3 blocks.
    """
    apart = max(1, blocks // 6)
    return [{"after": (first, first + apart)} for first in range(blocks - apart - 1, 0, -1)]


class TokenReduction(nn.Module):
    """A method that takes tokens out of frames, inside the blocks, and leaves the number of frames as it is.

    No parameters, and no state but what :meth:`start` makes and :meth:`block` hands on (tuples of tensors), so that a
    block may run again in the backward (gradient checkpointing).

    Args:
        adapter: of the tower, for the number of its blocks and prefix tokens and its kind of head; not kept.
    """

    # Whether tokens are taken out behind the block, or in its middle, before the MLP.
    behind_mlp = False

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.prefix = adapter.prefix

    @staticmethod
    def choices(blocks: int, tokens: int, prefix: int) -> list[dict[str, Any]]:
        """Settings for a budget of cost: arguments of the class, from the costliest to the cheapest.

        Args:
            blocks: of the tower.
            tokens: N, those of a frame.
            prefix: tokens before the patches.
        """
        raise NotImplementedError

    def start(self, x: Tensor, frames: int) -> Any:
        """The state before the first block, from its tokens x [B·T, N, C]."""
        raise NotImplementedError

    def block(
        self,
        adapter: Adapter,
        block: nn.Module,
        number: int,
        x: Tensor,
        frames: int,
        state: Any,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """One block of the tower, with this method in it.

        Args:
            adapter: of the tower.
            block: the tower's block number ``number``, counted from 1.
            x: [B·T, N, C].
            frames: T.
            state: what :meth:`start` or the block before gave.
            between: run on the tokens behind the attention's residual, [B·T, N, C] → the same shape, before any is
                merged or dropped; None for nothing.

        Returns:
            The tokens [B·T, N', C] with N' ≤ N, the prefix tokens still first, and the new state.
        """
        taken, mask = self.taken(number, x.shape[1]), self.mask(x, state)
        if not taken and mask is None:
            if between is None:
                return adapter.run_block(block, x), state
            parts = adapter.parts(block)
            return parts.mlp_residual(between(parts.attend_residual(x))), state
        parts = adapter.parts(block)
        q, k, v = parts.qkv(parts.norm1(x))
        x = x + parts.branch1(attend(parts, q, k, v, None if mask is None else mask.to(q.dtype)))
        x = x if between is None else between(x)
        if taken and not self.behind_mlp:
            x, state = self.take(x, k, taken, number, frames, state)
        x = parts.mlp_residual(x)
        if taken and self.behind_mlp:
            x, state = self.take(x, k, taken, number, frames, state)
        return x, state

    def taken(self, number: int, count: int) -> int:
        """How many of a frame's ``count`` tokens the block ``number`` takes out."""
        raise NotImplementedError

    def mask(self, x: Tensor, state: Any) -> Tensor | None:
        """What is added to the scores of attention among the tokens x [B·T, N, C], broadcast to [B·T, heads, N, N]."""
        return None

    def take(self, x: Tensor, keys: Tensor, taken: int, number: int, frames: int, state: Any) -> tuple[Tensor, Any]:
        """Takes tokens out.

        Args:
            x: [B·T, N, C], the output of the block or, if not ``behind_mlp``, of its first half.
            keys: of the block's attention, [B·T, heads, N, C/heads].
            taken: of :meth:`taken`, at least 1.
            number, frames, state: as :meth:`block` has them.

        Returns:
            The tokens that are left [B·T, N - taken, C], and the new state.
        """
        raise NotImplementedError

    def restore(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor | None]:
        """The tokens back at the places that they had before the first block: what needs the grid of patches reads
        this.

        Returns:
            Tokens [B·T, N, C] (where several were merged, each place has the merged one; where one was dropped, zeros)
            and, if any were dropped, which places still have one: bool [B·T, N].
        """
        raise NotImplementedError

    def reduce(self, x: Tensor, state: Any) -> Tensor:
        """The other way: x [B·T, N, C] at the places before the first block → [B·T, N', C], what it is at the tokens
        that are left. A merged token gets the mean over its places."""
        raise NotImplementedError

    def on_grid(self, module: Callable[[Tensor], Tensor], x: Tensor, state: Any) -> Tensor:
        """Runs a module that needs the grid of patches on the tokens that are left.

        Args:
            module: [B·T, N, C] → the same shape; called with the tokens that :meth:`restore` gives.
            x: [B·T, N', C].
            state: what :meth:`start` or the block before gave.

        Returns:
            [B·T, N', C]: x with the module's change at its places; without any merged or dropped, ``module(x)``.
        """
        whole, _ = self.restore(x, state)
        if whole.shape[1] == x.shape[1]:
            return module(x)
        return x + self.reduce(module(whole) - whole, state)

    def tokens(self, count: int, blocks: int) -> list[tuple[int, int]]:
        """Tokens a frame that the queries and keys of each block's attention, and its MLP, see: for costs by formula.

        Returns:
            One (attention, mlp) pair a block.
        """
        pairs = []
        for number in range(1, blocks + 1):
            left = count - self.taken(number, count)
            pairs.append((count, count if self.behind_mlp else left))
            count = left
        return pairs

    def macs(self, frames: int, count: int, blocks: int, width: int) -> int:
        """Multiply-accumulates of this method's own products for one clip, beside the blocks' own.

        Args:
            frames: T.
            count: tokens a frame before the first block.
            blocks: of the tower.
            width: of a head, C/heads.
        """
        raise NotImplementedError
