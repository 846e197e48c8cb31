"""benchmarks/sass_model.py: its reading of machine code, on a few hand-written lines; and, where NVRTC is, the aims."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from cuda_aot import Kernel

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # `benchmarks`, as python -m finds it

from benchmarks import sass_model  # noqa: E402
from benchmarks.sass import cubins, kernels, machine  # noqa: E402
from benchmarks.sass.disassembly import AtLeast, Function, ModelError, Search, cycles_alone, in_flight, streams  # noqa: E402
from benchmarks.sass.kernels import Launch, Model, Size  # noqa: E402

# A loop over frames. An odd frame goes the long way, on which an inner loop runs three times; a division's rare case is
# a call; what is loaded for the next frame arrives in R8 to R11, and what a flag asks for in R20 to R23.
CODE = """
        .weak           kernel
kernel:
	//## File "kernel.cu", line 1
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/               @P0 EXIT ;
.L_x_1:
	//## File "device.h", line 5 inlined at "kernel.cu", line 10
	//## File "kernel.cu", line 10
        /*0030*/                   LDG.E.128.SYS R8, [R2] ;
	//## File "kernel.cu", line 11
        /*0040*/                   ISETP.NE.AND P1, PT, R4, RZ, PT ;
        /*0050*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   LDS.U.64 R12, [R5] ;
        /*0070*/                   FFMA R16, R12, R14, R16 ;
        /*0080*/                   FFMA R17, R13, R14, R17 ;
	//## File "kernel.cu", line 12
        /*0090*/               @P2 BRA `(.L_x_2) ;
	//## File "kernel.cu", line 13
        /*00a0*/              @!P3 BRA `(.L_x_4) ;
	//## File "kernel.cu", line 14
        /*00b0*/                   LDG.E.128.SYS R20, [R6] ;
        /*00c0*/                   FADD R16, R16, R20 ;
.L_x_4:
        /*00d0*/                   F2F.F16.F32 R16, R16 ;
        /*00e0*/                   STG.E.128.SYS [R6], R16 ;
        /*00f0*/                   BRA P4, `(.L_x_5) ;
        /*0100*/                   CALL.REL.NOINC `(kernel) ;
        /*0110*/                   BRA `(.L_x_5) ;
.L_x_3:
	//## File "kernel.cu", line 15
        /*0120*/                   FFMA R16, R12, R14, R16 ;
.L_x_5:
        /*0130*/                   STS.128 [R5], R8 ;
        /*0140*/                   BAR.SYNC 0x0 ;
        /*0150*/               @P0 BRA `(.L_x_1) ;
        /*0160*/                   EXIT ;
.L_x_6:
        /*0170*/                   BRA `(.L_x_6);
"""
SOURCE = {10: "held = load(next);", 12: "for (int h = 0; h < 3; ++h)", 14: "sum += load(old);"}
SEARCH = Search(avoid=r"\bold\b", trips={"int h = 0": 3})


@pytest.fixture
def code(tmp_path: Path) -> str:
    lines = [SOURCE.get(number, "") for number in range(1, 21)]
    (tmp_path / "kernel.cu").write_text("\n".join(lines))
    return CODE.replace('"kernel.cu"', f'"{tmp_path / "kernel.cu"}"')


def operations(path: list) -> Counter[str]:
    return Counter(instruction.mark for instruction in path)


def test_the_loops_are_found(code: str) -> None:
    function = Function(code)
    headers = {function.blocks[loop.header].instructions[0].address for loop in function.loops}
    assert headers == {0x30, 0x60}  # what lies behind the end is never reached


def test_an_iteration_is_the_path_that_the_marks_name(code: str) -> None:
    path, repeats = Function(code).iteration([{"STG.128": 1}], SEARCH)
    assert repeats == 1
    assert operations(path) == {
        "LDG.128": 1, "ISETP": 1, "BRA": 7, "LDS.64": 3, "FFMA": 6, "F2F": 1, "STG.128": 1, "STS.128": 1, "BAR": 1,
    }  # fmt: skip
    short, _ = Function(code).iteration([{"STG.128": 0}], SEARCH)
    assert operations(short)["FFMA"] == 1
    both, _ = Function(code).iteration([{"FFMA": 1}, {"FFMA": 6, "LDG.128": AtLeast(1)}], SEARCH)
    assert operations(both) == operations(path) + operations(short)


def test_a_load_to_avoid_is_on_the_path_if_nothing_goes_round_it(code: str) -> None:
    path, _ = Function(code).iteration([{"STG.128": 1}], Search(trips=SEARCH.trips))
    assert operations(path)["LDG.128"] == 2
    unavoidable = code.replace("              @!P3 BRA `(.L_x_4) ;", "                   NOP ;").replace(
        "     LDG.E.128.SYS R20", "@!P3 LDG.E.128.SYS R20"
    )
    path, _ = Function(unavoidable).iteration([{"STG.128": 1}], SEARCH)
    assert operations(path)["LDG.128"] == 2


