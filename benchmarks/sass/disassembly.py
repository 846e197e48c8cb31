"""Reads nvdisasm's text: instructions, the loops they form, and the path of an iteration through a loop."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

_LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P[T\d]+)\s+)?(?P<name>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_SOURCE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)(.*)$')
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_MOST_REPEATS = 8  # of a loop's body, that a compiler unrolled


class ModelError(Exception):
    """The code is not what its model says."""


class AtLeast(int):
    """A count of marks: as few as there can be from this number on."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    address: int
    name: str  # with its modifiers: LDG.E.128.SYS
    operands: str
    predicate: str = ""  # P0 or !P0
    sources: tuple[tuple[str, int], ...] = ()  # file and line, from the innermost inlined function outward

    @property
    def operation(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> str | None:
        """The label that it may jump to."""
        found = _TARGET.search(self.operands) if self.operation == "BRA" else None
        return found[1] if found else None

    @property
    def ends_block(self) -> bool:
        return self.operation in ("BRA", "EXIT", "RET", "BRX", "JMP")

    @property
    def always(self) -> bool:
        """Whether control never goes on behind it: neither a predicate nor, of a branch, a second one, nor is it the
        way of a warp whose lanes have parted."""
        bound = self.predicate in ("", "PT") and not re.match(r"\s*!?U?P\d", self.operands)
        return self.ends_block and bound and self.name != "BRA.DIV"

    @property
    def width(self) -> int:
        """Bits of a memory access, a lane."""
        found = re.search(r"\.[US]?(8|16|64|128)\b", self.name)
        return int(found[1]) if found else 32

    @property
    def mark(self) -> str:
        """What models count: the operation, and of memory accesses their width."""
        return f"{self.operation}.{self.width}" if self.operation in ("LDG", "STG", "LDS", "STS") else self.operation

    @cached_property
    def written(self) -> frozenset[int]:
        """Registers that get its result."""
        first = self.operands.partition(",")[0].strip()
        found = re.match(r"R(\d+)\b", first)
        if not found or self.operation in ("BRA", "CALL", "RET", "EXIT"):
            return frozenset()
        count = 1
        if self.operation in ("LDG", "LDS", "LDL", "LDC"):
            count = max(1, self.width // 32)
        elif self.operation == "HMMA" or ".WIDE" in self.name or self.operation in ("CS2R", "DFMA", "DADD", "DMUL"):
            count = 2
        return frozenset(range(int(found[1]), int(found[1]) + count))

    @cached_property
    def read(self) -> frozenset[int]:
        """Registers that it needs; of an address only the lower half is seen."""
        operands = self.operands.partition(",")[2] if self.written else self.operands
        registers = [int(number) for number in _REGISTER.findall(operands)]
        if self.operation in ("STG", "STS", "STL") and registers:
            registers += range(registers[-1], registers[-1] + self.width // 32)
        elif self.operation == "HMMA":
            registers += [number + 1 for number in registers]
        return frozenset(registers)

    def source_text(self) -> str:
        """The lines of source that it comes from."""
        return "\n".join(_source_line(file, line) for file, line in self.sources)


_FILES: dict[str, list[str]] = {}


def _source_line(file: str, line: int) -> str:
    if file not in _FILES:
        path = Path(file)
        _FILES[file] = path.read_text().splitlines() if path.is_file() else []
    lines = _FILES[file]
    return lines[line - 1] if line <= len(lines) else ""


@dataclass
class Block:
    """Instructions that run one after the other."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """A natural loop: its first block, all its blocks, and those that jump back."""

    header: int
    blocks: frozenset[int]
    latches: frozenset[int]


@dataclass(frozen=True)
class Search:
    """What a path is looked for by, beside its marks."""

    avoid: str = ""  # a regular expression for lines of source: a path has no loads from them
    predicated: bool = True  # whether predicated loads are such loads
    trips: Mapping[str, int] = field(default_factory=dict)  # of loops inside, by their line of source
    costs: Mapping[str, int] = field(default_factory=dict)  # of operations, where they aren't 1


class Function:
    """A kernel's control-flow graph."""

    def __init__(self, text: str) -> None:
        self.blocks: list[Block] = [Block()]
        labels: dict[str, int] = {}
        for item in _read(text):
            if isinstance(item, str):
                if self.blocks[-1].instructions:
                    self.blocks.append(Block())
                labels[item] = len(self.blocks) - 1
            else:
                self.blocks[-1].instructions.append(item)
                if item.ends_block:
                    self.blocks.append(Block())
        for i, block in enumerate(self.blocks):
            last = block.instructions[-1] if block.instructions else None
            if last and last.target:
                block.next.append(labels[last.target])
            if not (last and last.always) and i + 1 < len(self.blocks):
                block.next.append(i + 1)

    @cached_property
    def _order(self) -> list[int]:
        """Blocks that can be reached, in reverse postorder."""
        seen, order = {0}, []
        stack: list[tuple[int, Iterator[int]]] = [(0, iter(self.blocks[0].next))]
        while stack:
            block, rest = stack[-1]
            for following in rest:
                if following not in seen:
                    seen.add(following)
                    stack.append((following, iter(self.blocks[following].next)))
                    break
            else:
                order.append(block)
                stack.pop()
        return order[::-1]

    @cached_property
    def _before(self) -> dict[int, list[int]]:
        before: dict[int, list[int]] = {block: [] for block in self._order}
        for block in self._order:
            for following in self.blocks[block].next:
                before[following].append(block)
        return before

    @cached_property
    def _dominators(self) -> dict[int, set[int]]:
        everything = set(self._order)
        dominators = {block: set(everything) for block in self._order}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in self._order[1:]:
                new = {block} | set.intersection(*(dominators[b] for b in self._before[block]))
                if new != dominators[block]:
                    dominators[block], changed = new, True
        return dominators

    @cached_property
    def loops(self) -> list[Loop]:
        latches: dict[int, set[int]] = {}
        for block in self._order:
            for following in self.blocks[block].next:
                if following in self._dominators[block]:
                    latches.setdefault(following, set()).add(block)
        loops = []
        for header, ends in latches.items():
            body, pending = {header}, list(ends)
            while pending:
                if (block := pending.pop()) not in body:
                    body.add(block)
                    pending += self._before[block]
            loops.append(Loop(header, frozenset(body), frozenset(ends)))
        return loops

    def trips(self, loop: Loop, rules: Mapping[str, int]) -> dict[int, tuple[int, int]]:
        """How often the blocks of loops inside this one run in one of its iterations, with the inner loop's header: by
        the first rule, a regular expression for a line of source, that fits the jump back; else once."""
        found: dict[int, tuple[int, int]] = {}
        for inner in sorted(self.loops, key=lambda inner: -len(inner.blocks)):
            if inner.header == loop.header or not inner.blocks < loop.blocks:
                continue
            text = "\n".join(i.source_text() for latch in inner.latches for i in self.blocks[latch].instructions)
            times = next((n for rule, n in rules.items() if re.search(rule, text)), 1)
            for block in inner.blocks:
                found[block] = (times * found.get(block, (1, 0))[0], inner.header)
        return found

    def path(self, loop: Loop, marks: Mapping[str, int], search: Search) -> list[Instruction]:
        """The costliest way once through the loop on which the marked instructions come as often as `marks` says
        (exactly, or AtLeast); empty if there is none. Blocks that call a function, as a division's rare cases do, are
        left out.
        """
        names = list(marks)
        start = (0,) * len(names)
        limits = [math.inf if isinstance(n, AtLeast) else n for n in marks.values()]
        trips = self.trips(loop, search.trips)
        # Per block, for every count of marks on a way to its end: the cost, and the block and counts before.
        found: dict[int, dict[tuple[int, ...], tuple[int, int, tuple[int, ...]]]] = {}
        for block in self._order:
            if block not in loop.blocks or self._left_out(block, search):
                continue
            times = trips.get(block, (1, 0))[0]
            counts = Counter(i.mark for i in self.blocks[block].instructions)
            cost = times * sum(search.costs.get(i.operation, 1) for i in self.blocks[block].instructions)
            ways: dict[tuple[int, ...], tuple[int, int, tuple[int, ...]]] = {}
            if block == loop.header:
                entries = [(start, 0, -1, start)]
            else:
                # Without the jumps back of loops inside.
                entries = [
                    (state, reached[0], before, state)
                    for before in self._before[block]
                    if before in found and block not in self._dominators[before]
                    for state, reached in found[before].items()
                ]
            for state, so_far, before, previous in entries:
                new = tuple(n + times * counts[name] for n, name in zip(state, names, strict=True))
                if any(n > most for n, most in zip(new, limits, strict=True)):
                    continue
                if new not in ways or so_far + cost > ways[new][0]:
                    ways[new] = (so_far + cost, before, previous)
            found[block] = ways
        ends = [
            (tuple(-n for n in state), ways[0], end, state)
            for end in loop.latches
            for state, ways in found.get(end, {}).items()
            if all(n >= wanted for n, wanted in zip(state, marks.values(), strict=True))
        ]
        if not ends:
            return []
        _, _, block, state = max(ends)
        blocks = []
        while block >= 0:
            blocks.append(block)
            _, block, state = found[block][state]
        path: list[Instruction] = []
        for (times, _), run in groupby(reversed(blocks), lambda block: trips.get(block, (1, -1))):
            path += times * [instruction for block in run for instruction in self.blocks[block].instructions]
        return path

    def _left_out(self, block: int, search: Search) -> bool:
        for instruction in self.blocks[block].instructions:
            if instruction.operation == "CALL":
                return True
            loads = instruction.operation == "LDG" and (search.predicated or not instruction.predicate)
            if search.avoid and loads and re.search(search.avoid, instruction.source_text()):
                return True
        return False

    def iteration(self, steps: Sequence[Mapping[str, int]], search: Search) -> tuple[list[Instruction], int]:
        """What the steady state repeats: a path for each of the steps through the one loop that has them all, and how
        many times over the compiler has it in the loop's body (a factor for all marks).

        Of several such loops the costliest is the hot one.

        Raises:
            ModelError: no loop has such paths.
        """
        # A load to avoid is one that a branch goes round, if there is such a path; else its predicate is what is false,
        # and it is issued all the same.
        for predicated in (True, False):
            searched = replace(search, predicated=predicated)
            best: tuple[int, list[Instruction], int] = (0, [], 1)
            for loop in self.loops:
                for repeats in range(1, _MOST_REPEATS + 1):
                    scaled = [{name: type(n)(n * repeats) for name, n in step.items()} for step in steps]
                    paths = [self.path(loop, marks, searched) for marks in scaled]
                    whole = [instruction for path in paths for instruction in path]
                    if all(paths) and len(whole) > best[0]:
                        best = (len(whole), whole, repeats)
                    if not any(steps):
                        break
            if best[1]:
                return best[1], best[2]
        raise ModelError(f"no loop has a path for each of {list(map(dict, steps))}; {self._describe()}")

    def _describe(self) -> str:
        """What there is instead, for messages."""
        lines = []
        for loop in sorted(self.loops, key=lambda loop: -len(loop.blocks))[:4]:
            marks = Counter(i.mark for block in loop.blocks for i in self.blocks[block].instructions)
            first = self.blocks[loop.header].instructions[0].address
            lines.append(f"all of the loop at {first:#x}: " + ", ".join(f"{m} {n}" for m, n in marks.most_common(12)))
        return "; ".join(lines) or "it has no loop"


def _read(text: str) -> Iterator[Instruction | str]:
    """Instructions, and labels as text."""
    chain: list[tuple[str, int]] = []
    open_chain = False
    for line in text.splitlines():
        if found := _SOURCE.match(line):
            if not open_chain:
                chain = []
            chain.append((found[1], int(found[2])))
            open_chain = True
        elif found := _LABEL.match(line):
            yield found[1]
        elif found := _LINE.match(line):
            open_chain = False
            yield Instruction(
                int(found["address"], 16),
                found["name"],
                found["operands"].strip(),
                found["predicate"] or "",
                tuple(chain),
            )


def functions(text: str) -> dict[str, str]:
    """The text of each kernel of a disassembled cubin, by its mangled name."""
    return dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-{5,}|^\.text\.|\Z)", text, re.MULTILINE | re.DOTALL))


def in_flight(path: Sequence[Instruction], size: Callable[[Instruction], float]) -> float:
    """Bytes of a lane, as `size` says of every global load, at the moment when the most of them are under way: issued,
    and no register of theirs read or written yet. The path is gone round twice, as loads may be for the next time."""
    under_way: dict[int, tuple[frozenset[int], float]] = {}
    most = 0.0
    for number, instruction in enumerate([*path, *path]):
        touched = instruction.read | instruction.written
        for other in [key for key, (registers, _) in under_way.items() if registers & touched]:
            del under_way[other]
        if instruction.operation == "LDG":
            under_way[number] = (instruction.written, size(instruction))
            most = max(most, sum(bytes_under_way for _, bytes_under_way in under_way.values()))
    return most


def streams(instruction: Instruction, cached: str) -> bool:
    """Whether it loads what no cache is expected to have."""
    return instruction.operation == "LDG" and not (cached and re.search(cached, instruction.source_text()))


def cycles_alone(
    path: Sequence[Instruction], latency: Callable[[Instruction], int], issue: Mapping[str, int]
) -> tuple[int, Counter[Instruction]]:
    """Cycles that a warp takes for the path with a scheduler to itself, going round and round: instructions start in
    order, each when the registers that it reads are there. Also for how long it waited for which instruction."""
    ready: dict[int, tuple[int, Instruction]] = {}
    now, begin = 0, 0
    waits: Counter[Instruction] = Counter()
    for _ in range(4):
        begin, waits = now, Counter()
        for instruction in path:
            late = max((ready[r] for r in instruction.read if r in ready), key=lambda entry: entry[0], default=None)
            if late and late[0] > now:
                waits[late[1]] += late[0] - now
                now = late[0]
            for register in instruction.written:
                ready[register] = (now + latency(instruction), instruction)
            now += issue.get(instruction.operation, 1)
    return now - begin, waits
