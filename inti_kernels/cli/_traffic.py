"""How many bytes the Triton and CUDA kernels move, from the addresses that they really touch without a GPU: in Triton's
interpreter, and in the emulator of CUDA.

Traffic is counted in sectors of 32 bytes, what a GPU reads and writes memory by:

* ``traffic``: each program's (of CUDA, each block's) distinct sectors, read and written, summed over the programs, over
  the least possible bytes, every input read once and every output written once. No cache is assumed but the program's.
* ``through_l2``: what reaches memory behind an L2 of 6 MiB (V100's), kept by least recent use, over the same least
  bytes. It is empty when a pass begins, and each launch finds what those before have left. Programs come one after the
  other in launch order; CUDA's blocks, of which it is known how they fit on V100, in turns with all that run with them,
  and what they read again after a barrier counts again. Partial sums are in what reaches memory, and not in the least.

Says nothing of time. `bench` prints the figures beside times of the triton backend; for them `count` runs in a process
of its own, since TRITON_INTERPRET is read when a kernel is defined:

    TRITON_INTERPRET=1 python -m inti_kernels.cli._traffic '{"op": "depthwise_conv3d", "dtype": "float16"}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ._passes import Part, passes

# The ops whose passes are counted. Of triton the ones whose traffic says how fast they can be.
COUNTED = {
    "triton": ("pair_interpolate", "depthwise_conv3d"),
    "cuda": ("pair_interpolate", "depthwise_conv3d", "token_features", "interpolation_head"),
}
SECTOR = 32
L2_BYTES = 6 << 20
MULTIPROCESSORS, SHARED_BYTES, THREADS = 80, 96 << 10, 512  # V100's; threads of 128 registers that fit on one
TURN = 32  # sectors that a block touches before it is the next one's turn
SIZES: dict[str, Any] = {"dim": 768, "frames": 16, "grid": (14, 14), "batch": 1, "prefix": 1}


@dataclass(frozen=True)
class Traffic:
    """What a pass of an op moves."""

    op: str
    case: str
    stage: str
    programs: int  # or blocks, of the kernel that reads the tokens
    traffic: float
    through_l2: float


@dataclass
class Program:
    """Sectors by number, in the order of their first touch."""

    read: dict[int, None] = field(default_factory=dict)
    written: dict[int, None] = field(default_factory=dict)
    order: list[tuple[int, bool]] = field(default_factory=list)  # every touch, and whether it writes; if that is known

    def touches(self) -> Iterator[tuple[int, bool]]:
        """All of them in order; where that isn't known, reads come first."""
        if self.order:
            yield from self.order
        else:
            yield from ((sector, False) for sector in self.read)
            yield from ((sector, True) for sector in self.written)

    def moved(self, shifts: Sequence[tuple[int, int, int]]) -> Program:
        """The same accesses elsewhere.  shifts: (first address, last address, by how many bytes) of each tensor."""

        def move(sectors: dict[int, None]) -> dict[int, None]:
            moved = {}
            for sector in sectors:
                by = next(by for first, last, by in shifts if first <= sector * SECTOR <= last)
                moved[sector + by // SECTOR] = None
            return moved

        return Program(move(self.read), move(self.written))


@dataclass
class Launched:
    """One launch: its programs in launch order, and how many run at the same time."""

    kernel: str
    programs: list[Program]
    together: int = 1

    def touches(self) -> Iterator[tuple[int, bool]]:
        """Those of the programs that run at the same time in turns; the next program begins where one has ended."""
        waiting = (program.touches() for program in self.programs)
        running = deque(islice(waiting, self.together))
        while running:
            program = running.popleft()
            turn = list(islice(program, TURN))
            yield from turn
            if len(turn) == TURN:
                running.append(program)
            else:
                running.extend(islice(waiting, 1))


def count(op: str, dtype: torch.dtype, *, backend: str = "triton", every: bool = False, **sizes: Any) -> list[Traffic]:
    """The traffic of every pass of an op.

    Args:
        op: one of COUNTED[backend].
        dtype: of every tensor.
        backend: "triton", in a process with TRITON_INTERPRET=1, or "cuda", where INTI_CUDA_LIBRARY names the emulator.
        every: run every program. By default, where blocks of channels of a Triton kernel do the same at other channels,
            only the first and the last of them run; that the last does what the first does is checked, not assumed.
        **sizes: dim, frames, grid, batch, prefix, where they aren't those of SIZES.

    Raises:
        RuntimeError: the emulator isn't there.
    """
    rows = []
    for one in passes(op, dtype, {**SIZES, **sizes}, backend):
        with recorded(every) if backend == "triton" else emulated() as launches:
            one.call()
        for part, its in _by_part(one.parts, launches):
            total = sum(len(p.read) + len(p.written) for launch in its for p in launch.programs) * SECTOR
            behind = through_l2(its) * SECTOR
            programs = len(its[0].programs)
            rows.append(Traffic(op, one.case, part.stage, programs, total / part.least, behind / part.least))
    return rows


def _by_part(parts: Sequence[Part], launches: list[Launched]) -> Iterator[tuple[Part, list[Launched]]]:
    """Each part with its launches: from its first kernel to the next part's."""
    starts = [next(i for i, launch in enumerate(launches) if launch.kernel.startswith(part.first)) for part in parts]
    for part, start, end in zip(parts, starts, [*starts[1:], len(launches)], strict=True):
        yield part, launches[start:end]


def count_elsewhere(op: str, dtype: torch.dtype, **sizes: Any) -> list[Traffic]:
    """`count` in a process of its own.

    Raises:
        RuntimeError: it failed; the message is what it said last.
    """
    task = {"op": op, "dtype": str(dtype).removeprefix("torch."), **sizes}
    # The table's settings are counted, whatever a GPU's tuning finds.
    environment = {name: value for name, value in os.environ.items() if name != "INTI_AUTOTUNE"}
    environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(task)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"counting the traffic of {op} failed: {done.stderr.strip().splitlines()[-1:]}")
    return [Traffic(**row) for row in json.loads(done.stdout)]


