"""Adapters: what they run is the library's own forward, bit for bit, and what they say of a tower is so."""

from __future__ import annotations

import peft
import pytest
import torch
import towers
import transformers
from torch import nn

from inti_kernels.models.adapters import adapter_for, attend
from inti_kernels.testing import FIXED_TOLERANCE, randomize

WHOLE = [name for name, kind in towers.KINDS.items() if kind.whole]
TAKEN_APART = [name for name in towers.KINDS if name not in WHOLE]


pytestmark = pytest.mark.usefixtures("one_thread")


def run_blocks(adapter, x):
    for block in adapter.blocks:
        x = adapter.run_block(block, x)
    return x


def close(got, wanted):
    return (got - wanted).abs().max() <= FIXED_TOLERANCE[torch.float32] * wanted.abs().max()


# Without gradients nn.MultiheadAttention takes another path.
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", towers.KINDS)
def test_the_blocks_in_a_loop_are_the_librarys_forward(name, gradients):
    tower, pictures = towers.build(name), towers.pictures(name)
    adapter = adapter_for(tower)
    with torch.set_grad_enabled(gradients):
        features = adapter.head(run_blocks(adapter, adapter.embed(pictures)))
        wanted = towers.features(name, tower, pictures)
    assert features.shape == (len(pictures), towers.KINDS[name].out_features)
    assert torch.equal(features, wanted)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", TAKEN_APART)
def test_the_parts_make_the_whole_block(name, gradients):
    adapter = adapter_for(towers.build(name))
    with torch.set_grad_enabled(gradients):
        x = adapter.embed(towers.pictures(name))
        for block in adapter.blocks:
            parts, whole = adapter.parts(block), adapter.run_block(block, x)
            x = x + parts.branch1(parts.attention(parts.norm1(x)))
            x = x + parts.branch2(parts.mlp(parts.norm2(x)))
            assert torch.equal(x, whole)


