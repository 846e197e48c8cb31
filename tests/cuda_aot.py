"""Compiles every CUDA kernel for sm_70 (V100) with NVRTC and holds it to tests/cuda_budget.json.

    python tests/cuda_aot.py [--arch 70] [--module FILE] [--update] [--json FILE] [--sass FOLDER] [-k WORD]

No GPU is needed, and no nvcc: `make cuda-compile` fetches NVRTC 12.9, the last that knows sm_70, and the disassembler
of Triton 3.3.1, the last of those tried that reads it, into build/. What is compiled are the instantiations that the
emulated module has, so those that the entry points can launch. NVRTC has no standard headers: a kernel that included
one would not compile here. Of each kernel are held: registers, spills and local memory (none) and static shared memory;
tensor-core kernels must have HMMA instructions, and kernels for 16-byte accesses 16-byte loads and stores of global
memory. --update writes the budget, --sass keeps the disassembly. Exit status 1 if a figure is over its budget.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).with_name("cuda_budget.json")
SOURCES = ROOT / "csrc" / "cuda"
NVRTC = ROOT / "build" / "nvrtc" / "nvidia"
DISASSEMBLER = ROOT / "build" / "triton-versions" / "3.3.1" / "triton" / "backends" / "nvidia" / "bin" / "nvdisasm"
HELD = ("registers", "spilled", "shared")  # at most the budget's
KEPT = ("hmma", "wide_loads", "wide_stores")  # at least the budget's
# What a simulator of PTX, and a reader of a budget of registers, count on: nothing is called, nothing kept in memory.
NOT_INLINED = r"^\s*(?:@!?%p\d+\s+)?(call|mma\.sync|\.local|\.func)\b"
# Kernels with a thread whose four columns are 8 bytes.
NARROW_STORES = ("fma_kernel<inti::bfloat16",)
CHUNK = 6  # kernels that one call of NVRTC compiles: reading the headers costs about as much as one
BYTES = {"inti::float16": 2, "inti::bfloat16": 2, "float": 4, "double": 8}
KERNEL = re.compile(r"^[0-9a-f]+ [Wt] void (inti::cuda::\w+_kernel<.*>)\(", re.MULTILINE)


@dataclass
class Kernel:
    """An instantiated kernel and what it compiles to."""

    name: str  # as C++ has it: inti::cuda::some_kernel<float, 4>
    source: str  # the .cu file
    registers: int = 0
    spilled: int = 0  # bytes of stack and local memory
    shared: int = 0  # static
    hmma: int = 0  # instructions
    wide_loads: int = 0  # of 16 bytes, from global memory
    wide_stores: int = 0
    not_inlined: list[str] = field(default_factory=list, repr=False)  # what its PTX must not have
    seconds: float = field(default=0.0, repr=False)  # to compile, shared out over the kernels of its chunk
    error: str = field(default="", repr=False)  # why it has not compiled

    @property
    def short(self) -> str:
        """The name without what all have in common, as the budget has it."""
        return re.sub(r"\binti::(cuda::)?", "", self.name).replace("_kernel<", "<").replace(" >", ">")

    @property
    def arguments(self) -> list[str]:
        """The template arguments up to the first that is a template itself."""
        return self.name.partition("<")[2].partition("<")[0].rstrip("> ").split(", ")

    @property
    def full_width(self) -> bool:
        """Whether its first two arguments are a dtype and as many of it as 16 bytes hold."""
        dtype, width = (*self.arguments, "", "")[:2]
        return width.isdigit() and int(width) * BYTES.get(dtype, 0) == 16


def kernels(module: Path) -> list[Kernel]:
    """Every kernel of the module, with the source that has its template. Compiled once, wherever it is launched."""
    listing = subprocess.run(["nm", "-C", module], capture_output=True, text=True, check=True).stdout
    names = sorted(set(KERNEL.findall(listing)))
    texts = {path.name: _with_local_headers(path) for path in sorted(SOURCES.glob("*.cu"))}
    found = []
    for name in names:
        # What it is an instance of, and every type among its arguments, must be known in the file.
        words = set(re.findall(r"\w+", name)) - {"inti", "cuda"}
        words = {word for word in words if not word.isdigit()}
        fits = [file for file, text in texts.items() if all(re.search(rf"\b{word}\b", text) for word in words)]
        if not fits:
            raise SystemExit(f"cuda_aot: no file of {SOURCES} has all that {name} names")
        found.append(Kernel(name, fits[0]))
    return found


def _with_local_headers(path: Path) -> str:
    """A source's text, and that of the headers beside it that it includes; dtypes are device.h's."""
    text, seen, pending = "float16 bfloat16 float double int bool true false unsigned", set(), [path]
    while pending:
        if (file := pending.pop()) in seen or not file.is_file():
            continue
        seen.add(file)
        content = file.read_text()
        text += content
        pending += (SOURCES / name for name in re.findall(r'^#include "([\w.]+)"', content, re.MULTILINE))
    return text


class Compiler:
    """NVRTC through ctypes."""

    def __init__(self, arch: int) -> None:
        folder = NVRTC / "cuda_nvrtc" / "lib"
        (builtins,) = folder.glob("libnvrtc-builtins.so.*")
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # which NVRTC would look for on the system
        self.library = ctypes.CDLL(str(folder / "libnvrtc.so.12"))
        self.options = [
            f"--gpu-architecture=sm_{arch}",
            "--std=c++17",
            f"--include-path={ROOT / 'csrc' / 'include'}",
            f"--include-path={SOURCES}",
            f"--include-path={NVRTC / 'cuda_runtime' / 'include'}",
            f"--include-path={NVRTC / 'cuda_nvcc' / 'include'}",
        ]

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, source: str, names: list[str]) -> tuple[bytes, list[str]]:
        """The cubin of these instantiations, and what they are called in it."""
        program = ctypes.c_void_p()
        text = (SOURCES / source).read_bytes()
        self._check(self.library.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), 0, None, None))
        for name in names:
            self._check(self.library.nvrtcAddNameExpression(program, name.encode()))
        options = (ctypes.c_char_p * len(self.options))(*(option.encode() for option in self.options))
        if self.library.nvrtcCompileProgram(program, len(options), options):
            raise RuntimeError(self._text(program, "ProgramLog").decode().rstrip("\0\n"))
        lowered = []
        for name in names:
            result = ctypes.c_char_p()
            self._check(self.library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(result)))
            assert result.value is not None
            lowered.append(result.value.decode())
        cubin = self._text(program, "CUBIN")
        self.ptx = self._text(program, "PTX").decode().rstrip("\0")
        self._check(self.library.nvrtcDestroyProgram(ctypes.byref(program)))
        return cubin, lowered

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"NVRTC: {self.library.nvrtcGetErrorString(status).decode()}")


def compiled(chunk: list[Kernel], arch: int, keep: Path | None) -> list[Kernel]:
    """Compiles kernels of one source together and reads their figures off the cubin."""
    start = time.monotonic()
    try:
        compiler = Compiler(arch)
        cubin, lowered = compiler.compile(chunk[0].source, [kernel.name for kernel in chunk])
    except RuntimeError as error:
        for kernel in chunk:
            kernel.error = str(error)
        return chunk
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels.cubin")
        file.write_bytes(cubin)
        usage = _output(_cuobjdump(), "-res-usage", file)
        sass = _output(DISASSEMBLER, "-c", file)
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.entry |\Z)", compiler.ptx, re.DOTALL))
    resources = dict(re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", usage))
    bodies = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", sass, re.MULTILINE | re.DOTALL))
    for kernel, symbol in zip(chunk, lowered, strict=True):
        read = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", resources[symbol]))
        kernel.registers, kernel.shared = int(read["REG"]), int(read["SHARED"])
        kernel.spilled = int(read["STACK"]) + int(read["LOCAL"])
        operations = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", bodies[symbol], re.M))
        kernel.hmma = sum(count for name, count in operations.items() if name.startswith("HMMA"))
        kernel.wide_loads = sum(count for name, count in operations.items() if re.match(r"LDG\b.*\.128\b", name))
        kernel.wide_stores = sum(count for name, count in operations.items() if re.match(r"STG\b.*\.128\b", name))
        kernel.not_inlined = sorted(set(re.findall(NOT_INLINED, entries[symbol], re.MULTILINE)))
        kernel.seconds = (time.monotonic() - start) / len(chunk)
        if keep:
            (keep / f"{re.sub('[^a-zA-Z0-9]+', '_', kernel.short).strip('_')}.sass").write_text(bodies[symbol])
    return chunk


def _output(*command: str | Path) -> str:
    return subprocess.run(list(command), capture_output=True, text=True, check=True).stdout


def _cuobjdump() -> Path:
    return DISASSEMBLER.with_name("cuobjdump")


def wrong(kernel: Kernel, arch: int) -> list[str]:
    """What no budget may allow."""
    if kernel.error:
        return ["does not compile"]
    problems = []
    if kernel.not_inlined:
        problems.append(f"{', '.join(kernel.not_inlined)} in the PTX")
    if kernel.spilled:
        problems.append(f"{kernel.spilled} bytes of stack and local memory")
    # bfloat16 has no tensor cores below sm_80: the host never launches those kernels there, and they are empty.
    if "wmma" in kernel.name and not kernel.hmma and (arch >= 80 or "bfloat16" not in kernel.name):
        problems.append("no HMMA")
    if kernel.full_width and not (arch < 80 and "wmma" in kernel.name and "bfloat16" in kernel.name):
        problems += ["no 16-byte load"] * (not kernel.wide_loads)
        if not any(word in kernel.name for word in NARROW_STORES):
            problems += ["no 16-byte store"] * (not kernel.wide_stores)
    return problems


def over(kernel: Kernel, allowed: dict[str, int] | None) -> list[str]:
    if allowed is None:
        return [f"no budget; run {Path(__file__).name} --update and look at what it wrote"]
    row = asdict(kernel)
    problems = [f"{name} {row[name]}, budget {allowed[name]}" for name in HELD if row[name] > allowed[name]]
    return problems + [f"{name} {row[name]}, at least {allowed[name]}" for name in KEPT if row[name] < allowed[name]]


def compile_all(work: list[Kernel], arch: int, keep: Path | None) -> list[Kernel]:
    """Compiles them all, one process a core: NVRTC takes one program at a time."""
    by_source: dict[str, list[Kernel]] = {}
    for kernel in work:
        by_source.setdefault(kernel.source, []).append(kernel)
    chunks = [same[i : i + CHUNK] for same in by_source.values() for i in range(0, len(same), CHUNK)]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        futures = [pool.submit(compiled, chunk, arch, keep) for chunk in chunks]
        done = [kernel for future in futures for kernel in future.result()]
    return sorted(done, key=lambda kernel: kernel.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=70, help="compute capability; only 70 has a budget")
    parser.add_argument("--module", type=Path, help="the emulated module, or object (default: build/emulator's)")
    parser.add_argument("--update", action="store_true", help="write what was measured into the budget")
    parser.add_argument("--json", type=Path, help="write the figures to a file too")
    parser.add_argument("--sass", type=Path, help="keep every kernel's disassembly in this folder")
    parser.add_argument("-k", dest="word", default="", help="only kernels whose names contain this")
    args = parser.parse_args()
    if args.sass:
        args.sass.mkdir(parents=True, exist_ok=True)
    module = args.module or next((ROOT / "build" / "emulator").glob("_cuda*.so"), None)
    if module is None:
        raise SystemExit("cuda_aot: build/emulator has no _cuda module; `make emulator` builds it")
    start = time.monotonic()
    work = [kernel for kernel in kernels(module) if args.word in kernel.short]
    if not work:
        raise SystemExit(f"cuda_aot: {module} has no kernel whose name contains {args.word!r}")
    done = compile_all(work, args.arch, args.sass)
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    problems = []
    print(f"NVRTC {Compiler(args.arch).version()}, sm_{args.arch}")
    print(f"{'kernel':78} {'regs':>4} {'spilled':>7} {'shared':>6} {'HMMA':>5} {'LDG.128':>7} {'STG.128':>7}")
    for kernel in done:
        found = wrong(kernel, args.arch)
        if args.arch == 70 and not args.update:
            found += over(kernel, budget.get(kernel.short))
        problems += [f"{kernel.short}: {problem}" for problem in found]
        figures = (kernel.registers, kernel.spilled, kernel.shared, kernel.hmma, kernel.wide_loads, kernel.wide_stores)
        cells = (f"{number:{width}}" for number, width in zip(figures, (4, 7, 6, 5, 7, 7), strict=True))
        print(f"{kernel.short:78} {' '.join(cells)}{'  OVER' if found else ''}")
    rows = {kernel.short: {name: asdict(kernel)[name] for name in HELD + KEPT} for kernel in done if not kernel.error}
    if args.update:
        kept = budget if args.word else {}
        BUDGET.write_text(json.dumps({**kept, **rows}, indent=1, sort_keys=True) + "\n")
    elif not args.word:
        problems += [f"{name}: in the budget, and not in the module" for name in sorted(set(budget) - set(rows))]
    if args.json:
        args.json.write_text(json.dumps([asdict(kernel) for kernel in done], indent=1) + "\n")
    slowest = sorted(done, key=lambda kernel: -kernel.seconds)[:3]
    print("slowest: " + "; ".join(f"{kernel.short} {kernel.seconds:.1f} s" for kernel in slowest))
    print("\n".join(sorted({kernel.error for kernel in done if kernel.error}) + problems))
    failed = len({line.split(":")[0] for line in problems})
    seconds = time.monotonic() - start
    print(f"{len(done)} kernels in {seconds:.0f} s: {max(len(done) - failed, 0)} passed, {failed} failed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
