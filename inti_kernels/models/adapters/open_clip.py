"""open_clip's visual towers: its own VisionTransformer, and the ViTs of timm that it wraps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ._base import (
    Adapter,
    BlockParts,
    Heads,
    check_patch_dropout,
    class_is_of,
    class_of,
    in_projection,
    keeps_methods,
    multihead_qkv,
    pair,
)
from .timm import Timm


class OpenCLIP(Adapter):
    """open_clip's ``VisionTransformer``: ``model.visual`` of a CLIP or CoCa.

    The features are what its forward returns, without the tokens that ``output_tokens=True`` adds. Attentional
    pooling of CoCa is part of the head.
    """

    library = "open_clip"
    prefix = 1

    def __init__(self, model: nn.Module, prefix: int | None = None) -> None:
        super().__init__(model, prefix)
        self.check_prefix(prefix)
        _check_form(model)
        self.dim = model.conv1.out_channels
        self.patch, self.image = pair(model.patch_size), pair(model.image_size)
        pooled = self.dim if model.attn_pool is None else model.output_dim
        self.out_features = pooled if model.proj is None else model.proj.shape[1]
        self.pools_class_token = model.attn_pool is None and model.pool_type == "tok"
        self.other_form = next((type(block).__name__ for block in self.blocks if not _has_known_form(block)), None)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return class_is_of(model, "open_clip", "VisionTransformer")

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.transformer.resblocks

    def embed(self, pictures: Tensor) -> Tensor:
        check_patch_dropout(self.model.patch_dropout)
        return self.model._embeds(pictures)

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    def take_apart(self, block: nn.Module) -> BlockParts:
        if hasattr(block.attn, "ln_q"):
            return _custom_parts(block)
        return BlockParts(
            norm1=block.ln_1,
            attention=block.attention,
            qkv=lambda x: multihead_qkv(block.attn, x),
            project=block.attn.out_proj,
            scale=block.attn.head_dim**-0.5,
            norm2=block.ln_2,
            mlp=block.mlp,
            branch1=block.ls_1,
            branch2=block.ls_2,
        )

    def head(self, x: Tensor) -> Tensor:
        pooled, _ = self.model._pool(x)
        if self.model.proj is not None:
            pooled = pooled @ self.model.proj
        # A pooler with one query keeps its axis.
        return pooled.flatten(1)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        model = self.model
        for module in (model.ln_post, model.attn_pool, getattr(model, "attn_pool_contrastive", None)):
            if module is not None:
                yield from module.parameters()
        if model.proj is not None:
            yield model.proj

    @property
    def checkpointing(self) -> bool:
        return self.model.transformer.grad_checkpointing


class OpenCLIPTimm(Timm):
    """open_clip's ``TimmModel`` round a timm ViT (its SigLIP, for one): ``model.visual``.

    The features are what its forward returns: the trunk's, through open_clip's own projection where there is one.
    """

    library = "open_clip"

    def __init__(self, model: nn.Module, prefix: int | None = None) -> None:
        super().__init__(model, prefix)
        if hasattr(model.head, "pool"):
            raise ValueError(
                f"open_clip's TimmModel pools with {type(model.head.pool).__name__}, which needs a feature map; make "
                "it with timm_pool of the trunk's own (token, avg or map)"
            )
        if len(model.head):
            last = model.head.mlp.fc2 if hasattr(model.head, "mlp") else model.head.proj
            self.out_features = last.out_features

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return class_is_of(model, "open_clip", "TimmModel")

    @staticmethod
    def trunk_of(model: nn.Module) -> nn.Module:
        return model.trunk

    def head(self, x: Tensor) -> Tensor:
        return self.model.head(super().head(x))

    def head_parameters(self) -> Iterator[nn.Parameter]:
        yield from super().head_parameters()
        yield from self.model.head.parameters()


def _check_form(model: nn.Module) -> None:
    name = type(model).__name__
    if not (hasattr(model, "_embeds") and hasattr(model, "_pool")):
        raise ValueError(f"this open_clip's {name} has no _embeds and _pool: upgrade to open_clip_torch 2.32 or later")
    if not keeps_methods(model, class_of(model, "open_clip", "VisionTransformer"), "forward"):
        raise ValueError(f"{name} replaces the forward of open_clip's VisionTransformer: register an adapter for it")
    if model.pool_type == "none" and getattr(model, "attn_pool_contrastive", None) is None:
        raise ValueError(f"{name} has pool_type='none' and gives no features of a frame: make it with 'tok' or 'avg'")
    if not model.transformer.batch_first:
        raise ValueError(f"{name} has a Transformer with batch_first=False: make it with batch_first=True")


def _has_known_form(block: nn.Module) -> bool:
    names = "ResidualAttentionBlock", "CustomResidualAttentionBlock"
    cosine = getattr(block, "attn", None) is not None and getattr(block.attn, "logit_scale", None) is not None
    return keeps_methods(block, class_of(block, "open_clip", *names), "forward") and not cosine


def _custom_parts(block: nn.Module) -> BlockParts:
    """Of a CustomResidualAttentionBlock: norms of queries and keys, scaled heads and inner norms, whichever it has."""
    attn = block.attn

    def qkv(x: Tensor) -> Heads:
        q, k, v = in_projection(attn, x)
        return attn.ln_q(q), attn.ln_k(k), v

    def project(y: Tensor) -> Tensor:
        if attn.head_scale is not None:
            y = y * attn.head_scale.flatten().repeat_interleave(attn.head_dim)
        return attn.out_drop(attn.out_proj(attn.ln_inner(y)))

    return BlockParts(
        norm1=block.ln_1,
        attention=attn,
        qkv=qkv,
        project=project,
        scale=attn.scale,
        norm2=block.ln_2,
        mlp=block.mlp,
        branch1=lambda y: block.ls_1(block.ln_attn(y)),
        branch2=block.ls_2,
    )