@pytest.mark.parametrize("name", TAKEN_APART)
def test_attending_to_queries_keys_and_values_is_the_librarys_attention(name):
    adapter = adapter_for(towers.build(name))
    parts = adapter.parts(adapter.blocks[1])
    with torch.no_grad():
        x = parts.norm1(adapter.embed(towers.pictures(name)))
        q, k, v = parts.qkv(x)
        wanted = parts.attention(x)
        assert q.shape == k.shape == v.shape == (len(x), towers.HEADS, x.shape[1], towers.DIM // towers.HEADS)
        assert close(attend(parts, q, k, v), wanted)
        mask = torch.zeros(len(x), 1, 1, x.shape[1])
        assert close(attend(parts, q, k, v, mask), wanted)
        mask[..., -1] = -torch.inf
        fewer = attend(parts, q, k[:, :, :-1], v[:, :, :-1])
        assert not close(fewer, wanted)
        assert close(attend(parts, q, k, v, mask), fewer)


@pytest.mark.parametrize("name", WHOLE)
def test_other_blocks_run_but_are_not_taken_apart(name):
    adapter = adapter_for(towers.build(name))
    assert towers.KINDS[name].whole in adapter.other_form
    with pytest.raises(ValueError, match=f"{towers.KINDS[name].whole} can't be taken apart"):
        adapter.parts(adapter.blocks[0])


@pytest.mark.parametrize("name", towers.KINDS)
def test_facts(name):
    kind = towers.KINDS[name]
    adapter = adapter_for(towers.build(name), prefix=kind.prefix)
    assert (adapter.dim, adapter.prefix, adapter.out_features) == (towers.DIM, kind.prefix, kind.out_features)
    assert adapter.patch == (towers.PATCH, towers.PATCH)
    assert (adapter.image, adapter.grid(*adapter.image)) == (kind.image, kind.grid)
    assert adapter.pools_class_token is kind.pools_class_token
    assert len(adapter.blocks) == towers.BLOCKS
    tokens = adapter.embed(towers.pictures(name))
    assert tokens.shape[1:] == (kind.prefix + kind.grid[0] * kind.grid[1], towers.DIM)
    # Only the class token is read: the others may be anything.
    others = torch.cat([tokens[:, :1], torch.randn_like(tokens[:, 1:])], 1)
    assert torch.equal(adapter.head(tokens), adapter.head(others)) is kind.pools_class_token
    with pytest.raises(ValueError, match=rf"has {kind.prefix} tokens before its patches, got prefix={kind.prefix + 1}"):
        adapter_for(adapter.model, prefix=kind.prefix + 1)


# timm pads what doesn't divide, DINOv2 cuts it off.
@pytest.mark.parametrize(
    ("name", "height", "grid"),
    [("timm-dynamic", 60, 8), ("dinov2", 60, 7), ("dinov2-registers", 56, 7), ("siglip2", 56, 7)],
)
def test_pictures_of_another_size(name, height, grid):
    adapter, width = adapter_for(towers.build(name)), 24
    pictures = torch.randn(2, 3, height, width)
    adapter.check_picture(height, width)
    assert adapter.grid(height, width) == (grid, 3)
    rows, columns = adapter.grid(height, width)
    x = adapter.embed(pictures)
    assert x.shape[1] == adapter.prefix + rows * columns
    assert torch.equal(adapter.head(run_blocks(adapter, x)), towers.features(name, adapter.model, pictures))


def test_the_sizes_of_timm_are_live():
    tower = towers.build("timm")
    adapter = adapter_for(tower)
    tower.set_input_size(img_size=(48, 64))
    adapter.check_picture(48, 64)
    pictures = torch.randn(2, 3, 48, 64)
    assert (adapter.image, adapter.grid(*adapter.image)) == ((48, 64), (6, 8))
    assert torch.equal(adapter.head(run_blocks(adapter, adapter.embed(pictures))), tower(pictures))
    tower.set_input_size(img_size=(64, 64), patch_size=(16, 16))
    assert (adapter.patch, adapter.grid(*adapter.image)) == ((16, 16), (4, 4))


@pytest.mark.parametrize("name", towers.KINDS)
def test_unused_parameters_are_those_without_a_gradient(name):
    tower = towers.build(name)
    adapter = adapter_for(tower)
    adapter.head(run_blocks(adapter, adapter.embed(towers.pictures(name)))).sum().backward()
    unused = {key for key, parameter in tower.named_parameters() if parameter.grad is None}
    assert unused == ({"embeddings.mask_token"} if "dinov2" in name else set())
    assert [id(p) for p in adapter.unused_parameters()] == [id(tower.get_parameter(key)) for key in unused]


@pytest.mark.parametrize("name", towers.KINDS)
def test_head_parameters_are_those_that_only_the_head_uses(name):
    adapter = adapter_for(towers.build(name))
    names = {parameter: name for name, parameter in adapter.model.named_parameters()}

    def used(output):
        gradients = torch.autograd.grad(output.sum(), list(names), retain_graph=True, allow_unused=True)
        return {name for name, gradient in zip(names.values(), gradients, strict=True) if gradient is not None}

    tokens = run_blocks(adapter, adapter.embed(towers.pictures(name)))
    of_head = [names[parameter] for parameter in adapter.head_parameters()]
    assert len(of_head) == len(set(of_head))
    assert set(of_head) == used(adapter.head(tokens)) - used(tokens)


@pytest.mark.parametrize("name", [name for name, kind in towers.KINDS.items() if kind.checkpointing])
def test_checkpointing_follows_the_librarys_switch(name):
    tower = towers.build(name)
    adapter = adapter_for(tower)
    tokens = adapter.embed(towers.pictures(name)).detach().requires_grad_()
    tower.train()
    assert not adapter.checkpointing
    towers.KINDS[name].checkpointing(tower, True)
    assert adapter.checkpointing
    runs = []
    norm = next(module for module in adapter.blocks[0].modules() if "Norm" in type(module).__name__)
    norm.register_forward_hook(lambda *_: runs.append(1))
    adapter.run_block(adapter.blocks[0], tokens).sum().backward()
    assert len(runs) == (2 if adapter.blocks_checkpoint_themselves else 1)
    assert adapter.blocks_checkpoint_themselves is (adapter.library == "transformers")
    towers.KINDS[name].checkpointing(tower, False)
    assert not adapter.checkpointing


class LayerOfVersion4(transformers.models.clip.modeling_clip.CLIPEncoderLayer):
    def forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
        return (super().forward(hidden_states, attention_mask),)


class AttentionOfVersion4(nn.Module):
    """DINOv2's attention, nested and named as in version 4."""

    def __init__(self, attention):
        super().__init__()
        self.attention = nn.Module()
        self.attention.num_attention_heads = towers.HEADS
        self.attention.attention_head_size = towers.DIM // towers.HEADS
        self.attention.query, self.attention.key = attention.q_proj, attention.k_proj
        self.attention.value, self.output = attention.v_proj, OutputOfVersion4()
        self.output.dense = attention.o_proj
        self.whole = [attention]

    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        return self.whole[0](hidden_states)[:1]


class OutputOfVersion4(nn.Module):
    def forward(self, hidden_states, input_tensor):
        return self.dense(hidden_states)


def test_layers_of_transformers_4_want_masks_and_return_tuples():
    tower, pictures = towers.build("clip"), towers.pictures("clip")
    with torch.no_grad():
        wanted = towers.features("clip", tower, pictures)
        for layer in tower.encoder.layers:
            layer.__class__ = LayerOfVersion4
        adapter = adapter_for(tower)
        assert torch.equal(adapter.head(run_blocks(adapter, adapter.embed(pictures))), wanted)


def test_attention_of_transformers_4():
    tower = towers.build("dinov2")
    adapter, layer = adapter_for(tower), tower.encoder.layer[0]
    with torch.no_grad():
        x = layer.norm1(adapter.embed(towers.pictures("dinov2")))
        wanted = layer.attention(x)[0]
        layer.attention = AttentionOfVersion4(layer.attention)
        parts = adapter.parts(layer)
        assert torch.equal(parts.attention(x), wanted)
        assert close(attend(parts, *parts.qkv(x)), wanted)


def test_half_precision_as_clip_is_loaded():
    """Norms and embeddings stay in single precision, and the pictures may."""
    tower, pictures = towers.convert_weights(towers.build("openai_clip")), towers.pictures("openai_clip")
    adapter = adapter_for(tower)
    assert {tower.class_embedding.dtype, tower.ln_post.weight.dtype} == {torch.float32}
    with torch.no_grad():
        features = adapter.head(run_blocks(adapter, adapter.embed(pictures)))
        wanted = tower(pictures.half())
    assert features.dtype == torch.float16
    assert torch.equal(features, wanted)


def test_copies_of_openai_clips_file():
    """Known under another module's name, and with no resolution kept."""
    module = towers.load_openai_clip("another_project")
    tower = module.VisionTransformer(34, towers.PATCH, towers.DIM, 1, towers.HEADS, towers.OUT)
    assert adapter_for(tower).image == (34, 34)
    del tower.input_resolution
    adapter, pictures = adapter_for(tower), towers.pictures("openai_clip")
    assert (adapter.image, adapter.grid(*adapter.image)) == ((32, 32), (4, 4))
    assert torch.equal(adapter.head(run_blocks(adapter, adapter.embed(pictures))), tower(pictures))


def put_lora(tower, target):
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False), tower)
    with torch.no_grad():
        randomize(tower, seed=1)


