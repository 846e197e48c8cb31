"""Which backend really ran, read from the counters of the implementations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .. import backends


@dataclass
class Ran:
    """What ran while `watch` looked; ``what`` is the op that was called, or another name for more than an op."""

    what: str = ""
    kernels: list[str] = field(default_factory=list)  # backends other than the reference
    plain: list[str] = field(default_factory=list)  # ops for which the reference ran
    fallen: list[str] = field(default_factory=list)  # those of them that have kernels, so that none was shown to work

    @property
    def covered(self) -> bool:
        """Whether this says anything of a kernel of its own."""
        return bool(self.kernels) and not self.fallen and self.what not in self.plain

    def __str__(self) -> str:
        return ", ".join(self.kernels) or "reference"

    @property
    def note(self) -> str:
        """What the reader of a result should know."""
        if not self.covered:
            return f"the reference ran{' for ' if self.fallen else ''}{', '.join(self.fallen)}"
        return f"plain PyTorch: {', '.join(self.plain)}" if self.plain else ""


@contextmanager
def watch(what: str) -> Iterator[Ran]:
    """Fills a `Ran` with what executed inside the block; an op's backward counts as the op."""
    before = Counter(backends.executed)
    ran = Ran(what)
    yield ran
    executed = {(op.removesuffix("_backward"), name) for op, name in Counter(backends.executed) - before}
    ran.kernels = sorted({name for _, name in executed if name != "reference"})
    ran.plain = sorted({op for op, name in executed if name == "reference"})
    ran.fallen = [op for op in ran.plain if backends.HAS_KERNEL[op]]
