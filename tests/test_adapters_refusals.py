"""Adapters: what isn't taken, and that the error says what it is and what to do."""

from __future__ import annotations

from collections import OrderedDict

import peft
import pytest
import timm
import torch
import towers
import transformers
from open_clip import CLIP, modified_resnet, timm_model
from timm.models import vision_transformer
from torch import nn

from inti_kernels.models.adapters import Adapter, _base, adapter_for, register_adapter


class Toy(nn.Module):
    """A tower of no library."""


class ToyAdapter(Adapter):
    library = "toys"

    @classmethod
    def matches(cls, model):
        return isinstance(model, Toy)


def test_an_adapter_of_ones_own(monkeypatch):
    monkeypatch.setattr(_base, "_ADAPTERS", list(_base._ADAPTERS))
    known = (
        r"there are adapters .* of OpenAI CLIP, open_clip, timm, transformers\. For another library .*register_adapter"
    )
    with pytest.raises(TypeError, match=f"no adapter for {__name__}.Toy; {known}"):
        adapter_for(Toy())
    assert register_adapter(ToyAdapter) is ToyAdapter
    assert isinstance(adapter_for(Toy()), ToyAdapter)
    later = type("Later", (ToyAdapter,), {})
    register_adapter(later)
    register_adapter(ToyAdapter)  # again: nothing changes
    assert type(adapter_for(Toy())) is later
    with pytest.raises(TypeError, match="takes a subclass of Adapter, got <class '.*Toy'>"):
        register_adapter(Toy)
    with pytest.raises(TypeError, match=r"expected a vision tower \(an nn.Module\), got str"):
        adapter_for("ViT-B-16")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: timm.create_model("eva02_tiny_patch14_224"), "timm.models.eva.Eva"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer"),
        (lambda: modified_resnet.ModifiedResNet((1, 1, 1, 1), 8, 2, 32, 8), "open_clip.modified_resnet.ModifiedResNet"),
    ],
    ids=["eva", "swin", "resnet"],
)
def test_other_towers_have_no_adapter(make, named):
    with torch.device("meta"), pytest.raises(TypeError, match=f"no adapter for .*{named}"):
        adapter_for(make())


def whole_open_clip():
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1}
    return CLIP(16, vision, {"vocab_size": 8, "width": 32, "heads": 2, "layers": 1})


def whole_clip_of_transformers():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision, text = sizes | {"patch_size": 8, "image_size": 32}, sizes | {"vocab_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


def with_peft():
    return peft.get_peft_model(towers.build("clip"), peft.LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (whole_open_clip, "visual"),
        (whole_clip_of_transformers, "vision_model"),
        (with_peft, "base_model.model"),
        (lambda: nn.Sequential(nn.Identity(), towers.build("timm")), "1"),
    ],
    ids=["open_clip", "transformers", "peft", "other"],
)
def test_what_holds_a_tower_is_told_which_part_to_pass(make, part):
    model = make()
    with pytest.raises(TypeError, match=rf"no adapter for .*It holds one: pass model\.{part}\. "):
        adapter_for(model)
    assert adapter_for(model.get_submodule(part)).model is model.get_submodule(part)


class OwnOpenCLIP(towers.transformer.VisionTransformer):
    def forward(self, x):
        return -super().forward(x)


class OwnTimm(vision_transformer.VisionTransformer):
    def forward_features(self, x):
        return -super().forward_features(x)


class OwnDINOv2(transformers.Dinov2Model):
    def forward(self, pixel_values):
        return -super().forward(pixel_values).pooler_output


class OwnOpenAICLIP(towers.openai.VisionTransformer):
    def forward(self, x):
        return -super().forward(x)


def with_another_class(name, cls):
    tower = towers.build(name)
    tower.__class__ = cls
    return tower


def with_more(name, **attributes):
    tower = towers.build(name)
    for attribute, value in attributes.items():
        setattr(tower, attribute, value)
    return tower


