"""The backends: which exist, why each can or can't run here, and which one an op takes.

`auto` takes the best backend that can run and may fall back to the reference, saying so once. An explicit choice (the
argument ``backend=``, :func:`use_backend`, the environment variable INTI_BACKEND) never falls back: where it can't run
it raises with the reasons. A backend has a function ``<op>_forward`` and one ``<op>_backward`` for every op it has
kernels for, which take tensors: in one module for all ops, or in a module an op.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from functools import cache
from importlib import import_module
from types import ModuleType, TracebackType

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Backends with a kernel of their own, op by op, best first. On the others an op is plain PyTorch.
HAS_KERNEL: dict[str, tuple[str, ...]] = {
    "pair_interpolate": ("cpu", "triton", "cuda"),
    "depthwise_conv3d": ("cpu", "triton", "cuda"),
    "token_features": ("cpu", "triton", "cuda"),
    "interpolation_head": ("cpu", "triton", "cuda"),
}
# The whole module is a chain of the others.
HAS_KERNEL["inti"] = HAS_KERNEL["token_features"]
# What the CUDA kernels are tuned for; from 8.0 on Triton's compiler knows more of the GPU than they do.
TRITON_FIRST = (8, 0)

# (op or op_backward, backend) -> how often that implementation ran. This says what really executed, `auto` or not.
executed: Counter[tuple[str, str]] = Counter()

_MODULES = {"reference": "reference", "cpu": "cpu.{op}", "triton": "triton.{op}", "cuda": "cuda.{op}"}
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_active = os.environ.get("INTI_BACKEND") or "auto"
_noted: set[str] = set()
# What can run once can run always (a missing module may yet be built): (what was asked for, or auto's candidates,
# device, dtype) -> backend.
_usable: dict[tuple[str | tuple[str, ...], torch.device, torch.dtype], str] = {}
_counting = threading.Lock()


class use_backend:
    """Chooses the backend of every op that isn't given one, for the process, or for a ``with`` block.

    The choice is the process's: ``with`` blocks that overlap in two threads see each other's.

    Args:
        name: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: there is no such backend.

    Example:
        >>> use_backend("cpu")            # from here on
        >>> with use_backend("reference"):
        ...     z, weights = ops.pair_interpolate(x, logits)
    """

    def __init__(self, name: str) -> None:
        global _active
        self._name, self._previous = _known(name, "use_backend"), _active
        _active = name

    def __enter__(self) -> use_backend:
        global _active
        if _active != self._name:  # made earlier, entered now
            self._previous, _active = _active, self._name
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        global _active
        _active = self._previous


def active_backend() -> str:
    """The choice in force where an op isn't given one: "auto" or a backend's name.

    Raises:
        ValueError: the environment's INTI_BACKEND names none.
    """
    return _known(_active, "INTI_BACKEND")


def requested(backend: str | None) -> str:
    """What an op's argument ``backend`` asks for: itself, or the choice in force if it is None."""
    return active_backend() if backend is None else _known(backend, "backend")


def resolve(op: str, backend: str | None, x: torch.Tensor) -> str:
    """What a call of an op runs on: an explicit backend; "auto" where a kernel can run; else "reference", said once.

    Traced code keeps "auto": the op then decides when it runs, which may be on another machine.
    """
    backend = requested(backend)
    if backend != "auto" or torch.compiler.is_compiling() or x.is_meta:
        return backend
    return "reference" if _first_that_can(op, _in_order(op, x.device), x) == "reference" else "auto"


def why_not(
    backend: str, op: str | None = None, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> list[str]:
    """Why a backend can't run (an op) here.

    Args:
        backend: one of BACKENDS.
        op: one of HAS_KERNEL's keys, or None to ask of the backend in general.
        device: where the tensors are.
        dtype: of the tokens.

    Returns:
        One sentence a reason; an empty list if it can run.

    Raises:
        ValueError: there is no such backend or op.
    """
    _known(backend, "backend")
    if op is not None and op not in HAS_KERNEL:
        raise ValueError(f"op must be one of {tuple(HAS_KERNEL)}, got {op!r}")
    if backend in ("reference", "auto"):
        return []
    device = torch.device(device)
    if backend == "triton":
        from . import triton

        return triton.why_not(device, dtype)
    if backend == "cuda":
        from . import cuda

        return cuda.why_not(device, dtype)
    from . import native

    reasons = []
    if device.type != "cpu":
        reasons.append(f"the cpu backend takes tensors on the CPU, and these are on {device}.")
    if dtype not in _CPU_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _CPU_DTYPES)
        reasons.append(f"the cpu backend takes {names}, and this is {str(dtype).removeprefix('torch.')}.")
    return reasons + (native.why_not_native() or native.why_not_isa())