def test_a_body_that_was_unrolled_counts_as_several_iterations(code: str) -> None:
    path, repeats = Function(code).iteration([{"FFMA": 3}], SEARCH)
    assert (operations(path)["FFMA"], repeats) == (6, 2)


def test_lanes_that_have_parted_are_not_the_path(code: str) -> None:
    """Before a shuffle they may jump to where each is waited for; what lies behind is reached all the same."""
    line = "        /*0130*/                   STS.128 [R5], R8 ;\n"
    parted = f"        /*0128*/                   BRA.DIV `(.L_x_6) ;\n{line}"
    path, _ = Function(code.replace(line, parted)).iteration([{"STG.128": 1}], SEARCH)
    assert operations(path)["STS.128"] == 1


@pytest.mark.parametrize("planted", ["FFMA R18, R18, R18, R18 ;", "I2F R18, R18 ;", "LDG.E.128.SYS R24, [R2] ;"])
def test_a_planted_instruction_is_seen(code: str, planted: str) -> None:
    before, _ = Function(code).iteration([{"BAR": 1}], SEARCH)
    line = "        /*0130*/                   STS.128 [R5], R8 ;\n"
    assert line in code
    after, _ = Function(code.replace(line, f"{line}        /*0138*/                   {planted}\n")).iteration(
        [{"BAR": 1}], SEARCH
    )
    assert machine.issue_cycles(after) == machine.issue_cycles(before) + 1
    new = (operations(after) - operations(before)).popitem()
    assert new == ((planted.partition(" ")[0].replace("E.128.SYS", "128")), 1)


def test_code_that_is_not_the_models_is_an_error(code: str) -> None:
    with pytest.raises(ModelError, match=r"no loop has a path .*HMMA.*loop at 0x30: .*LDG.128 2"):
        Function(code).iteration([{"HMMA": 64}], SEARCH)


def test_loads_are_in_flight_until_a_register_of_theirs_is_touched(code: str) -> None:
    path, _ = Function(code).iteration([{"STG.128": 1}], SEARCH)
    assert in_flight(path, lambda load: load.width / 8) == 16
    both, _ = Function(code).iteration([{"STG.128": 1}], Search(trips=SEARCH.trips))
    assert in_flight(both, lambda load: load.width / 8) == 32
    assert in_flight(both, lambda load: 0 if "old" in load.source_text() else 8) == 8


def test_loads_that_a_cache_answers_are_told_by_their_source(code: str) -> None:
    path, _ = Function(code).iteration([{"STG.128": 1}], SEARCH)
    loads = [instruction for instruction in path if instruction.operation == "LDG"]
    assert [streams(load, "") for load in loads] == [True]
    assert [streams(load, r"load\(next") for load in loads] == [False]


def test_a_warp_waits_for_a_load_that_is_used_at_once(code: str) -> None:
    def alone(text: str) -> int:
        path, _ = Function(text).iteration([{"STG.128": 1}], SEARCH)
        cycles, waits = cycles_alone(path, lambda i: machine.latency(i, ""), machine.HMMA_ISSUE)
        assert cycles == len(path) + waits.total()
        return waits[path[0]]

    first = "        /*0030*/                   LDG.E.128.SYS R8, [R2] ;\n"
    assert first in code
    used = alone(code.replace(first, f"{first}        /*0038*/                   PRMT R30, R8, 0x7632, R30 ;\n"))
    assert used == machine.STREAM_LATENCY - 1
    assert alone(code) < used - 50  # the inner loop lies between


def test_hmma_takes_two_issue_cycles_and_registers_in_pairs() -> None:
    text = "        /*0000*/                   HMMA.884.F32.F32.STEP0 R8, R16.reuse.ROW, R20.reuse.COL, R8 ;\n"
    (hmma,) = Function(text).blocks[0].instructions
    assert machine.issue_cycles([hmma]) == 2
    assert machine.pipe(hmma) == ("tensor", 2)
    assert hmma.written == {8, 9}
    assert hmma.read == {8, 9, 16, 17, 20, 21}


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [
        (128, 0, 256, 2),
        (129, 0, 256, 1),  # registers are given out eight at a time
        (32, 48 * 1024, 128, 2),
        (32, 49 * 1024, 128, 1),
        (32, 0, 128, 16),  # 64 warps
        (16, 0, 32, 32),  # and 32 blocks at most
        (128, 0, 224, 2),  # 14 warps: four a scheduler
        (144, 0, 224, 1),  # three a scheduler, 12 in all
    ],
)
def test_the_blocks_that_fit(registers: int, shared: int, threads: int, blocks: int) -> None:
    assert machine.blocks_of_multiprocessor(registers, shared, threads) == blocks


