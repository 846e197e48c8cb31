"""The demo's backbone: a CLIP vision tower run frame by frame, with modules put between its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ._video import require


@dataclass(frozen=True)
class Model:
    """Sizes of a CLIP vision tower, and the blocks after which the paper's InTI_{5,7} stands in it."""

    dim: int
    blocks: int
    heads: int
    patch: int
    image: int
    projection: int
    after: tuple[int, ...]


MODELS = {
    "vit_b_32": Model(768, 12, 12, 32, 224, 512, (5, 7)),
    "vit_b_16": Model(768, 12, 12, 16, 224, 512, (5, 7)),
    # The paper counts in steps of two blocks on ViT-L: its InTI_{5,7} stands after blocks 10 and 14.
    "vit_l_14": Model(1024, 24, 16, 14, 224, 768, (10, 14)),
    # Not a published size: small enough for a test of the whole demo.
    "vit_tiny": Model(32, 4, 2, 16, 64, 16, (1, 2)),
}


def build_clip(name: str, weights: Path | None = None, seed: int = 0) -> nn.Module:
    """A `transformers` CLIPVisionModelWithProjection of the named size, in eval mode.

    weights: None for random weights drawn from `seed`; a directory as `save_pretrained` writes it (a whole CLIP or its
    vision part); or a state dict file (.safetensors, or anything `torch.load` reads with weights_only). Nothing is
    ever downloaded.
    Raises RuntimeError without transformers, ValueError when the checkpoint isn't there or doesn't fit the size.
    """
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
    # The global generator is left as it was found.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = transformers.CLIPVisionModelWithProjection(config)
    if weights is not None:
        _load(clip, weights, name)
    return clip.eval()


def _load(clip: nn.Module, weights: Path, name: str) -> None:
    if weights.is_dir():
        transformers = require("transformers")
        try:
            loaded = transformers.CLIPVisionModelWithProjection.from_pretrained(str(weights), local_files_only=True)
        except OSError as error:
            raise ValueError(f"{weights} holds no checkpoint that transformers can read: {error}") from error
        state = loaded.state_dict()
    elif weights.is_file():
        state = _read_state(weights)
    else:
        raise ValueError(f"no such checkpoint: {weights}; --weights takes a local directory or file")
    own = clip.state_dict()
    # A state dict of a whole CLIP has the text tower too, and older ones the position buffer.
    state = {key: value for key, value in state.items() if key in own}
    missing = sorted(own.keys() - state.keys())
    wrong = [key for key, value in state.items() if value.shape != own[key].shape]
    if missing or wrong:
        raise ValueError(
            f"{weights} doesn't fit {name}: {len(missing)} of {len(own)} tensors are missing"
            + (f" (first: {missing[0]})" if missing else "")
            + f", {len(wrong)} have another shape"
            + (f" (first: {wrong[0]})" if wrong else "")
            + "; expected transformers' CLIP of that size, --model chooses another"
        )
    clip.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return require("safetensors.torch").load_file(str(path))
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state dict of tensors, got {type(state).__name__}")
    return state


class VideoTower(nn.Module):
    """A CLIP vision tower on the frames of a clip, compressed in time between its blocks.

    clip: CLIPVisionModelWithProjection. compressions: block number, counted from 1, to the module that stands after it
    and maps [B, T, N, C] to [B, T', N, C]. With none this is the paper's Naive adaptation: all blocks on all frames,
    the final class tokens averaged.
    """

    def __init__(self, clip: nn.Module, compressions: Mapping[int, nn.Module] | None = None) -> None:
        super().__init__()
        self.clip = clip
        self.compressions = nn.ModuleDict({str(after): module for after, module in (compressions or {}).items()})

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.clip.vision_model.encoder.layers

    def embed(self, video: Tensor) -> Tensor:
        """Patch embedding, class token, positions, the LayerNorm before the blocks: [B, T, 3, H, W] → [B, T, N, C]."""
        vision = self.clip.vision_model
        batch, frames = video.shape[:2]
        tokens = vision.pre_layrnorm(vision.embeddings(video.flatten(0, 1)))
        return tokens.unflatten(0, (batch, frames))

    def run(
        self, tokens: Tensor, start: int = 0, stop: int | None = None, weights: list[Tensor] | None = None
    ) -> Tensor:
        """Blocks start+1 … stop with what stands after each of them but `stop` itself; None: to the end, all of it.

        tokens: [B, T, N, C], after block `start` and, when start > 0, before what stands there.
        weights: a list to which each compression's weights [B, T/2, N, 2] are appended.
        """
        end = len(self.blocks) if stop is None else stop
        for number in range(start, end + 1):
            if number > start:
                tokens = self._block(number, tokens)
            if number != stop and str(number) in self.compressions:
                tokens = self._compress(number, tokens, weights)
        return tokens

    def _compress(self, number: int, tokens: Tensor, weights: list[Tensor] | None) -> Tensor:
        module = self.compressions[str(number)]
        if weights is None:
            return module(tokens)
        tokens, pair_weights = module(tokens, return_weights=True)
        weights.append(pair_weights)
        return tokens

    def _block(self, number: int, tokens: Tensor) -> Tensor:
        batch, frames = tokens.shape[:2]
        x = tokens.flatten(0, 1)
        # By its parts: the signature of CLIPEncoderLayer.forward changed between transformers 4 and 5, theirs didn't.
        block = self.blocks[number - 1]
        x = x + block.self_attn(block.layer_norm1(x))[0]
        x = x + block.mlp(block.layer_norm2(x))
        return x.unflatten(0, (batch, frames))

    def frame_embeddings(self, tokens: Tensor) -> Tensor:
        """The embedding of each frame: final tokens [B, T, N, C] → [B, T, projection]."""
        return self.clip.visual_projection(self.clip.vision_model.post_layernorm(tokens[:, :, 0]))

    def pool(self, tokens: Tensor) -> Tensor:
        """The clip's embedding, the mean over its frames: final tokens [B, T, N, C] → [B, projection]."""
        return self.frame_embeddings(tokens).mean(1)

    def forward(self, video: Tensor) -> Tensor:
        """video: [B, T, 3, H, W], normalised → the clip's embedding [B, projection]."""
        return self.pool(self.run(self.embed(video)))
