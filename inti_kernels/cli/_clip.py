"""Vision towers by name, for the commands: CLIPs of published sizes, and what the installed libraries have."""

from __future__ import annotations

import argparse
import difflib
import json
import pickle
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import compress
from ..models.compress import PAPER_AFTER
from ._video import CLIP_MEAN, CLIP_STD, require

# Of a clip, as the paper has them.
FRAMES = 16


@dataclass(frozen=True)
class Model:
    """Sizes of a CLIP vision tower."""

    dim: int
    blocks: int
    heads: int
    patch: int
    image: int
    projection: int

    @property
    def after(self) -> tuple[int, ...]:
        """Blocks after which InTI stands where nobody says otherwise."""
        return places(PAPER, self.blocks)


MODELS = {
    "vit_b_32": Model(768, 12, 12, 32, 224, 512),
    "vit_b_16": Model(768, 12, 12, 16, 224, 512),
    "vit_l_14": Model(1024, 24, 16, 14, 224, 768),
    # Not a published size: small enough for a test of the whole demo.
    "vit_tiny": Model(32, 4, 2, 16, 64, 16),
}


PAPER = "paper"
# The help of an option --after.
AFTER = (
    f"blocks, counted from 1, after which frames are halved, or {PAPER}: 5,7 in a tower of 12 blocks, 10,14 in one of "
    f"24, as far along in others (default: {PAPER})"
)


def tower_name(text: str) -> str:
    """Checks a tower's name as far as that goes without its library: the type of an argparse option."""
    library, _, name = text.partition("/")
    if text in MODELS or (library in _BUILDERS and name):
        return text
    raise argparse.ArgumentTypeError(f"no tower {text!r}; there are {NAMES}")


def block_numbers(text: str) -> tuple[int, ...] | str:
    """Block numbers with commas between them, or "paper": the type of an argparse option."""
    if text == PAPER:
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected block numbers such as 5,7, or {PAPER}, got {text!r}") from None