def settle(op: str, backend: str, x: torch.Tensor) -> str:
    """The backend that runs an op on tokens like x; RuntimeError where one that was chosen explicitly can't."""
    return _first_that_can(op, _in_order(op, x.device), x) if backend == "auto" else _explicit(op, backend, x)


def implementation(op: str, backend: str, x: torch.Tensor, *, direction: str | None = "forward") -> ModuleType:
    """The module that runs an op on tokens like x; counted in ``executed``.

    Args:
        op: one of HAS_KERNEL's keys.
        backend: as :func:`resolve` gives it.
        x: the tokens; their device and dtype decide.
        direction: "forward" or "backward"; None counts nothing, for what is a part of either.

    Raises:
        RuntimeError: the backend was chosen explicitly and can't run; the message lists the reasons, and those of the
            other backends.
    """
    chosen = settle(op, backend, x)
    if direction is not None:
        count(op if direction == "forward" else f"{op}_backward", chosen)
    return _module(chosen, op)


@cache
def _module(backend: str, op: str) -> ModuleType:
    return import_module(f"{__name__}.{_MODULES[backend].format(op=op)}")


def _in_order(op: str, device: torch.device) -> tuple[str, ...]:
    """The backends with a kernel for an op, the one to prefer on the device first."""
    names = HAS_KERNEL[op]
    if device.type != "cuda" or _is_newer_than_turing(device):
        return names
    return tuple(sorted(names, key=lambda name: name != "cuda"))


def _is_newer_than_turing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TRITON_FIRST


def _first_that_can(op: str, candidates: tuple[str, ...], x: torch.Tensor) -> str:
    key = (candidates, x.device, x.dtype)
    if key in _usable:
        return _usable[key]
    reasons = {}
    for name in candidates:
        reasons[name] = why_not(name, op, device=x.device, dtype=x.dtype)
        if name == "triton" and x.device.type == "cpu" and not reasons[name]:
            reasons[name] = ["Triton's interpreter is for tests, and runs where it is asked for only."]
        if name == "cuda" and x.device.type == "cpu" and not reasons[name]:
            reasons[name] = ["the emulator of CUDA is for tests, and runs where it is asked for only."]
        if not reasons[name]:
            _usable[key] = name
            return name
    why = "; ".join(f"{name}: {' '.join(sentences)}" for name, sentences in reasons.items())
    note(f"inti_kernels.{op} runs as plain PyTorch (backend 'reference') here. {why}")
    return "reference"


def _explicit(op: str, backend: str, x: torch.Tensor) -> str:
    key = (backend, x.device, x.dtype)
    if key in _usable:
        return backend
    if reasons := why_not(backend, op, device=x.device, dtype=x.dtype):
        others = {name: why_not(name, op, device=x.device, dtype=x.dtype) for name in BACKENDS if name != backend}
        can = "; ".join(f"{name}: {' '.join(why) or 'can run here'}" for name, why in others.items())
        raise RuntimeError(f"{op} can't run on backend={backend!r}: {' '.join(reasons)} The others: {can}.")
    _usable[key] = backend
    return backend


def count(op: str, backend: str) -> None:
    """Counts in ``executed`` that an op, or its backward, ran on a backend."""
    with _counting:
        executed[op, backend] += 1


def note(message: str) -> None:
    """Warns once a process. For implementations: traced code may not warn."""
    if message not in _noted:
        _noted.add(message)
        warnings.warn(message, stacklevel=2)


def _known(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {('auto', *BACKENDS)}, got {name!r}")
    return name


def count_reference(op: str) -> None:
    """Counts the reference where it runs outside :func:`implementation`. Traced code may not count."""
    if not torch.compiler.is_compiling():
        count(op, "reference")
