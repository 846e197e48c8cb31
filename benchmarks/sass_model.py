"""What the CUDA kernels should reach on a V100, from their sm_70 code.

    python -m benchmarks.sass_model [-k WORD] [--counts] [--blame] [--markdown] [--json FILE]

No GPU is needed and none is modelled cycle by cycle: see benchmarks/README.md, "What the kernels should reach on a
V100". Exit status 1 if a kernel misses its aim.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .sass import cubins, machine
from .sass.disassembly import Function, Instruction, ModelError, Search, cycles_alone, in_flight, streams
from .sass.kernels import Launch, Model, Size, models


@dataclass
class Prediction:
    """A kernel at a size. Times are cycles of a multiprocessor for 1000 elements of output."""

    title: str
    kernel: str
    size: str
    registers: int
    stack: int
    blocks_an_sm: int
    warps_an_sm: int
    blocks: int
    waves: float
    bytes_an_output: float
    instructions_an_output: float  # of a warp's lane: 32 lanes share an instruction
    memory: float
    issue: float
    issue_with_ends: float  # the loop's run-in and run-out at their cost
    pipes: dict[str, float]
    latency: float  # if warps only waited for their own results, those that fit beside each other
    bytes_in_flight: int  # of a multiprocessor
    tensor_share: float
    counts: dict[str, float]  # instructions of a lane for an element of output, by kind
    aims: list[str] = field(default_factory=list)  # missed

    @property
    def share(self) -> float:
        """Of memory's bandwidth, with issue as the only other limit."""
        return self.memory / max(self.memory, self.issue)

    @property
    def limit(self) -> str:
        return "memory" if self.memory >= self.issue else "issue"

    @property
    def strict_share(self) -> float:
        return self.memory / max(self.memory, self.issue, self.latency, *self.pipes.values())

    @property
    def strict_limit(self) -> str:
        pipes = {f"{name} pipe": time for name, time in self.pipes.items()}
        times = {"memory": self.memory, "issue": self.issue, "latency": self.latency, **pipes}
        return max(times, key=lambda name: times[name])


def kind(instruction: Instruction) -> str:
    """The kinds that the table of counts has."""
    if instruction.operation in ("LDG", "STG", "LDS", "STS"):
        return instruction.mark
    if instruction.operation in ("HMMA", "SHFL", "BAR"):
        return instruction.operation
    name = machine.pipe(instruction)[0]
    if name == "fp32":
        return "IMAD" if instruction.operation in ("IMAD", "IMUL") else "FFMA"
    return {"fp16": "widen", "convert": "F2F, MUFU"}.get(name, name)


def in_flight_of_lane(path: list[Instruction], model: Model, launch: Launch, repeats: int) -> float:
    """Bytes that a lane has under way from memory at most, on average over the lanes."""
    vectors = sum(i.width == 128 and streams(i, model.cached) for i in path) / len(model.steps) / repeats
    share = min(1.0, launch.vectors / vectors) if vectors else 1.0

    def size(load: Instruction) -> float:
        if not streams(load, model.cached):
            return 0
        return load.width / 8 * (share if load.width == 128 else 1)

    return in_flight(path, size)


