"""What a compressed model has to know of a library's vision tower: the base of all adapters, and their register."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Heads = tuple[Tensor, Tensor, Tensor]
Sizes = Literal["one", "patches", "any"]


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

    def attend_residual(self, x: Tensor) -> Tensor:
        """The block's first half, with the library's attention: [F, N, C] → [F, N, C]."""
        return x + self.branch1(self.attention(self.norm1(x)))

    def mlp_residual(self, x: Tensor) -> Tensor:
        """Its second half: [F, N, C] → [F, N, C]."""
        return x + self.branch2(self.mlp(self.norm2(x)))


class Adapter:
    """One vision tower, seen as embedding → blocks → head. Tokens are [F, N, C], F frames of all clips, whatever
    layout the library runs its blocks in; N = prefix + H·W, the prefix tokens first.

    A subclass a library: it sets the attributes and writes what raises NotImplementedError here. It keeps no tensor of
    its own and looks up the library's modules when it calls them, so that hooks, adapters and the library's attention
    stay in use.

    Args:
        model: the tower.
        prefix: tokens before the patches, where they can't be read from the model; None reads them.

    Attributes:
        model: the tower.
        dim: C.
        prefix: tokens before the patches.
        patch: (height, width) of a patch in pixels.
        image: (height, width) in pixels that the tower was built for.
        sizes: of pictures that the tower takes: "one" (``image`` alone), "patches" (whole patches, any number of them)
            or "any" (a rest is padded or cut off).
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
    sizes: Sizes = "one"
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

    def check_picture(self, height: int, width: int) -> None:
        """Raises ValueError if the tower can't take pictures of a size in pixels; the message says which it takes."""
        (tall, wide), grid = self.patch, self.grid(height, width)
        if self.sizes == "one" and (height, width) != tuple(self.image):
            takes, advice = f"{self.image[0]}×{self.image[1]} pixels", "resize them, or make the tower for their size"
        elif self.sizes == "patches" and (height % tall or width % wide):
            takes, advice = f"whole patches of {tall}×{wide} pixels", "crop or pad them"
        elif 0 in grid:
            takes, advice = f"at least a patch of {tall}×{wide} pixels", "enlarge them"
        else:
            return
        raise ValueError(f"{type(self.model).__name__} takes pictures of {takes}, got {height}×{width}: {advice}")

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
        """The block taken apart; raises ValueError, naming the class, if the tower has blocks of another form."""
        self.check_parts()
        return self.take_apart(block)

    def take_apart(self, block: nn.Module) -> BlockParts:
        """What :meth:`parts` gives, of a block that has that form."""
        raise NotImplementedError

    def head(self, x: Tensor) -> Tensor:
        """All that stands behind the last block: [F, N, C] → [F, D]."""
        raise NotImplementedError

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Of what only :meth:`head` uses."""
        raise NotImplementedError

    def unused_parameters(self) -> Iterator[nn.Parameter]:
        """Those that features never depend on, such as a mask token: they get no gradient, which stops DDP."""
        yield from ()

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

    @property
    def own_grid(self) -> tuple[int, int]:
        """(H, W) patches of pictures of the size that the tower was built for."""
        return self.grid(*self.image)


_ADAPTERS: list[type[Adapter]] = []


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Makes :func:`inti_kernels.compress` take another kind of vision tower. Usable as a class decorator.

    The last one registered is asked first, so that an adapter of one's own can stand in for one of this package's.
    Registering one again changes nothing.

    Args:
        adapter: the subclass; its ``matches`` says of which models, its ``library`` what error messages call them.

    Returns:
        ``adapter``.

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

    Args:
        model: the tower alone: not a whole CLIP, nor what wraps it (a PeftModel, DistributedDataParallel).
        prefix: tokens before the patches, where the adapter can't read them from the model; None reads them.

    Raises:
        TypeError: no adapter knows the model; the message names the part of it to pass, if it holds a tower that one
            does, and says how to register one.
        ValueError: the adapter's library can make such a tower, but features of it can't be computed block by block
            (a forward that was replaced, no pooling), or it has another number of tokens before its patches than
            ``prefix``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a vision tower (an nn.Module), got {type(model).__name__}")
    if (adapter := _matching(model)) is not None:
        return adapter(model, prefix)
    inside = next((name for name, part in model.named_modules() if name and _matching(part)), None)
    known = ", ".join(sorted({adapter.library for adapter in _ADAPTERS}))
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    raise TypeError(
        f"no adapter for {kind}; there are adapters for vision towers of {known}. "
        + f"It holds one: pass model.{inside}. " * (inside is not None)
        + "For another library write a subclass of inti_kernels.models.Adapter and pass it to "
        "inti_kernels.models.register_adapter"
    )


def _matching(model: nn.Module) -> type[Adapter] | None:
    return next((adapter for adapter in _ADAPTERS if adapter.matches(model)), None)


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
    return in_projection(attention, x)


def in_projection(attention: nn.Module, x: Tensor) -> Heads:
    """The same of any module with the one input projection of nn.MultiheadAttention, by its names."""
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
