"""Tables and progress on the terminal: by rich and tqdm where they are installed, else in plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import TracebackType

STYLES = {"FAIL": "bold red", "pass": "green", "available": "green"}


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Sequence[str] = (),
    fold: Sequence[str] = (),
) -> None:
    """Prints a table to stdout.

    Args:
        title: the line above it.
        columns: the headings; none for a table without a head.
        rows: one string a column.
        right: the columns that are aligned to the right (figures).
        fold: the columns that may be folded where the terminal is narrow; any if there are none.
    """
    rows = [list(row) for row in rows]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plain(title, columns, rows, right)
        return
    table = Table(show_header=bool(columns), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns or ("",) * max(map(len, rows), default=0):
        justify = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=bool(fold) and column not in fold)
    for row in rows:
        table.add_row(*(Text(cell, style=STYLES.get(cell.split(":")[0], "")) for cell in row))
    console = Console()
    if not console.is_terminal:
        # In a file or a pipe nothing is gained by folding at 80 columns.
        console = Console(width=max(console.width, 200))
    console.print(Text(title, style="bold"))
    console.print(table)


def _print_plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    lines = [list(columns), *rows] if columns else list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if columns:
        lines.insert(1, ["-" * width for width in widths])
    justified = [name in right for name in columns or ("",) * len(widths)]
    print(title)
    for line in lines:
        cells = zip(line, widths, justified, strict=True)
        print("  " + "  ".join(cell.rjust(w) if to_right else cell.ljust(w) for cell, w, to_right in cells).rstrip())


class Progress:
    """A bar on stderr that says what is being done; nothing where tqdm isn't installed or ``show`` is False."""

    def __init__(self, total: int, show: bool = True) -> None:
        self._bar = None
        if show:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            # A terminal gets a moving bar, a log file a line now and then of what takes long.
            wait = {} if sys.stderr.isatty() else {"delay": 10, "mininterval": 10}
            self._bar = tqdm(total=total, file=sys.stderr, leave=False, dynamic_ncols=True, **wait)

    def step(self, doing: str) -> None:
        """Says what comes next, and counts one step."""
        if self._bar is not None:
            self._bar.set_description(doing, refresh=False)
            self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def kibibytes(count: float | None) -> str:
    """A byte count for people: "12.3 MiB"."""
    if count is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
