"""The cuda backend: a module an op, with `<op>_forward` and `<op>_backward`; and, here, why it can't run.

The kernels are in the compiled module `inti_kernels._cuda`, apart from the CPU's. INTI_CUDA_LIBRARY names another file
to load in its place: an instrumented build or, for tests, the one in which an emulator runs the kernels on the CPU.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from .._compiled import Compiled

DTYPES = (torch.float16, torch.float32, torch.bfloat16, torch.float64)
LEAST_CAPABILITY = (7, 0)
REBUILD = (
    "To build it, run in the source tree, where nvcc is: INTI_CUDA=on pip install --force-reinstall --no-deps "
    "--no-cache-dir . (or -e . for an install in place); INTI_CUDA_ARCHS=70 names the GPUs to build for"
)
_compiled = Compiled("_cuda", "INTI_CUDA_LIBRARY", REBUILD, note="cuda_reason")


def load() -> ModuleType:
    """Load the compiled module, once.

    Raises:
        RuntimeError: it was never built, is built for another Python or from another version of the sources, or does
            not load; the message says which, and how to build it.
    """
    return _compiled.load()


def build_info() -> dict[str, Any]:
    """What the compiled module says of its build.

    Returns:
        version, compiler and cuda_version (str), cuda_archs (list of str, such as "70" or "90+PTX"), emulated (bool: an
        emulator runs the kernels on the CPU).

    Raises:
        RuntimeError: as `load`.
    """
    info = dict(load().build_info())
    info["cuda_archs"] = [arch for arch in info["cuda_archs"].replace(",", ";").split(";") if arch]
    return info


def emulated() -> bool:
    """Whether the module is there, and an emulator runs its kernels."""
    return not _compiled.why_not() and bool(load().build_info()["emulated"])


def why_not(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the CUDA kernels can't run on tensors of a device and dtype, as sentences; an empty list if they can."""
    reasons = _compiled.why_not()
    if device.type == "cpu":
        if reasons or not emulated():
            reasons.insert(0, "the cuda backend takes tensors on CUDA devices, and these are on the CPU.")
    elif device.type != "cuda":
        reasons.insert(0, f"the cuda backend takes tensors on CUDA devices, and these are on {device}.")
    elif torch.version.hip:
        reasons.insert(0, "this PyTorch is built for ROCm, where CUDA kernels don't run.")
    elif not reasons and emulated():
        reasons = ["INTI_CUDA_LIBRARY names the emulator, which takes tensors on the CPU; unset it."]
    elif not reasons:
        capability = torch.cuda.get_device_capability(device)
        reasons = why_not_by_capability(capability, build_info()["cuda_archs"])
    return reasons + _why_not_dtype(dtype)


def why_not_by_capability(capability: tuple[int, int], archs: list[str]) -> list[str]:
    """Why kernels built for ``archs`` can't run on a GPU of that compute capability, such as (7, 0) for V100.

    Args:
        capability: major and minor.
        archs: "70" is machine code, "90+PTX" machine code and PTX.
    """
    have = "{}.{}".format(*capability)
    if capability < LEAST_CAPABILITY:
        return [f"the CUDA kernels need compute capability 7.0, and this GPU has {have}."]
    for arch in archs:
        number, _, ptx = arch.partition("+")
        built = divmod(int(number), 10)
        # Machine code runs on later GPUs of the same major version, PTX is compiled for any later one.
        if built <= capability and (ptx or built[0] == capability[0]):
            return []
    return [
        f"the CUDA kernels were built for {', '.join(archs) or 'no GPU'}, and this GPU has compute capability {have}: "
        f"rebuild with INTI_CUDA_ARCHS={capability[0]}{capability[1]}."
    ]


def _why_not_dtype(dtype: torch.dtype) -> list[str]:
    if dtype in DTYPES:
        return []
    names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
    return [f"the cuda backend takes {names}, and this is {str(dtype).removeprefix('torch.')}."]
