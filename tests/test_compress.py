"""compress(): a tower of every library made a video model, against what the library's own forward gives."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Sequence

import open_clip
import pytest
import torch
import towers
from torch import Tensor, nn

import inti_kernels
from inti_kernels import FusedInTI, InTI, compress
from inti_kernels.models import CompressedViT, cost

pytestmark = pytest.mark.usefixtures("one_thread")

LIBRARIES = towers.LIBRARIES


class PairMean(nn.Module):
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x.unflatten(1, (-1, 2)).mean(2)


@pytest.mark.parametrize("name", towers.KINDS)
def test_naive_is_the_library_on_all_frames(name: str) -> None:
    """The same bits, in the same batch; and the library's tower is untouched by it."""
    tower, clips = towers.build(name), towers.clips(name)
    with torch.no_grad():
        expected = towers.features(name, tower, clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(1)
        model = compress(tower, towers.FRAMES, method="naive")
        assert torch.equal(model(clips), expected)
        assert model.uncompress() is tower
        again = towers.features(name, tower, clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(1)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("method", ["inti", "inti_reference", "linear_pooling", "conv_pooling"])
@pytest.mark.parametrize("name", towers.KINDS)
def test_at_first_it_is_the_mean_of_the_pairs(name: str, method: str) -> None:
    model, clips = towers.compressed(name, method), towers.clips(name)
    mean = CompressedViT(model.adapter, towers.FRAMES, {number: PairMean() for number in towers.AFTER})
    with torch.no_grad():
        torch.testing.assert_close(model(clips), mean(clips), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["inti", "tome", "sta"])
def test_temporal_modules_start_as_nothing(method: str) -> None:
    """ST-Adapters, and UniFormerV2's local modules, leave a tower as it was until they are trained."""
    clips = towers.clips("timm")
    plain = towers.compressed("timm", method)(clips)
    for place in ("attention", "mlp"):
        model = towers.compressed("timm", method, temporal="st_adapter", st_adapter={"width": 8, "before": place})
        assert torch.equal(model(clips), plain)
    options = {"global_blocks": 0, "local": "double"}
    model = towers.compressed("timm", method, temporal="uniformer_v2", uniformer_v2=options)
    assert torch.equal(model(clips), plain)


def test_the_head_that_isnt_used_is_frozen_and_given_back() -> None:
    tower = towers.build("open_clip")
    tower.proj.requires_grad_(True)
    model = compress(tower, towers.FRAMES, towers.AFTER, temporal="uniformer_v2", uniformer_v2={"global_blocks": 2})
    frozen = {key for key, p in tower.named_parameters() if not p.requires_grad}
    assert frozen == {"proj", "ln_post.weight", "ln_post.bias"}
    model.uncompress()
    assert all(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_weights_are_the_towers(name: str) -> None:
    tower = towers.build(name)
    own = dict(tower.named_parameters())
    model = compress(tower, towers.FRAMES, towers.AFTER)
    shared = {key.removeprefix("backbone."): p for key, p in model.named_parameters() if key.startswith("backbone.")}
    assert shared.keys() == own.keys()
    assert all(shared[key] is own[key] for key in own)
    assert {key.partition(".")[0] for key in model.state_dict()} == {"backbone", "insertions"}
    assert type(model.insertions["1"]) is FusedInTI
    assert (model.insertions["1"].frames, model.insertions["3"].frames) == (4, 2)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_checkpoint_gives_the_same_scores(name: str) -> None:
    """Saved with its settings and read with weights_only: plain data and tensors."""
    model = towers.randomized(towers.compressed(name, num_classes=5, inti={"context": ("cube",), "hidden": 8}))
    file = io.BytesIO()
    torch.save({"settings": model.settings, "state_dict": model.state_dict()}, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    again = compress(towers.build(name, seed=1), **read["settings"])
    again.load_state_dict(read["state_dict"])
    with torch.no_grad():
        assert torch.equal(again(towers.clips(name)), model(towers.clips(name)))


def test_a_checkpoint_of_the_tower_loads_with_a_report() -> None:
    source, model = towers.build("open_clip", seed=5), towers.compressed("open_clip", num_classes=3)
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
    report = towers.compressed("open_clip").load_backbone(state)
    visual = {key for key in state if key.startswith(f"{before}visual.")}
    assert report.prefix == f"{before}visual."
    assert {report.prefix + key for key in report.loaded} == visual
    assert set(report.unused) == state.keys() - visual
    assert f"{before}transformer.resblocks.0.ln_1.weight" in report.unused


def test_a_checkpoint_that_doesnt_fit_changes_nothing() -> None:
    model = towers.compressed("open_clip")
    before = copy.deepcopy(model.state_dict())
    state = towers.build("open_clip", seed=5).state_dict()
    with pytest.raises(ValueError, match="1 of 56 tensors are missing, 1 have another shape"):
        model.load_backbone({k: v[:3] if k == "ln_pre.bias" else v for k, v in state.items() if k != "ln_post.bias"})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [{"context": ()}, {"context": ("cube", "frame"), "fusion": "cat"}, {"fusion": "add"}, {"head": "sigmoid"},
     {"head": "attention"}, {"backend": "reference", "recompute": True}],
)  # fmt: skip
def test_ablations(options: dict) -> None:
    model = towers.compressed("clip", inti=options)
    inti = model.insertions["3"]
    for key, value in options.items():
        assert getattr(inti, {"head": "head_type"}.get(key, key)) == value
    reference = towers.compressed(
        "clip", "inti_reference", inti={k: options[k] for k in options.keys() & {"context", "fusion", "head"}}
    )
    towers.randomized(model), towers.randomized(reference)
    torch.testing.assert_close(model(towers.clips("clip")), reference(towers.clips("clip")), rtol=1e-4, atol=1e-5)


def test_weights_of_every_insertion() -> None:
    model, clips = towers.randomized(towers.compressed("timm-registers")), towers.clips("timm-registers")
    output, weights = model(clips, return_weights=True)
    assert torch.equal(output, model(clips))
    assert [tuple(w.shape) for w in weights] == [(2, 2, 5 + 24, 2), (2, 1, 5 + 24, 2)]
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 2, 29))


def test_run_in_two_parts_is_the_whole() -> None:
    model, clips = towers.randomized(towers.compressed("clip")), towers.clips("clip")
    tokens = model.embed(clips)
    for start, stop in ((0, 1), (1, 2), (2, None)):
        tokens = model.run(tokens, start, stop)
    assert torch.equal(model.pool(tokens), model(clips))
    with pytest.raises(ValueError, match="start must be 0, got 2: ToMe"):
        towers.compressed("clip", "tome").run(tokens, 2)


def test_another_size_of_picture() -> None:
    """Where the library takes one; the grid that the insertions get is the pictures'."""
    model = towers.randomized(towers.compressed("timm-dynamic"))
    clips = torch.randn(1, towers.FRAMES, 3, 48, 64)
    output, weights = model(clips, return_weights=True)
    assert weights[0].shape == (1, 2, 1 + 6 * 8, 2)
    assert output.isfinite().all()


def test_the_towers_modes_are_kept() -> None:
    """A part that was put in eval mode stays there, and uncompress gives the modes back."""
    tower = towers.build("timm-registers").train()
    tower.blocks[0].drop_path1.eval()
    before = {name: module.training for name, module in tower.named_modules()}
    model = compress(tower, towers.FRAMES, towers.AFTER)
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
    model = compress(tower, towers.FRAMES, towers.AFTER, freeze_backbone=True)
    model.to_empty(device="cpu")
    assert all(p.requires_grad for p in model.uncompress().parameters())


@pytest.mark.parametrize("method", ["inti", "tome", "sta", "linear_pooling"])
def test_a_budget(method: str) -> None:
    """The costliest setting within it; what it sets can't be given too, and frames are looked at first."""
    naive = towers.compressed("timm", "naive")
    clips = towers.clips("timm", 1)
    whole = cost.count_macs(naive, clips)
    model = compress(towers.build("timm"), towers.FRAMES, method=method, gflops=0.8 * whole / 1e9)
    assert 0.6 * whole < cost.count_macs(model, clips) <= 0.8 * whole
    if method in ("inti", "linear_pooling"):
        with pytest.raises(TypeError, match=f"gflops= sets where {method} halves the frames"):
            compress(towers.build("timm"), towers.FRAMES, (1, 3), method, gflops=1.0)
        with pytest.raises(ValueError, match="need frames that divide by 4, got 6"):
            compress(towers.build("timm"), 6, method=method, gflops=1.0)
    with pytest.raises(ValueError, match="the least is"):
        compress(towers.build("timm"), towers.FRAMES, method=method, gflops=1e-6)


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
        compress(towers.build("clip"), **{"frames": towers.FRAMES, "after": towers.AFTER, **arguments})


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
        towers.compressed("clip")(torch.zeros(shape))


def test_importing_needs_none_of_the_libraries() -> None:
    libraries = ("timm", "open_clip", "transformers", "clip")
    code = f"import sys, inti_kernels.models; print([m for m in {libraries} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_reachable_from_the_top() -> None:
    assert inti_kernels.compress is compress
    assert issubclass(FusedInTI, InTI)
