"""The methods of compression that a tower can be given, by name. "naive" is the tower with none."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...modules import FusedInTI
from ...reference import InTI
from ..adapters import Adapter
from ._base import TokenReduction, insertion_choices
from .pooling import ConvPooling, LinearPooling
from .sta import STA
from .tome import ToMe

# Name → class. Of two kinds: a TokenReduction works inside the blocks and is made with (adapter, **options); the others
# stand between two blocks, halve the frames, [B, T, N, C] → [B, T/2, N, C], and are made with (dim, frames, grid,
# prefix=…, **options).
METHODS: dict[str, type[nn.Module]] = {
    "inti": FusedInTI,
    "inti_reference": InTI,
    "linear_pooling": LinearPooling,
    "conv_pooling": ConvPooling,
    "tome": ToMe,
    "sta": STA,
}


def reduces_tokens(method: str) -> bool:
    """Whether a method takes tokens out of frames, inside the blocks."""
    return method in METHODS and issubclass(METHODS[method], TokenReduction)


def halves_frames(method: str) -> bool:
    """Whether a method stands between two blocks and halves the frames."""
    return method in METHODS and not reduces_tokens(method)


def choices(method: str, blocks: int, tokens: int, prefix: int) -> list[dict[str, Any]]:
    """Settings for a budget of cost, from the costliest to the cheapest: ``after`` of methods that halve frames,
    options of those that take tokens out; of "naive" there is one, with nothing set.

    Args:
        method: "naive" or a key of :data:`METHODS`.
        blocks: of the tower.
        tokens: N, those of a frame.
        prefix: tokens before the patches.
    """
    if halves_frames(method):
        return insertion_choices(blocks)
    return METHODS[method].choices(blocks, tokens, prefix) if reduces_tokens(method) else [{}]


def build_method(
    method: str, adapter: Adapter, frames: int, after: Sequence[int], options: Mapping[str, Any]
) -> tuple[dict[int, nn.Module], TokenReduction | None]:
    """What a method puts into a tower.

    Args:
        method: "naive" or a key of :data:`METHODS`.
        adapter: of the tower.
        frames: T of a clip.
        after: blocks, counted from 1, behind which frames are halved.
        options: arguments of the method's class.

    Returns:
        Block number → what stands behind it, and what works inside the blocks.
    """
    if reduces_tokens(method):
        return {}, METHODS[method](adapter, **options)
    sizes = {"grid": adapter.own_grid, "prefix": adapter.prefix}
    return {
        number: METHODS[method](adapter.dim, frames >> level, **sizes, **options) for level, number in enumerate(after)
    }, None


__all__ = [
    "METHODS",
    "STA",
    "ConvPooling",
    "LinearPooling",
    "ToMe",
    "TokenReduction",
    "build_method",
    "choices",
    "halves_frames",
    "insertion_choices",
    "reduces_tokens",
]
