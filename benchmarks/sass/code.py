"""Reads nvdisasm's text: instructions, the loops they form, and the path of an iteration through a loop."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
        """Whether control never goes on behind it: neither a predicate nor, of a branch, a second one."""
        return self.ends_block and self.predicate in ("", "PT") and not re.match(r"\s*!?U?P\d", self.operands)

    @property
    def width(self) -> int:
        """Bits of a memory access, a lane."""
        found = re.search(r"\.[US]?(8|16|64|128)\b", self.name)
        return int(found[1]) if found else 32

    @property
    def mark(self) -> str:
        """What models count: the operation, and of memory accesses their width."""
        return f"{self.operation}.{self.width}" if self.operation in ("LDG", "STG", "LDS", "STS") else self.operation

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

    def path(self, loop: Loop, marks: Mapping[str, int], avoid: str, costs: Mapping[str, int]) -> list[Instruction]:
        """The costliest way once through the loop on which the marked instructions come as often as `marks` says;
        empty if there is none. Loops inside are gone through once. Blocks that load what `avoid` says (a regular
        expression for a line of source), and those that call a function, as a division's rare cases do, are left out.
        """
        names = list(marks)
        start = (0,) * len(names)
        # Per block, for every count of marks on a way to its end: the cost, and the block and counts before.
        found: dict[int, dict[tuple[int, ...], tuple[int, int, tuple[int, ...]]]] = {}
        for block in self._order:
            if block not in loop.blocks or self._left_out(block, avoid):
                continue
            counts = Counter(i.mark for i in self.blocks[block].instructions)
            cost = sum(costs.get(i.operation, 1) for i in self.blocks[block].instructions)
            ways: dict[tuple[int, ...], tuple[int, int, tuple[int, ...]]] = {}
            if block == loop.header:
                entries = [(start, 0, -1, start)]
            else:
                # A block that dominates nothing here yet is reached by a jump back: an inner loop's, gone once.
                entries = [
                    (state, reached[0], before, state)
                    for before in self._before[block]
                    if before in found and block not in self._dominators[before]
                    for state, reached in found[before].items()
                ]
            for state, so_far, before, previous in entries:
                new = tuple(n + counts[name] for n, name in zip(state, names, strict=True))
                if any(n > marks[name] for n, name in zip(new, names, strict=True)):
                    continue
                if new not in ways or so_far + cost > ways[new][0]:
                    ways[new] = (so_far + cost, before, previous)
            found[block] = ways
        wanted = tuple(marks.values())
        ends = [(found[end][wanted][0], end) for end in loop.latches if wanted in found.get(end, {})]
        if not ends:
            return []
        block, state, blocks = max(ends)[1], wanted, []
        while block >= 0:
            blocks.append(block)
            _, block, state = found[block][state]
        return [instruction for block in reversed(blocks) for instruction in self.blocks[block].instructions]

    def _left_out(self, block: int, avoid: str) -> bool:
        for instruction in self.blocks[block].instructions:
            if instruction.operation == "CALL":
                return True
            if avoid and instruction.operation == "LDG" and re.search(avoid, instruction.source_text()):
                return True
        return False

    def iteration(
        self, steps: Sequence[Mapping[str, int]], avoid: str = "", costs: Mapping[str, int] | None = None
    ) -> tuple[list[Instruction], int]:
        """What the steady state repeats: a path for each of the steps through the one loop that has them all, and how
        many times over the compiler has it in the loop's body (a factor for all marks).

        Of several such loops the costliest is the hot one.

        Raises:
            ModelError: no loop has such paths.
        """
        best: tuple[int, list[Instruction], int] = (0, [], 1)
        for loop in self.loops:
            for repeats in range(1, _MOST_REPEATS + 1):
                scaled = [{name: count * repeats for name, count in step.items()} for step in steps]
                paths = [self.path(loop, marks, avoid, costs or {}) for marks in scaled]
                if all(paths):
                    whole = [instruction for path in paths for instruction in path]
                    # A body of several repeats is taken for one of the same loop's that has fewer of them.
                    if len(whole) > best[0]:
                        best = (len(whole), whole, repeats)
                if not any(steps):
                    break
        if not best[1]:
            raise ModelError(f"no loop has a path for each of {list(map(dict, steps))}; {self._describe()}")
        return best[1], best[2]

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
                int(found["address"], 16), found["name"], found["operands"].strip(), found["predicate"] or "", tuple(chain)
            )


def functions(text: str) -> dict[str, str]:
    """The text of each kernel of a disassembled cubin, by its mangled name."""
    return dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-{5,}|^\.text\.|\Z)", text, re.MULTILINE | re.DOTALL))


def in_flight(path: Sequence[Instruction], cached: str = "") -> tuple[int, int]:
    """Global loads of the path, as (bytes of a lane, how many) at the moment when the most of them are under way: issued,
    and no register of theirs read or written yet. The path is gone round twice, as loads may be for the next time.
    Loads from lines of source that match `cached` come from a cache, and don't count."""
    streams = {i for i in path if i.operation == "LDG" and not (cached and re.search(cached, i.source_text()))}
    under_way: dict[int, tuple[set[int], int]] = {}
    most = (0, 0)
    for number, instruction in enumerate([*path, *path]):
        touched = _registers(instruction)
        for other in [key for key, (registers, _) in under_way.items() if registers & touched]:
            del under_way[other]
        if instruction in streams:
            first = next(iter(_REGISTER.findall(instruction.operands)))
            width = instruction.width // 8
            under_way[number] = ({int(first) + k for k in range(max(1, width // 4))}, width)
            most = max(most, (sum(size for _, size in under_way.values()), len(under_way)))
    return most


def _registers(instruction: Instruction) -> set[int]:
    touched = {int(number) for number in _REGISTER.findall(instruction.operands)}
    if instruction.operation in ("STG", "STS"):
        data = int(_REGISTER.findall(instruction.operands)[-1]) if _REGISTER.search(instruction.operands) else -1
        touched |= {data + k for k in range(instruction.width // 32)}
    return touched
