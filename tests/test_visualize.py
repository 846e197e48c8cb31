"""`visualize`: what its pictures show, the checkpoints that it takes, and what it refuses."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

# The package works without them; `make test` installs them.
av = pytest.importorskip("av", reason="needs inti_kernels[demo]")
image_module = pytest.importorskip("PIL.Image", reason="needs inti_kernels[demo]")
pytest.importorskip("matplotlib", reason="needs inti_kernels[demo]")

import synthetic_clip  # noqa: E402
import towers  # noqa: E402

from inti_kernels.__main__ import main  # noqa: E402
from inti_kernels.cli import _animation, _clip, _picture, visualize  # noqa: E402
from inti_kernels.models import CompressedViT, compress  # noqa: E402
from inti_kernels.testing import randomize  # noqa: E402


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_clip.write(tmp_path_factory.mktemp("video") / "square.mp4", lambda i: 20 + 5 * i, side=16)


def model_of(frames: int = 8, after: tuple[int, ...] = (1, 2), **arguments) -> CompressedViT:
    return compress(_clip.build_tower("vit_tiny", seed=1), frames, after, **arguments).requires_grad_(False)


def all_to_the_first(model: CompressedViT) -> CompressedViT:
    """Every InTI gives the first frame of each pair all the weight."""
    for insertion in model.insertions.values():
        insertion.head.linear2.bias.copy_(torch.tensor([100.0, 0.0]))
    return model


def save(model: CompressedViT, path: Path, name: str = "vit_tiny") -> Path:
    torch.save({"model": name, "settings": model.settings, "state_dict": model.state_dict()}, path)
    return path


def shown(model: CompressedViT) -> visualize.Shown:
    return visualize.Shown(model, "a tower", "from a test", ((0.5,) * 3, (0.5,) * 3))


def call(video: Path, folder: Path, *more: object) -> int:
    return main(["visualize", str(video), "--out", str(folder / "picture.png"), *map(str, more)])


def frames_of(path: Path) -> list[Tensor]:
    """uint8 [height, width, 3] each."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    with image_module.open(path) as image:
        frames = []
        for number in range(image.n_frames):
            image.seek(number)
            rgb = image.convert("RGB")
            frames.append(torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3))
    return frames


