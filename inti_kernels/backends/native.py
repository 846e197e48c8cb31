"""The compiled module `inti_kernels._native`, the CPU kernels: see `_compiled` for how it is loaded."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ._compiled import Compiled

NAME = "inti_kernels._native"
REINSTALL = (
    "To build it, run in the source tree: "
    "INTI_NATIVE=require pip install --force-reinstall --no-deps --no-cache-dir . (or -e . for an install in place)"
)
_compiled = Compiled("_native", "INTI_NATIVE_LIBRARY", REINSTALL, note="reason")


def load() -> ModuleType:
    """Load the compiled module, once.

    The file is the one in the package or, if INTI_NATIVE_LIBRARY is set, the one that it names (instrumented builds).

    Returns:
        The extension module.

    Raises:
        RuntimeError: it was never built, is built for another Python or from another version of the sources, or does
            not load; the message says which, and how to reinstall.
    """
    return _compiled.load()


def why_not_native() -> list[str]:
    """Why the compiled module can't be used here, as sentences; an empty list if it can. Loads it to find out."""
    return _compiled.why_not()


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
        version, compiler and flags (str), openmp (bool), cpu_isas (list of str: the instruction sets that were
        compiled).

    Raises:
        RuntimeError: as `load`.
    """
    info = dict(load().build_info())
    info.pop("cuda_archs", None)  # the CUDA kernels are a module of their own
    info["cpu_isas"] = info["cpu_isas"].split(",") if info["cpu_isas"] else []
    return info


def cpu_isa() -> str:
    """The instruction set whose kernels run here: "baseline", "avx2" or "avx512" (INTI_CPU forces one).

    Raises:
        RuntimeError: as `load`.
        ValueError: INTI_CPU names an instruction set that this build or this machine lacks.
    """
    return load().cpu_isa()
