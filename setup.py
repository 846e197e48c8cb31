"""Builds inti_kernels. What it is, is in pyproject.toml; how `inti_kernels._native` is compiled, in CMakeLists.txt.

This file decides whether there is anything to compile, runs CMake, and leaves a note of the outcome in the package
(`inti_kernels/_build.json`), so that a pure install can say at run time why it is one. Environment:

    INTI_NATIVE      auto (default): build if a C++ compiler is found; require: or fail; off: a pure install
    INTI_CPU_ISAS    instruction sets to compile for, e.g. "baseline,avx2" (default: all that the compiler supports)
    CXX, CXXFLAGS    as everywhere
"""

import importlib
import json
import os
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
MODULE = "_native"


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
    """Write into the package whether its native module was built, and why not; backends/native.py reads it."""
    note = {
        "native": PURE_REASON is None,
        "reason": PURE_REASON,
        "python": sys.implementation.cache_tag,
        "platform": sysconfig.get_platform(),
    }
    (package / "_build.json").write_text(json.dumps(note, indent=2) + "\n")


class BuildPackage(build_py):
    """Copies the package afresh, with the note of how it was built."""

    def run(self) -> None:
        target = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE)
        if not self.editable_mode:
            # A file that is gone from the sources must not reach the wheel through an old build folder.
            shutil.rmtree(target, ignore_errors=True)
        elif PURE_REASON:
            # Nor may a pure install in place go on loading what an earlier one built.
            (target / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        super().run()
        leave_note(target)


class BuildNative(build_ext):
    """Configures and builds CMakeLists.txt with Ninja, and puts the module where setuptools wants the extension."""

    def run(self) -> None:
        super().run()
        # `setup.py build_ext --inplace` copies no package, and has no other place to leave the note.
        if self.inplace:
            leave_note(ROOT / PACKAGE)

    def build_extension(self, ext: Extension) -> None:
        # setuptools gives an editable install a temporary folder; a lasting one lets Ninja rebuild only what changed.
        tag = f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        folder = ROOT / "build" / tag if self.editable_mode else Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        environment = dict(os.environ, CXX=find_compiler())
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DINTI_CPU_ISAS={os.environ.get('INTI_CPU_ISAS', '')}",
        ]
        # CMake keeps the compiler and the paths of its first run: with other ones it has to start afresh.
        keys = ("CXX", "CXXFLAGS", "LDFLAGS", "PYTHONPATH")
        inputs = json.dumps([configure, {key: environment.get(key) for key in keys}], indent=2)
        seen = folder / "inputs.json"
        if not seen.is_file() or seen.read_text() != inputs:
            shutil.rmtree(folder)
            folder.mkdir()
        self._run(configure, environment)
        seen.write_text(inputs)
        self._run([cmake, "--build", str(folder)], environment)
        name = f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / name, target)

    def _run(self, command: list[str], environment: dict[str, str]) -> None:
        print(f"{PACKAGE}: {shlex.join(command)}", flush=True)
        if subprocess.run(command, env=environment, stderr=subprocess.STDOUT).returncode != 0:
            raise CompileError(
                f"building {PACKAGE}.{MODULE} failed; the log is above. "
                "Set INTI_NATIVE=off to install without it (everything then runs in plain PyTorch)."
            )


PURE_REASON = why_pure()
if PURE_REASON:
    print(f"{PACKAGE}: a pure install, without the native module: {PURE_REASON}", flush=True)

setup(
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"])
    + [f"{PACKAGE}.benchmarks"]
    + [f"{PACKAGE}.benchmarks.{name}" for name in find_packages("benchmarks")],
    package_dir={f"{PACKAGE}.benchmarks": "benchmarks"},
    # Without an extension the wheel is py3-none-any; with one, it is of this Python and platform.
    ext_modules=[] if PURE_REASON else [Extension(f"{PACKAGE}.{MODULE}", sources=[])],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildNative},
)
