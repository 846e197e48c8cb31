"""Kernels' sm_70 code: compiled by tests/cuda_aot.py's NVRTC with lines of source, kept in build/sass."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .disassembly import functions

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "sass"
_KEPT = 4  # kernels' code of that many states of the sources stays in the cache


CXX = os.environ.get("CXX", "g++")


@dataclass(frozen=True)
class Compiled:
    """What a kernel compiles to."""

    text: str  # the disassembly
    registers: int
    stack: int  # bytes of stack and local memory


def compiler() -> ModuleType:
    """tests/cuda_aot.py, which knows where NVRTC and the disassembler are."""
    path = ROOT / "tests" / "cuda_aot.py"
    if not path.is_file():
        raise SystemExit(f"sass_model: there is no {path}; run it from the source repository")
    if "cuda_aot" not in sys.modules:
        specification = importlib.util.spec_from_file_location("cuda_aot", path)
        assert specification is not None
        assert specification.loader is not None
        sys.modules["cuda_aot"] = module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    return sys.modules["cuda_aot"]


def why_not() -> str | None:
    """Why nothing can be compiled here, if so."""
    tools = compiler()
    missing = [path for path in (tools.NVRTC / "cuda_nvrtc", tools.DISASSEMBLER) if not path.exists()]
    if missing:
        return f"{missing[0].relative_to(ROOT)} is not there: `make cuda-compile` fetches it"
    return None if shutil.which(CXX) else f"there is no C++ compiler {CXX}; name one in CXX"


def compiled(source: str, names: list[str]) -> dict[str, Compiled]:
    """The code of kernels of one .cu file, by their names."""
    tools = compiler()
    folder = _cache()
    files = {name: folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.sass" for name in names}
    if missing := [name for name in names if not files[name].exists()]:
        nvrtc = tools.Compiler(70)
        nvrtc.options.append("-lineinfo")
        cubin, symbols = nvrtc.compile(source, missing)
        with tempfile.TemporaryDirectory() as temporary:
            kept = Path(temporary, "kernels.cubin")
            kept.write_bytes(cubin)
            listing = _output(tools.DISASSEMBLER, "-c", "-gi", kept)
            usage = _output(tools.DISASSEMBLER.with_name("cuobjdump"), "-res-usage", kept)
        # NVRTC takes its source to lie in the working directory.
        named = re.compile(rf'"[^"]*\b{re.escape(source)}"')
        texts = functions(named.sub(f'"{tools.SOURCES / source}"', listing))
        resources = dict(re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", usage))
        for name, symbol in zip(missing, symbols, strict=True):
            _write(files[name], f"{resources[symbol]}\n{texts[symbol]}")
    found = {}
    for name, file in files.items():
        first, _, text = file.read_text().partition("\n")
        read = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", first)}
        found[name] = Compiled(text, read["REG"], read["STACK"] + read["LOCAL"])
    return found


def launches(numbers: Iterable[int]) -> dict[str, list[int]]:
    """What launches.cpp prints for these arguments."""
    arguments = list(map(str, numbers))
    file = _cache() / f"launches_{hashlib.sha256(' '.join(arguments).encode()).hexdigest()[:16]}"
    if not file.exists():
        folders = [f"-I{ROOT / 'csrc' / folder}" for folder in ("", "include", "cuda")]
        source = Path(__file__).with_name("launches.cpp")
        with tempfile.TemporaryDirectory() as temporary:
            program = Path(temporary, "launches")
            _output(CXX, "-std=c++17", "-O0", *folders, "-o", program, source)
            _write(file, _output(program, *arguments))
    lines = [line.split() for line in file.read_text().splitlines()]
    return {name: list(map(int, values)) for name, *values in lines}


def _cache() -> Path:
    """The folder for what belongs to the sources as they are; those of a few states before are kept."""
    state = hashlib.sha256(Path(__file__).with_name("launches.cpp").read_bytes())
    for path in sorted((ROOT / "csrc").rglob("*.[ch]*")):
        if "emulator" not in path.parts and "cpu" not in path.parts:
            state.update(path.read_bytes())
    folder = CACHE / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted((f for f in CACHE.iterdir() if f.is_dir()), key=lambda f: -f.stat().st_mtime)[_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _write(file: Path, text: str) -> None:
    """Whole or not at all: others may be reading and writing here."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        temporary.write(text)
    Path(temporary.name).replace(file)


def _output(*command: str | Path) -> str:
    done = subprocess.run(list(command), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout
