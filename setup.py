"""Builds inti_kernels. What it is, is in pyproject.toml; how `_native` and `_cuda` are compiled, in CMakeLists.txt.

This file decides whether there is anything to compile, runs CMake, and leaves a note of the outcome in the package
(`inti_kernels/_build.json`), so that a pure install can say at run time why it is one. Environment:

    INTI_NATIVE      auto (default): build if a C++ compiler is found; require: or fail; off: a pure install
    INTI_CPU_ISAS    instruction sets to compile for, e.g. "baseline,avx2" (default: all that the compiler supports)
    CXX, CXXFLAGS    as everywhere
    INTI_CUDA        the CUDA kernels, beside the native module: auto (default): build them if nvcc, 11.8 or newer, and
                     a driver are found, or nvcc and a list of architectures is set; on: or fail; off: leave them out
    INTI_CUDA_ARCHS  compute capabilities, e.g. "70;75;80+PTX" (default: TORCH_CUDA_ARCH_LIST, else what nvcc has of
                     70;75;80;86;90, and PTX of the newest)
    CUDACXX          nvcc (default: that of CUDA_HOME or CUDA_PATH, of PATH, of /usr/local/cuda)
    CUDAHOSTCXX      the C++ compiler that nvcc calls (default: CXX)
"""

import ctypes
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
PACKAGE = "inti_kernels"
MODULES = ("_native", "_cuda")
OLDEST_NVCC = (11, 8)
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def find_compiler() -> str | None:
    """The C++ compiler's command line, or None. A compiler named in CXX that is not there is an error, not a None."""
    if named := os.environ.get("CXX"):
        if shutil.which(shlex.split(named)[0]) is None:
            raise SystemExit(f"{PACKAGE}: CXX is {named!r}, and there is no such program; correct it or unset it")
        return named
    found = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
    if found and sys.platform == "darwin" and Path(found).parent == Path("/usr/bin"):
        # Without Apple's tools these are stubs that only open a dialogue to install them.
        if subprocess.run(["xcode-select", "-p"], capture_output=True).returncode != 0:
            return None
    return found


def why_pure() -> str | None:
    """Why nothing is to be compiled, as the middle of a sentence; None if the native module is to be built."""
    choice = os.environ.get("INTI_NATIVE", "auto")
    if choice not in ("auto", "require", "off"):
        raise SystemExit(f"{PACKAGE}: INTI_NATIVE must be auto, require or off, got {choice!r}")
    header = Path(sysconfig.get_path("platinclude"), "Python.h")
    if choice == "off":
        return "INTI_NATIVE=off was set at install time"
    if sys.platform == "win32":
        reason = "it is not built on Windows"
    elif find_compiler() is None:
        reason = "no C++ compiler was found at install time"
    elif not header.is_file():
        reason = f"the header {header} was not found at install time; Linux distributions have it in python3-dev"
    else:
        return None
    if choice == "require":
        raise SystemExit(
            f"{PACKAGE}: INTI_NATIVE=require, but the native module cannot be built: {reason}. "
            "Install what is missing, or set INTI_NATIVE=auto for a pure install."
        )
    return reason


def find_nvcc() -> str | None:
    """nvcc's path, or None. One named in CUDACXX that is not there is an error, not a None."""
    if named := os.environ.get("CUDACXX"):
        if (path := shutil.which(named)) is None:
            raise SystemExit(f"{PACKAGE}: CUDACXX is {named!r}, and there is no such program; correct it or unset it")
        return path
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, places) if path), None)


def why_too_old(nvcc: str) -> str | None:
    """Why this nvcc can't compile the CUDA kernels, as the middle of a sentence; None if it can, or doesn't say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or (int(release[1]), int(release[2])) >= OLDEST_NVCC:
        return None
    oldest = ".".join(map(str, OLDEST_NVCC))
    return f"they need nvcc {oldest} or newer, and {nvcc} is version {release[1]}.{release[2]}"


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed."""
    if shutil.which("nvidia-smi"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def why_no_cuda() -> str | None:
    """Why the CUDA kernels are not to be built, as the middle of a sentence; None if they are."""
    choice = os.environ.get("INTI_CUDA", "auto")
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"{PACKAGE}: INTI_CUDA must be auto, on or off, got {choice!r}")
    if choice == "off":
        return "INTI_CUDA=off was set at install time"
    listed = os.environ.get("INTI_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if PURE_REASON:
        reason = PURE_REASON
    elif sys.platform != "linux":
        reason = "they are built on Linux only"
    elif (nvcc := find_nvcc()) is None:
        reason = "no nvcc was found at install time"
    elif too_old := why_too_old(nvcc):
        reason = too_old
    elif choice == "auto" and not listed and not has_driver():
        return "no NVIDIA driver was found at install time, nor was INTI_CUDA_ARCHS set"
    else:
        return None
    if choice == "on":
        raise SystemExit(
            f"{PACKAGE}: INTI_CUDA=on, but the CUDA kernels cannot be built: {reason}. Install what is missing (nvcc "
            "is the CUDA toolkit's, 11.8 to 13; CUDACXX names one), or set INTI_CUDA=auto to go without."
        )
    return reason


def tool(name: str, directory_attribute: str) -> str:
    """Path of cmake or ninja: the one that the running Python's package of that name brings, else the system's."""
    try:
        directory = getattr(importlib.import_module(name), directory_attribute)
    except ImportError:
        directory = None
    # An empty directory is the package's way to say that it brings no program.
    path = (shutil.which(name, path=directory) if directory else None) or shutil.which(name)
    if path is None:
        raise CompileError(f"{name} was not found; `pip install {name}` brings it")
    return path


def leave_note(package: Path) -> None:
    """Write into the package which modules were built, and why not the others; the backends read it."""
    note = {
        "native": PURE_REASON is None,
        "reason": PURE_REASON,
        "cuda": CUDA_REASON is None,
        "cuda_reason": CUDA_REASON,
        "python": sys.implementation.cache_tag,
        "platform": sysconfig.get_platform(),
    }
    (package / "_build.json").write_text(json.dumps(note, indent=2) + "\n")


def remove_old(package: Path) -> None:
    """An install in place must not go on loading a module of an earlier one that this one leaves out."""
    for module in set(MODULES) - set(BUILT):
        (package / f"{module}{SUFFIX}").unlink(missing_ok=True)


class BuildPackage(build_py):
    """Copies the package afresh, with the note of how it was built."""

    def run(self) -> None:
        target = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE)
        if not self.editable_mode:
            # A file that is gone from the sources must not reach the wheel through an old build folder.
            shutil.rmtree(target, ignore_errors=True)
        else:
            remove_old(target)
        super().run()
        leave_note(target)


