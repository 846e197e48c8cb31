"""The published figures of arXiv 2408.06840, tables 1 and 2 and the ablations, with what makes each of their models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..reference.inti import LEVELS

B, L = "vit_b_16", "vit_l_14"
KINETICS, SOMETHING, CONTEXT, FUSION, HEAD = (
    "Kinetics-400, 16×3×4 views",
    "Something-Something V2, 16×1×3 views",
    "Ablation of the context, Kinetics-400",
    "Ablation of the fusion, Kinetics-400",
    "Ablation of the head, Kinetics-400",
)
CLASSES = {KINETICS: 400, SOMETHING: 174}
# UniFormerV2's recipe for motion; for Kinetics its defaults.
MOTION = {"local": "double", "global_blocks": 8}


@dataclass(frozen=True)
class Published:
    """A row of the paper.

    Attributes:
        table: one of the titles above.
        name: as the paper has it.
        model: of `_clip.MODELS`.
        method, after, temporal, options: of :func:`inti_kernels.compress`; ``temporal`` is UniFormerV2's modules.
        gflops: multiply-accumulates ×1e9 of a clip of 16 frames, rounded; or None, as all below, where none is given.
        parameters: in millions.
        top1, top5: in percent.
        budget: whether ``gflops`` is what the method's setting is found for.
    """

    table: str
    name: str
    model: str = B
    method: str = "inti"
    after: tuple[int, ...] = ()
    temporal: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    gflops: int | None = None
    parameters: int | None = None
    top1: float | None = None
    top5: float | None = None
    budget: bool = False


# ^temp of ToMe, STA, ConvPooling and LinearPooling: GFLOPs, parameters, top-1, top-5.
KINETICS_B = ((192, 115, 84.2, 96.5), (192, 115, 84.1, 96.5), (184, 127, 82.7, 95.9), (179, 115, 83.9, 96.3))
SOMETHING_B = ((254, None, 68.1, None), (254, None, 68.4, None), (234, None, 67.2, None), (221, None, 67.6, None))
# Naive, InTI and InTI^temp after blocks 3,5 / 5,7 / 7,9, and UniFormerV2.
TOWERS = {
    B: (
        (281, 86, 83.4, 96.2),
        ((147, None, 83.6), (182, None, 84.1), (217, None, 84.2)),
        ((150, 126, 84.5), (184, 126, 84.9, 96.8), (220, 126, 85.0)),
        (297, 115, 85.0, 96.8),
    ),
    L: (
        (1297, 304, 86.7, 97.2),
        ((650, None, 86.9), (811, None, 87.1), (973, None, 87.2)),
        ((656, 378, 87.1), (817, 378, 87.6, 97.6), (978, 378, 87.7)),
        (1332, 354, 87.5, 97.4),
    ),
}
FIGURES = ("gflops", "parameters", "top1", "top5")


def rows() -> list[Published]:
    """All rows, table by table."""
    kinetics = (*_of_tower(B), *_baselines(KINETICS, {}, KINETICS_B), *_of_tower(L))
    return [*kinetics, *_something(), *_ablations()]


def _figures(values: tuple[float | None, ...]) -> dict[str, Any]:
    return dict(zip(FIGURES, values, strict=False))


def _of_tower(model: str) -> Iterator[Published]:
    naive, inti, inti_temporal, uniformer = TOWERS[model]
    size = "B" if model == B else "L"
    yield Published(KINETICS, f"Naive-{size}", model, "naive", temporal=False, **_figures(naive))
    for temporal, published in ((False, inti), (True, inti_temporal)):
        for (i, j), values in zip(((3, 5), (5, 7), (7, 9)), published, strict=True):
            # The paper counts in steps of two blocks on ViT-L.
            after = (i, j) if model == B else (2 * i, 2 * j)
            name = f"InTI{'^temp' * temporal}-{size} {i},{j}"
            yield Published(KINETICS, name, model, after=after, temporal=temporal, **_figures(values))
    yield Published(KINETICS, f"UniFormerV2-{size}", model, "naive", **_figures(uniformer))


def _baselines(table: str, temporal: dict[str, Any], published: tuple[tuple[Any, ...], ...]) -> Iterator[Published]:
    options = {"uniformer_v2": temporal} if temporal else {}
    kinds = (("ToMe", "tome"), ("STA", "sta"), ("ConvPooling", "conv_pooling"), ("LinearPooling", "linear_pooling"))
    for (name, method), values in zip(kinds, published, strict=True):
        inside = method in ("tome", "sta")
        after = () if inside else (5, 7)
        figures = _figures(values)
        yield Published(table, f"{name}^temp-B", B, method, after, options=options, budget=inside, **figures)


def _something() -> Iterator[Published]:
    options = {"uniformer_v2": MOTION}
    figures = {"gflops": 371, "parameters": 163, "top1": 69.5}
    yield Published(SOMETHING, "UniFormerV2-B", B, "naive", options=options, **figures)
    yield from _baselines(SOMETHING, MOTION, SOMETHING_B)
    figures = {"gflops": 234, "parameters": 174, "top1": 69.3}
    yield Published(SOMETHING, "InTI^temp-B 5,7", after=(5, 7), options=options, **figures)


def _ablations() -> Iterator[Published]:
    """InTI^temp-B after blocks 5 and 7."""
    contexts = ((), ("cube",), ("frame",), ("global",), ("cube", "frame"), ("frame", "global"), LEVELS)
    of_context = zip((118, 121, 121, 121, 124, 123, 126), (84.3, 84.4, 84.6, 84.5, 84.7, 84.8, 84.9), strict=True)
    for context, values in zip(contexts, of_context, strict=True):
        yield _ablation(CONTEXT, " + ".join(context) or "none", {"context": context}, *values)
    for fusion, values in zip(("add", "cat", "separate"), ((125, 84.5), (128, 84.7), (126, 84.9)), strict=True):
        yield _ablation(FUSION, fusion, {"fusion": fusion}, *values)
    for head, top1 in zip(("sigmoid", "attention", "softmax"), (84.5, 84.6, 84.9), strict=True):
        yield _ablation(HEAD, head, {"head": head}, None, top1)


def _ablation(table: str, name: str, inti: dict[str, Any], parameters: int | None, top1: float) -> Published:
    return Published(table, name, after=(5, 7), options={"inti": inti}, parameters=parameters, top1=top1)
