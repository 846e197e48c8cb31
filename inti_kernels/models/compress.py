"""compress(): one call that makes a compressive video model of a vision tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..reference import functional
from . import cost
from .adapters import adapter_for
from .methods import METHODS, build_method, halves_frames
from .model import CompressedViT
from .temporal import TEMPORAL, build_temporal

AFTER = (5, 7)
# Of the paper's InTI_{5,7}: it counts in steps of two blocks on a ViT-L of 24.
PAPER_AFTER = {12: AFTER, 24: (10, 14)}


def compress(
    vision_model: nn.Module,
    frames: int = 16,
    after: Sequence[int] | str = AFTER,
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

    The tower's modules and parameters are shared, not copied; ``uncompress()`` of the result gives the tower back. All
    that is changed until then is what is frozen: with ``freeze_backbone`` everything, with "uniformer_v2" the head that
    its own takes the place of. What is new is on the device, and of the dtype, of the block that it stands behind.

    Args:
        vision_model: a visual tower of open_clip or OpenAI's CLIP, a CLIP, SigLIP or DINOv2 vision model of
            transformers, or a ViT of timm; others by :func:`inti_kernels.models.register_adapter`.
        frames: T of a clip.
        after: blocks, counted from 1, behind which the frames are halved, by the methods that do that; "paper" is
            (5, 7) in a tower of 12 blocks and (10, 14) in one of 24.
        method: "inti" (:class:`~inti_kernels.FusedInTI`), "inti_reference" (:class:`~inti_kernels.InTI`), "naive" (all
            blocks on all frames), "linear_pooling", "conv_pooling", "tome", "sta".
        temporal: None, "uniformer_v2" (InTI^temp) or "st_adapter".
        num_classes: of a new linear classifier on the clip's features; None gives the features.
        prefix: tokens before the patches, where the tower doesn't say.
        gflops: multiply-accumulates of one clip in units of 1e9 that may not be passed: the method's setting (for those
            that halve frames, ``after``) becomes the costliest within it.
        freeze_backbone: only what is new is trained. Every parameter that the tower has now is frozen: put LoRA on it
            afterwards, or leave this out, since peft freezes what it is put on.
        **options: for a method or the temporal modules, a dict of arguments under its name, such as
            ``inti=dict(context=("cube",), fusion="add", head="sigmoid")``, ``tome=dict(r=8)``,
            ``uniformer_v2=dict(local="double")``; "inti_reference" takes ``inti``.

    Returns:
        video [B, T, 3, H, W] → features [B, D] or class scores [B, num_classes].

    Raises:
        TypeError: no adapter knows the tower; an unknown option; ``gflops`` beside what it is to set; arguments of the
            wrong kind.
        ValueError: frames can't be halved that often, a block isn't there, ``gflops`` is out of reach, the tower has a
            form that can't be run, or the method or its arguments don't go with it.
    """
    _check_name("method", method, ("naive", *METHODS))
    if temporal is not None:
        _check_name("temporal", temporal, TEMPORAL)
    _check_options(options, method, temporal)
    adapter = adapter_for(vision_model, prefix)
    own = dict(options.get(_options_of(method), {}))
    of_temporal = dict(options.get(temporal or "", {}))
    blocks = _check_after(after, len(adapter.blocks), method, gflops)
    _check_frames(frames, len(blocks))
    if gflops is not None:
        blocks, own = cost.setting_for(adapter, gflops, method, own, frames, temporal, of_temporal, num_classes)
    insertions, reduction = build_method(method, adapter, frames, blocks, own)
    modules = build_temporal(temporal, adapter, of_temporal)
    if reduction is not None or (modules is not None and any(map(modules.splits, range(1, len(adapter.blocks) + 1)))):
        adapter.check_parts()
    features = adapter.dim if modules is not None and modules.replaces_head else adapter.out_features
    classifier = None if num_classes is None else _classifier(features, num_classes)
    model = CompressedViT(adapter, frames, insertions, reduction, modules, classifier)
    if freeze_backbone:
        model.freeze(vision_model.parameters())
    settings = {"frames": frames, "after": blocks, "method": method, "temporal": temporal, "num_classes": num_classes}
    settings |= {"prefix": prefix, "freeze_backbone": freeze_backbone}
    given = {_options_of(method): own, temporal: of_temporal}
    model.settings = _plain(settings | {name: value for name, value in given.items() if value})
    for number, module in insertions.items():
        _place(module, adapter.blocks[number - 1])
    for module in (modules, classifier):
        if module is not None:
            _place(module, adapter.blocks[-1])
    model.training = vision_model.training  # the tower's modules keep the modes that they have
    for module in (model.insertions, reduction, modules, classifier):
        if module is not None:
            module.train(vision_model.training)
    return model


def _place(module: nn.Module, block: nn.Module) -> None:
    """On the device of a block's matrices, in their dtype: of a tower in half precision the norms may be wider."""
    matrix = next(
        parameter for parameter in block.parameters() if parameter.dim() > 1 and parameter.is_floating_point()
    )
    module.to(matrix.device, matrix.dtype)


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


def _check_after(after: Sequence[int] | str, count: int, method: str, gflops: float | None) -> tuple[int, ...]:
    """The blocks; with ``gflops`` those of the default, whose number is that of any setting."""
    if isinstance(after, str) and after != "paper":
        raise ValueError(f'after must be block numbers or "paper", got {after!r}')
    if not isinstance(after, (str, Sequence)):
        raise TypeError(f'after must be a sequence of block numbers or "paper", got {after!r}')
    # None, or those of the default, say nothing.
    given = isinstance(after, str) or tuple(after) not in ((), AFTER)
    if not halves_frames(method):
        if given:
            raise TypeError(f"after is for methods that halve frames, which {method} doesn't: leave it out")
        return ()
    if gflops is not None:
        if given:
            raise TypeError(
                f"gflops= sets where {method} halves the frames, got after={after!r} too: give one or the other"
            )
        return AFTER
    if after == "paper":
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
    functional.check_at_least_1(num_classes=classes)
    linear = nn.Linear(features, classes)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear
