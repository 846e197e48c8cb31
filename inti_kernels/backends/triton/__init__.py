"""The triton backend: a module an op, with `<op>_forward` and `<op>_backward`; and, here, why it can't run.

Nothing here imports Triton before it has to: `info` must say what is missing where it is missing.
"""

from __future__ import annotations

import importlib.util
import os
import re

import torch

OLDEST = (3, 3)  # what torch 2.7, the oldest that this package takes, brings
DTYPES = (torch.float16, torch.float32, torch.bfloat16, torch.float64)
# Below 8.0 Triton has no tensor-core products, and some of its versions crash on tl.dot.
LEAST_CAPABILITY, LEAST_FOR_BFLOAT16, LEAST_FOR_DOT = (7, 0), (8, 0), (8, 0)


def why_not(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why Triton kernels can't run on tensors of a device and dtype, as sentences; an empty list if they can."""
    reasons = _why_not_on(device)
    if device.type == "cuda" and not reasons:
        return why_not_by_capability(torch.cuda.get_device_capability(device), dtype)
    return reasons + _why_not_dtype(dtype)


def why_not_by_capability(capability: tuple[int, int], dtype: torch.dtype) -> list[str]:
    """Why the kernels can't run on a GPU of that compute capability, such as (7, 0) for V100."""
    reasons = _why_not_dtype(dtype)
    have = "{}.{}".format(*capability)
    if capability < LEAST_CAPABILITY:
        reasons.append(f"Triton compiles for compute capability 7.0 and newer, and this GPU has {have}.")
    elif dtype == torch.bfloat16 and capability < LEAST_FOR_BFLOAT16:
        reasons.append(
            f"bfloat16 needs compute capability 8.0, and this GPU has {have}; use float16, as autocast does with "
            "dtype=torch.float16."
        )
    return reasons


def products_by_capability(capability: tuple[int, int]) -> str:
    """What computes the matrix products of the module on such a GPU, and why."""
    if capability < LEAST_FOR_DOT:
        return (
            "cuBLAS, through PyTorch, between Triton's passes: Triton has no tensor-core products below compute "
            "capability 8.0"
        )
    return (
        "Triton, for the token level and the head in 16 bits, forward; cuBLAS, through PyTorch, for the frame level, "
        "in float32 and float64, and for the backward"
    )


def interprets() -> bool:
    """Whether Triton is told to run kernels in its interpreter (TRITON_INTERPRET=1 when Python started)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def tuning() -> str:
    """How launch settings are found here, in words."""
    table = "the table of launch settings"
    if os.environ.get("INTI_AUTOTUNE") != "1":
        return f"{table}; INTI_AUTOTUNE=1 tunes instead"
    if torch.are_deterministic_algorithms_enabled():
        return f"{table}: INTI_AUTOTUNE=1 is set, but PyTorch is told to be deterministic"
    if reasons := _why_not_installed():
        return " ".join(reasons)
    from ._launch import caches_tuning

    return "tuned at the first launch of each size, " + (
        "and kept on disk, in Triton's cache" if caches_tuning() else "once a process: Triton before 3.4 keeps none"
    )


def _why_not_on(device: torch.device) -> list[str]:
    if device.type == "cpu":
        if not interprets():
            return [
                f"Triton compiles for GPUs, and these tensors are on the CPU ({_no_gpu()}); for tests, "
                "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, very slowly."
            ]
    elif device.type != "cuda":
        return [f"the triton backend takes tensors on CUDA devices, and these are on {device}."]
    elif interprets():
        return ["TRITON_INTERPRET is set: the kernels would run in Triton's interpreter, on the CPU; unset it."]
    elif torch.version.hip:
        return ["this PyTorch is built for ROCm, where these kernels were never tried."]
    return _why_not_installed()


def _no_gpu() -> str:
    if torch.cuda.is_available():
        return f"there is a GPU: {torch.cuda.get_device_name()}"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"and torch {torch.__version__}, {built}, finds no CUDA device"


def _why_not_installed() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["Triton is not installed; PyTorch's wheels for Linux bring the one that fits: pip install triton."]
    try:
        import triton
    except Exception as error:  # an ABI error or a missing library is a reason, not the end of `auto`
        return [f"Triton is installed but does not import: {type(error).__name__}: {error}."]
    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < OLDEST:
        return [f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}; install a newer torch."]
    return []


def _why_not_dtype(dtype: torch.dtype) -> list[str]:
    if dtype in DTYPES:
        return []
    names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
    return [f"the triton backend takes {names}, and this is {str(dtype).removeprefix('torch.')}."]