class BuildNative(build_ext):
    """Configures and builds CMakeLists.txt with Ninja, and puts the modules where setuptools wants the extensions."""

    def run(self) -> None:
        super().run()
        # `setup.py build_ext --inplace` copies no package, and has no other place to leave the note.
        if self.inplace:
            remove_old(ROOT / PACKAGE)
            leave_note(ROOT / PACKAGE)

    def build_extensions(self) -> None:
        self.cmake = tool("cmake", "CMAKE_BIN_DIR")
        self.environment = dict(os.environ, CXX=find_compiler())
        self.folder = self._configured()
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        module = ext.name.rpartition(".")[2]
        self._run([self.cmake, "--build", str(self.folder), "--target", module], module)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.folder / f"{module}{SUFFIX}", target)

    def _configured(self) -> Path:
        """The build folder, ready for Ninja."""
        # setuptools gives an editable install a temporary folder; a lasting one lets Ninja rebuild only what changed.
        tag = f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        folder = ROOT / "build" / tag if self.editable_mode else Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        configure = [
            *(self.cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DINTI_CPU_ISAS={os.environ.get('INTI_CPU_ISAS', '')}",
        ]
        if CUDA_REASON is None:
            configure += ["-DINTI_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        # CMake keeps the compilers and the paths of its first run: with other ones it has to start afresh.
        keys = ("CXX", "CXXFLAGS", "LDFLAGS", "PYTHONPATH")
        if CUDA_REASON is None:
            keys += ("CUDAHOSTCXX", "CUDAFLAGS", "INTI_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
        inputs = json.dumps([configure, {key: self.environment.get(key) for key in keys}], indent=2)
        seen = folder / "inputs.json"
        if not seen.is_file() or seen.read_text() != inputs:
            shutil.rmtree(folder)
            folder.mkdir()
        self._run(configure, BUILT[-1])
        seen.write_text(inputs)
        return folder

    def _run(self, command: list[str], module: str) -> None:
        print(f"{PACKAGE}: {shlex.join(command)}", flush=True)
        if subprocess.run(command, env=self.environment, stderr=subprocess.STDOUT).returncode != 0:
            raise CompileError(f"building {PACKAGE}.{module} failed; the log is above. {WITHOUT[module]}")


WITHOUT = {
    "_native": "Set INTI_NATIVE=off to install without it (everything then runs in plain PyTorch).",
    "_cuda": "Set INTI_CUDA=off to install without it (GPUs are then served by Triton and plain PyTorch).",
}
PURE_REASON = why_pure()
CUDA_REASON = why_no_cuda()
BUILT = [name for name, reason in zip(MODULES, (PURE_REASON, CUDA_REASON), strict=True) if reason is None]
if PURE_REASON:
    print(f"{PACKAGE}: a pure install, without the native module: {PURE_REASON}", flush=True)
elif CUDA_REASON:
    print(
        f"{PACKAGE}: without the CUDA kernels: {CUDA_REASON}; with nvcc 11.8 to 13, INTI_CUDA=on or "
        "INTI_CUDA_ARCHS='70;75' builds them",
        flush=True,
    )

setup(
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"])
    + [f"{PACKAGE}.benchmarks"]
    + [f"{PACKAGE}.benchmarks.{name}" for name in find_packages("benchmarks")],
    package_dir={f"{PACKAGE}.benchmarks": "benchmarks"},
    # Without an extension the wheel is py3-none-any; with one, it is of this Python and platform.
    ext_modules=[Extension(f"{PACKAGE}.{module}", sources=[]) for module in BUILT],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildNative},
)
