"""ToMe: token merging inside each frame, arXiv 2210.09461."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference import functional
from ..adapters import Adapter
from ._base import TokenReduction


class Match(NamedTuple):
    """Which tokens of the set A = 0, 2, 4, … go where; the set B = 1, 3, 5, … stays.

    Attributes:
        stay: [F, |A| - r] long, places in A of those that stay, rising.
        go: [F, r] long, places in A of those that are merged, the most similar first.
        into: [F, r] long, the places in B that they are merged into.
    """

    stay: Tensor
    go: Tensor
    into: Tensor


def similarity_features(keys: Tensor) -> Tensor:
    """What tokens are compared by: the mean of their keys over the heads, of length 1.

    Args:
        keys: [F, heads, N, C/heads].

    Returns:
        [F, N, C/heads], float32 (float64 for float64), without a gradient: it only decides.
    """
    keys = keys.detach()
    wide = torch.promote_types(keys.dtype, torch.float32)
    return F.normalize(keys.to(wide).mean(dim=1), dim=-1)


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ [F, N, M] of features [F, N, D] and [F, M, D], in their dtype also under autocast: half precision would make
    ties of what differs."""
    if not torch.amp.is_autocast_available(a.device.type):
        return a @ b.mT
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def order(values: Tensor, descending: bool = False) -> Tensor:
    """Indices that sort the last axis [F, N]; of equals, the first comes first.

    ONNX has no stable sort, and needs none: its TopK, which a sort becomes there, keeps the order of equals.
    """
    if torch.compiler.is_exporting():
        return values.sort(dim=-1, descending=descending).indices
    return values.sort(dim=-1, descending=descending, stable=True).indices


def match(features: Tensor, r: int) -> Match:
    """Bipartite soft matching: every token of A has an edge to the most similar one of B, and the r most similar edges
    are kept. Of equals, the first.

    Args:
        features: [F, N, D], of length 1.
        r: edges to keep, N // 2 at most.
    """
    scores = similarities(features[:, 0::2], features[:, 1::2])  # [F, A, B]
    into = scores.argmax(dim=-1)
    best = scores.gather(-1, into[..., None])[..., 0]
    ranked = order(best, descending=True)
    go = ranked[:, :r]
    return Match(ranked[:, r:].sort(dim=-1).values, go, into.gather(-1, go))


def rows(index: Tensor, of: Tensor) -> Tensor:
    """[F, n] → [F, n, C], what makes gather and scatter take whole rows of a tensor [F, N, C]."""
    return index[..., None].expand(-1, -1, of.shape[-1])


