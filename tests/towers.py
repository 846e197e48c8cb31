"""Tiny vision towers with random weights, one of every library and form that the adapters take: for all model tests.

Every parameter is random (fresh towers have many that are 0 or 1, where a wrong result could not show). Pictures are
not square where the library allows it, so that a height taken for a width shows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from open_clip import timm_model, transformer
from timm.models import deit, vision_transformer
from torch import Tensor, nn

from inti_kernels.testing import randomize

DIM, HEADS, BLOCKS, PATCH, OUT = 32, 2, 4, 8, 20
SQUARE, WIDE = (32, 32), (32, 48)


@dataclass(frozen=True)
class Kind:
    """A kind of tower, and what an adapter has to say about it.

    Attributes:
        make: builds one; the parameters are whatever the library starts with.
        image: (height, width) of its pictures.
        prefix: tokens before the patches.
        out_features: width of its features.
        pools_class_token: whether they are read from token 0 alone.
        whole: class of block that can't be taken apart, None if the blocks can.
        features: tower, pictures [F, 3, H, W] → features [F, D], by the library's own forward.
        checkpointing: turns the library's switch for gradient checkpointing on or off; None where it has none.
    """

    make: Callable[[], nn.Module]
    image: tuple[int, int] = SQUARE
    prefix: int = 1
    out_features: int = OUT
    pools_class_token: bool = True
    whole: str | None = None
    features: Callable[[nn.Module, Tensor], Tensor] = lambda tower, pictures: tower(pictures)
    checkpointing: Callable[[nn.Module, bool], None] | None = lambda tower, on: tower.set_grad_checkpointing(on)

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // PATCH, self.image[1] // PATCH


def build(name: str, seed: int = 0) -> nn.Module:
    """A tower of a kind (a key of :data:`KINDS`) with random parameters, in eval mode."""
    tower = KINDS[name].make().eval()
    with torch.no_grad():
        randomize(tower, seed)
    return tower


def pictures(name: str, count: int = 3, seed: int = 0) -> Tensor:
    """[count, 3, H, W] of the size that the tower takes."""
    return torch.randn(count, 3, *KINDS[name].image, generator=torch.Generator().manual_seed(seed))


def features(name: str, tower: nn.Module, frames: Tensor) -> Tensor:
    """What the library itself gives: [F, 3, H, W] → [F, D]."""
    return KINDS[name].features(tower, frames)


def _open_clip(**options) -> Callable[[], nn.Module]:
    sizes = {"image_size": WIDE, "patch_size": PATCH, "width": DIM, "layers": BLOCKS, "heads": HEADS, "mlp_ratio": 2.0}
    return lambda: transformer.VisionTransformer(**sizes, **{"output_dim": OUT, **options})


def _without_projection() -> nn.Module:
    tower = _open_clip()()
    tower.proj = None
    return tower


def _timm(**options) -> Callable[[], nn.Module]:
    sizes = {"img_size": WIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": BLOCKS, "num_heads": HEADS}
    return lambda: vision_transformer.VisionTransformer(**sizes, **{"mlp_ratio": 2.0, "num_classes": OUT, **options})


def _distilled() -> nn.Module:
    return deit.VisionTransformerDistilled(
        img_size=WIDE, patch_size=PATCH, embed_dim=DIM, depth=BLOCKS, num_heads=HEADS, mlp_ratio=2.0, num_classes=OUT
    )


@timm.models.register_model
def vit_inti_test(pretrained: bool = False, **options) -> nn.Module:
    """A tiny ViT that open_clip's TimmModel can make by its name."""
    options.pop("pretrained_cfg", None), options.pop("pretrained_cfg_overlay", None), options.pop("cache_dir", None)
    tower = _timm(**{"num_classes": 0, **options})()
    tower.default_cfg = {}
    return tower


def _open_clip_timm(**options) -> Callable[[], nn.Module]:
    return lambda: timm_model.TimmModel("vit_inti_test", OUT, image_size=WIDE, **options)


