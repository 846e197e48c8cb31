"""The compiled module `inti_kernels._native`: loaded at the first use, or a sentence that says why it can't be.

"Never built", "built for another Python", "built from another version" and "does not load" are different errors, each
with what to do about it. Nothing is cached but a module that has loaded whole.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

# First of all: torch's wheels bring the OpenMP runtime under the name that _native asks for. Loaded before it, one
# runtime, and one pool of threads, serves both.
import torch  # noqa: F401

from .._version import __version__

NAME = "inti_kernels._native"
REINSTALL = (
    "To build it, run in the source tree: "
    "INTI_NATIVE=require pip install --force-reinstall --no-deps --no-cache-dir . (or -e . for an install in place)"
)
_PACKAGE = Path(__file__).resolve().parent.parent
_lock = threading.Lock()
_module: ModuleType | None = None


def load() -> ModuleType:
    """Load the compiled module, once.

    The file is the one in the package or, if INTI_NATIVE_LIBRARY is set, the one that it names (instrumented builds).

    Returns:
        The extension module.

    Raises:
        RuntimeError: it was never built, is built for another Python or from another version of the sources, or does
            not load; the message says which, and how to reinstall.
    """
    global _module
    with _lock:
        if _module is None:
            _module = _load(_find())
        return _module


def why_not_native() -> list[str]:
    """Why the compiled module can't be used here, as sentences; an empty list if it can. Loads it to find out."""
    try:
        load()
    except RuntimeError as error:
        return [str(error)]
    return []


def why_not_isa() -> list[str]:
    """Why no instruction set can be chosen (INTI_CPU names one that isn't there), as `why_not_native` says it."""
    try:
        cpu_isa()
    except ValueError as error:
        return [str(error)]
    return []


def build_info() -> dict[str, Any]:
    """What the compiled module says of its build.

    Returns:
        version, compiler and flags (str), openmp (bool), cpu_isas and cuda_archs (lists of str: the instruction sets
        that were compiled, and the CUDA architectures, if any).

    Raises:
        RuntimeError: as `load`.
    """
    info = dict(load().build_info())
    for key in ("cpu_isas", "cuda_archs"):
        info[key] = info[key].split(",") if info[key] else []
    return info


def cpu_isa() -> str:
    """The instruction set whose kernels run here: "baseline", "avx2" or "avx512" (INTI_CPU forces one).

    Raises:
        RuntimeError: as `load`.
        ValueError: INTI_CPU names an instruction set that this build or this machine lacks.
    """
    return load().cpu_isa()


def _find() -> Path:
    """The file to load; RuntimeError with the reason if there is none."""
    if named := os.environ.get("INTI_NATIVE_LIBRARY"):
        if not Path(named).is_file():
            raise RuntimeError(
                f"INTI_NATIVE_LIBRARY must name the compiled module's file, got {named!r}, which does not exist; "
                "correct it or unset it."
            )
        return Path(named)
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (path := _PACKAGE / f"_native{suffix}").is_file():
            return path
    tag = sys.implementation.cache_tag
    if others := sorted(path.name for pattern in ("_native*.so", "_native*.pyd") for path in _PACKAGE.glob(pattern)):
        raise RuntimeError(
            f"{NAME} was built for another Python: {', '.join(others)} is there, and this is {tag}. {REINSTALL}"
        )
    remedy = "" if sys.platform == "win32" else f" {REINSTALL}"
    raise RuntimeError(f"{NAME} was never built ({_why_never_built()}).{remedy}")


def _why_never_built() -> str:
    """The reason that setup.py left in the package, as the middle of a sentence."""
    try:
        note = json.loads((_PACKAGE / "_build.json").read_text())
    except FileNotFoundError:
        return "the package was imported from its sources without being installed"
    return note["reason"] or "its last build did not finish"


def _load(path: Path) -> ModuleType:
    """Load the extension module from a file and put it into sys.modules, whole or not at all."""
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_file_location(NAME, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(NAME, None)
        raise RuntimeError(f"{NAME} is there ({path}) but does not load: {error}. {REINSTALL}") from error
    built = module.build_info()["version"]
    if built != __version__:
        raise RuntimeError(
            f"{NAME} was built from version {built} of the sources ({path}), and this is {__version__}. {REINSTALL}"
        )
    sys.modules[NAME] = module
    return module
