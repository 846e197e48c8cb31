"""What a compressed model has to know of a library's vision tower: the base of all adapters, and their register."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Heads = tuple[Tensor, Tensor, Tensor]


def _unchanged(x: Tensor) -> Tensor:
    """The identity; torch.compile can't trace an nn.Identity among a dataclass's defaults."""
    return x


@dataclass(frozen=True)
class BlockParts:
    """A pre-norm transformer block taken apart: x + branch1(attention(norm1(x))), then x + branch2(mlp(norm2(x))).

    Attributes:
        norm1, norm2: [F, N, C] → [F, N, C].
        attention: the library's own attention with its projections, [F, N, C] → [F, N, C].
        qkv: [F, N, C] → queries, keys and values [F, heads, N, C/heads], as the library's attention has them.
        project: the attention's output projection (and dropout), [F, N, C] → [F, N, C].
        scale: of the scores q·kᵀ.
        mlp: [F, N, C] → [F, N, C].
        branch1, branch2: what stands on the residual branches (layer scale, drop path), or the identity.
    """

    norm1: Callable[[Tensor], Tensor]
    attention: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], Heads]
    project: Callable[[Tensor], Tensor]
    scale: float
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    branch1: Callable[[Tensor], Tensor] = _unchanged
    branch2: Callable[[Tensor], Tensor] = _unchanged


class Adapter:
    """One vision tower, seen as embedding → blocks → head. Tokens are [F, N, C], F frames of all clips, whatever
    layout the library runs its blocks in; N = prefix + H·W, the prefix tokens first.

    A subclass a library. It keeps no tensor of its own and calls the library's modules, so that hooks, adapters and the
    library's attention stay in use.

    Args:
        model: the tower.
        prefix: tokens before the patches, where they can't be read from the model; None reads them.

    Attributes:
        model: the tower.
        dim: C.
        prefix: tokens before the patches.
        patch: (height, width) of a patch in pixels.
        image: (height, width) in pixels that the tower was built for.
        out_features: width D of what the head gives.
        pools_class_token: whether the head reads token 0 alone; False for mean or attention pooling.
        other_form: class of a block that isn't of the form of :class:`BlockParts`, None if all are.

    Raises:
        ValueError: the tower has a form that this adapter can't run; the message names it.
    """

    library: str
    dim: int
    prefix: int
    patch: tuple[int, int]
    image: tuple[int, int]
    out_features: int
    pools_class_token: bool = True
    other_form: str | None = None

    def __init__(self, model: nn.Module, prefix: int | None = None) -> None:
        self.model = model

    def check_parts(self) -> None:
        """Raises ValueError, naming the class, if the blocks can't be taken apart."""
        if self.other_form is not None:
            raise ValueError(
                f"blocks of class {self.other_form} can't be taken apart, as methods and modules inside a block need "
                "it: take a method that works between blocks"
            )

    def check_prefix(self, given: int | None) -> None:
        """Raises ValueError if the prefix that was asked for isn't the one that was read from the model."""
        if given not in (None, self.prefix):
            raise ValueError(
                f"{type(self.model).__name__} has {self.prefix} tokens before its patches, got prefix={given}: leave "
                "prefix out"
            )

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model is one of this adapter's, without importing a library that nobody imported."""
        raise NotImplementedError

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The tower's blocks, live."""
        raise NotImplementedError

    def embed(self, pictures: Tensor) -> Tensor:
        """All that stands before the first block: [F, 3, H, W] → [F, N, C]."""
        raise NotImplementedError

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """A whole block, called as the module that it is: [F, N, C] → [F, N, C]."""
        raise NotImplementedError

    def parts(self, block: nn.Module) -> BlockParts:
        """The block taken apart; raises ValueError, naming the block's class, if it has another form."""
        raise NotImplementedError

    def head(self, x: Tensor) -> Tensor:
        """All that stands behind the last block: [F, N, C] → [F, D]."""
        raise NotImplementedError

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Of what only :meth:`head` uses."""
        raise NotImplementedError

    @property
    def checkpointing(self) -> bool:
        """Whether the library's switch for gradient checkpointing is on."""
        return False

    @property
    def blocks_checkpoint_themselves(self) -> bool:
        """Whether a block that is called checkpoints itself, if the switch is on."""
        return False

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) patches of pictures of a size in pixels."""
        return height // self.patch[0], width // self.patch[1]


_ADAPTERS: list[type[Adapter]] = []


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Makes :func:`inti_kernels.compress` take another kind of vision tower. Usable as a class decorator.

    The last one registered is asked first, so that an adapter of one's own can stand in for one of this package's.

    Raises:
        TypeError: not a subclass of :class:`Adapter`.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise TypeError(f"register_adapter takes a subclass of Adapter, got {adapter!r}")
    if adapter not in _ADAPTERS:
        _ADAPTERS.insert(0, adapter)
    return adapter


def adapter_for(model: nn.Module, prefix: int | None = None) -> Adapter:
    """The adapter of a vision tower.

    Raises:
        TypeError: no adapter knows the model; the message says how to register one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a vision tower (an nn.Module), got {type(model).__name__}")
    for adapter in _ADAPTERS:
        if adapter.matches(model):
            return adapter(model, prefix)
    known = ", ".join(sorted({adapter.library for adapter in _ADAPTERS}))
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    raise TypeError(
        f"no adapter for {kind}; there are adapters for vision towers of {known}. For a whole CLIP pass its vision "
        "part (model.visual, model.vision_model); for another library write a subclass of inti_kernels.models.Adapter "
        "and pass it to inti_kernels.models.register_adapter"
    )


