"""The emulator itself (csrc/emulator): kernels with one planted fault each, all of which it must name, and kernels that
are right, whose results and counts can be told by hand. tests/emulator has them; this builds, runs and checks them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "tests" / "emulator").glob("*.cpp"))
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-math-errno", "-ffp-contract=fast"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler: {COMPILER} was not found"),
    pytest.mark.timeout(900),  # two builds, on a machine that may do other things
]

BARRIER = r"barrier_faults\.cpp:\d+"
RACE = r"with no barrier between the two"
# Case → what the message must say beside "kernel K, block B, thread T", as a regular expression.
FAULTS = {
    "missing_barrier": rf"race: (read|write) of 4 bytes of shared memory at byte \d+, which thread \d+ .*{RACE}",
    "half_the_block_waits": rf"divergent barrier: it ended, but thread \d+ waits at {BARRIER}|has ended",
    "barriers_in_two_places": rf"divergent barrier: waits at {BARRIER}, but thread \d+ waits at another, {BARRIER}",
    "barrier_after_return": rf"thread 5: divergent barrier: it ended, but|waits at {BARRIER}, but thread 5 has ended",
    "return_between_barriers": r"thread 40: divergent barrier: it ended, but|but thread 40 has ended",
    "shuffle_after_return": r"__shfl_sync\(0xffffffff\) at .*: thread \d+ of the mask has ended|it ended, but",
    "return_before_shuffle": r"it ended, but thread \d+ waits for it at __shfl_xor_sync|thread (31|63) of the mask has",
    "shuffle_of_half_the_lanes": r"waits for the whole block at .*__shfl_down_sync|__shfl_down_sync.*at the barrier",
    "barrier_while_lanes_wait": r"waits for the whole block at .* at __syncwarp|waits at the barrier|waits at another",
    "caller_not_in_mask": r"__shfl_sync\(0xfffe\) at .*: the mask leaves out the calling lane \d+",
    "masks_differ": r"__shfl_up_sync\(0xf+\) at .*: the warp diverged: thread \d+ waits at __shfl_up_sync\(0xf+\)",
    "collectives_differ": r"__(any|all)_sync.*: the warp diverged: thread \d+ waits at __(any|all)_sync",
    "collectives_in_two_places": rf"__syncwarp.* at {BARRIER}: the warp diverged: thread \d+ .* at {BARRIER}",
    "shuffle_reads_outside_mask": r"__shfl_sync\(0xffff\) at .*: it reads lane 20, which is not in the mask",
    "syncwarp_of_absent_lane": r"thread 63: it ended, but .* waits for it at __syncwarp|thread 63 of the mask has",
    "ring_of_masks": r"deadlock: all threads that have not ended wait, such as thread [0-2] at __syncwarp",
    "ballot_of_absent_lane": r"thread 33: it ended, but .* waits for it at __ballot_sync|thread 33 of the mask has",
    "shuffle_in_a_small_block": r"__shfl_sync\(0xffffffff\) at .*: thread 16 of the mask does not exist",
    "misaligned_global_load": r"misaligned read of 16 bytes of global memory at 0x[0-9a-f]+: .* a multiple of 16",
    "misaligned_global_store": r"misaligned write of 8 bytes of global memory at 0x[0-9a-f]+: .* a multiple of 8",
    "null_pointer": r"read of 4 bytes of global memory at 0x[0-9a-f]+: a null pointer",
    "shared_load_out_of_bounds": r"thread 31: read of 4 bytes of shared memory at byte 512: out of bounds, .* has 512",
    "shared_store_out_of_bounds": r"thread 31: write of 16 bytes of shared memory at byte 512: out of bounds",
    "shared_load_before_the_start": r"thread 0: read of 4 bytes of shared memory at byte -4: out of bounds",
    "misaligned_shared_load": r"misaligned read of 16 bytes of shared memory at byte 8: it must be a multiple of 16",
    "misaligned_shared_store": r"misaligned write of 8 bytes of shared memory at byte \d+: it must be a multiple of 8",
    "race_of_writes": rf"race: write of 4 bytes of shared memory at byte \d+, which thread \d+ wrote, {RACE}",
    "race_of_write_after_read": rf"race: (read .* wrote|write .* read), {RACE}",
    "race_of_write_after_many_read": rf"race: (write .* byte 0, .* read|read .* byte 0, which thread 33 wrote), {RACE}",
    "race_in_a_warp": rf"race: (read .* wrote|write .* read), {RACE}",
    "race_around_a_shuffle": rf"race: read .* wrote, {RACE}.*shuffles and votes order no memory",
    "race_of_the_other_half": rf"race: (read .* wrote|write .* read), {RACE}",
    "race_of_write_after_warp_read": rf"race: (read .* which thread (3|35) wrote|write .* read), {RACE}",
    "race_of_halves": rf"race: (read of 4 .* wrote|write of 2 .* read), {RACE}",
    "misaligned_fragment": r"load_fragment at byte 16: it must be a multiple of 32",
    "fragment_pitch": r"load_fragment: the pitch must be 16 or more and a multiple of 8, got 20",
    "fragment_pitch_of_sums": r"store_fragment: the pitch must be 16 or more and a multiple of 4, got 18",
    "fragment_out_of_bounds": r"load_fragment of bytes 2816 to 3328 of shared memory: out of bounds, .* has 3072",
    "fragment_store_out_of_bounds": r"store_fragment of bytes 2560 to 3584 of shared memory: out of bounds",
    "mma_of_absent_lane": r"thread 7: it ended, but thread \d+ waits for it at mma_sync|thread 7 of the mask has ended",
    "fragments_of_different_places": r"lanes 0 and 5 of warp 0 loaded or stored fragments differently",
    "race_of_fragments": rf"race: read of \d+ bytes of shared memory at byte \d+, which .* wrote, {RACE}",
    "mma_of_bfloat16_before_ampere": r"mma_sync of bfloat16 needs compute capability 8\.0",
}
# What a launch is refused for: no kernel runs, so there is no block or thread to name.
REFUSED = {
    "too_many_threads": r"nothing \(1 blocks of 1056 threads, .*: a block has 1 to 1024 threads",
    "more_threads_than_launch_bounds": r"nothing \(1 blocks of 288 threads, .*launch bounds are 256 threads",
    "no_threads": r"a block has 1 to 1024 threads",
    "threads_of_no_whole_warps": r"threads must fill whole warps of 32",
    "too_many_blocks": r"nothing \(2147483648 blocks .*: a grid has 1 to 2147483647 blocks",
    "too_much_shared_memory": r"98320 bytes of shared memory\).* capability 70 has 98304 bytes of shared memory",
    "too_much_shared_memory_for_turing": r"capability 75 has 65536 bytes of shared memory",
}
SANITIZED_FAULTS = {
    "global_load_out_of_bounds": r"(read|write) of 4 bytes of global memory at 0x[0-9a-f]+: out of bounds of every",
    "global_store_out_of_bounds": r"block 0, thread 15: write of 16 bytes of global memory at .*: out of bounds of",
}
RIGHT = {
    "barrier": "what missing_barrier lacks",
    "missing_barrier_by_order": "the order of threads alone shows it",
    "launch_limits": "just what the hardware allows",
    "exception_of_a_kernel": "comes out of launch()",
    "shuffles": "by index, up, down, across; every width",
    "partial_masks": "halves of a warp on ways of their own",
    "votes": "ballot, any, all",
    "atomics": "and that every thread runs once",
    "orders_of_threads": "a seed's, shuffled at a barrier",
    "block_sizes": "1 to 1024 threads",
    "launches_by_two_threads": "at once",
    "products_of_fragments": "against a plain loop",
    "every_half_in_a_fragment": "subnormals too",
    "layout_of_fragments": "code that takes it for granted goes wrong",
    "sectors": "read and written by each block",
    "order_of_first_touch": "of sectors",
    "nothing_is_counted_unasked": "before and after recording",
    "bank_conflicts": "by width and stride",
    "broadcasts": "are no conflict",
    "bank_conflicts_of_ragged_loops": "lanes are matched place by place",
    "bank_conflicts_of_fragments": "by pitch",
    "half_conversions": "all 65536, ties and their neighbours",
    "bfloat16_conversions": "all 65536, ties and their neighbours",
    "half_arithmetic": "rounded once",
    "bfloat16_arithmetic": "rounded once",
    "bfloat16_tie_and_a_lost_term": "a fused product and sum",
    "pairs_of_numbers": "__half2 and its twin",
    "bits_of_floats": "and other small functions",
}
RIGHT_IN_MEMORY = {
    "copy": "through global memory",
    "shared_memory": "to its last byte",
    "uninitialised_shared_memory": "is NaN in every block",
    "syncwarp_orders": "the lanes of a warp",
    "syncwarp_of_halves_orders": "the lanes of its mask",
    "syncwarps_in_a_chain_order": "by way of a third lane",
    "syncwarp_orders_the_warp": "one write after many reads",
    "own_bytes_are_no_race": "of one thread",
    "two_halves_of_a_word_are_no_race": "of two threads",
    "fragments": "with all barriers",
    "mma_of_bfloat16": "on Ampere",
}


def build(folder: Path, sources: list[Path], flags: list[str]) -> Path:
    """The program of these sources; no warning is let pass."""

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        run([COMPILER, *FLAGS, *flags, *includes, "-c", str(source), "-o", str(out)])
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "program"
    run([COMPILER, *flags, *map(str, objects), "-o", str(program), "-pthread"])
    return program


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def ends_of(program: Path) -> dict[str, tuple[str, str]]:
    """How each case ended: ok, caught or failed; and the message."""
    lines = run([str(program)], INTI_EMULATOR_SEED="1", INTI_EMULATOR_RACES="1").splitlines()
    return {name: (end, message) for name, end, message in (line.split("\t") for line in lines)}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    return ends_of(build(tmp_path_factory.mktemp("emulator"), SOURCES, ["-O1"]))


@pytest.fixture(scope="module")
def sanitized_ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Of the cases about memory, built with AddressSanitizer and UBSan."""
    folder = tmp_path_factory.mktemp("sanitized")
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    command = [COMPILER, *SANITIZE, str(probe), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True).returncode or subprocess.run([folder / "probe"]).returncode:
        pytest.skip(f"{COMPILER} can't build or run programs with AddressSanitizer here")
    sources = [source for source in SOURCES if source.stem in ("main", "memory_faults")]
    return ends_of(build(folder, sources, ["-O0", *SANITIZE]))