class TestPictures:
    def test_a_planted_model_shows_the_first_frame(
        self, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = save(all_to_the_first(model_of()), tmp_path / "model.pt")
        assert call(video, tmp_path, "--checkpoint", file, "--animation", tmp_path / "moving.gif") == 0
        with image_module.open(tmp_path / "picture.png") as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
        frames = frames_of(tmp_path / "moving.gif")
        assert len(frames) == 8
        # 64 pixels enlarged to 256, three of them with 8 between, 20 for the labels.
        assert {tuple(frame.shape) for frame in frames} == {(276, 784, 3)}
        panels = [frame[20:].float().unflatten(0, (64, 4)).mean(1) for frame in frames]
        for number, panel in enumerate(panels):
            first = panels[number // 4 * 4][:, :256]
            difference = (panel[:, 528:] - first).abs().mean()
            assert difference < 3, f"aggregated frame of frame {number} isn't the first of its four: {difference}"
        assert (panels[0][:, :256] - panels[1][:, :256]).abs().mean() > 10
        printed = capsys.readouterr().out
        assert printed.count("1.000 0.000 0.000 0.000") == 2
        assert "8 frames made 2 by InTI after 1, 2" in printed

    def test_without_a_checkpoint_all_frames_weigh_the_same(
        self, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        moving = tmp_path / "moving.mp4"
        assert call(video, tmp_path, "--model", "vit_tiny", "--frames", 16, "--animation", moving) == 0
        printed = capsys.readouterr().out
        assert "random weights" in printed
        assert printed.count("0.250 … 0.250") == printed.count("0.250 0.250 0.250 0.250") == 4
        frames = frames_of(moving)
        assert len(frames) == 16
        assert {tuple(frame.shape) for frame in frames} == {(276, 784, 3)}
        # The frames get brighter from each to the next.
        brightness = [float(frame[200:270, 4:250].float().mean()) for frame in frames]
        assert brightness == sorted(brightness)
        assert brightness[-1] - brightness[0] > 100

    @pytest.mark.parametrize(("height", "width"), [(32, 48), (225, 301)])
    def test_moving_pictures_of_any_size(self, tmp_path: Path, height: int, width: int) -> None:
        weights = [torch.rand(1, 1 + 2 * 3, 2).softmax(-1)]
        pictures = torch.rand(2, 3, height, 1).expand(-1, -1, -1, width)
        maps = _picture.maps_of(pictures, [3, 9], weights, (2, 3), 1)
        for suffix in _animation.SUFFIXES:
            path = tmp_path / f"moving{suffix}"
            _animation.animate(path, maps)
            times = 7 if height == 32 else 1
            want = (times * height + 20 + height % 2, 3 * times * width + 16 + width % 2, 3)
            assert [tuple(frame.shape) for frame in frames_of(path)] == [want] * 2
            with pytest.raises(FileExistsError):
                _animation.animate(path, maps)
            _animation.animate(path, maps, force=True)


class TestMaps:
    @pytest.mark.parametrize("kind", sorted(towers.KINDS))
    def test_of_every_tower(self, video: Path, kind: str) -> None:
        """Patches at their places in grids that aren't square, whatever stands before them."""
        tower, size = towers.build(kind), towers.KINDS[kind]
        model = compress(tower, 4, (2,)).eval().requires_grad_(False)
        randomize(model.insertions, seed=2)
        weights: list[Tensor] = []
        handle = model.insertions["2"].register_forward_hook(lambda module, inputs, output: weights.append(output[1]))
        clip, maps = visualize._maps(shown(model), video)
        handle.remove()
        assert maps.pictures.shape == (4, 3, *size.image)
        assert maps.outputs.shape == (2, 3, *size.image)
        assert clip.indices == maps.indices == [5, 15, 25, 35]
        # The middle of a patch has the patch's weight.
        middle = towers.PATCH // 2
        at_patches = maps.pixels[:, middle - 1 :: towers.PATCH, middle - 1 :: towers.PATCH].flatten(1)
        of_patches = weights[0][0, :, size.prefix :].transpose(1, 2).flatten(0, 1)
        assert at_patches.shape == of_patches.shape
        assert (at_patches - of_patches).abs().max() < 0.25 * (of_patches.max() - of_patches.min())
        if size.prefix:
            torch.testing.assert_close(maps.first, weights[0][0, :, 0].flatten())
        else:
            assert maps.first is None

    @pytest.mark.parametrize("frames", [8, 16, 32])
    def test_of_any_number_of_frames(self, video: Path, frames: int) -> None:
        model = all_to_the_first(model_of(frames, (1, 2, 3)))
        _, maps = visualize._maps(shown(model), video)
        torch.testing.assert_close(maps.outputs, maps.pictures[::8])

    def test_the_models_pixels_are_those_of_its_tower(self) -> None:
        tower = _clip.build_tower("timm/vit_tiny_patch16_224")
        assert _clip.pixel_statistics("timm/vit_tiny_patch16_224", tower) == ((0.5,) * 3, (0.5,) * 3)
        mean, _ = _clip.pixel_statistics("open_clip/ViT-B-16", tower)
        assert mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
        assert _clip.pixel_statistics("open_clip/ViT-B-16-SigLIP", tower) == ((0.5,) * 3, (0.5,) * 3)


def load(*options: object) -> visualize.Shown:
    parser = argparse.ArgumentParser()
    visualize.add_arguments(parser)
    return visualize._load(parser.parse_args([str(option) for option in options]))


class TestCheckpoints:
    def test_settings_and_state_come_back(self, tmp_path: Path) -> None:
        model = model_of(4, (2,), num_classes=3, inti={"context": ("cube",), "head": "sigmoid"})
        randomize(model, seed=5)
        loaded = load("--checkpoint", save(model, tmp_path / "model.pt"))
        assert loaded.name == "vit_tiny"
        clip = torch.randn(1, 4, 3, 64, 64)
        assert torch.equal(loaded.model(clip), model.eval()(clip))

    def test_a_state_dict_alone(self, tmp_path: Path) -> None:
        model = model_of(8, (1, 3), num_classes=3)
        randomize(model, seed=5)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        loaded = load("--checkpoint", tmp_path / "state.pt", "--model", "vit_tiny")
        assert loaded.after == [1, 3]
        clip = torch.randn(1, 8, 3, 64, 64)
        assert torch.equal(loaded.model(clip), model.eval()(clip))

    def test_blocks_of_the_paper(self) -> None:
        """Of its towers of 12 and 24 blocks, as far along in this one of 4; by that word and without one."""
        places = [_clip.places("paper", blocks) for blocks in (4, 6, 12, 24)]
        assert places == [(1, 2), (2, 3), (5, 7), (10, 14)]
        assert [_clip.MODELS[name].after for name in ("vit_tiny", "vit_b_32", "vit_l_14")] == [(1, 2), (5, 7), (10, 14)]
        for options in ([], ["--after", "paper"]):
            assert load("--model", "vit_tiny", *options).after == [1, 2]
        assert load("--model", "vit_tiny", "--after", "1,3").after == [1, 3]

    def test_timms_classifier(self, tmp_path: Path) -> None:
        model = compress(timm.create_model("test_vit", num_classes=7), 4, (1,))
        file = save(model, tmp_path / "model.pt", "timm/test_vit")
        assert load("--checkpoint", file).model.adapter.out_features == 7

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            ([1, 2], [], r"holds list; expected what torch.save\(\{\"model\": NAME"),
            ({"epoch": 3, "optimizer": {}}, [], "holds a dict of epoch, optimizer; expected"),
            ({"model": "vit_tiny", "settings": {"after": [1]}}, [], 'no state dict of tensors under "state_dict"'),
            ({"weight": torch.zeros(2)}, [], r"has no InTI \(insertions.5.position"),
            ({"model": "vit_9", "settings": {}, "state_dict": {"a": torch.zeros(1)}}, [], "no tower 'vit_9'; there"),
            ({"settings": {}, "state_dict": {"a": torch.zeros(1)}}, [], "doesn't say of which tower it is.*--model"),
            ({"settings": {"after": [1], "method": "tome"}}, [], "with method 'tome', which gives tokens no weights"),
            ({"settings": {"after": []}}, [], "no InTI in it"),
            ({"settings": {"after": [1], "cow": {}}}, [], "unknown option 'cow'"),
            ({"settings": {"after": [1], "frames": 4}}, [], "fit vit_tiny.*Missing key.*settings in the checkpoint"),
            ({"settings": {"after": [1], "frames": 4}}, ["--frames", 8], "made with frames=4, got --frames 8"),
            ({"settings": {"after": [1]}}, ["--after", "1,2"], r"made with after=\[1\], got --after \[1, 2\]"),
            ({"settings": {"after": [1]}}, ["--after", "paper"], r"made with after=\[1\], got --after \[1, 2\]"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_said(
        self, tmp_path: Path, content: object, options: list[object], message: str
    ) -> None:
        if isinstance(content, dict) and set(content) == {"settings"}:
            content = {"model": "vit_tiny", "state_dict": {"a": torch.zeros(1)}, **content}
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises((ValueError, TypeError), match=message):
            load("--checkpoint", tmp_path / "model.pt", *options)

    def test_files_that_are_no_checkpoint(self, video: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no such checkpoint"):
            load("--checkpoint", tmp_path / "absent.pt")
        with pytest.raises(ValueError, match=r"can't be read by torch.load with weights_only=True"):
            load("--checkpoint", video)
        torch.save(model_of(), tmp_path / "pickle.pt")
        with pytest.raises(ValueError, match=r"can't be read by torch.load with weights_only=True"):
            load("--checkpoint", tmp_path / "pickle.pt")


class TestCommand:
    def test_nothing_is_overwritten(self, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = ("--model", "vit_tiny", "--frames", 4)
        moving = tmp_path / "moving.gif"
        moving.write_text("mine")
        assert call(video, tmp_path, *model, "--animation", moving) == 1
        assert "moving.gif is there already" in capsys.readouterr().err
        assert moving.read_text() == "mine"
        assert not (tmp_path / "picture.png").exists()
        assert call(video, tmp_path, *model, "--animation", moving, "--force") == 0
        assert len(frames_of(moving)) == 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--out", "picture.jpg"], "must end in .png, got picture.jpg"),
            (["--animation", "moving.webm"], "must end in .gif or .mp4, got moving.webm"),
            (["--checkpoint", "model.png", "--out", "model.png", "--force"], "model.png is what is to be read"),
            (["--model", "vit_tiny", "--after", "9"], "blocks from 1 to 4"),
            (["--model", "vit_tiny", "--frames", "6"], "need frames that divide by 4, got 6"),
            (["--model", "vit_tiny", "--frames", "64"], "at least 64 frames, got 40"),
            (["--model", "timm/vit_9"], "timm has no model 'vit_9'; among its"),
            (["--model", "transformers/absent"], "no config.json in absent"),
        ],
    )
    def test_what_cannot_be_done_is_said(
        self, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        options: list[str], message: str,
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        assert call(video, tmp_path, *options) == 1
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
