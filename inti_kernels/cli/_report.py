"""What the demo prints when it is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._tables import kibibytes, print_table

_BARS = "▁▂▃▄▅▆▇█"


def show(report: dict[str, Any], picture: Path, file: Path) -> None:
    """Print the report's tables, what failed, and where picture and report file are."""
    _setting(report)
    _agreement(report["agreement"])
    _ways(report["ways"])
    _training(report["training"])
    executed = report["ways"]["FusedInTI"]["executed"]
    print("In its latency runs FusedInTI ran " + ", ".join(f"{name} {count}×" for name, count in executed.items()))
    print(f"picture: {picture}")
    print(f"report:  {file}")
    for failure in report["failures"]:
        print(f"FAIL: {failure}")


def _setting(report: dict[str, Any]) -> None:
    rows = [(key, report[key]) for key in ("clip", "model", "compression", "machine")]
    rows.append(("replaced by fuse()", ", ".join(report["replaced"])))
    for block, error in report["at_start"].items():
        rows.append((f"new InTI after block {block}", f"the plain mean of each pair to {error:.1e}"))
    print_table("InTI on a real clip", ("what", "value"), rows)


def _agreement(agreement: list[dict[str, Any]]) -> None:
    """The rows that aren't gradients, the tokens' gradient, and each module's worst parameter gradient."""
    rows: list[tuple[str, dict[str, Any]]] = []
    worst: dict[str, tuple[str, dict[str, Any]]] = {}
    for row in agreement:
        _, gradient, name = row["name"].partition("gradient of ")
        block, _, parameter = name.partition(".")
        if not gradient or not parameter:
            rows.append((row["name"], row))
        elif block not in worst or not row["error"] <= worst[block][1]["error"]:
            worst[block] = (f"gradients of InTI after block {block}; worst: {parameter}", row)
    print_table(
        "InTI and FusedInTI at the same random parameters, from the first InTI to the clip's embedding and back",
        ("tensor", "RMS(difference) / RMS(InTI)", "verdict"),
        [(name, f"{row['error']:.1e}", "pass" if row["ok"] else "FAIL") for name, row in (*rows, *worst.values())],
        right=("RMS(difference) / RMS(InTI)",),
    )


def _ways(ways: dict[str, dict[str, Any]]) -> None:
    naive = ways["Naive"]

    def row(name: str, text: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return (name, *map(text, ways.values()))

    def seconds(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda way: f"{_seconds(way[key])} ({naive[key] / way[key]:.2f}×)"

    rounds = len(naive["inference_seconds"])
    rows = [
        row(
            "GFLOPs (multiply-accumulates × 1e9)",
            lambda way: format(way["gmacs"], ".1f" if way["gmacs"] >= 1 else ".2g"),
        ),
        row(f"inference, median of {rounds} interleaved runs", seconds("inference_median_seconds")),
        row("training step of the whole tower, one run", seconds("training_step_seconds")),
        row("kept for its backward", lambda way: kibibytes(way["kept_bytes"])),
        row("of that within the InTI modules", lambda way: kibibytes(way["kept_bytes_in_the_modules"])),
        row("error against Naive after training (see below)", lambda way: f"{way['error']:.4f}"),
        row("cosine with Naive after training", lambda way: f"{way['cosine']:.6f}"),
    ]
    print_table("Three ways to embed the clip", ("", *ways), rows, right=tuple(ways))


def _training(training: dict[str, Any]) -> None:
    errors = training["errors"]
    rows = [
        (
            "how",
            f"{training['optimizer']}, the tower frozen, {training['seconds_per_step']:.2f} s a step with FusedInTI",
        ),
        ("error", "squared distance from Naive's embedding; 1 is how far the clip's single frames are on average"),
        ("start → end", f"{errors[0]:.4f} (plain mean) → {errors[-1]:.4f}  {_spark(errors)}"),
        ("each step", " ".join(f"{error:.4f}" for error in errors)),
    ]
    if held_out := training["held_out"]:
        rows.append(("on other frames of the video", f"{held_out['before']:.4f} → {held_out['after']:.4f}"))
    print_table("Training InTI to reproduce Naive's embedding of the clip", ("what", "value"), rows)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _spark(values: list[float]) -> str:
    top = max(values) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, max(0, int(value / top * len(_BARS))))] for value in values)
