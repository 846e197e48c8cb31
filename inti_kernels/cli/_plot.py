"""The bars of `bench --plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"eager": "#888888", "compile": "#e09f3e", "fused": "#2a6f97", "floor": "#9b2226"}


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws a panel an op: the medians of every contender by mode, with whiskers from the 20 to the 80 % quantile.

    Args:
        rows: of `bench`; those without a time are left out.
        path: the picture's file, its suffix the format.
        title: above it all.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row["ms_50"] is not None]
    ops, modes = list(dict.fromkeys(row["op"] for row in timed)), list(dict.fromkeys(row["mode"] for row in timed))
    size = (1.5 + 3.2 * len(ops), 4.2)
    figure, axes = pyplot.subplots(1, len(ops), figsize=size, squeeze=False, layout="constrained")
    for axis, op in zip(axes[0], ops, strict=True):
        contenders = [name for name in COLOURS if any(r["contender"] == name and r["op"] == op for r in timed)]
        width = 0.8 / len(contenders)
        for number, name in enumerate(contenders):
            own = {row["mode"]: row for row in timed if row["op"] == op and row["contender"] == name}
            places = [index + (number - (len(contenders) - 1) / 2) * width for index in range(len(modes))]
            low, medians, high = ([own[mode][key] for mode in modes] for key in ("ms_20", "ms_50", "ms_80"))
            below = [median - quantile for median, quantile in zip(medians, low, strict=True)]
            above = [quantile - median for median, quantile in zip(medians, high, strict=True)]
            axis.bar(
                places, medians, width, yerr=(below, above), color=COLOURS[name], label=name, ecolor="black", capsize=2
            )
        axis.set_title(op, fontsize=10)
        axis.set_xticks(range(len(modes)), [mode.replace("+", "+\n") for mode in modes], fontsize=8)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("milliseconds")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