def check_caught(end: tuple[str, str], expected: str) -> None:
    assert end[0] == "caught", end
    assert re.search(r"kernel \w+, block \d+, thread \d+: ", end[1]), end[1]
    assert re.search(expected, end[1]), end[1]


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(ends: dict[str, tuple[str, str]], name: str) -> None:
    check_caught(ends[name], FAULTS[name])


@pytest.mark.parametrize("name", REFUSED)
def test_launch_is_refused(ends: dict[str, tuple[str, str]], name: str) -> None:
    assert ends[name][0] == "caught"
    assert re.search(REFUSED[name], ends[name][1]), ends[name][1]


@pytest.mark.parametrize("name", RIGHT | RIGHT_IN_MEMORY)
def test_what_is_right_passes(ends: dict[str, tuple[str, str]], name: str) -> None:
    assert ends[name] == ("ok", "")


def test_every_case_is_known(ends: dict[str, tuple[str, str]]) -> None:
    assert set(ends) == {*FAULTS, *REFUSED, *RIGHT, *RIGHT_IN_MEMORY}


@pytest.mark.parametrize("name", SANITIZED_FAULTS)
def test_fault_is_caught_when_sanitized(sanitized_ends: dict[str, tuple[str, str]], name: str) -> None:
    check_caught(sanitized_ends[name], SANITIZED_FAULTS[name])


def test_sanitizers_change_nothing_else(sanitized_ends: dict[str, tuple[str, str]]) -> None:
    for name, end in sanitized_ends.items():
        if name in RIGHT_IN_MEMORY:
            assert end == ("ok", ""), name
        elif name not in SANITIZED_FAULTS:
            check_caught(end, FAULTS[name])
    assert set(sanitized_ends) >= {*SANITIZED_FAULTS, *RIGHT_IN_MEMORY}
