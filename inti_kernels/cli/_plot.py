"""The bars of `bench --plot`, and what its pictures have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# By contender, in the order in which the bars stand.
COLOURS = {"eager": "#888888", "compile": "#e09f3e", "fused": "#2a6f97", "recompute": "#61a5c2", "floor": "#9b2226"}
COLOURS |= {"Naive": "#444444", "InTI": COLOURS["eager"], "FusedInTI": COLOURS["fused"], "mean": COLOURS["floor"]}
COLOURS |= {"LinearPooling": "#ee9b00", "ConvPooling": "#ca6702", "ToMe": "#7b2cbf", "STA": "#c77dff"}
COLOURS |= {"InTI^temp": COLOURS["recompute"]}


@contextmanager
def saved(path: Path, title: str, panels: int) -> Iterator[Sequence[Any]]:
    """Gives the axes of a picture with so many panels side by side, and saves it with the title above it all."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    size = (1.5 + 3.2 * panels, 4.2)
    figure, axes = pyplot.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    yield axes[0]
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("milliseconds")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws a panel an op: the medians of every contender by mode, with whiskers from the 20 to the 80 % quantile.

    Args:
        rows: of `bench`; those without a time are left out.
        path: the picture's file, its suffix the format.
        title: above it all.
    """
    timed = [row for row in rows if row["ms_50"] is not None]
    ops, modes = list(dict.fromkeys(row["op"] for row in timed)), list(dict.fromkeys(row["mode"] for row in timed))
    with saved(path, title, panels=len(ops)) as axes:
        for axis, op in zip(axes, ops, strict=True):
            _bars(axis, op, modes, [row for row in timed if row["op"] == op])


def _bars(axis: Any, op: str, modes: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    contenders = [name for name in COLOURS if any(row["contender"] == name for row in rows)]
    width = 0.8 / len(contenders)
    for number, name in enumerate(contenders):
        own = {row["mode"]: row for row in rows if row["contender"] == name}
        places = [index + (number - (len(contenders) - 1) / 2) * width for index in range(len(modes))]
        low, medians, high = ([own[mode][key] for mode in modes] for key in ("ms_20", "ms_50", "ms_80"))
        below = [median - quantile for median, quantile in zip(medians, low, strict=True)]
        above = [quantile - median for median, quantile in zip(medians, high, strict=True)]
        style = {"color": COLOURS[name], "label": name, "ecolor": "black", "capsize": 2}
        axis.bar(places, medians, width, yerr=(below, above), **style)
    axis.set_title(op, fontsize=10)
    axis.set_xticks(range(len(modes)), [mode.replace("+", "+\n") for mode in modes], fontsize=8)
    axis.legend(fontsize=8, frameon=False)