def through_l2(launches: Sequence[Launched], capacity: int = L2_BYTES // SECTOR) -> int:
    """Sectors that reach memory behind a cache of so many sectors: those read that it lacks, and dirty ones that it
    gives up, then or at the end. A sector written needs no reading: programs write whole ones."""
    cache: OrderedDict[int, bool] = OrderedDict()  # sector -> dirty, the least recently used first
    moved = 0

    def touch(sector: int, dirty: bool) -> None:
        nonlocal moved
        if sector in cache:
            cache.move_to_end(sector)
            cache[sector] |= dirty
            return
        moved += not dirty
        cache[sector] = dirty
        if len(cache) > capacity:
            moved += cache.popitem(last=False)[1]

    for launch in launches:
        for sector, written in launch.touches():
            touch(sector, written)
    return moved + sum(cache.values())


@contextmanager
def emulated() -> Iterator[list[Launched]]:
    """Records what the CUDA kernels touch that are launched inside the block."""
    from ..backends import cuda

    if not cuda.emulated():
        raise RuntimeError(
            "the traffic of the CUDA kernels is counted by the emulator: build it (cmake -B build/emulator "
            "-DINTI_EMULATOR=ON) and let INTI_CUDA_LIBRARY name the file"
        )
    module, launches = cuda.load(), []
    module.start_recording()
    try:
        yield launches
    finally:
        for launch in module.stop_recording():
            programs = []
            for sectors, written in launch["traffic"]:
                program = Program()
                for sector, write in zip(memoryview(sectors).cast("Q"), written, strict=True):
                    (program.written if write else program.read)[sector] = None
                    program.order.append((sector, bool(write)))
                programs.append(program)
            fit = min(THREADS // launch["threads"], SHARED_BYTES // max(launch["shared_bytes"], 1))
            launches.append(Launched(launch["kernel"], programs, MULTIPROCESSORS * max(fit, 1)))


@contextmanager
def recorded(every: bool = False) -> Iterator[list[Launched]]:
    """Records what the kernels touch that are launched inside the block, and runs only what `count` says."""
    import numpy as np
    from triton.runtime import interpreter

    from ..backends.triton import _launch

    builder, launches = interpreter.InterpreterBuilder, []
    load, store, place = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    start, chosen, here = _launch.run, [], {}

    def sectors(pointers: Any, mask: Any) -> list[int]:
        addresses, live = np.broadcast_arrays(pointers.data, mask.data)
        touched = addresses.ravel()[live.ravel().astype(bool)] // SECTOR
        _, first = np.unique(touched, return_index=True)
        return touched[np.sort(first)].tolist()

    def recording_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        here["program"].read.update(dict.fromkeys(sectors(pointers, mask)))
        return load(self, pointers, mask, *rest)

    def recording_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        here["program"].written.update(dict.fromkeys(sectors(pointers, mask)))
        return store(self, pointers, value, mask, *rest)

    def placing(self: Any, x: int, y: int, z: int) -> None:
        place(self, x, y, z)
        self.grid_idx = (chosen[x], y, z)
        here["program"] = here["programs"].setdefault(chosen[x], Program())

    def run(kernel: Any, grid: Callable[[dict[str, Any]], tuple[int]], arguments: dict[str, Any]) -> None:
        (programs,) = grid(arguments)
        name, blocks = kernel.fn.__name__.strip("_").removesuffix("_kernel"), 1
        if not every and name.startswith("depthwise") and arguments["DIM"] % arguments["CHANNELS"] == 0:
            blocks = arguments["DIM"] // arguments["CHANNELS"]
        chosen[:] = [p for p in range(programs) if p % blocks in (0, blocks - 1)]
        here["programs"] = {}
        start(kernel, lambda meta: (len(chosen),), arguments)
        launches.append(Launched(name, _all_programs(here["programs"], programs, blocks, arguments)))

    builder.create_masked_load, builder.create_masked_store = recording_load, recording_store
    builder.set_grid_idx, _launch.run = placing, run
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.set_grid_idx, _launch.run = place, start


def _all_programs(ran: dict[int, Program], programs: int, blocks: int, arguments: dict[str, Any]) -> list[Program]:
    """Every program in launch order, those of the blocks of channels between the first and the last by moving."""
    if blocks == 1:
        return [ran[number] for number in range(programs)]

    def block(number: int) -> list[tuple[int, int, int]]:
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        channels = number * arguments["CHANNELS"]
        # Strided tensors reach further than their numbers; a storage ends where it ends.
        spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes(), t.element_size()) for t in tensors]
        return [(start // SECTOR * SECTOR, start + size - 1, channels * item) for start, size, item in spans]

    everything = []
    for number in range(programs):
        first = ran[number - number % blocks]
        everything.append(first.moved(block(number % blocks)) if number % blocks else first)
        if number in ran and everything[-1] != ran[number]:
            raise AssertionError(f"the last block of channels does not do what the first does (program {number})")
    return everything


def main() -> int:
    """Counts what the JSON of the first argument asks for; prints JSON."""
    task = json.loads(sys.argv[1])
    task["grid"] = tuple(task.get("grid", SIZES["grid"]))
    rows = count(task.pop("op"), getattr(torch, task.pop("dtype")), **task)
    print(json.dumps([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
