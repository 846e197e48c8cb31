"""Vision models of Hugging Face transformers: CLIP, SigLIP and DINOv2. Versions 4 and 5 name and nest some modules
differently; both forms are taken."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._base import Adapter, BlockParts, Heads, class_is_of, class_of, keeps_methods, pair, split_heads


class _Transformers(Adapter):
    """What the vision models of transformers have in common.

    A subclass lists the classes that it takes and says where their blocks are. The library's attention stays the one
    that the configuration names (sdpa, eager, flash).
    """

    library = "transformers"
    classes: tuple[str, ...]
    block_classes: tuple[str, ...]

    def __init__(self, model: nn.Module, prefix: int | None = None) -> None:
        super().__init__(model, prefix)
        if not keeps_methods(model, class_of(model, "transformers", *self.classes), "forward"):
            raise ValueError(f"{type(model).__name__} replaces its library's forward: register an adapter for it")
        # The tower's modules are nested once or twice in version 4 and with a projection.
        self.core = model
        while hasattr(self.core, "vision_model"):
            self.core = self.core.vision_model
        config = model.config
        self.dim = self.out_features = config.hidden_size
        self.patch = pair(config.patch_size)
        others = (type(b).__name__ for b in self.blocks if not self._has_known_form(b))
        self.other_form = next(others, None)
        # In version 4 a layer wants masks that a vision tower doesn't have.
        arguments = list(inspect.signature(type(self.blocks[0]).forward).parameters.values())[2:]
        self._no_masks = [
            None for argument in arguments if argument.default is argument.empty and not _varies(argument)
        ]

    def _has_known_form(self, block: nn.Module) -> bool:
        return keeps_methods(block, class_of(block, "transformers", *self.block_classes), "forward")

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return class_is_of(model, "transformers", *cls.classes)

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        return _first(block(x, *self._no_masks))

    @property
    def checkpointing(self) -> bool:
        return getattr(
            self.blocks[0], "gradient_checkpointing", getattr(self.core.encoder, "gradient_checkpointing", False)
        )

    @property
    def blocks_checkpoint_themselves(self) -> bool:
        return hasattr(self.blocks[0], "gradient_checkpointing")


class TransformersCLIP(_Transformers):
    """``CLIPVisionModel`` and ``CLIPVisionModelWithProjection``.

    The features are ``pooler_output``, or ``image_embeds`` of a model with projection.
    """

    classes = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPVisionTransformer")
    block_classes = ("CLIPEncoderLayer",)
    prefix = 1

    def __init__(self, model: nn.Module, prefix: int | None = None) -> None:
        super().__init__(model, prefix)
        self.check_prefix(prefix)
        self.image = pair(model.config.image_size)
        if self.projection is not None:
            self.out_features = self.projection.out_features

    @property
    def projection(self) -> nn.Module | None:
        """Live: LoRA puts another module in its place."""
        return getattr(self.model, "visual_projection", None)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.core.encoder.layers

    def embed(self, pictures: Tensor) -> Tensor:
        return self.core.pre_layrnorm(self.core.embeddings(pictures))

    def take_apart(self, block: nn.Module) -> BlockParts:
        return _clip_parts(block)

    def head(self, x: Tensor) -> Tensor:
        x = self.core.post_layernorm(x[:, 0])
        return x if self.projection is None else self.projection(x)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.core.post_layernorm.parameters()
        if self.projection is not None:
            yield from self.projection.parameters()


class TransformersSigLIP(_Transformers):
    """``SiglipVisionModel``, and ``Siglip2VisionModel`` on pictures of one size. No class token.

    The features are ``pooler_output``, from attention pooling. SigLIP 2 takes pictures as rows of pixels of its
    patches; the adapter makes them, in the order of the library's image processor, and no place is padded.
    """

    classes = ("SiglipVisionModel", "SiglipVisionTransformer", "Siglip2VisionModel", "Siglip2VisionTransformer")
    block_classes = ("SiglipEncoderLayer", "Siglip2EncoderLayer")
    prefix = 0
    pools_class_token = False

    def __init__(self, model: nn.Module, prefix: int | None = None) -> None:
        super().__init__(model, prefix)
        self.check_prefix(prefix)
        if not hasattr(self.core, "head"):
            raise ValueError(
                f"{type(model).__name__} has vision_use_head=False and gives no features of a frame: load it with its "
                "pooling head"
            )
        self.takes_patches = class_is_of(model, "transformers", "Siglip2VisionModel", "Siglip2VisionTransformer")
        if self.takes_patches:
            side = round(model.config.num_patches**0.5)
            self.image, self.sizes = (side * self.patch[0], side * self.patch[1]), "patches"
        else:
            self.image = pair(model.config.image_size)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.core.encoder.layers

    def embed(self, pictures: Tensor) -> Tensor:
        if not self.takes_patches:
            return self.core.embeddings(pictures)
        height, width = self.patch
        # [F, 3, rows, height, columns, width] → [F, rows·columns, height·width·3]
        cells = pictures.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        rows = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        grid = torch.tensor(self.grid(*pictures.shape[-2:]), device=pictures.device).expand(len(rows), 2)
        return self.core.embeddings(rows, grid)

    def take_apart(self, block: nn.Module) -> BlockParts:
        return _clip_parts(block)

    def head(self, x: Tensor) -> Tensor:
        return self.core.head(self.core.post_layernorm(x))

    def head_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.core.post_layernorm.parameters()
        yield from self.core.head.parameters()


class TransformersDINOv2(_Transformers):
    """``Dinov2Model`` and ``Dinov2WithRegistersModel``.

    The features are ``pooler_output``: the class token behind the last norm.
    """

    classes = ("Dinov2Model", "Dinov2WithRegistersModel")
    block_classes = ("Dinov2Layer", "Dinov2WithRegistersLayer")
    sizes = "any"

    def __init__(self, model: nn.Module, prefix: int | None = None) -> None:
        super().__init__(model, prefix)
        self.prefix = 1 + getattr(model.config, "num_register_tokens", 0)
        self.check_prefix(prefix)
        self.image = pair(model.config.image_size)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.core.encoder.layer

    def embed(self, pictures: Tensor) -> Tensor:
        return self.core.embeddings(pictures)

    def take_apart(self, block: nn.Module) -> BlockParts:
        nested = hasattr(block.attention, "attention")  # version 4
        attn = block.attention.attention if nested else block.attention
        linears = (attn.query, attn.key, attn.value) if nested else (attn.q_proj, attn.k_proj, attn.v_proj)
        return BlockParts(
            norm1=block.norm1,
            attention=lambda x: _first(block.attention(x)),
            qkv=lambda x: _projections(linears, attn.num_attention_heads, x),
            project=(lambda y: block.attention.output(y, y)) if nested else attn.o_proj,
            scale=attn.attention_head_size**-0.5 if nested else attn.scaling,
            norm2=block.norm2,
            mlp=block.mlp,
            branch1=lambda y: block.drop_path(block.layer_scale1(y)),
            branch2=lambda y: block.drop_path(block.layer_scale2(y)),
        )

    def head(self, x: Tensor) -> Tensor:
        return self.core.layernorm(x)[:, 0]

    def head_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.core.layernorm.parameters()

    def unused_parameters(self) -> Iterator[nn.Parameter]:
        # Stands in for patches that a caller masks; models made without it have None.
        if self.core.embeddings.mask_token is not None:
            yield self.core.embeddings.mask_token


def _clip_parts(block: nn.Module) -> BlockParts:
    attn = block.self_attn
    linears = (attn.q_proj, attn.k_proj, attn.v_proj)
    return BlockParts(
        norm1=block.layer_norm1,
        attention=lambda x: _first(attn(x)),
        qkv=lambda x: _projections(linears, attn.num_heads, x),
        project=attn.out_proj,
        scale=attn.scale,
        norm2=block.layer_norm2,
        mlp=block.mlp,
    )


def _projections(linears: Sequence[nn.Module], heads: int, x: Tensor) -> Heads:
    q, k, v = (split_heads(linear(x), heads) for linear in linears)
    return q, k, v


def _first(output: Any) -> Tensor:
    """The tokens of what a layer returns: version 4 puts them into a tuple, and attention does in both."""
    return output[0] if isinstance(output, tuple) else output


def _varies(argument: inspect.Parameter) -> bool:
    return argument.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
