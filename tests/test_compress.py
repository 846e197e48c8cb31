"""compress(): a tower of every library made a video model, against what the library's own forward gives."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence

import onnxruntime
import open_clip
import peft
import pytest
import torch
import towers
from torch import Tensor, nn

import inti_kernels
from inti_kernels import FusedInTI, InTI, compress
from inti_kernels.models import CompressedViT, cost
from inti_kernels.testing import randomize

FRAMES, AFTER = 4, (1, 3)
LIBRARIES = ("open_clip", "openai_clip", "clip", "timm")
METHODS = ("inti", "inti_reference", "naive", "linear_pooling", "conv_pooling", "tome", "sta")
# Towers whose head reads the class token, which the two methods that take tokens out need.
SETTINGS = {"tome": {"tome": {"r": 2}}}


def video(name: str, clips: int = 2, frames: int = FRAMES) -> Tensor:
    return towers.pictures(name, clips * frames).unflatten(0, (clips, frames))


def compressed(name: str, method: str = "inti", **options) -> CompressedViT:
    after = {} if method in ("naive", "tome", "sta") else {"after": AFTER}
    return compress(towers.build(name), FRAMES, method=method, **{**after, **SETTINGS.get(method, {}), **options})


def randomized(model: CompressedViT) -> CompressedViT:
    """Every parameter that isn't the tower's random: what starts at zero would hide what is wrong."""
    for part in (model.insertions, model.temporal, model.classifier):
        if part is not None:
            randomize(part, seed=3)
    return model


class PairMean(nn.Module):
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x.unflatten(1, (-1, 2)).mean(2)


@pytest.mark.parametrize("name", towers.KINDS)
def test_naive_is_the_library_on_all_frames(name: str) -> None:
    """The same bits, in the same batch; and the library's tower is untouched by it."""
    tower, clips = towers.build(name), video(name)
    with torch.no_grad():
        expected = towers.features(name, tower, clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(1)
        model = compress(tower, FRAMES, method="naive")
        assert torch.equal(model(clips), expected)
        assert model.uncompress() is tower
        again = towers.features(name, tower, clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(1)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("method", ["inti", "inti_reference", "linear_pooling", "conv_pooling"])
@pytest.mark.parametrize("name", towers.KINDS)
def test_at_first_it_is_the_mean_of_the_pairs(name: str, method: str) -> None:
    model, clips = compressed(name, method), video(name)
    mean = CompressedViT(model.adapter, FRAMES, {number: PairMean() for number in AFTER})
    with torch.no_grad():
        torch.testing.assert_close(model(clips), mean(clips), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(name: str, method: str) -> None:
    """Every parameter in use has a gradient, the tower's too, and the new ones are where the tower's are."""
    model = randomized(compressed(name, method, num_classes=7)).train()
    scores = model(video(name))
    assert scores.shape == (2, 7)
    scores.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    backbone = [p.grad.abs().max() for p in model.blocks[0].parameters()]
    assert max(backbone) > 0


@pytest.mark.parametrize(
    ("temporal", "options"),
    [
        ("uniformer_v2", {"global_blocks": 2, "dropout": 0.0}),
        ("uniformer_v2", {"global_blocks": 1, "dropout": 0.0, "local": "double"}),
        ("st_adapter", {"width": 8}),
        ("st_adapter", {"width": 8, "before": "mlp"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_temporal_modules(method: str, temporal: str, options: dict) -> None:
    model = randomized(compressed("open_clip", method, temporal=temporal, num_classes=3, **{temporal: options}))
    model.train()(video("open_clip")).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    # Behind the last attention the class token no longer sees the patches, which an adapter works on.
    unseen = f"adapters.{towers.BLOCKS - 1}." if options.get("before") == "mlp" else "none"
    for key, parameter in model.temporal.named_parameters():
        assert parameter.grad.any() != key.startswith(unseen), key


@pytest.mark.parametrize("method", ["inti", "tome", "sta"])
def test_temporal_modules_start_as_nothing(method: str) -> None:
    """ST-Adapters, and UniFormerV2's local modules, leave a tower as it was until they are trained."""
    clips = video("timm")
    plain = compressed("timm", method)(clips)
    for place in ("attention", "mlp"):
        model = compressed("timm", method, temporal="st_adapter", st_adapter={"width": 8, "before": place})
        assert torch.equal(model(clips), plain)
    options = {"global_blocks": 0, "local": "double"}
    model = compressed("timm", method, temporal="uniformer_v2", uniformer_v2=options)
    assert torch.equal(model(clips), plain)


def test_the_head_that_isnt_used_is_frozen_and_given_back() -> None:
    tower = towers.build("open_clip")
    tower.proj.requires_grad_(True)
    model = compress(tower, FRAMES, AFTER, temporal="uniformer_v2", uniformer_v2={"global_blocks": 2})
    frozen = {key for key, p in tower.named_parameters() if not p.requires_grad}
    assert frozen == {"proj", "ln_post.weight", "ln_post.bias"}
    model.uncompress()
    assert all(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_weights_are_the_towers(name: str) -> None:
    tower = towers.build(name)
    own = dict(tower.named_parameters())
    model = compress(tower, FRAMES, AFTER)
    shared = {key.removeprefix("backbone."): p for key, p in model.named_parameters() if key.startswith("backbone.")}
    assert shared.keys() == own.keys()
    assert all(shared[key] is own[key] for key in own)
    assert {key.partition(".")[0] for key in model.state_dict()} == {"backbone", "insertions"}
    assert type(model.insertions["1"]) is FusedInTI
    assert (model.insertions["1"].frames, model.insertions["3"].frames) == (4, 2)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_checkpoint_gives_the_same_scores(name: str) -> None:
    """Saved with its settings and read with weights_only: plain data and tensors."""
    model = randomized(compressed(name, num_classes=5, inti={"context": ("cube",), "hidden": 8}))
    file = io.BytesIO()
    torch.save({"settings": model.settings, "state_dict": model.state_dict()}, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    again = compress(towers.build(name, seed=1), **read["settings"])
    again.load_state_dict(read["state_dict"])
    with torch.no_grad():
        assert torch.equal(again(video(name)), model(video(name)))


def test_a_checkpoint_of_the_tower_loads_with_a_report() -> None:
    source, model = towers.build("open_clip", seed=5), compressed("open_clip", num_classes=3)
    report = model.load_backbone(source.state_dict())
    assert set(report.loaded) == source.state_dict().keys()
    assert (report.unused, report.prefix) == ([], "")
    assert "classifier.weight" in report.new
    assert not any(key.startswith("backbone") for key in report.new)
    assert "new: insertions.1.position" in str(report)
    for key, value in source.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value)


@pytest.mark.parametrize("before", ["", "module."])
def test_a_checkpoint_of_a_whole_clip_loads(before: str) -> None:
    """Some names of open_clip's text tower are those of the visual one: they are not used, and reported so."""
    sizes = {"image_size": towers.WIDE, "patch_size": towers.PATCH, "width": towers.DIM, "layers": towers.BLOCKS}
    text = {"context_length": 4, "vocab_size": 8, "width": towers.DIM, "heads": 2, "layers": towers.BLOCKS}
    whole = open_clip.CLIP(towers.OUT, {**sizes, "head_width": towers.DIM // 2, "mlp_ratio": 2.0}, text)
    state = {before + key: value for key, value in whole.state_dict().items()}
    report = compressed("open_clip").load_backbone(state)
    visual = {key for key in state if key.startswith(f"{before}visual.")}
    assert report.prefix == f"{before}visual."
    assert {report.prefix + key for key in report.loaded} == visual
    assert set(report.unused) == state.keys() - visual
    assert f"{before}transformer.resblocks.0.ln_1.weight" in report.unused


def test_a_checkpoint_that_doesnt_fit_changes_nothing() -> None:
    model = compressed("open_clip")
    before = copy.deepcopy(model.state_dict())
    state = towers.build("open_clip", seed=5).state_dict()
    with pytest.raises(ValueError, match="1 of 56 tensors are missing, 1 have another shape"):
        model.load_backbone({k: v[:3] if k == "ln_pre.bias" else v for k, v in state.items() if k != "ln_post.bias"})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name, kind in towers.KINDS.items() if kind.checkpointing])
def test_the_librarys_gradient_checkpointing(name: str) -> None:
    """The same gradients, and less kept for the backward."""
    kept, gradients = [], []
    for on in (False, True):
        tower = towers.build(name)
        towers.KINDS[name].checkpointing(tower, on)
        model = randomized(compress(tower, FRAMES, AFTER, "inti_reference")).train()
        for module in model.modules():  # paths and patches that are dropped would be others in every run
            if hasattr(module, "drop_prob") or hasattr(module, "prob"):
                module.eval()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(_counting(sizes), lambda tensor: tensor):
            loss = model(video(name, 1)).square().mean()
        loss.backward()
        kept.append(sum(sizes))
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert kept[1] < 0.7 * kept[0]
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def _counting(sizes: list[int]) -> Callable[[Tensor], Tensor]:
    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    return keep


@pytest.mark.parametrize("name", ["open_clip-tokens", "timm-dynamic"])
def test_towers_that_drop_patches_are_refused_in_training(name: str) -> None:
    with pytest.raises(ValueError, match="drops patches in training"):
        compressed(name).train()(video(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LIBRARIES)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model, clips = randomized(compressed(name)), video(name)
    with torch.autocast("cpu", dtype):
        output = model(clips)
        output.float().square().mean().backward()
    error = (output.float() - model(clips)).square().mean().sqrt()
    assert error < {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype] * output.float().square().mean().sqrt()


@pytest.mark.parametrize("name", LIBRARIES)
def test_compile_breaks_no_graph(name: str) -> None:
    temporal = {"temporal": "uniformer_v2", "uniformer_v2": {"global_blocks": 1, "local": "double", "dropout": 0.0}}
    model, clips = randomized(compressed(name, **temporal if name == "timm" else {})), video(name)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(clips), model(clips))
    step(clips).square().mean().backward()
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "method"), [*((name, "inti") for name in LIBRARIES), ("timm", "tome")])
def test_export(name: str, method: str) -> None:
    model, clips = randomized(compressed(name, method)), video(name)
    exported = torch.export.export(model, (clips,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(clips), model(clips))


@pytest.mark.parametrize("name", LIBRARIES)
def test_onnx(name: str) -> None:
    """Through the reference, whose operators ONNX knows."""
    model, clips = randomized(compressed(name, "inti_reference", num_classes=3)), video(name)
    program = torch.onnx.export(model, (clips,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (scores,) = session.run(None, {session.get_inputs()[0].name: clips.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(scores), model(clips), rtol=1e-3, atol=1e-4)


LORA = {"open_clip": ["c_fc"], "openai_clip": ["c_fc"], "clip": ["q_proj", "v_proj"], "timm": ["qkv"]}


@pytest.mark.parametrize("name", LIBRARIES)
def test_lora_on_the_backbone(name: str) -> None:
    """Put on before or after: its branches are called, and trained while the tower isn't."""
    config = peft.LoraConfig(r=2, target_modules=LORA[name], init_lora_weights=False)
    model = randomized(compressed(name))
    clips, plain = video(name), model(video(name))
    model.freeze(model.backbone.parameters())
    peft.inject_adapter_in_model(config, model.backbone)
    model(clips).square().mean().backward()
    assert not torch.allclose(model(clips), plain)
    trained = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {key for key, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in key for key in trained)
    assert all("lora_" in key for key in trained if key.startswith("backbone"))
    before = compress(peft.inject_adapter_in_model(config, towers.build(name)), FRAMES, AFTER)
    before.load_state_dict(model.state_dict())
    torch.testing.assert_close(before(clips), model(clips))


@pytest.mark.parametrize("options", [{"method": "tome"}, {"temporal": "st_adapter", "st_adapter": {"before": "mlp"}}])
def test_blocks_that_cant_be_taken_apart(options: dict) -> None:
    """Refused when the model is made, by name; and a block that FSDP2 sharded by itself when it is run."""
    with pytest.raises(ValueError, match="ParallelScalingBlock can't be taken apart"):
        compress(towers.build("timm-parallel"), FRAMES, **{"after": () if "method" in options else AFTER, **options})
    model = compressed("timm", **options)
    handle = model.blocks[2].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="takes block 3 apart, but it has hooks"):
        model(video("timm"))
    handle.remove()
    model.blocks[1].unshard = None
    with pytest.raises(RuntimeError, match="takes block 2 apart, but FSDP2 sharded it"):
        model(video("timm"))


def test_frozen_backbone() -> None:
    tower = towers.build("clip")
    model = randomized(compress(tower, FRAMES, AFTER, freeze_backbone=True, num_classes=2))
    model(video("clip")).square().mean().backward()
    assert all(p.grad is None for p in tower.parameters())
    assert all(p.grad is not None for p in model.insertions.parameters())
    assert compress(tower, **model.settings).settings == model.settings
    model.uncompress()
    assert all(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize(
    "options",
    [{"context": ()}, {"context": ("cube", "frame"), "fusion": "cat"}, {"fusion": "add"}, {"head": "sigmoid"},
     {"head": "attention"}, {"backend": "reference", "recompute": True}],
)  # fmt: skip
def test_ablations(options: dict) -> None:
    model = compressed("clip", inti=options)
    inti = model.insertions["3"]
    for key, value in options.items():
        assert getattr(inti, {"head": "head_type"}.get(key, key)) == value
    reference = compressed(
        "clip", "inti_reference", inti={k: options[k] for k in options.keys() & {"context", "fusion", "head"}}
    )
    randomized(model), randomized(reference)
    torch.testing.assert_close(model(video("clip")), reference(video("clip")), rtol=1e-4, atol=1e-5)


def test_weights_of_every_insertion() -> None:
    model, clips = randomized(compressed("timm-registers")), video("timm-registers")
    output, weights = model(clips, return_weights=True)
    assert torch.equal(output, model(clips))
    assert [tuple(w.shape) for w in weights] == [(2, 2, 5 + 24, 2), (2, 1, 5 + 24, 2)]
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 2, 29))


def test_run_in_two_parts_is_the_whole() -> None:
    model, clips = randomized(compressed("clip")), video("clip")
    tokens = model.embed(clips)
    for start, stop in ((0, 1), (1, 2), (2, None)):
        tokens = model.run(tokens, start, stop)
    assert torch.equal(model.pool(tokens), model(clips))
    with pytest.raises(ValueError, match="start must be 0, got 2: ToMe"):
        compressed("clip", "tome").run(tokens, 2)


def test_another_size_of_picture() -> None:
    """Where the library takes one; the grid that the insertions get is the pictures'."""
    model = randomized(compressed("timm-dynamic"))
    clips = torch.randn(1, FRAMES, 3, 48, 64)
    output, weights = model(clips, return_weights=True)
    assert weights[0].shape == (1, 2, 1 + 6 * 8, 2)
    assert output.isfinite().all()


def test_a_copy_is_whole() -> None:
    """deepcopy, as EMA makes one: it runs on its own tower."""
    model = randomized(compressed("open_clip"))
    twin, clips = copy.deepcopy(model), video("open_clip")
    expected = model(clips)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(clips), expected)
    assert not torch.equal(model(clips), expected)


@pytest.mark.parametrize("name", ["open_clip", "openai_clip"])
def test_towers_in_half_precision(name: str) -> None:
    """As these libraries load them on a GPU: matrices in half precision, norms and class token in single."""
    tower = towers.convert_weights(towers.build(name))
    assert {p.dtype for p in tower.parameters()} == {torch.float16, torch.float32}
    model = randomized(compress(tower, FRAMES, AFTER, num_classes=2, inti={"hidden": 8}))
    assert {p.dtype for p in model.insertions.parameters()} == {torch.float16}
    scores = model(video(name).half())
    wide = randomized(compress(towers.build(name), FRAMES, AFTER, num_classes=2, inti={"hidden": 8}))
    torch.testing.assert_close(scores.float(), wide(video(name)), rtol=0.05, atol=0.05)
    scores.float().square().mean().backward()


def test_another_dtype() -> None:
    model = compress(towers.build("timm").double(), FRAMES, AFTER, num_classes=2)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(video("timm").double()).dtype == torch.float64


def test_the_towers_modes_are_kept() -> None:
    """A part that was put in eval mode stays there, and uncompress gives the modes back."""
    tower = towers.build("timm-registers").train()
    tower.blocks[0].drop_path1.eval()
    before = {name: module.training for name, module in tower.named_modules()}
    model = compress(tower, FRAMES, AFTER)
    assert {name: module.training for name, module in tower.named_modules()} == before
    assert model.training
    assert model.insertions["1"].training
    model.eval()
    model.uncompress()
    assert {name: module.training for name, module in tower.named_modules()} == before


def test_uncompress_after_the_parameters_were_replaced() -> None:
    """As FSDP2 does, and as what fills a model that was made on meta."""
    with torch.device("meta"):
        tower = towers.KINDS["clip"].make()
    model = compress(tower, FRAMES, AFTER, freeze_backbone=True)
    model.to_empty(device="cpu")
    assert all(p.requires_grad for p in model.uncompress().parameters())


@pytest.mark.parametrize("local", [True, "double"])
@pytest.mark.parametrize("method", ["inti", "tome", "sta"])
def test_batch_statistics_are_taken_once_a_step(method: str, local: bool | str) -> None:
    """Gradient checkpointing runs the norms of the local modules twice, and changes nothing."""
    options = {"local": local, "global_blocks": 1, "dropout": 0.0}
    results = []
    for on in (False, True):
        model = compressed("open_clip", method, temporal="uniformer_v2", uniformer_v2=options)
        model.backbone.set_grad_checkpointing(on)
        randomized(model).train()(video("open_clip")).square().mean().backward()
        counts = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
        assert len(counts) == towers.BLOCKS * (1 + (local == "double"))
        assert all(count == 1 for count in counts)
        results.append([*model.buffers(), *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("method", ["inti", "tome", "sta", "linear_pooling"])
def test_a_budget(method: str) -> None:
    """The costliest setting within it; what it sets can't be given too, and frames are looked at first."""
    naive = compressed("timm", "naive")
    clips = video("timm", 1)
    whole = cost.count_macs(naive, clips)
    model = compress(towers.build("timm"), FRAMES, method=method, gflops=0.8 * whole / 1e9)
    assert 0.6 * whole < cost.count_macs(model, clips) <= 0.8 * whole
    if method in ("inti", "linear_pooling"):
        with pytest.raises(TypeError, match=f"gflops= sets where {method} halves the frames"):
            compress(towers.build("timm"), FRAMES, (1, 3), method, gflops=1.0)
        with pytest.raises(ValueError, match="need frames that divide by 4, got 6"):
            compress(towers.build("timm"), 6, method=method, gflops=1.0)
    with pytest.raises(ValueError, match="the least is"):
        compress(towers.build("timm"), FRAMES, method=method, gflops=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"frames": 6, "after": (1, 3)}, ValueError, "need frames that divide by 4, got 6, which can be halved once"),
        ({"frames": 5, "after": (1,)}, ValueError, "got 5, which can be halved 0 times"),
        ({"after": (0,)}, ValueError, "after counts blocks from 1 to 4 in this tower, got 0"),
        ({"after": (2, 5)}, ValueError, "from 1 to 4 in this tower, got 5"),
        ({"after": (3, 1)}, ValueError, "rising"),
        ({"after": "paper"}, ValueError, "12 or 24 blocks, this one has 4"),
        ({"after": "all"}, ValueError, 'block numbers or "paper"'),
        ({"after": (1.5,)}, TypeError, "block numbers"),
        ({"method": "mean"}, ValueError, "method must be one of naive, inti"),
        ({"temporal": "conv"}, ValueError, "temporal must be one of uniformer_v2, st_adapter"),
        ({"context": ("cube",)}, TypeError, "unknown option 'context'; with method='inti' compress takes inti"),
        ({"tome": {"r": 2}}, TypeError, "unknown option 'tome'"),
        ({"inti": ("cube",)}, TypeError, "inti must be a dict of arguments, got tuple"),
        ({"inti": {"levels": 2}}, TypeError, "levels"),
        ({"after": 1}, TypeError, "after must be a sequence of block numbers"),
        ({"method": "naive"}, TypeError, "after is for methods that halve frames, which naive doesn't"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        ({"num_classes": 3.0}, TypeError, "num_classes"),
        ({"frames": 0, "method": "naive", "after": ()}, ValueError, "frames must be a whole number of at least 1"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compress(towers.build("clip"), **{"frames": FRAMES, "after": AFTER, **arguments})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 32, 32), r"video must be \[B, frames, 3, H, W\]"),
        ((1, 8, 3, 32, 32), "clips of 4 frames, got 8"),
        ((1, 4, 3, 48, 32), "48"),
    ],
)
def test_bad_videos(shape: Sequence[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compressed("clip")(torch.zeros(shape))


def test_importing_needs_none_of_the_libraries() -> None:
    import subprocess
    import sys

    libraries = ("timm", "open_clip", "transformers", "clip")
    code = f"import sys, inti_kernels.models; print([m for m in {libraries} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_reachable_from_the_top() -> None:
    assert inti_kernels.compress is compress
    assert issubclass(FusedInTI, InTI)
