"""What this machine and this installation are, as plain data: for `info`, and with the rows of `check` and `bench`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import backends, ops
from .._version import __version__
from ..backends import cuda, native, triton

# Every variable that changes what this package does when it runs, and what it is for.
VARIABLES = {
    "INTI_BACKEND": "backend to start with: auto (default) or a name; a name never falls back",
    "INTI_CPU": "instruction set of the cpu backend: baseline, avx2 or avx512 (default: the best that runs here)",
    "INTI_NATIVE_LIBRARY": "file to load as the compiled module instead of the installed one",
    "INTI_CUDA_LIBRARY": "file to load as the module of the CUDA kernels: an instrumented build, or the emulator",
    "INTI_AUTOTUNE": "1 tunes the launch settings of Triton kernels on the first launch of each size",
    "TRITON_INTERPRET": "1 runs Triton kernels on the CPU, in Triton's interpreter, for tests; read when Python starts",
    "OMP_NUM_THREADS": "threads that torch starts with, which the cpu backend follows",
}

# The flags that decide which vector code can run, by the names of Linux.
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16")


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it; None if it isn't installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Of this package and of what it runs on; None is not installed."""
    return {
        "inti_kernels": __version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
    }


def build() -> dict[str, Any]:
    """What the compiled module was built from and how; {"missing": why} if there is none that loads."""
    reasons = native.why_not_native()
    return {"missing": reasons} if reasons else dict(native.build_info())


def cuda_build() -> dict[str, Any]:
    """What the module of the CUDA kernels was built from and how; {"missing": why} if there is none that loads."""
    try:
        return cuda.build_info()
    except RuntimeError as error:
        return {"missing": [str(error)]}


def cpu() -> dict[str, Any]:
    """Model, instruction sets, cores and threads."""
    model, flags = _cpuinfo()
    try:
        in_use = native.cpu_isa()
    except (RuntimeError, ValueError) as error:
        in_use = f"none: {error}"
    return {
        "model": model,
        "machine": platform.machine(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "instruction_set": in_use,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpuinfo() -> tuple[str, set[str]]:
    """Model name and flags as Linux gives them; elsewhere what Python knows, and no flags."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return fields.get("model name", platform.machine()), set(fields.get("flags", fields.get("Features", "")).split())


def devices() -> list[dict[str, Any]]:
    """The CPU and every CUDA device that torch sees."""
    found: list[dict[str, Any]] = [{"device": "cpu", "name": _cpuinfo()[0]}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def usable_device(name: str) -> torch.device:
    """The device of that name, if it can be used here.

    Raises:
        ValueError: torch knows no such device, or this package has no use for it.
        RuntimeError: it is a CUDA device that isn't there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise RuntimeError(f"device {name!r} can't be used: torch {torch.__version__}, {built}, finds no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(f"device {name!r} can't be used: there are {torch.cuda.device_count()} CUDA devices")
    return device


def device_name(device: torch.device) -> str:
    """What a row says it ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo()[0]


def backend_states(device: str = "cpu") -> dict[str, list[str]]:
    """Backend → why it can't run on the device (empty: it can)."""
    return {name: backends.why_not(name, device=device) for name in backends.BACKENDS}


def op_states(device: str = "cpu") -> dict[str, dict[str, list[str]]]:
    """Op → backend → why that backend has no kernel for it that can run on the device (empty: it has one)."""
    states: dict[str, dict[str, list[str]]] = {}
    for op in ops.OPS:
        states[op] = {}
        for backend in backends.BACKENDS:
            if backend == "reference" or backend in backends.HAS_KERNEL[op]:
                states[op][backend] = backends.why_not(backend, op, device=device)
            else:
                states[op][backend] = ["no kernel of its own: plain PyTorch runs in its place"]
    return states


# A GPU of each kind that the Triton kernels are compiled for, by compute capability.
GPUS = {(7, 0): "V100", (7, 5): "T4, RTX 20", (8, 0): "A100", (8, 6): "RTX 30", (9, 0): "H100"}


def _kinds_of_gpu() -> list[tuple[tuple[int, int], str]]:
    """GPUS, this machine's own included: by capability, so that it can be read before one is bought."""
    kinds = dict(GPUS)
    for device in devices():
        if "capability" in device:
            major, minor = map(int, device["capability"].split("."))
            kinds[major, minor] = f"{device['name']} ({device['device']})"
    return sorted(kinds.items())


def cuda_by_gpu() -> list[dict[str, Any]]:
    """On which kinds of GPU the CUDA kernels run, as their module was built; nothing if it wasn't, or is the
    emulator."""
    build = cuda_build()
    if "missing" in build or build["emulated"]:
        return []
    return [
        {
            "capability": "{}.{}".format(*capability),
            "name": name,
            "why_not": cuda.why_not_by_capability(capability, build["cuda_archs"]),
        }
        for capability, name in _kinds_of_gpu()
    ]


def triton_by_gpu() -> list[dict[str, Any]]:
    """What the triton backend does on GPUs of each kind."""
    rows = []
    for capability, name in _kinds_of_gpu():
        dtypes = {
            str(dtype).removeprefix("torch."): triton.why_not_by_capability(capability, dtype)
            for dtype in triton.DTYPES
        }
        usable = [dtype for dtype, reasons in dtypes.items() if not reasons]
        rows.append(
            {
                "capability": "{}.{}".format(*capability),
                "name": name,
                "ops": [op for op in ops.OPS if "triton" in backends.HAS_KERNEL[op]] if usable else [],
                "dtypes": usable,
                "why_not": sorted({reason for reasons in dtypes.values() for reason in reasons}),
                "products": triton.products_by_capability(capability),
            }
        )
    return rows


def summary(device: torch.device) -> dict[str, Any]:
    """The few figures that a row of results can't be read without."""
    facts: dict[str, Any] = {**versions(), "device": str(device), "device_name": device_name(device)}
    if device.type == "cpu":
        facts |= {"threads": torch.get_num_threads(), "instruction_set": cpu()["instruction_set"]}
    return facts