def test_a_prediction_by_hand(code: str) -> None:
    """40 instructions would be 10 cycles of four schedulers; the outputs' bytes are chosen to take as long."""

    def launch(size: Size) -> Launch:
        outputs = 32 * 80
        return Launch(80, 32, 0, 1, 1, outputs, outputs * machine.BYTES_A_CYCLE / 8)

    model = Model("a kernel", "kernel.cu", "kernel", ({"STG.128": 1},), launch, avoid=r"\bold\b", trips=SEARCH.trips)
    row, path = sass_model.predict(model, Size(32, 1, 1), cubins.Compiled(code, 32, 0))
    assert row.memory == pytest.approx(1000 / 8)
    # A block of one warp for 32 outputs: a lane's instructions are the path's.
    assert row.instructions_an_output == pytest.approx(len(path))
    assert row.issue == pytest.approx(1000 / 32 * len(path) / 4)
    assert row.limit == "issue"
    assert row.share == pytest.approx(row.memory / row.issue)
    assert row.strict_limit == "latency"
    assert row.bytes_in_flight == 16 * 32
    assert row.counts["F2F, MUFU"] == pytest.approx(1)


@pytest.mark.skipif(not shutil.which(cubins.CXX), reason="there is no C++ compiler")
def test_launches_are_what_the_code_says() -> None:
    warps, forward, backward = kernels.fact("pair")
    assert min(warps, forward, backward) >= 1
    lanes, half, single = kernels.fact("slab")
    assert half * 2 == single * 4 == 32  # a sector
    rows, strips, tiles, slabs, run, runs, threads, *_ = kernels.fact("convolution", 2, 7, 3, 2, 768, 14, 8, 16)
    assert (rows, strips, tiles, slabs, run * runs) == (14, 2, 1, 48, 8)
    assert threads == rows * strips * lanes


def readme() -> dict[str, str]:
    """Rows of the table of benchmarks/README.md by their titles."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    table = text[text.index("| kernel | registers / blocks |") :].partition("\n\n")[0]
    return {row.split(" | ")[0].removeprefix("| "): row for row in table.splitlines()[2:]}


@pytest.mark.skipif(not shutil.which(cubins.CXX), reason="there is no C++ compiler")
def test_the_readme_has_every_model_and_registers_that_were_measured() -> None:
    """All figures of some rows are held below, where there is a compiler for them."""
    table, models = readme(), list(kernels.models())
    assert sorted(table) == sorted(model.title for model in models)
    budget = json.loads((ROOT / "tests" / "cuda_budget.json").read_text())
    measured = {model.title: budget[Kernel(model.name, model.source).short]["registers"] for model in models}
    # Lines of source, which the model asks the compiler for, can cost or save a register.
    written = {title: int(row.split(" | ")[1].partition(" ")[0]) for title, row in table.items()}
    assert {title: n for title, n in written.items() if abs(n - measured[title]) > 1} == {}
    text = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").iterdir()))
    defined = {word.removesuffix("(") for word in re.findall(r"\b\w+_kernel\(", text)}
    modelled = {re.search(r"(\w+_kernel)<", model.name)[1] for model in models}
    unmodelled = defined - modelled
    assert {name for name in unmodelled if not name.startswith("class_levels_")} == {"partial_sums_kernel"}
    said = f"{len(models)} instantiations, in float16 and float32 and with 16-byte accesses, of {len(modelled)} of the "
    assert said + f"{len(defined)} kernels" in (ROOT / "benchmarks" / "README.md").read_text()


needs_nvrtc = pytest.mark.skipif(bool(cubins.why_not()), reason=str(cubins.why_not()))


@needs_nvrtc
@pytest.mark.parametrize("words", [("pair_interpolate",), ("3×3×3 / 2", "P = 7"), ("product",)], ids=str)
def test_the_aims_hold_and_the_readme_has_the_figures(words: tuple[str, ...]) -> None:
    """InTI's own kernels; all the others are in `python -m benchmarks.sass_model`."""
    rows = [row for row, _, _ in sass_model.predictions("float16", *words)]
    first = {row.title: sass_model.markdown(row) for row in reversed(rows)}
    table = readme()
    assert first
    assert first == {title: table[title] for title in first}, "see `python -m benchmarks.sass_model --markdown`"
    assert {row.title: row.aims for row in rows if row.aims} == {}