def predict(model: Model, size: Size, code: cubins.Compiled) -> tuple[Prediction, list[Instruction]]:
    """The figures of a kernel at a size, and the path of an iteration.

    Raises:
        ModelError: the code has no such loop.
    """
    launch: Launch = model.launch(size)
    search = Search(avoid=model.avoid, trips=model.trips, costs=machine.HMMA_ISSUE)
    path, repeats = Function(code.text).iteration(model.steps, search)
    warps = launch.threads // 32
    # Iterations of all warps for 1000 outputs of one multiprocessor.
    times = launch.blocks * warps * launch.iterations / repeats / launch.outputs * 1000
    issue = machine.issue_cycles(path)
    fits = machine.blocks_of_multiprocessor(code.registers, launch.shared_bytes, launch.threads)
    in_lane = in_flight_of_lane(path, model, launch, repeats)
    alone, _ = cycles_alone(path, lambda i: machine.latency(i, model.cached), machine.HMMA_ISSUE)
    counts = Counter(map(kind, path))
    hmma = counts["HMMA"]
    resident = min(fits, max(1, -(-launch.blocks // machine.MULTIPROCESSORS)))
    made = Prediction(
        title=model.title,
        kernel=model.name,
        size=str(size),
        registers=code.registers,
        stack=code.stack,
        blocks_an_sm=fits,
        warps_an_sm=fits * warps,
        blocks=launch.blocks,
        waves=launch.blocks / (fits * machine.MULTIPROCESSORS) if fits else 0.0,
        bytes_an_output=launch.least_bytes / launch.outputs,
        instructions_an_output=len(path) * times * 32 / 1000,
        memory=1000 * launch.least_bytes / launch.outputs / machine.BYTES_A_CYCLE,
        issue=issue * times / machine.SCHEDULERS,
        issue_with_ends=issue * times / machine.SCHEDULERS * launch.walked / launch.iterations,
        pipes={name: cycles * times for name, cycles in machine.pipe_cycles(path).items()},
        latency=alone * times / (resident * warps),
        bytes_in_flight=round(in_lane * launch.threads * resident),
        tensor_share=2 * hmma / issue,
        counts={name: n * times * 32 / 1000 for name, n in sorted(counts.items())},
    )
    if code.stack:
        made.aims.append(f"{code.stack} bytes of stack or local memory")
    if model.bandwidth and made.share < model.bandwidth:
        made.aims.append(f"{made.share:.0%} of bandwidth, aim {model.bandwidth:.0%}")
    if model.bandwidth and made.bytes_in_flight < machine.LITTLE_BYTES:
        made.aims.append(f"{made.bytes_in_flight / 1024:.1f} KiB in flight, aim {machine.LITTLE_BYTES // 1024}")
    if model.tensor and made.tensor_share < model.tensor:
        made.aims.append(f"{made.tensor_share:.0%} HMMA, aim {model.tensor:.0%}")
    return made, path


def predictions(*words: str) -> Iterator[tuple[Prediction, list[Instruction], Model]]:
    """All kernels whose titles and names have all of the words, at all their sizes."""
    chosen = [model for model in models() if all(word in f"{model.title} {model.name}" for word in words)]
    for source in dict.fromkeys(model.source for model in chosen):
        code = cubins.compiled(source, [model.name for model in chosen if model.source == source])
        for model in (model for model in chosen if model.source == source):
            for size in model.sizes:
                try:
                    yield *predict(model, size, code[model.name]), model
                except ModelError as error:
                    raise ModelError(f"{model.name}: {error}") from None


def blame(path: list[Instruction], most: int = 12) -> Iterator[str]:
    """The lines of source that the path's instructions come from, those with the most first."""
    lines: dict[str, Counter[str]] = {}
    for instruction in path:
        place = " < ".join(f"{Path(file).name}:{line}" for file, line in instruction.sources[:3])
        lines.setdefault(place, Counter())[instruction.mark] += 1
    for place, marks in sorted(lines.items(), key=lambda item: -item[1].total())[:most]:
        yield f"  {marks.total():4} {place}: " + ", ".join(f"{name} {n}" for name, n in marks.most_common(8))


def waits(path: list[Instruction], model: Model, most: int = 8) -> Iterator[str]:
    """What a warp alone waits for, longest first."""
    cycles, late = cycles_alone(path, lambda i: machine.latency(i, model.cached), machine.HMMA_ISSUE)
    yield f"  a warp alone takes {cycles} cycles for {len(path)} instructions, and waits for"
    for instruction, wait in late.most_common(most):
        place = " < ".join(f"{Path(file).name}:{line}" for file, line in instruction.sources[:3])
        yield f"  {wait:4} {place}: {instruction.name} {instruction.operands}"


HEAD = """
  B/el: least bytes of an element of output; instr: a lane's instructions for it; then cycles of a multiprocessor for
  1000 elements, by memory, issue (with the loop's run-in and run-out), latency; the share of memory's bandwidth that
  issue leaves; the stricter share, by pipes and latency too, and what limits it; HMMA's share of issue; KiB in flight
  of a multiprocessor; waves of blocks
"""
COLUMNS = (
    f"  {'size':24} {'B/el':>5} {'instr':>6} {'memory':>6} {'issue':>6} {'(ends)':>7} {'latency':>7} {'share':>6} "
    f"{'strict':>6} {'limit':12} {'HMMA':>5} {'KiB':>5} {'waves':>6}"
)


def line(row: Prediction) -> str:
    ends = f"({row.issue_with_ends:.0f})"
    return (
        f"  {row.size:24} {row.bytes_an_output:5.2f} {row.instructions_an_output:6.1f} {row.memory:6.0f} "
        f"{row.issue:6.0f} {ends:>7} {row.latency:7.0f} {row.share:6.0%} {row.strict_share:6.0%} "
        f"{row.strict_limit:12} {row.tensor_share:5.0%} {row.bytes_in_flight / 1024:5.1f} {row.waves:6.2f}"
        + (f"  MISSED: {'; '.join(row.aims)}" if row.aims else "")
    )


def markdown(row: Prediction) -> str:
    """A row of the README's table."""
    counts = Counter[str]()
    for name, n in row.counts.items():
        counts[COLUMN_OF.get(name, "other")] += n
    cells = [row.title, f"{row.registers} / {row.blocks_an_sm}", f"{row.bytes_an_output:.1f}"]
    cells += [f"{counts[name]:.1f}" for name in (*dict.fromkeys(COLUMN_OF.values()), "other")]
    cells += [f"{time:.0f}" for time in (row.memory, row.issue, row.latency)]
    cells += [f"{row.share:.0%} {row.limit}", f"{row.strict_share:.0%} {row.strict_limit}"]
    cells += [f"{row.tensor_share:.0%}" if row.tensor_share else "", f"{row.bytes_in_flight / 1024:.0f}"]
    return f"| {' | '.join(cells)} |"


COLUMN_OF = {
    "FFMA": "FFMA", "widen": "conversions", "F2F, MUFU": "conversions", "LDG.128": "LDG, STG", "LDG.64": "LDG, STG",
    "LDG.32": "LDG, STG", "STG.128": "LDG, STG", "STG.64": "LDG, STG", "STG.32": "LDG, STG", "LDS.128": "LDS, STS",
    "LDS.64": "LDS, STS", "LDS.32": "LDS, STS", "STS.128": "LDS, STS", "STS.64": "LDS, STS", "STS.32": "LDS, STS",
    "HMMA": "HMMA", "IMAD": "integer", "integer": "integer",
}  # fmt: skip


def report(words: list[str], counts: bool, blamed: bool, as_markdown: bool) -> list[Prediction]:
    """Prints the predictions, those of a kernel below its name."""
    rows: list[Prediction] = []
    if as_markdown:
        head = ["kernel", "registers / blocks", "B", *dict.fromkeys(COLUMN_OF.values()), "other"]
        head += ["memory", "issue", "latency", "of bandwidth", "strictly", "HMMA share", "KiB in flight"]
        print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    else:
        print(HEAD.strip("\n"))
    for row, path, model in predictions(*words):
        first = not rows or rows[-1].kernel != row.kernel
        rows.append(row)
        if as_markdown:
            if first:
                print(markdown(row))
            continue
        if first:
            print(f"\n{row.title}: {row.kernel}")
            print(f"  {row.registers} registers, {row.blocks_an_sm} blocks an SM ({row.warps_an_sm} warps)\n{COLUMNS}")
        print(line(row))
        if first and counts:
            print("    counts: " + ", ".join(f"{name} {n:.2f}" for name, n in row.counts.items()))
            print("    pipes: " + ", ".join(f"{name} {n:.0f}" for name, n in sorted(row.pipes.items())))
        if first and blamed:
            print("\n".join([*blame(path), *waits(path, model)]))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="words", metavar="WORD", action="append", default=[], help="only kernels with it")
    parser.add_argument(
        "--counts", action="store_true", help="instructions of a lane for an element, by kind, and pipes"
    )
    parser.add_argument("--blame", action="store_true", help="lines of source with the most instructions and waits")
    parser.add_argument("--markdown", action="store_true", help="the README's table instead: each kernel's first size")
    parser.add_argument("--json", type=Path, help="write all figures to a file")
    args = parser.parse_args(arguments)
    if reason := cubins.why_not():
        raise SystemExit(f"sass_model: {reason}")
    try:
        rows = report(args.words, args.counts, args.blame, args.markdown)
    except (ModelError, RuntimeError) as error:
        raise SystemExit(f"sass_model: {error}") from None
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n")
    missed = [row for row in rows if row.aims]
    if not args.markdown:
        print(f"\n{len(rows)} predictions, {len(missed)} miss an aim")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
