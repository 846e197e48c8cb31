"""A vision tower run on the frames of a clip, compressed in time between (or inside) its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapters import Adapter
from .methods import TokenReduction
from .temporal import TemporalModules

Grid = tuple[int, int]


@dataclass(frozen=True)
class LoadReport:
    """What :meth:`CompressedViT.load_backbone` did with a checkpoint.

    Attributes:
        loaded: names of the tower's tensors that came from it.
        new: names of the compressed model's tensors that no checkpoint of the tower has: they keep their values.
        unused: the checkpoint's names that aren't the tower's (a text tower, say).
        prefix: what stood before the tower's names in the checkpoint.
    """

    loaded: list[str]
    new: list[str]
    unused: list[str]
    prefix: str

    def __str__(self) -> str:
        parts = f"{len(self.loaded)} tensors loaded" + f" (under {self.prefix!r})" * bool(self.prefix)
        parts += f", {len(self.unused)} of the checkpoint not used" * bool(self.unused)
        return parts + f", {len(self.new)} new: {', '.join(self.new)}" * bool(self.new)


@dataclass(frozen=True)
class _State:
    """Where a run stands: what the method and the temporal modules hand on from block to block."""

    frames: int
    reduction: Any = None
    temporal: Any = None


class CompressedViT(nn.Module):
    """A vision tower on video, as :func:`inti_kernels.compress` makes it (Sec. 3.2 of the paper).

    All blocks run on the frames of all clips as one batch; between two blocks an insertion (InTI, or a pooling of
    pairs) halves the frames; the head's features of the remaining frames are averaged. With no insertion this is the
    paper's Naive adaptation. **(choice)** A classifier reads the features as the tower's head gives them, projected
    where it projects.

    The tower's modules are the user's own objects and are called, never patched: its adapters (LoRA), its attention and
    its switch for gradient checkpointing stay in force, and its parameters are ``backbone.`` + their names. Hooks on
    the tower itself don't fire, since its embedding, blocks and head are called one by one; those on the blocks, and
    on all within, do. Methods and modules that work inside a block take it apart, and refuse one with hooks.

    Args:
        adapter: of the tower.
        frames: T of a clip.
        insertions: block number, counted from 1, → what stands behind it: [B, T, N, C] → [B, T/2, N, C].
        reduction: a method that takes tokens out of frames, inside the blocks.
        temporal: modules that let frames see each other.
        classifier: features → class scores; None gives the features.

    Attributes:
        settings: the arguments of :func:`inti_kernels.compress` that make such a model of the tower again, as plain
            data: what a checkpoint needs beside the ``state_dict``.

    Shape:
        video [B, T, 3, H, W], prepared as the tower's pictures are → [B, D], or scores [B, classes].
    """

    def __init__(
        self,
        adapter: Adapter,
        frames: int,
        insertions: Mapping[int, nn.Module] | None = None,
        reduction: TokenReduction | None = None,
        temporal: TemporalModules | None = None,
        classifier: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.adapter, self.frames = adapter, frames
        self.backbone = adapter.model
        self.insertions = nn.ModuleDict({str(after): module for after, module in (insertions or {}).items()})
        self.reduction, self.temporal, self.classifier = reduction, temporal, classifier
        self.settings: dict[str, Any] = {}
        # For `uncompress`: names, since sharding a model, or filling one on meta, puts others in the parameters' place.
        self._frozen: set[str] = set()
        self._modes = {name: module.training for name, module in self.backbone.named_modules()}
        self.freeze(adapter.unused_parameters())
        if self.replaces_head:
            self.freeze(adapter.head_parameters())

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The tower's blocks: what to shard (FSDP2), one by one."""
        return self.adapter.blocks

    @property
    def replaces_head(self) -> bool:
        """Whether the temporal modules' features stand in for the tower's head, which then isn't run."""
        return self.temporal is not None and self.temporal.replaces_head

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes parameters of the tower out of training until :meth:`uncompress`. Another model of the same tower
        shares them, and sees it.

        Args:
            parameters: of the tower; others are left alone.
        """
        chosen = set(parameters)
        for name, parameter in self.backbone.named_parameters():
            if parameter in chosen and parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.add(name)

    def uncompress(self) -> nn.Module:
        """The user's tower: the same object, with its weights of today. What was frozen is trainable again, and modules
        are in the mode, train or eval, that they came in. The compressed model isn't to be used any more."""
        for name, parameter in self.backbone.named_parameters():
            if name.replace(".base_layer", "") in self._frozen:  # where LoRA put it
                parameter.requires_grad_(True)
        for name, module in self.backbone.named_modules():
            module.training = self._modes.get(name, module.training)
        self._frozen.clear()
        return self.backbone

    def load_backbone(self, state_dict: Mapping[str, Tensor]) -> LoadReport:
        """Loads a checkpoint of the tower alone, or of a whole CLIP that has it.

        Args:
            state_dict: the library's names → tensors, with or without something before them ("visual.", "module.").

        Raises:
            ValueError: tensors are missing or have another shape; nothing has been changed then.
        """
        own = self.backbone.state_dict()
        prefix = _prefix(state_dict, own)
        found = {key: state_dict[prefix + key] for key in own if prefix + key in state_dict}
        missing = sorted(own.keys() - found.keys())
        wrong = [f"{key} {tuple(v.shape)}, not {tuple(own[key].shape)}" for key, v in found.items()
                 if v.shape != own[key].shape]  # fmt: skip
        if missing or wrong:
            few = ", ".join([*missing[:3], *wrong[:3]])
            raise ValueError(
                f"the checkpoint doesn't fit {type(self.backbone).__name__}: {len(missing)} of {len(own)} tensors are "
                f"missing, {len(wrong)} have another shape ({few}); expected the tower's own names, or those of a "
                "model that holds it"
            )
        self.backbone.load_state_dict(found)
        new = [name for name in self.state_dict() if not name.startswith("backbone.")]
        used = {prefix + key for key in own}
        return LoadReport(list(found), new, [key for key in state_dict if key not in used], prefix)

    def embed(self, video: Tensor) -> Tensor:
        """All before the first block: video [B, T, 3, H, W] → tokens [B, T, N, C].

        Raises:
            ValueError: the video has another shape than the model was made for.
        """
        self._check_video(video)
        return self.adapter.embed(video.flatten(0, 1)).unflatten(0, video.shape[:2])

    def run(
        self,
        tokens: Tensor,
        start: int = 0,
        stop: int | None = None,
        weights: list[Tensor] | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """Blocks start+1 … stop, and the insertions behind each of them but ``stop`` itself; None: to the end, all.

        Args:
            tokens: [B, T, N, C], behind block ``start`` and, where start > 0, before what stands there.
            weights: a list to which the weights [B, T/2, N, 2] of every InTI are appended.
            grid: (H, W) patches, where it isn't the one that the tower was built for.

        Returns:
            [B, T', N, C], T' = T halved by every insertion on the way.

        Raises:
            ValueError: start > 0 with a method or modules that carry something from the first block on.
        """
        return self._run(tokens, grid or self.adapter.own_grid, start, stop, weights)[0]

    def pool(self, tokens: Tensor) -> Tensor:
        """The tower's head on every frame, and their mean: final tokens [B, T, N, C] → features [B, D]."""
        return self.adapter.head(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]).mean(1)

    def forward(self, video: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """video [B, T, 3, H, W] → features [B, D] or scores [B, classes].

        Args:
            return_weights: also return the weights [B, T/2, N, 2] of every InTI, in order.

        Raises:
            ValueError: the video has another shape than the model was made for.
        """
        weights = [] if return_weights else None
        tokens = self.embed(video)
        tokens, state = self._run(tokens, self.adapter.grid(*video.shape[-2:]), 0, None, weights)
        features = self.temporal.features(tokens, state.temporal) if self.replaces_head else self.pool(tokens)
        output = features if self.classifier is None else self.classifier(features)
        return (output, weights) if return_weights else output

    def _run(
        self, tokens: Tensor, grid: Grid, start: int, stop: int | None, weights: list[Tensor] | None
    ) -> tuple[Tensor, _State]:
        batch, frames = tokens.shape[:2]
        if start and (self.reduction is not None or self.temporal is not None):
            raise ValueError(
                f"start must be 0, got {start}: {type(self.reduction or self.temporal).__name__} carries something "
                "from the first block on"
            )
        x, end = tokens.flatten(0, 1), len(self.blocks) if stop is None else stop
        reduction = None if self.reduction is None else self.reduction.start(x, frames)
        state = _State(frames, reduction, None if self.temporal is None else self.temporal.start(batch))
        for number in range(start, end + 1):
            if number > start:
                x, state = self._layer(number, x, grid, state)
            if number != stop and str(number) in self.insertions:
                x = self._insert(number, x.unflatten(0, (batch, state.frames)), grid, weights).flatten(0, 1)
                state = _State(state.frames // 2, state.reduction, state.temporal)
        return x.unflatten(0, (batch, state.frames)), state

    def _layer(self, number: int, x: Tensor, grid: Grid, state: _State) -> tuple[Tensor, _State]:
        """A block with all that stands in and beside it, checkpointed where the library would."""
        adapter = self.adapter
        checkpointed = adapter.blocks_checkpoint_themselves and not self._takes_apart(number)
        if adapter.checkpointing and self.training and not checkpointed:
            x, reduction = checkpoint(self._block, number, x, grid, state.frames, state.reduction, use_reentrant=False)
        else:
            x, reduction = self._block(number, x, grid, state.frames, state.reduction)
        temporal = state.temporal
        if self.temporal is not None and self.temporal.reads(number):
            tokens, present = (x, None) if self.reduction is None else self.reduction.restore(x, reduction)
            temporal = self.temporal.after_block(number, tokens, state.frames, grid, present, temporal)
        return x, _State(state.frames, reduction, temporal)

    def _takes_apart(self, number: int) -> str:
        """The name of what works inside a block; "" if the block is called as the module that it is."""
        if self.reduction is not None:
            return type(self.reduction).__name__
        splits = self.temporal is not None and self.temporal.splits(number)
        return type(self.temporal).__name__ if splits else ""

    def _check_whole(self, number: int, block: nn.Module) -> None:
        """What is called past its ``forward`` must not have anything hung on it."""
        what = f"{self._takes_apart(number)} takes block {number} apart, but"
        parts = block.modules() if self.reduction is not None else (block,)
        if any(hasattr(part, "unshard") for part in parts):
            raise RuntimeError(
                f"{what} FSDP2 sharded it by itself, and would not gather it: shard the whole model alone"
            )
        if block._forward_hooks or block._forward_pre_hooks or "forward" in block.__dict__:
            raise RuntimeError(
                f"{what} it has hooks or a forward of its own (accelerate's offloading does that), which would not "
                "run: take them off, or a method that works between blocks"
            )

    def _block(self, number: int, x: Tensor, grid: Grid, frames: int, reduction: Any) -> tuple[Tensor, Any]:
        adapter, temporal, block = self.adapter, self.temporal, self.adapter.blocks[number - 1]
        if self._takes_apart(number):
            self._check_whole(number, block)
        if temporal is not None and temporal.precedes(number):
            x = self._on_grid(temporal.before_attention, number, x, grid, frames, reduction)
        between = None
        if temporal is not None and temporal.splits(number):
            between = partial(self._on_grid, temporal.before_mlp, number, grid=grid, frames=frames, reduction=reduction)
        if self.reduction is not None:
            return self.reduction.block(adapter, block, number, x, frames, reduction, between)
        if between is None:
            return adapter.run_block(block, x), None
        parts = adapter.parts(block)
        return parts.mlp_residual(between(parts.attend_residual(x))), None

    def _on_grid(
        self, module: Callable[..., Tensor], number: int, x: Tensor, grid: Grid, frames: int, reduction: Any
    ) -> Tensor:
        """A temporal module that stands in a block, with every patch in its place."""
        whole = partial(module, number, frames=frames, grid=grid)
        return whole(x) if self.reduction is None else self.reduction.on_grid(whole, x, reduction)

    def _insert(self, number: int, x: Tensor, grid: Grid, weights: list[Tensor] | None) -> Tensor:
        module = self.insertions[str(number)]
        # Towers without a class token leave the channels of the patch embedding apart, and the blocks keep it so.
        x = x.contiguous()
        # By what only an InTI has, and not by its class: peft and FSDP2 put others round it.
        if weights is None or not hasattr(module, "head_type"):
            return module(x, grid=grid)
        z, of_pairs = module(x, return_weights=True, grid=grid)
        weights.append(of_pairs)
        return z

    def _check_video(self, video: Tensor) -> None:
        if not isinstance(video, Tensor) or video.dim() != 5 or video.shape[2] != 3:
            got = tuple(video.shape) if isinstance(video, Tensor) else type(video).__name__
            raise ValueError(f"video must be [B, frames, 3, H, W], got {got}")
        if video.shape[1] != self.frames:
            raise ValueError(
                f"this model was made for clips of {self.frames} frames, got {video.shape[1]}; sample "
                f"{self.frames} of them, or compress the tower again with frames={video.shape[1]}"
            )
        self.adapter.check_picture(*video.shape[-2:])

    def extra_repr(self) -> str:
        return f"{self.adapter.library} tower, frames={self.frames}"


def _prefix(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """What stands before the tower's names in a checkpoint: what fits most of them, the shortest of equals."""
    found: dict[str, int] = {"": 0}
    for key in state_dict:
        for name in own:
            if key == name or key.endswith("." + name):
                prefix = key.removesuffix(name)
                found[prefix] = found.get(prefix, 0) + 1
    return max(found, key=lambda prefix: (found[prefix], -len(prefix)))
