"""Tiny vision towers with random weights, one of every library and form that the adapters take: for all model tests.

Every parameter is random (fresh towers have many that are 0 or 1, where a wrong result could not show). Pictures are
not square where the library allows it, so that a height taken for a width shows.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import timm
import torch
import transformers
from open_clip import timm_model, transformer
from timm.models import deit, vision_transformer
from torch import Tensor, nn

from inti_kernels import compress
from inti_kernels.models import CompressedViT
from inti_kernels.models.methods import halves_frames
from inti_kernels.testing import randomize


def load_openai_clip(name: str) -> ModuleType:
    """``model.py`` of OpenAI's CLIP as a module of a name. By its path: the package's ``__init__`` wants pkg_resources,
    which setuptools no longer has."""
    (folder,) = importlib.util.find_spec("clip").submodule_search_locations
    spec = importlib.util.spec_from_file_location(name, f"{folder}/model.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


openai = load_openai_clip("clip.model")

DIM, HEADS, BLOCKS, PATCH, OUT = 32, 2, 4, 8, 20
FRAMES, AFTER = 4, (1, 3)
# A kind of each.
LIBRARIES = ("open_clip", "openai_clip", "clip", "timm")
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


def in_double(name: str) -> nn.Module:
    """A tower in float64: of OpenAI's CLIP with other norms, as its own take float32 alone."""
    tower = build(name).double()
    for module in tower.modules():
        if isinstance(module, openai.LayerNorm):
            module.__class__ = nn.LayerNorm
    return tower


def convert_weights(tower: nn.Module) -> nn.Module:
    """Makes a CLIP's tower what OpenAI's package loads on a GPU: the weights of products are float16, norms and
    embeddings stay float32."""
    openai.convert_weights(tower)
    return tower


def pictures(name: str, count: int = 3, seed: int = 0) -> Tensor:
    """[count, 3, H, W] of the size that the tower takes."""
    return torch.randn(count, 3, *KINDS[name].image, generator=torch.Generator().manual_seed(seed))


def clips(name: str, count: int = 2, frames: int = FRAMES) -> Tensor:
    """[count, frames, 3, H, W]."""
    return pictures(name, count * frames).unflatten(0, (count, frames))


def compressed(name: str, method: str = "inti", **options: Any) -> CompressedViT:
    """A tower of a kind as a model of clips of ``FRAMES`` frames, which a method that halves them halves behind the
    blocks ``AFTER``; in eval mode, what is new as it starts."""
    own = {"after": AFTER} if halves_frames(method) else {}
    own |= {"tome": {"r": 2}} if method == "tome" else {}
    return compress(build(name), FRAMES, method=method, **{**own, **options})


def randomized(model: CompressedViT) -> CompressedViT:
    """Every parameter that isn't the tower's random: what starts at zero would hide what is wrong."""
    for part in (model.insertions, model.temporal, model.classifier):
        if part is not None:
            randomize(part, seed=3)
    return model


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


def openai_clip() -> nn.Module:
    return openai.VisionTransformer(SQUARE[0], PATCH, DIM, BLOCKS, HEADS, OUT)


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