def class_of(module: nn.Module, package: str, *names: str) -> type | None:
    """The first of a module's classes (its own, or one it derives from) that is a package's class of these names."""
    classes = (c for c in type(module).__mro__ if c.__module__.partition(".")[0] == package and c.__name__ in names)
    return next(classes, None)


def class_is_of(model: nn.Module, package: str, *names: str) -> bool:
    """Whether the model's class, or one it derives from, is one of a package's classes of these names."""
    return class_of(model, package, *names) is not None


def keeps_methods(module: nn.Module, known: type | None, *names: str) -> bool:
    """Whether the module is of a known class and its methods of these names are that class's: a subclass that replaces
    one computes something else. Wrappers put round them (checkpointing, sharding) don't count."""
    return known is not None and all(
        inspect.unwrap(getattr(type(module), name)) is inspect.unwrap(getattr(known, name)) for name in names
    )


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """A size in pixels as (height, width)."""
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def check_patch_dropout(dropout: nn.Module) -> None:
    """Raises ValueError if patches are dropped now: what is left is no grid."""
    if dropout.training and getattr(dropout, "prob", 0.0) > 0:
        raise ValueError(
            f"the tower drops patches in training (probability {dropout.prob}), but compression needs them all: set "
            "the probability to 0 (patch_dropout=0 or patch_drop_rate=0 where the tower is made)"
        )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[F, N, C] → [F, heads, N, C/heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def multihead_qkv(attention: nn.Module, x: Tensor) -> Heads:
    """Queries, keys and values of an nn.MultiheadAttention: [F, N, C] → [F, heads, N, C/heads] each."""
    if not isinstance(attention, nn.MultiheadAttention):
        raise ValueError(
            f"{type(attention).__module__}.{type(attention).__name__} stands in place of nn.MultiheadAttention and "
            "changes its weights only while it runs, so its queries and keys can't be read: merge it first, or leave "
            "the attention out of what it is put on"
        )
    projected = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (split_heads(part, attention.num_heads) for part in projected.chunk(3, -1))
    return q, k, v


def attend(parts: BlockParts, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(scale·q·kᵀ + mask)·v and the output projection, for what comes between a block's projections.

    Dropout of attention weights, which CLIP and its kin train without, is not applied **(choice)**.

    Args:
        q, k, v: [F, heads, N, C/heads].
        mask: added to the scores, broadcast to [F, heads, N, N], of q's dtype.

    Returns:
        [F, N, C].
    """
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=parts.scale)
    return parts.project(y.transpose(1, 2).flatten(2))
