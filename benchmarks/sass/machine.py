"""A V100 as the model takes it, and what an instruction costs on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from .disassembly import Instruction, streams

MULTIPROCESSORS = 80
CLOCK = 1.53e9
BANDWIDTH = 900e9
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction a cycle
BYTES_A_CYCLE = BANDWIDTH / (MULTIPROCESSORS * CLOCK)  # of a multiprocessor
LITTLE_BYTES = 12 * 1024  # in flight on a multiprocessor, which memory's latency asks for
REGISTERS_A_SCHEDULER, SHARED_BYTES, WARPS, BLOCKS = 16384, 96 * 1024, 64, 32

HMMA_ISSUE = {"HMMA": 2}  # cycles that an instruction takes to issue, if not one

# The pipes: the instructions, and the cycles that a warp's instruction keeps one busy. A scheduler has 16 lanes for
# FP32 (with integer multiply-add), as many for integers and for packed halves, 8 for FP64, 4 for conversions and
# transcendentals; a multiprocessor has 32 load/store units. "documented": by the arithmetic throughput table of the
# CUDA programming guide (64, 64, 64·2, 32, 16 results a cycle and multiprocessor) or the Volta whitepaper.
_PIPES = (
    ("fp32", r"FFMA|FADD|FMUL|FCHK|IMAD|IMUL", 2),  # documented; that IMAD shares it is Nsight Compute's word
    ("tensor", r"HMMA", 2),  # the issue's rule; 125 TFLOP/s say the same
    ("fp16", r"HADD2|HMUL2|HFMA2|HSETP2|HSET2", 2),  # documented; HADD2.F32, which widens a half, taken as one
    ("convert", r"F2F|F2I|I2F|FRND|MUFU|POPC|FLO|BREV", 8),  # documented
    ("fp64", r"DFMA|DADD|DMUL|DSETP|DMNMX", 4),  # documented
    (
        "control",
        r"BRA|BSSY|BSYNC|BAR|EXIT|WARPSYNC|BMOV|NOP|DEPBAR|S2R|CALL|RET|VOTE|YIELD|MEMBAR|ERRBAR|BREAK",
        1,
    ),  # assumed
)  # all else: integers, logic, comparisons, moves, predicates: "integer", 2
PIPES = [(name, re.compile(f"(?:{pattern})$"), cycles) for name, pattern, cycles in _PIPES]
MEMORY = ("LDG", "STG", "LDS", "STS", "SHFL", "LDL", "STL", "LD", "ST", "LDC", "ATOM", "ATOMS", "RED")


def pipe(instruction: Instruction) -> tuple[str, float]:
    """The pipe that an instruction goes to, and its cycles there: of a scheduler's pipe, or of the multiprocessor's one
    load/store pipe, where 128 bytes pass in a cycle (documented) and an instruction takes one at least."""
    if instruction.operation in MEMORY:
        return "memory", max(1, instruction.width // 32)
    for name, pattern, cycles in PIPES:
        if pattern.match(instruction.operation):
            return name, cycles
    return "integer", 2


def issue_cycles(path: Sequence[Instruction]) -> int:
    """Of a scheduler, for one warp."""
    return sum(HMMA_ISSUE.get(i.operation, 1) for i in path)


def pipe_cycles(path: Sequence[Instruction]) -> dict[str, float]:
    """Cycles of a multiprocessor for one warp, by pipe."""
    busy: Counter[str] = Counter()
    for instruction in path:
        name, cycles = pipe(instruction)
        busy[name] += cycles if name == "memory" else cycles / SCHEDULERS
    return dict(busy)


def blocks_of_multiprocessor(registers: int, shared_bytes: int, threads: int) -> int:
    """Blocks that fit: registers are given out to a warp in units of 256, out of a scheduler's; shared memory in units
    of 256 bytes."""
    warps = threads // 32
    by_registers = SCHEDULERS * (REGISTERS_A_SCHEDULER // max(1, (registers * 32 + 255) // 256 * 256))
    by_shared = SHARED_BYTES // ((shared_bytes + 255) // 256 * 256) if shared_bytes else BLOCKS
    return min(by_registers // warps, by_shared, WARPS // warps, BLOCKS)


# Cycles from an instruction's start until its result can be used. Assumed, after published measurements of V100: what
# they decide is only whether a warp waits for memory, or computes meanwhile.
STREAM_LATENCY, CACHE_LATENCY = 450, 200
_LATENCY = {"LDS": 24, "SHFL": 24, "HMMA": 10, "IMAD": 5, "HADD2": 6, "HMUL2": 6, "HFMA2": 6, "S2R": 20, "LDC": 30}


def latency(instruction: Instruction, cached: str) -> int:
    """Loads from lines of source that match `cached` are answered by the L2 cache."""
    if instruction.operation == "LDG":
        return STREAM_LATENCY if streams(instruction, cached) else CACHE_LATENCY
    name, cycles = pipe(instruction)
    return 16 if name == "convert" else 10 if name == "fp64" else _LATENCY.get(instruction.operation, 4)