def places(after: tuple[int, ...] | str | None, blocks: int) -> tuple[int, ...]:
    """The block numbers that an option --after means in a tower of so many blocks; None is the default.

    The paper says where InTI stands in towers of 12 and 24; in others it stands as far along as in that of 12.
    """
    if after is not None and after != PAPER:
        return after
    return PAPER_AFTER.get(blocks, tuple(number * blocks // 12 for number in PAPER_AFTER[12]))


def build_tower(name: str, weights: Path | None = None, seed: int = 0) -> nn.Module:
    """A vision tower by its name, in eval mode; nothing is ever downloaded.

    Args:
        name: one of ``MODELS``, a `transformers` CLIPVisionModelWithProjection of that size; "open_clip/NAME" or
            "timm/NAME", an architecture of that library (timm's without its classifier); "transformers/DIR", what the
            config.json in a directory describes (of a whole CLIP its vision tower, with projection), and no more:
            weights beside it are read where they are given, see :func:`weights_beside`.
        weights: None for random weights drawn from ``seed``; a directory as transformers' ``save_pretrained`` writes
            it; or a state dict file (.safetensors, or anything ``torch.load`` reads with weights_only), of the tower or
            of a model that holds it.

    Raises:
        RuntimeError: the library isn't installed.
        ValueError: no such tower; the checkpoint isn't there or doesn't fit it.
    """
    library, _, of_library = name.partition("/")
    # The global generator is left as it was found.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = _clip(name) if name in MODELS else _BUILDERS[library](of_library)
    if weights is not None:
        _load(tower, weights, name)
    return tower.eval()


def _clip(name: str) -> nn.Module:
    transformers = require("transformers")
    size = MODELS[name]
    config = transformers.CLIPVisionConfig(
        hidden_size=size.dim,
        intermediate_size=4 * size.dim,
        projection_dim=size.projection,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        image_size=size.image,
        patch_size=size.patch,
        attn_implementation="sdpa",
    )
    return transformers.CLIPVisionModelWithProjection(config)


def _of_open_clip(name: str) -> nn.Module:
    open_clip = require("open_clip", "models")
    _check_known("open_clip", name, open_clip.list_models())
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"] | {"timm_model_pretrained": False}
    # The text tower isn't needed: the smallest there can be, and none whose config is fetched from a hub.
    text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    return open_clip.CLIP(config["embed_dim"], vision, text, config.get("quick_gelu", False)).visual


def _of_timm(name: str) -> nn.Module:
    timm = require("timm", "models")
    _check_known("timm", name.partition(".")[0], timm.list_models())
    return timm.create_model(name, pretrained=False, num_classes=0)


def _of_transformers(directory: str) -> nn.Module:
    transformers = require("transformers", "models")
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(
            f"no config.json in {directory}; transformers/DIR takes a directory that save_pretrained wrote"
        )
    vision, architecture = _configuration(directory)
    if architecture in ("CLIPModel", "CLIPVisionModelWithProjection"):
        return transformers.CLIPVisionModelWithProjection(vision)
    return transformers.AutoModel.from_config(vision)


def _configuration(directory: str) -> tuple[Any, str]:
    """transformers' configuration of the vision tower in a directory, and the class that was saved there."""
    config = require("transformers", "models").AutoConfig.from_pretrained(directory, local_files_only=True)
    vision = getattr(config, "vision_config", config)
    # A whole CLIP's is the one that its projection has.
    if hasattr(config, "projection_dim"):
        vision.projection_dim = config.projection_dim
    return vision, (config.architectures or [""])[0]


def weights_beside(name: str) -> Path | None:
    """The directory of a "transformers/DIR" if it holds more than the config.json, as ``save_pretrained`` writes it:
    what `build_tower` takes as ``weights``. None for other towers."""
    library, _, directory = name.partition("/")
    if library != "transformers":
        return None
    files = (file for pattern in ("model*.safetensors", "pytorch_model*.bin") for file in Path(directory).glob(pattern))
    return Path(directory) if any(files) else None


_BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "open_clip": _of_open_clip,
    "timm": _of_timm,
    "transformers": _of_transformers,
}
NAMES = ", ".join(MODELS) + ", open_clip/NAME, timm/NAME, transformers/DIR"


def _check_known(library: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5) or sorted(known)[:5]
        raise ValueError(f"{library} has no model {name!r}; among its {len(known)} are {', '.join(near)}")


def pixel_statistics(name: str, tower: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the pixels that a tower is trained on; CLIP's where its library doesn't say."""
    library, _, of_library = name.partition("/")
    stated: list[Any] = []
    if library == "open_clip":
        # Not every checkpoint of an architecture has the same: what most have.
        open_clip = require("open_clip", "models")
        tags = open_clip.list_pretrained_tags_by_model(of_library)
        configs = (open_clip.get_pretrained_cfg(of_library, tag) for tag in tags)
        stated = [(config["mean"], config["std"]) for config in configs if config.get("mean")]
    elif library == "timm":
        stated = [(tower.pretrained_cfg["mean"], tower.pretrained_cfg["std"])]
    elif library == "transformers" and (file := Path(of_library) / "preprocessor_config.json").is_file():
        config = json.loads(file.read_text())
        stated = [(tuple(config["image_mean"]), tuple(config["image_std"]))]
    return statistics.mode(stated) if stated else (CLIP_MEAN, CLIP_STD)


def _load(tower: nn.Module, weights: Path, name: str) -> None:
    if weights.is_dir():
        if not hasattr(tower, "from_pretrained"):
            raise ValueError(f"{weights} is a directory, which only towers of transformers load; {name} takes a file")
        try:
            config, _ = _configuration(str(weights))
            own = {"config": config} if isinstance(config, type(tower).config_class) else {}
            loaded = type(tower).from_pretrained(str(weights), local_files_only=True, **own)
        except (OSError, ValueError) as error:
            raise ValueError(f"{weights} holds no checkpoint that transformers can read: {error}") from error
        state = loaded.state_dict()
    else:
        state = read_checkpoint(weights)
        state = state.get("state_dict", state) if isinstance(state, dict) else state
        if not is_state_dict(state):
            raise ValueError(f"{weights} must hold a state dict of tensors, got {type(state).__name__}")
    try:
        compress(tower, method="naive").load_backbone(state)
    except ValueError as error:
        raise ValueError(f"{weights} isn't of {name}: {error}; --model chooses another tower") from error


def read_checkpoint(path: Path) -> Any:
    """What a local file holds (.safetensors, or whatever torch.load takes with weights_only), on the CPU.

    Raises ValueError when the file isn't there or is something else.
    """
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}")
    if path.suffix == ".safetensors":
        return require("safetensors.torch").load_file(str(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"{path} can't be read by torch.load with weights_only=True: {first}") from error


def is_state_dict(value: Any) -> bool:
    """Whether it is a dict of tensors."""
    return isinstance(value, dict) and bool(value) and all(isinstance(one, Tensor) for one in value.values())
