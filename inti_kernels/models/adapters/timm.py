"""timm's VisionTransformer, which is also its DeiT, DINOv2, SigLIP and CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ._base import (
    Adapter,
    BlockParts,
    Heads,
    Sizes,
    _unchanged,
    check_patch_dropout,
    class_is_of,
    class_of,
    keeps_methods,
    pair,
)


class Timm(Adapter):
    """timm's ``VisionTransformer``: with a class token, registers, both or neither, and with any of its poolings.

    The features are what its forward returns: class scores if the tower has a classifier, pooled features if it was
    made with ``num_classes=0``.
    """

    library = "timm"

    def __init__(self, model: nn.Module, prefix: int | None = None) -> None:
        super().__init__(model, prefix)
        self.trunk = trunk = self.trunk_of(model)
        known = _check_form(trunk)
        self.dim, self.prefix = trunk.embed_dim, trunk.num_prefix_tokens
        self.check_prefix(prefix)
        last = trunk.head
        self.out_features = self.dim if isinstance(last, nn.Identity) else last.out_features
        # A distilled DeiT has a head of its own, that reads two tokens.
        own_head = not keeps_methods(trunk, known, "forward_head")
        self.pools_class_token = trunk.attn_pool is None and trunk.global_pool == "token" and not own_head
        self.other_form = next(filter(None, map(_why_whole, trunk.blocks)), None)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return class_is_of(model, "timm", "VisionTransformer")

    @staticmethod
    def trunk_of(model: nn.Module) -> nn.Module:
        """The VisionTransformer in a tower."""
        return model

    # Both read live: set_input_size changes them.
    @property
    def patch(self) -> tuple[int, int]:
        return pair(self.trunk.patch_embed.feat_ratio(as_scalar=False))

    @property
    def image(self) -> tuple[int, int]:
        return pair(self.trunk.patch_embed.img_size)

    @property
    def sizes(self) -> Sizes:
        if not self.trunk.dynamic_img_size:
            return "one"
        return "any" if self.trunk.patch_embed.dynamic_img_pad else "patches"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.trunk.blocks

    def embed(self, pictures: Tensor) -> Tensor:
        trunk = self.trunk
        check_patch_dropout(trunk.patch_drop)
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(pictures))))

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    def take_apart(self, block: nn.Module) -> BlockParts:
        attn = block.attn
        norm = getattr(attn, "norm", _unchanged)  # older timm has none

        def qkv(x: Tensor) -> Heads:
            q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return attn.q_norm(q), attn.k_norm(k), v

        return BlockParts(
            norm1=block.norm1,
            attention=attn,
            qkv=qkv,
            project=lambda y: attn.proj_drop(attn.proj(norm(y))),
            scale=attn.scale,
            norm2=block.norm2,
            mlp=block.mlp,
            branch1=lambda y: block.drop_path1(block.ls1(y)),
            branch2=lambda y: block.drop_path2(block.ls2(y)),
        )

    def head(self, x: Tensor) -> Tensor:
        return self.trunk.forward_head(self.trunk.norm(x))

    def head_parameters(self) -> Iterator[nn.Parameter]:
        for name in ("norm", "attn_pool", "fc_norm", "head", "head_dist"):
            module = getattr(self.trunk, name, None)
            if module is not None:
                yield from module.parameters()

    @property
    def checkpointing(self) -> bool:
        return self.trunk.grad_checkpointing

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return pair(self.trunk.patch_embed.dynamic_feat_size((height, width)))


def _check_form(trunk: nn.Module) -> type:
    """timm's own class of the tower; raises ValueError if this isn't quite it."""
    name, known = type(trunk).__name__, class_of(trunk, "timm", "VisionTransformer")
    if known is None:
        raise ValueError(f"the timm trunk is of class {name}, only VisionTransformer can be run: register an adapter")
    if not keeps_methods(trunk, known, "forward", "forward_features"):
        raise ValueError(f"{name} replaces the forward of timm's VisionTransformer: register an adapter for it")
    if not trunk.global_pool:
        raise ValueError(f"{name} has global_pool='' and gives no features of a frame: make it with 'token' or 'avg'")
    if getattr(trunk, "distilled_training", False):
        raise ValueError(f"{name} gives two scores a frame in distilled training: call set_distilled_training(False)")
    return known


def _why_whole(block: nn.Module) -> str | None:
    """The class, of a block or its attention, because of which it can't be taken apart; None if it can."""
    if not keeps_methods(block, class_of(block, "timm", "Block"), "forward"):
        return type(block).__name__
    if not keeps_methods(block.attn, class_of(block.attn, "timm", "Attention"), "forward"):
        return f"{type(block).__name__} with {type(block.attn).__name__}"
    if getattr(block.attn, "gate", None) is not None:
        return f"{type(block).__name__} with a gated {type(block.attn).__name__}"
    return None
