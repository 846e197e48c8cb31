"""STA: pruning by semantic-aware temporal accumulation, arXiv 2308.04549."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...reference import functional
from ..adapters import Adapter
from ._base import TokenReduction
from .tome import match, order, rows, similarities, similarity_features


def semantic_scores(x: Tensor) -> Tensor:
    """The activation map of patch tokens [..., P, C]: the sum of the absolute channels, from 0 to 1 in each frame.

    Returns:
        [..., P] in float32 (float64 for float64), without a gradient; 0 where all tokens of a frame are as active.
    """
    x = x.detach()
    activity = x.to(torch.promote_types(x.dtype, torch.float32)).abs().sum(dim=-1)
    least, most = activity.amin(dim=-1, keepdim=True), activity.amax(dim=-1, keepdim=True)
    return (activity - least) / (most - least).clamp_min(torch.finfo(activity.dtype).tiny)


def kept_patches(features: Tensor, semantics: Tensor, dropped: int) -> Tensor:
    """Which patches of each frame stay.

    Args:
        features: of the patches [B, T, P, D], of length 1.
        semantics: their semantic scores [B, T, P].
        dropped: patches that each frame loses, P // 2 at most.

    Returns:
        [B, T, P - dropped] long, rising.
    """
    count = features.shape[2] - dropped
    first = match(features[:, 0], dropped)
    in_second = torch.arange(features.shape[2] // 2, device=features.device).expand(features.shape[0], -1)
    kept = [torch.cat((2 * first.stay, 2 * in_second + 1), dim=1).sort(dim=1).values]
    before, redundancy = features[:, 0], torch.ones_like(semantics[:, 0])  # [B, n, D], [B, n]
    for frame in range(1, features.shape[1]):
        here = features[:, frame]
        # Every patch of the frame before passes on all of its redundancy, the most to what is most like it.
        transition = similarities(here, before).softmax(dim=1)  # [B, P, n]
        passed = (transition * redundancy[:, None]).sum(dim=-1)  # [B, P]
        scores = passed * (1 - semantics[:, frame])
        kept.append(order(scores)[:, :count].sort(dim=1).values)
        before, redundancy = here.gather(1, rows(kept[-1], here)), passed.gather(1, kept[-1])
    return torch.stack(kept, dim=1)


class STA(TokenReduction):
    """Pruning by Semantic-aware Temporal Accumulation (Ding et al., "Prune Spatio-temporal Tokens by Semantic-aware
    Temporal Accumulation").

    Behind a few blocks every frame loses the patches of the highest score = redundancy · (1 - semantics).

    * Redundancy accumulates from frame to frame as a Markov chain: a patch that was kept in the frame before passes its
      own on to the patches of this frame, by a softmax over them of the cosines with their keys (mean over the heads).
      What is new in a frame gets little.
    * Semantics is the activation map: the sum of the block's output over absolute channels, from 0 to 1 in each frame.
    * The frame that the chain starts from has none before it: it loses those that bipartite matching
      (:class:`ToMe`) finds most like others of the same frame, at most every second one. The chain starts evenly from
      all of its patches, those too.
    * At every second of the blocks the chain runs backwards in time.

    The blocks, the same number of patches in every frame (so that frames stay one batch), the activation map, the
    chain's directions and the rule for its first frame are those of the authors' code. Its towers attend over all
    frames at once, these over one; where that differs, this implementation chooses **(choice)**: a frame stays one at
    every stage (their later stages take several for one), prefix tokens are never dropped, and each time the same part
    of the patches that are left is.

    Args:
        adapter: of the tower.
        at: blocks, counted from 1, behind which patches are dropped; None for the first, and those behind a third and
            two thirds of the tower (1, 5 and 9 of 12).
        keep: how much of the patches that are there stay at each of them, from 0.5 to 1. With 0.75 the cost of a
            ViT-B/16 is that of InTI after blocks 5 and 7.

    Raises:
        ValueError: a block isn't there; keep is outside its range.
        TypeError: ``at`` isn't whole numbers.
    """

    behind_mlp = True

    def __init__(self, adapter: Adapter, at: Iterable[int] | None = None, keep: float = 0.75) -> None:
        super().__init__(adapter)
        blocks = len(adapter.blocks)
        self.at = frozenset((1, blocks // 3 + 1, 2 * blocks // 3 + 1) if at is None else at)
        for number in self.at:
            functional.check_whole(at=number)
            if not 1 <= number <= blocks:
                raise ValueError(f"at counts blocks from 1 to {blocks} in this tower, got {number}")
        if not 0.5 <= keep <= 1:
            raise ValueError(
                f"keep must be from 0.5 to 1 (the first frame loses every second patch at most), got {keep}"
            )
        self.keep = keep

    @staticmethod
    def choices(blocks: int, tokens: int, prefix: int) -> list[dict[str, float]]:
        """keep from 1 down to 0.5 in hundredths; see :meth:`TokenReduction.choices`."""
        return [{"keep": percent / 100} for percent in range(100, 49, -1)]

    def start(self, x: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """The places before the first block of the tokens that are left [F, N] long, and which places have one
        [F, N] bool."""
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return places, torch.ones_like(places, dtype=torch.bool)

    def taken(self, number: int, count: int) -> int:
        patches = count - self.prefix
        return min(round((1 - self.keep) * patches), patches // 2) if number in self.at else 0

    def take(self, x: Tensor, keys: Tensor, taken: int, number: int, frames: int, state: Any) -> tuple[Tensor, Any]:
        features = similarity_features(keys)[:, self.prefix :].unflatten(0, (-1, frames))
        semantics = semantic_scores(x[:, self.prefix :]).unflatten(0, (-1, frames))
        backwards = (1,) if sorted(self.at).index(number) % 2 else ()
        patches = kept_patches(features.flip(backwards), semantics.flip(backwards), taken).flip(backwards)
        prefix = torch.arange(self.prefix, device=x.device).expand(x.shape[0], -1)
        kept = torch.cat((prefix, self.prefix + patches.flatten(0, 1)), dim=1)
        places, present = state
        places = places.gather(1, kept)
        present = torch.zeros_like(present).scatter(1, places, True)
        return x.gather(1, rows(kept, x)), (places, present)

    def restore(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor | None]:
        places, present = state
        if x.shape[1] == present.shape[1]:
            return x, None
        whole = x.new_zeros(*present.shape, x.shape[-1])
        return whole.scatter(1, rows(places, x), x), present

    def reduce(self, x: Tensor, state: Any) -> Tensor:
        return x.gather(1, rows(state[0], x))

    def macs(self, frames: int, count: int, blocks: int, width: int) -> int:
        total = 0
        for number, (n, _) in enumerate(self.tokens(count, blocks), 1):
            if dropped := self.taken(number, n):
                patches = n - self.prefix
                within = (patches - patches // 2) * (patches // 2)
                before = patches + (frames - 2) * (patches - dropped) if frames > 1 else 0  # of all second frames
                total += (within + before * patches) * width
        return total

    def extra_repr(self) -> str:
        return f"at={tuple(sorted(self.at))}, keep={self.keep}"
