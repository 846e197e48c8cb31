"""`bench --sweep`: FusedInTI against its floor over batch, frames and tokens, to see that time grows as they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._stopwatch import FLOOR, FUSED
from ._tables import print_table

if TYPE_CHECKING:
    from ..benchmarks import Sizes

MODES = ("forward", "forward+backward")
MARKS = {"frames": "s", "base": "o", "grid": "^", "batch": "D"}


def sizes(base: Sizes) -> list[tuple[str, Sizes]]:
    """The base, and sizes in which one axis is another, each with the axis: half and twice the frames, twice the
    patches, twice and four times the batch."""
    height, width = base.grid
    fewer = max(2, base.frames // 4 * 2)
    swept = [("frames", replace(base, frames=fewer))] if fewer < base.frames else []
    swept += [("base", base), ("frames", replace(base, frames=2 * base.frames))]
    swept += [("grid", replace(base, grid=(2 * height, width)))]
    return swept + [("batch", replace(base, batch=times * base.batch)) for times in (2, 4)]


@dataclass(frozen=True)
class Line:
    """t = slope · tokens, fitted by least squares."""

    slope: float
    r_squared: float  # 1 - residuals² / deviations² from the mean: 1 is a straight line through the origin
    worst: float  # the largest |t / (slope · tokens) - 1|


def fit(tokens: Sequence[int], times: Sequence[float]) -> Line:
    """The line through the origin of times by tokens."""
    slope = sum(n * t for n, t in zip(tokens, times, strict=True)) / sum(n * n for n in tokens)
    mean = sum(times) / len(times)
    residuals = sum((t - slope * n) ** 2 for n, t in zip(tokens, times, strict=True))
    spread = sum((t - mean) ** 2 for t in times)
    worst = max(abs(t / (slope * n) - 1) for n, t in zip(tokens, times, strict=True))
    return Line(slope, 1 - residuals / spread if spread else float(residuals == 0), worst)


def lines(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Line]:
    """Of every mode and contender that was timed at every size."""
    found = {}
    for mode in MODES:
        for contender in (FUSED, FLOOR):
            own = [row for row in rows if (row["mode"], row["contender"]) == (mode, contender)]
            if own and all(row["ms_50"] is not None for row in own):
                found[mode, contender] = fit([row["tokens"] for row in own], [row["ms_50"] for row in own])
    return found


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints a table a mode, and how straight each line is."""
    for mode in MODES:
        own = [row for row in rows if row["mode"] == mode]
        columns = ("batch", "frames", "grid", "tokens", "contender", "ms", "ms / 1000 tokens", "/ floor", "status")
        cells = []
        for row in own:
            times = (row["ms_50"], row["ms_50"] and 1e3 * row["ms_50"] / row["tokens"], row["over_floor"])
            figures = [
                "" if t is None else format(t, form) for t, form in zip(times, (".2f", ".3f", ".2f"), strict=True)
            ]
            grid = "×".join(map(str, row["grid"]))
            name = row["contender"] if row["executed"] == "torch" else f"{row['contender']} ({row['executed']})"
            cells.append(
                [str(row["batch"]), str(row["frames"]), grid, str(row["tokens"]), name, *figures, row["status"]]
            )
        print_table(f"inti, {mode}, {title}", columns, cells, right=columns[:2] + columns[3:4] + columns[5:8])
    for (mode, contender), line in lines(rows).items():
        print(
            f"{mode}, {contender}: {1e3 * line.slope:.3f} ms for 1000 tokens through the origin, "
            f"R² {line.r_squared:.4f}, farthest off {line.worst:.0%}"
        )
    for note in sorted({f"{row['contender']}, {row['status']}: {row['note']}" for row in rows if row["note"]}):
        print(note)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws medians by tokens, a panel a mode, with the fitted lines and their R².

    Args:
        rows: of `bench --sweep`, with "tokens" and "axis", which size it is.
        path: the picture's file, its suffix the format.
        title: above it all.
    """
    from ._plot import COLOURS, saved

    with saved(path, title, panels=len(MODES)) as axes:
        for axis, mode in zip(axes, MODES, strict=True):
            straight = []
            for (_, contender), line in ((key, line) for key, line in lines(rows).items() if key[0] == mode):
                own = [row for row in rows if (row["mode"], row["contender"]) == (mode, contender)]
                most = max(row["tokens"] for row in own)
                colour = COLOURS[contender]
                axis.plot([0, most], [0, line.slope * most], color=colour, linewidth=1, label=contender)
                for swept, mark in MARKS.items():
                    points = [row for row in own if row["axis"] == swept]
                    places, heights = ([row[key] for row in points] for key in ("tokens", "ms_50"))
                    axis.scatter(places, heights, color=colour, marker=mark, s=28)
                straight.append(f"{contender} R² {line.r_squared:.4f}")
            for swept, mark in MARKS.items():
                axis.scatter([], [], color="black", marker=mark, s=28, label=swept)
            axis.set_title("\n".join((mode, ", ".join(straight))), fontsize=10)
            axis.set_xlabel("tokens: batch × frames × tokens a frame")
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.legend(fontsize=8, frameon=False)
