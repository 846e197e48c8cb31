"""When the CUDA kernels are built, for which architectures, and what is said when they are not. Needs no nvcc."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_packaging import CLEAN, ROOT, run_python

CMAKE = Path(sys.executable).with_name("cmake")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux only")


def fake_nvcc(folder: Path, release: str, *archs: int) -> str:
    """A program that says of itself what an nvcc does: its version, and what it can compile for."""
    script = folder / "nvcc"
    listed = "\\n".join(f"sm_{arch}" for arch in archs)
    version = f"Cuda compilation tools, release {release}, V{release}.99"
    script.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && echo '{version}' || printf '{listed}\\n'\n")
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def nvcc(tmp_path: Path) -> str:
    """As nvcc 12 is, with a few architectures less."""
    return fake_nvcc(tmp_path, "12.4", 50, 60, 70, 75, 80, 86, 89, 90)


@pytest.fixture
def nvcc_13(tmp_path: Path) -> str:
    """As nvcc 13 is, which has no 70 any more."""
    return fake_nvcc(tmp_path, "13.0", 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


def setup(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Let setup.py decide what to build, and build nothing; code runs before it, to change what it finds."""
    run = """
        import runpy, sys
        sys.argv = ["setup.py", "--quiet", "--name"]
        names = runpy.run_path("setup.py")
        print(names["BUILT"], names["CUDA_REASON"])
    """
    return run_python(f"{code}\n{re.sub('^        ', '', run, flags=re.MULTILINE)}", **{**CLEAN, **environment})


# Programs and libraries that a test machine may have, hidden.
NO_NVCC = """
import shutil
which = shutil.which
shutil.which = lambda name, *args, **others: None if "nvcc" in str(name) else which(name, *args, **others)
"""
NO_DRIVER = """
import ctypes, shutil
which = shutil.which
shutil.which = lambda name, *args, **others: None if name == "nvidia-smi" else which(name, *args, **others)
def no_library(name):
    raise OSError(name)
ctypes.CDLL = no_library
"""
DRIVER = """
import ctypes
ctypes.CDLL = lambda name: None
"""


@linux_only
def test_auto_without_nvcc_leaves_it_out_in_one_line() -> None:
    done = setup(NO_NVCC, INTI_CUDA=None)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "without the CUDA kernels" in line)
    assert "no nvcc was found at install time" in line
    assert "INTI_CUDA=on" in line
    assert "['_native'] no nvcc was found at install time" in done.stdout


@linux_only
@pytest.mark.parametrize("variable", ["INTI_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"])
def test_auto_needs_a_driver_or_a_list_of_architectures(nvcc: str, variable: str) -> None:
    done = setup(NO_DRIVER, INTI_CUDA="auto", CUDACXX=nvcc)
    assert "['_native'] no NVIDIA driver was found at install time, nor was INTI_CUDA_ARCHS set" in done.stdout
    done = setup(DRIVER, INTI_CUDA="auto", CUDACXX=nvcc)
    assert "['_native', '_cuda'] None" in done.stdout
    done = setup(NO_DRIVER, INTI_CUDA="auto", CUDACXX=nvcc, **{variable: "7.0"})
    assert "['_native', '_cuda'] None" in done.stdout


@linux_only
@pytest.mark.parametrize(
    ("code", "environment", "message"),
    [
        (NO_NVCC, {}, "INTI_CUDA=on, but the CUDA kernels cannot be built: no nvcc was found"),
        ("", {"INTI_NATIVE": "off"}, "INTI_CUDA=on, but the CUDA kernels cannot be built: INTI_NATIVE=off was set"),
        ("", {"INTI_CUDA": "yes"}, "INTI_CUDA must be auto, on or off, got 'yes'"),
        ("", {"CUDACXX": "no-such-nvcc"}, "CUDACXX is 'no-such-nvcc', and there is no such program"),
    ],
)
def test_a_build_that_cannot_be_is_an_error(code: str, environment: dict[str, str], message: str) -> None:
    done = setup(code, **{"INTI_CUDA": "on", **environment})
    assert done.returncode != 0
    assert message in done.stderr


@linux_only
@pytest.mark.parametrize("release", ["10.2", "11.7"])
def test_an_nvcc_that_is_too_old_is_none(tmp_path: Path, release: str) -> None:
    nvcc = fake_nvcc(tmp_path, release, 70)
    reason = f"they need nvcc 11.8 or newer, and {nvcc} is version {release}"
    done = setup(DRIVER, INTI_CUDA="auto", INTI_CUDA_ARCHS="70", CUDACXX=nvcc)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "without the CUDA kernels" in line)
    assert reason in line
    assert f"['_native'] {reason}" in done.stdout
    done = setup(DRIVER, INTI_CUDA="on", CUDACXX=nvcc)
    assert done.returncode != 0
    assert f"INTI_CUDA=on, but the CUDA kernels cannot be built: {reason}. Install what is missing" in done.stderr


@linux_only
@pytest.mark.parametrize("release", ["11.8", "12.9", "13.0"])
def test_any_newer_nvcc_will_do(tmp_path: Path, release: str) -> None:
    done = setup(DRIVER, INTI_CUDA="on", CUDACXX=fake_nvcc(tmp_path, release, 75))
    assert "['_native', '_cuda'] None" in done.stdout, done.stderr


