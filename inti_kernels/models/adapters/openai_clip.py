"""The vision tower of OpenAI's CLIP package, and copies of its file in other projects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ._base import Adapter, BlockParts, keeps_methods, multihead_qkv, pair

BLOCK = {"attn", "ln_1", "mlp", "ln_2"}
MODULES = {"conv1", "ln_pre", "transformer", "ln_post"}
PARAMETERS = {"class_embedding", "positional_embedding", "proj"}


class OpenAICLIP(Adapter):
    """``VisionTransformer`` of ``clip.model``: ``model.visual`` of a CLIP with a ViT.

    The package is often copied into other projects, so the tower is known by its class's name and by its parts. Its
    blocks run sequence-first, [N, F, C]. Pixels are cast to the weights' dtype, which CLIP's own callers do: the
    package loads half precision on a GPU. The features are what forward returns.
    """

    library = "OpenAI CLIP"
    prefix = 1

    def __init__(self, model: nn.Module, prefix: int | None = None) -> None:
        super().__init__(model, prefix)
        self.check_prefix(prefix)
        _check_form(model)
        self.dim, self.patch = model.conv1.out_channels, pair(model.conv1.kernel_size)
        side = round((model.positional_embedding.shape[0] - 1) ** 0.5)
        # A resolution that doesn't divide by the patch can only be read; some copies of the file don't keep it.
        self.image = pair(getattr(model, "input_resolution", [side * self.patch[0], side * self.patch[1]]))
        self.out_features = self.dim if model.proj is None else model.proj.shape[1]
        others = (type(b).__name__ for b in self.blocks if {name for name, _ in b.named_children()} != BLOCK)
        self.other_form = next(others, None)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return _own_class(model) is not None and all(hasattr(model, name) for name in MODULES | PARAMETERS)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.transformer.resblocks

    def embed(self, pictures: Tensor) -> Tensor:
        model = self.model
        x = model.conv1(pictures.to(model.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        token = model.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([token, x], 1)
        return model.ln_pre(x + model.positional_embedding.to(x.dtype))

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        return _sequence_first(block)(x)

    def take_apart(self, block: nn.Module) -> BlockParts:
        return BlockParts(
            norm1=_sequence_first(block.ln_1),
            attention=_sequence_first(block.attention),
            qkv=lambda x: multihead_qkv(block.attn, x),
            project=block.attn.out_proj,
            scale=block.attn.head_dim**-0.5,
            norm2=_sequence_first(block.ln_2),
            mlp=_sequence_first(block.mlp),
        )

    def head(self, x: Tensor) -> Tensor:
        x = self.model.ln_post(x[:, 0])
        return x if self.model.proj is None else x @ self.model.proj

    def head_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.model.ln_post.parameters()
        if self.model.proj is not None:
            yield self.model.proj


def _sequence_first(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of [N, F, C] as one of [F, N, C]. Views only: what CLIP's layers give stays in their own layout."""
    return lambda x: function(x.transpose(0, 1)).transpose(0, 1)


def _own_class(model: nn.Module) -> type | None:
    # "VisualTransformer" in CLIP's first versions.
    return next((c for c in type(model).__mro__ if c.__name__ in ("VisionTransformer", "VisualTransformer")), None)


def _check_form(model: nn.Module) -> None:
    """Copies of CLIP's file are often changed under the old name, mostly by adding something."""
    own = {name for name, _ in model.named_children()} | {name for name, _ in model.named_parameters(recurse=False)}
    if added := sorted(own - MODULES - PARAMETERS):
        raise ValueError(
            f"{type(model).__module__}.{type(model).__name__} has {', '.join(added)}, which OpenAI CLIP's tower "
            "doesn't have: write a subclass of inti_kernels.models.Adapter for it and pass it to register_adapter"
        )
    if not keeps_methods(model, _own_class(model), "forward"):
        raise ValueError(
            f"{type(model).__name__} replaces the forward of OpenAI CLIP's tower: register an adapter for it"
        )
    attentions = [getattr(block, "attn", None) for block in model.transformer.resblocks]
    if any(getattr(attention, "batch_first", False) for attention in attentions):
        raise ValueError(f"{type(model).__name__} has blocks with batch_first=True; OpenAI CLIP's are sequence-first")