def _transformers(model: str, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        cls = getattr(transformers, model)
        return cls(cls.config_class(**_SIZES, **{"image_size": SQUARE[0], **options}))

    return make


_SIZES = {"hidden_size": DIM, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "patch_size": PATCH}
_CLIP = {"intermediate_size": 2 * DIM}
_DINO = {"mlp_ratio": 2}


def _pooled(tower: nn.Module, frames: Tensor) -> Tensor:
    return tower(pixel_values=frames).pooler_output


def _pooled_of_patches(tower: nn.Module, frames: Tensor) -> Tensor:
    """SigLIP 2 on pictures as its processor prepares them, with no place padded."""
    rows = []
    for picture in frames:
        patches = [cell for line in picture.split(PATCH, 1) for cell in line.split(PATCH, 2)]
        rows.append(torch.stack([patch.permute(1, 2, 0).flatten() for patch in patches]))
    shapes = torch.tensor([[frames.shape[2] // PATCH, frames.shape[3] // PATCH]] * len(frames))
    return tower(pixel_values=torch.stack(rows), pixel_attention_mask=None, spatial_shapes=shapes).pooler_output


def _enable(tower: nn.Module, on: bool) -> None:
    name = "activation" if hasattr(tower, "activation_checkpointing_enable") else "gradient"
    getattr(tower, f"{name}_checkpointing_{'enable' if on else 'disable'}")()


class ResidualAttentionBlock(nn.Module):
    """A block of OpenAI's CLIP, with its names: tokens are [N, F, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)
        self.attn_mask = None

    def attention(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks of OpenAI's CLIP."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(width, heads) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    """The vision tower of OpenAI's CLIP, with its names; the package is not on any index."""

    def __init__(self, resolution: int, patch: int, width: int, layers: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        zeros = torch.zeros(x.shape[0], 1, x.shape[-1], dtype=x.dtype, device=x.device)
        x = torch.cat([self.class_embedding.to(x.dtype) + zeros, x], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.ln_post(x[:, 0, :])
        return x if self.proj is None else x @ self.proj


def openai_clip() -> nn.Module:
    return VisionTransformer(SQUARE[0], PATCH, DIM, BLOCKS, HEADS, OUT)


_HF = {"features": _pooled, "checkpointing": _enable, "out_features": DIM}
KINDS: dict[str, Kind] = {
    "open_clip": Kind(_open_clip(), WIDE),
    "open_clip-avg": Kind(_open_clip(pool_type="avg"), WIDE, pools_class_token=False),
    "open_clip-no-ln-pre": Kind(_open_clip(final_ln_after_pool=True, ls_init_value=0.1, no_ln_pre=True), WIDE),
    "open_clip-no-proj": Kind(_without_projection, WIDE, out_features=DIM),
    "open_clip-tokens": Kind(
        _open_clip(output_tokens=True, patch_dropout=0.5), WIDE, features=lambda tower, frames: tower(frames)[0]
    ),
    "open_clip-coca": Kind(
        _open_clip(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=2, output_tokens=True),
        WIDE,
        pools_class_token=False,
        features=lambda tower, frames: tower(frames)[0],
    ),
    "open_clip-cascade": Kind(
        _open_clip(attentional_pool="cascade", attn_pooler_queries=5, attn_pooler_heads=2, output_dim=DIM),
        WIDE,
        out_features=DIM,
        pools_class_token=False,
        features=lambda tower, frames: tower(frames)[:, 0],
    ),
    "open_clip-custom": Kind(
        _open_clip(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True), WIDE
    ),
    "open_clip-timm": Kind(_open_clip_timm(pool="token", proj="linear"), WIDE),
    "open_clip-timm-mlp": Kind(_open_clip_timm(pool="avg", proj="mlp"), WIDE, pools_class_token=False),
    "open_clip-timm-siglip": Kind(
        _open_clip_timm(pool="map", proj="none"), WIDE, out_features=DIM, pools_class_token=False
    ),
    "openai_clip": Kind(openai_clip, checkpointing=None),
    "clip": Kind(_transformers("CLIPVisionModel", **_CLIP), **_HF),
    "clip-eager": Kind(_transformers("CLIPVisionModel", attn_implementation="eager", **_CLIP), **_HF),
    "clip-projection": Kind(
        _transformers("CLIPVisionModelWithProjection", projection_dim=OUT, **_CLIP),
        features=lambda tower, frames: tower(pixel_values=frames).image_embeds,
        checkpointing=_enable,
    ),
    "siglip": Kind(_transformers("SiglipVisionModel", **_CLIP), prefix=0, pools_class_token=False, **_HF),
    "siglip2": Kind(
        _transformers("Siglip2VisionModel", num_patches=16, **_CLIP),
        prefix=0,
        pools_class_token=False,
        **(_HF | {"features": _pooled_of_patches}),
    ),
    "dinov2": Kind(_transformers("Dinov2Model", **_DINO), **_HF),
    "dinov2-registers": Kind(
        _transformers(
            "Dinov2WithRegistersModel", use_swiglu_ffn=True, num_register_tokens=3, drop_path_rate=0.1, **_DINO
        ),
        prefix=4,
        **_HF,
    ),
    "timm": Kind(_timm(), WIDE),
    "timm-clip": Kind(_timm(pre_norm=True, num_classes=0, act_layer="quick_gelu"), WIDE, out_features=DIM),
    "timm-avg": Kind(_timm(class_token=False, global_pool="avg", num_classes=0), WIDE, 0, DIM, False),
    "timm-map": Kind(_timm(class_token=False, global_pool="map"), WIDE, 0, pools_class_token=False),
    "timm-registers": Kind(
        _timm(
            reg_tokens=4, no_embed_class=True, init_values=0.1, qk_norm=True, drop_path_rate=0.1, scale_attn_norm=True
        ),
        WIDE,
        5,
    ),
    "timm-dynamic": Kind(_timm(dynamic_img_size=True, dynamic_img_pad=True, patch_drop_rate=0.25), WIDE),
    "timm-distilled": Kind(_distilled, WIDE, 2, pools_class_token=False),
    "timm-diff": Kind(_timm(attn_layer="diff"), WIDE, whole="DiffAttention"),
    "timm-parallel": Kind(_timm(block_fn=vision_transformer.ParallelScalingBlock), WIDE, whole="ParallelScalingBlock"),
}