# Before the adapter is made, and after it.
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("name", "target"),
    [("clip", "q_proj"), ("clip-projection", "visual_projection"), ("dinov2", "v_proj"), ("timm", "qkv"),
     ("timm", "head"), ("openai_clip", "c_fc")],
)  # fmt: skip
def test_lora_is_in_what_runs(name, target, before):
    tower, pictures = towers.build(name), towers.pictures(name)
    if before:
        put_lora(tower, target)
    adapter = adapter_for(tower)
    if not before:
        put_lora(tower, target)
    with torch.no_grad():
        x = adapter.embed(pictures)
        assert torch.equal(adapter.head(run_blocks(adapter, x)), towers.features(name, tower, pictures))
        parts = adapter.parts(adapter.blocks[0])
        x = parts.norm1(x)
        assert close(attend(parts, *parts.qkv(x)), parts.attention(x))


@pytest.mark.parametrize("name", ["open_clip", "openai_clip"])
def test_queries_behind_lora_on_a_whole_attention_are_refused(name):
    tower, pictures = towers.build(name), towers.pictures(name)
    put_lora(tower, "attn")
    adapter = adapter_for(tower)
    with torch.no_grad():
        x = adapter.embed(pictures)
        assert torch.equal(adapter.head(run_blocks(adapter, x)), towers.features(name, tower, pictures))
        with pytest.raises(ValueError, match="lora.layer.MultiheadAttention stands in place of nn.MultiheadAttention"):
            adapter.parts(adapter.blocks[0]).qkv(x)


@pytest.mark.parametrize("name", ["openai_clip", "dinov2"])
def test_parts_compile_without_a_graph_break(name):
    adapter = adapter_for(towers.build(name))
    block = adapter.blocks[0]

    def run(x):
        parts = adapter.parts(block)
        x = x + parts.branch1(attend(parts, *parts.qkv(parts.norm1(x))))
        return x + parts.branch2(parts.mlp(parts.norm2(x)))

    with torch.no_grad():
        x = adapter.embed(towers.pictures(name))
        assert close(torch.compile(run, fullgraph=True, backend="eager")(x), run(x))