class ToMe(TokenReduction):
    """Token merging (Bolya et al., "Token Merging: Your ViT But Faster"), in every block, in each frame on its own.

    Between attention and MLP the patch tokens are dealt out in turn to two sets A and B; each token of A has an edge to
    the token of B whose key (mean over the heads) has the largest cosine with its own; over the r most similar edges,
    tokens of A are merged into B as means weighted by size, the number of patches that a token stands for. Attention
    is proportional: the logarithm of its size is added to the scores of a key. Behind it are those of A that are left,
    then B.

    Where that paper is silent, or meant another kind of tower, this implementation chooses **(choice)**: prefix tokens
    are never merged and in neither set (in its authors' code the class token is dealt out too, as the first of A, and
    only kept from merging: there the first patch is of B, here of A); r is the same in every block, but never more than
    half of the patch tokens that are there; before the first merging no sizes are added, and a block that merges
    nothing is called as it is.

    Args:
        adapter: of the tower.
        r: tokens merged in each block. With 12 the cost of a ViT-B/16 is that of InTI after blocks 5 and 7.

    Raises:
        ValueError: r is negative; the tower's head doesn't read the class token alone.
        TypeError: r isn't a whole number.
    """

    def __init__(self, adapter: Adapter, r: int = 12) -> None:
        super().__init__(adapter)
        functional.check_whole(r=r)
        if r < 0:
            raise ValueError(f"r must be 0 or more tokens, got {r}")
        if not adapter.pools_class_token:
            raise ValueError(
                "ToMe needs a tower whose head reads the class token: a head that pools all tokens would weigh a "
                f"merged one as one patch ({type(adapter.model).__name__} has such a head); take sta, or a method that "
                "halves frames"
            )
        self.r = r

    @staticmethod
    def choices(blocks: int, tokens: int, prefix: int) -> list[dict[str, int]]:
        """r from 0 to half of the patches; see :meth:`TokenReduction.choices`."""
        return [{"r": r} for r in range((tokens - prefix) // 2 + 1)]

    def start(self, x: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Sizes [F, N, 1] float32, and for each place before the first block [F, N] long, where its token is now."""
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return torch.ones_like(x[..., :1], dtype=torch.float32), places

    def taken(self, number: int, count: int) -> int:
        return min(self.r, (count - self.prefix) // 2)

    def mask(self, x: Tensor, state: Any) -> Tensor | None:
        sizes, places = state
        return None if x.shape[1] == places.shape[1] else sizes.log().mT[:, None]  # [F, 1, 1, N]

    def take(self, x: Tensor, keys: Tensor, taken: int, number: int, frames: int, state: Any) -> tuple[Tensor, Any]:
        x, *state = self._merge(x, *state, similarity_features(keys), taken)
        return x, tuple(state)

    def restore(self, x: Tensor, state: Any) -> tuple[Tensor, None]:
        _, places = state
        if x.shape[1] == places.shape[1]:
            return x, None
        return x.gather(1, rows(places, x)), None

    def reduce(self, x: Tensor, state: Any) -> Tensor:
        sizes, places = state
        sums = x.new_zeros(*sizes.shape[:2], x.shape[-1], dtype=torch.promote_types(x.dtype, sizes.dtype))
        return (sums.scatter_add(1, rows(places, x), x.to(sums.dtype)) / sizes).to(x.dtype)

    def macs(self, frames: int, count: int, blocks: int, width: int) -> int:
        patches = [n - self.prefix for n, left in self.tokens(count, blocks) if left < n]
        return frames * sum((n - n // 2) * (n // 2) * width for n in patches)

    def _merge(
        self, x: Tensor, sizes: Tensor, places: Tensor, features: Tensor, r: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [F, N, C], sizes [F, N, 1] and places, with r patch tokens merged into others."""
        prefix, patches = self.prefix, x.shape[1] - self.prefix
        edges = match(features[:, prefix:], r)
        # Sums of size·token and of sizes at once, in float32 or wider: the sizes are.
        sums = torch.cat((x[:, prefix:] * sizes[:, prefix:], sizes[:, prefix:]), dim=-1)
        a, b = sums[:, 0::2], sums[:, 1::2]
        b = b.scatter_add(1, rows(edges.into, a), a.gather(1, rows(edges.go, a)))
        sums = torch.cat((a.gather(1, rows(edges.stay, a)), b), dim=1)
        of_patches = sums[..., -1:].detach()
        x = torch.cat((x[:, :prefix], (sums[..., :-1] / of_patches).to(x.dtype)), dim=1)
        sizes = torch.cat((sizes[:, :prefix], of_patches.to(sizes.dtype)), dim=1)

        # Where each token is now: those of A, those of B, and both in turn, as they stood.
        number = torch.arange(prefix + patches, device=x.device)
        stayed, of_a = edges.stay.shape[1], torch.zeros(a.shape[:2], dtype=torch.long, device=x.device)
        of_a = of_a.scatter(1, edges.stay, number[:stayed].expand_as(edges.stay))
        of_a = of_a.scatter(1, edges.go, stayed + edges.into)
        of_b = stayed + number[: b.shape[1]].expand(b.shape[:2])
        in_turn = number[:patches] // 2 + number[:patches] % 2 * a.shape[1]
        now = prefix + torch.cat((of_a, of_b), dim=1)[:, in_turn]
        now = torch.cat((number[:prefix].expand(x.shape[0], -1), now), dim=1)
        return x, sizes, now.gather(1, places)

    def extra_repr(self) -> str:
        return f"r={self.r}"
