"""benchmarks/standalone: every CUDA entry point, called from C++ alone and held against loops in double precision."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS = ("pair_interpolate", "depthwise_conv3d", "token_features", "interpolation_head", "class_levels", "partial_sums")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, with the kernels compiled for the emulator."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    into = tmp_path_factory.mktemp("standalone")
    flags = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-Wno-psabi"]
    flags += ["-DINTI_EMULATED", '-DINTI_CUDA_ARCHS="70"', f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    sources = sorted((ROOT / "benchmarks" / "standalone").glob("*.cpp")) + sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    command = [compiler, *flags, "-x", "c++", *map(str, sources), "-o", str(into / "standalone"), "-pthread"]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    return into / "standalone"


# Compiling the program takes a minute and a half.
pytestmark = pytest.mark.slow


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [("float16", "float32"), ("bfloat16", "float64"), ("--capability", "80", "bfloat16", *OPS[2:])],
    ids=["default", "bfloat16-float64", "bfloat16-tensor-cores"],
)
def test_every_output_is_within_its_bound(program: Path, arguments: tuple[str, ...]) -> None:
    result = run(program, *arguments)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
    named = [op for op in OPS if op in arguments] or OPS
    for op in named:
        assert any(line.startswith(f"RESULT {op} max_error ") and line.endswith(" ok") for line in lines)
    # Forward and backward outputs of each op, dtype and case; a case that is lost would lower it.
    assert result.stdout.count("\nCHECK ") > 60 * len(named)


def test_no_time_without_a_gpu(program: Path) -> None:
    result = run(program, "--time")
    assert result.returncode == 2
    assert "needs a GPU" in result.stderr
    assert "TIME" not in result.stdout


def test_unknown_arguments_are_refused(program: Path) -> None:
    result = run(program, "--fast")
    assert result.returncode == 2
    assert "usage" in result.stderr