def test_the_note_says_what_was_built(tmp_path: Path) -> None:
    """Without compiling: `leave_note` alone."""
    code = f"""
        import pathlib, runpy, sys
        sys.argv = ["setup.py", "--quiet", "--name"]
        runpy.run_path("setup.py")["leave_note"](pathlib.Path({str(tmp_path)!r}))
    """
    done = run_python(code, **{**CLEAN, "INTI_NATIVE": "off", "INTI_CUDA": None})
    assert done.returncode == 0, done.stderr
    note = json.loads((tmp_path / "_build.json").read_text())
    assert (note["native"], note["cuda"]) == (False, False)
    assert note["reason"] == note["cuda_reason"] == "INTI_NATIVE=off was set at install time"


def archs(nvcc: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What CMake makes of these variables."""
    if not CMAKE.exists() and shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    command = [str(CMAKE) if CMAKE.exists() else "cmake", f"-DCMAKE_CUDA_COMPILER={nvcc}", "-P", "csrc/cuda.cmake"]
    clean = {key: value for key, value in os.environ.items() if key not in CLEAN}
    return subprocess.run(command, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True)


@linux_only
@pytest.mark.parametrize(
    ("environment", "targets"),
    [
        ({}, "70;75;80;86;90+PTX"),
        ({"INTI_CUDA_ARCHS": "70"}, "70"),
        ({"INTI_CUDA_ARCHS": "70;75;80+PTX"}, "70;75;80+PTX"),
        ({"INTI_CUDA_ARCHS": "70, 7.5,70"}, "70;75"),
        ({"TORCH_CUDA_ARCH_LIST": "7.0 7.5;9.0a+PTX"}, "70;75;90+PTX"),
        ({"INTI_CUDA_ARCHS": "86", "TORCH_CUDA_ARCH_LIST": "7.0"}, "86"),
        ({"TORCH_CUDA_ARCH_LIST": "5.2 6.0 7.0 8.6+PTX 12.0"}, "70;86+PTX"),
        ({"TORCH_CUDA_ARCH_LIST": "Volta"}, "70+PTX"),
        ({"TORCH_CUDA_ARCH_LIST": "Volta;8.0"}, "70+PTX;80"),
        ({"TORCH_CUDA_ARCH_LIST": "Pascal Turing Ampere"}, "75+PTX;80;86+PTX"),
        ({"TORCH_CUDA_ARCH_LIST": "Kepler+Tesla;Maxwell;Ada;Hopper;Blackwell+Tegra"}, "89+PTX;90+PTX"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5 Turing 7.5"}, "75+PTX"),
    ],
)
def test_architectures(nvcc: str, environment: dict[str, str], targets: str) -> None:
    done = archs(nvcc, **environment)
    assert done.returncode == 0, done.stderr
    assert f"CUDA kernels: {targets} by {nvcc}" in done.stdout


@linux_only
@pytest.mark.parametrize(
    ("listed", "targets"), [("Volta;8.0", "80"), ("7.0;7.5", "75"), ("Volta+Tegra Blackwell", "100;103;120;121+PTX")]
)
def test_volta_is_left_out_with_a_warning(nvcc_13: str, listed: str, targets: str) -> None:
    done = archs(nvcc_13, TORCH_CUDA_ARCH_LIST=listed)
    assert done.returncode == 0, done.stderr
    assert f"CUDA kernels: {targets} by {nvcc_13}" in done.stdout
    said = " ".join(done.stderr.split())
    assert "CMake Warning" in said
    assert " of TORCH_CUDA_ARCH_LIST left out, which " in said
    assert "For 70 (V100) take nvcc 11.8 to 12.9; CUDACXX names another nvcc" in said


@linux_only
def test_what_is_older_than_volta_is_left_out_without_one(nvcc: str) -> None:
    assert "Warning" not in archs(nvcc, TORCH_CUDA_ARCH_LIST="Pascal;6.1;7.0").stderr


@linux_only
def test_names_are_those_of_pytorch(nvcc: str) -> None:
    """The list is in a function of PyTorch's; a name that it gets to know is to be added to csrc/cuda.cmake."""
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    known = re.findall(
        r"\('([A-Z]\w+(?:\+\w+)?)', '([\d.;+PTX]+)'\)", inspect.getsource(cpp_extension._get_cuda_arch_flags)
    )
    assert len(known) >= 10
    cmake = (ROOT / "csrc" / "cuda.cmake").read_text()
    ours = re.findall(r"set\(torch_(\S+) ", cmake)
    for name, stands_for in known:
        if float(stands_for[:3].rstrip(".")) >= 7:
            assert name in ours, f"{name} is {stands_for}"


@linux_only
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "Pascal"}, "('Pascal') names nothing that"),
        ({"INTI_CUDA_ARCHS": "Volta"}, "must list compute capabilities such as 70;75+PTX or 7.0;7.5+PTX, got 'Volta'"),
        ({"INTI_CUDA_ARCHS": "70;sm_75"}, "got 'sm_75'"),
        ({"INTI_CUDA_ARCHS": "60"}, "these kernels need tensor cores, so 70 (V100) or newer"),
        ({"INTI_CUDA_ARCHS": "120"}, "INTI_CUDA_ARCHS names 120, which"),
    ],
)
def test_wrong_architectures_are_errors(nvcc: str, environment: dict[str, str], message: str) -> None:
    done = archs(nvcc, **environment)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