def of_another_attention():
    tower = towers.openai_clip()
    tower.transformer.resblocks[1].attn = nn.MultiheadAttention(towers.DIM, towers.HEADS, batch_first=True)
    return tower


REFUSED = {
    "open_clip forward": (lambda: with_another_class("open_clip", OwnOpenCLIP), "OwnOpenCLIP replaces the forward"),
    "open_clip pool": (towers._open_clip(pool_type="none"), "VisionTransformer has pool_type='none'"),
    "open_clip layout": (
        lambda: with_more("open_clip", transformer=towers.transformer.Transformer(32, 2, 2, batch_first=False)),
        "VisionTransformer has a Transformer with batch_first=False",
    ),
    "trunk": (lambda: timm_model.TimmModel("eva02_tiny_patch14_224", 8, pool="token"), "trunk is of class Eva"),
    "rot_attn": (
        lambda: with_more("open_clip-timm", head=nn.Sequential(OrderedDict(pool=nn.Flatten()))),
        "TimmModel pools with Flatten",
    ),
    "timm forward": (lambda: with_another_class("timm", OwnTimm), "OwnTimm replaces the forward"),
    "timm pool": (towers._timm(global_pool=""), "VisionTransformer has global_pool=''"),
    "distilled": (
        lambda: with_more("timm-distilled", distilled_training=True),
        "VisionTransformerDistilled gives two scores",
    ),
    "dinov2 forward": (lambda: with_another_class("dinov2", OwnDINOv2), "OwnDINOv2 replaces its library's forward"),
    "siglip": (
        towers._transformers("SiglipVisionModel", vision_use_head=False),
        "SiglipVisionModel has vision_use_head=False",
    ),
    "openai_clip more": (
        lambda: with_more("openai_clip", temporal_embedding=nn.Parameter(torch.zeros(8, 32))),
        "clip.model.VisionTransformer has temporal_embedding, which OpenAI CLIP's tower doesn't have.*register_adapter",
    ),
    "openai_clip forward": (
        lambda: with_another_class("openai_clip", OwnOpenAICLIP),
        "OwnOpenAICLIP replaces the forward",
    ),
    "openai_clip layout": (of_another_attention, "VisionTransformer has blocks with batch_first=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_forms_that_are_refused_by_name(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        adapter_for(make())


@pytest.mark.parametrize("name", ["open_clip-tokens", "timm-dynamic"])
def test_patches_are_not_dropped_in_training(name):
    adapter = adapter_for(towers.build(name).train())
    with pytest.raises(ValueError, match="drops patches in training"):
        adapter.embed(towers.pictures(name))


SIZES = {"siglip2": "patches", "dinov2": "any", "dinov2-registers": "any"}
TAKES = {
    "one": "pictures of {}×{} pixels, got",
    "patches": "pictures of whole patches of 8×8 pixels, got",
    "any": "pictures of at least a patch of 8×8 pixels, got",
}


@pytest.mark.parametrize("name", [name for name in towers.KINDS if name != "timm-dynamic"])
def test_pictures_of_a_size_that_the_tower_cant_take(name):
    """Told before the library fails on them."""
    adapter, sizes = adapter_for(towers.build(name)), SIZES.get(name, "one")
    height, width = adapter.image
    adapter.check_picture(height, width)
    tall = {"one": height + towers.PATCH, "patches": height + 1, "any": towers.PATCH - 1}[sizes]
    with pytest.raises(ValueError, match=TAKES[sizes].format(height, width) + f" {tall}×{width}: "):
        adapter.check_picture(tall, width)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        adapter.embed(torch.zeros(1, 3, tall, width))


def test_sizes_of_timm():
    padded = adapter_for(towers.build("timm-dynamic"))
    padded.check_picture(7, 60)
    dynamic = adapter_for(towers._timm(dynamic_img_size=True)())
    dynamic.check_picture(16, 64)
    with pytest.raises(ValueError, match=r"VisionTransformer takes pictures of whole patches of 8×8 pixels, got 16×60"):
        dynamic.check_picture(16, 60)
