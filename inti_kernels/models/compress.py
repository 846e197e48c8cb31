"""compress(): one call that makes a compressive video model of a vision tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from . import cost
from .adapters import Adapter, adapter_for
from .methods import METHODS, TokenReduction
from .model import CompressedViT
from .temporal import TEMPORAL, TemporalModules

# Of the paper's InTI_{5,7}: it counts in steps of two blocks on a ViT-L of 24.
PAPER_AFTER = {12: (5, 7), 24: (10, 14)}


def compress(
    vision_model: nn.Module,
    frames: int = 16,
    after: Sequence[int] | str = (5, 7),
    method: str = "inti",
    temporal: str | None = None,
    num_classes: int | None = None,
    *,
    prefix: int | None = None,
    gflops: float | None = None,
    freeze_backbone: bool = False,
    **options: Any,
) -> CompressedViT:
    """Makes a compressive video model of a vision tower that was trained on images (Sec. 3.2, 3.3 of the paper).

    The tower's modules and parameters are shared, not copied, and stay as they are; ``uncompress()`` of the result
    gives the tower back. What is new is on the device, and of the dtype, of the tower's first parameter.

    Args:
        vision_model: a visual tower of open_clip or OpenAI's CLIP, a CLIP, SigLIP or DINOv2 vision model of
            transformers, or a ViT of timm; others by :func:`inti_kernels.models.register_adapter`.
        frames: T of a clip.
        after: blocks, counted from 1, behind which the frames are halved, for the methods that do that; "paper" is
            (5, 7) in a tower of 12 blocks and (10, 14) in one of 24.
        method: "inti" (:class:`~inti_kernels.FusedInTI`), "inti_reference" (:class:`~inti_kernels.InTI`), "naive" (all
            blocks on all frames), "linear_pooling", "conv_pooling", "tome", "sta".
        temporal: None, "uniformer_v2" (InTI^temp) or "st_adapter".
        num_classes: of a new linear classifier on the clip's features; None gives the features.
        prefix: tokens before the patches, where the tower doesn't say.
        gflops: multiply-accumulates of one clip in units of 1e9 that may not be passed: the method's setting (for those
            that halve frames, ``after``) becomes the costliest within it.
        freeze_backbone: only what is new is trained.
        **options: for a method or the temporal modules, a dict of arguments under its name, such as
            ``inti=dict(context=("cube",), fusion="add", head="sigmoid")``, ``tome=dict(r=8)``,
            ``uniformer_v2=dict(local="double")``; "inti_reference" takes ``inti``.

    Returns:
        video [B, T, 3, H, W] → features [B, D] or class scores [B, num_classes].

    Raises:
        TypeError: no adapter knows the tower; an unknown option.
        ValueError: frames can't be halved that often, a block isn't there, the tower has a form that can't be run, or
            the method or its arguments don't go with it.
    """
    _check_name("method", method, ("naive", *METHODS))
    if temporal is not None:
        _check_name("temporal", temporal, TEMPORAL)
    _check_options(options, method, temporal)
    adapter = adapter_for(vision_model, prefix)
    own = dict(options.get(_options_of(method), {}))
    others = {name: dict(value) for name, value in options.items() if name != _options_of(method)}
    if gflops is not None:
        modules = others.get(temporal or "", {})
        after, own = cost.setting_for(adapter, gflops, method, own, frames, temporal, modules, num_classes)
    halves = method in METHODS and not issubclass(METHODS[method], TokenReduction)
    blocks = _check_after(after, frames, len(adapter.blocks)) if halves else ()
    _check_frames(frames, len(blocks))
    insertions = {
        number: METHODS[method](
            adapter.dim, frames >> level, adapter.grid(*adapter.image), prefix=adapter.prefix, **own
        )
        for level, number in enumerate(blocks)
    }
    reduction = None if halves or method == "naive" else METHODS[method](adapter, **own)
    modules = None if temporal is None else _temporal(temporal, adapter, reduction, others.get(temporal, {}))
    if reduction is not None or (modules is not None and any(map(modules.splits, range(1, len(adapter.blocks) + 1)))):
        adapter.check_parts()
    features = adapter.dim if modules is not None and modules.replaces_head else adapter.out_features
    classifier = None if num_classes is None else _classifier(features, num_classes)
    model = CompressedViT(adapter, frames, insertions, reduction, modules, classifier)
    if freeze_backbone:
        model.freeze(vision_model.parameters())
    settings = {"frames": frames, "after": blocks, "method": method, "temporal": temporal, "num_classes": num_classes}
    settings |= {"prefix": prefix, "freeze_backbone": freeze_backbone, **others}
    model.settings = _plain(settings | ({_options_of(method): own} if own else {}))
    first = next(vision_model.parameters())
    for new in (model.insertions, model.reduction, model.temporal, model.classifier):
        if new is not None:
            new.to(first.device, first.dtype)
    return model.train(vision_model.training)


def _temporal(
    kind: str, adapter: Adapter, reduction: TokenReduction | None, options: dict[str, Any]
) -> TemporalModules:
    grid = adapter.grid(*adapter.image)
    modules = TEMPORAL[kind](dim=adapter.dim, blocks=len(adapter.blocks), grid=grid, prefix=adapter.prefix, **options)
    if reduction is not None and modules.stands_in_blocks:
        raise ValueError(
            f"{type(reduction).__name__} leaves no grid of patches in the blocks, which modules of {kind} inside the "
            "blocks need: take a method that halves frames, or uniformer_v2 without local modules"
        )
    return modules


def _options_of(method: str) -> str:
    return "inti" if method == "inti_reference" else method


def _plain(value: Any) -> Any:
    """A copy of lists, dicts, numbers and names: what torch.load takes with weights_only."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple, set, frozenset)) else value


def _check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")


def _check_options(options: dict[str, Any], method: str, temporal: str | None) -> None:
    taken = [name for name in (_options_of(method), temporal) if name not in (None, "naive")]
    for name, value in options.items():
        if name not in taken:
            of = f"method={method!r}" + f" and temporal={temporal!r}" * (temporal is not None)
            raise TypeError(f"unknown option {name!r}; with {of} compress takes {' and '.join(taken) or 'none'}")
        if not isinstance(value, dict):
            raise TypeError(f"{name} must be a dict of arguments, got {type(value).__name__}")


def _check_after(after: Sequence[int] | str, frames: int, count: int) -> tuple[int, ...]:
    if isinstance(after, str):
        if after != "paper":
            raise ValueError(f'after must be block numbers or "paper", got {after!r}')
        if count not in PAPER_AFTER:
            raise ValueError(
                f'after="paper" is for towers of {" or ".join(map(str, PAPER_AFTER))} blocks, this one has {count}: '
                "give block numbers"
            )
        return PAPER_AFTER[count]
    blocks = tuple(after)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in blocks):
        raise TypeError(f"after must be block numbers, got {after!r}")
    if list(blocks) != sorted(set(blocks)):
        raise ValueError(f"after must be rising block numbers, got {blocks}")
    if outside := [number for number in blocks if not 1 <= number <= count]:
        raise ValueError(f"after counts blocks from 1 to {count} in this tower, got {outside[0]}")
    return blocks


def _check_frames(frames: int, halvings: int) -> None:
    if not isinstance(frames, int) or isinstance(frames, bool) or frames < 1:
        raise ValueError(f"frames must be a whole number of at least 1, got {frames!r}")
    if frames % 2**halvings:
        able = next(level for level in range(halvings) if frames % 2 ** (level + 1))
        raise ValueError(
            f"{halvings} compressions need frames that divide by {2**halvings}, got {frames}, which can be halved "
            f"{'once' if able == 1 else f'{able} times'}: take {math.ceil(frames / 2**halvings) * 2**halvings} frames "
            "or fewer blocks in after"
        )


def _classifier(features: int, classes: int) -> nn.Linear:
    """Starts near zero, so that training starts from even scores."""
    if classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {classes}")
    linear = nn.Linear(features, classes)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear
