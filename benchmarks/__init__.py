"""What `python -m inti_kernels bench` times: a file an op, the whole module (`inti`), and the floor (`floor`).

Each file has ``workload(sizes, dtype, device, backend) -> Workload`` and says how many multiply-accumulates its forward
needs. README.md describes how to run and read the benchmark.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded when they are wanted: `python -m benchmarks.sass_model` has no package around this folder
    import torch

    from .workload import Sizes, Workload

WORKLOADS = ("pair_interpolate", "depthwise_conv3d", "token_features", "interpolation_head", "inti")


def load(name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str | None) -> Workload:
    """The workload of that name (one of WORKLOADS) at these sizes.

    Args:
        name: one of WORKLOADS; a ValueError otherwise.
        sizes: of the tokens.
        dtype: of an op's tensors; for "inti" a 16-bit dtype means autocast of float32 parameters and tokens.
        device: where the tensors are made.
        backend: what the fused contender is told to run on; None for auto.
    """
    if name not in WORKLOADS:
        raise ValueError(f"workload must be one of {WORKLOADS}, got {name!r}")
    return import_module(f".{name}", __package__).workload(sizes, dtype, device, backend)


def __getattr__(name: str) -> Any:
    if name in ("Sizes", "Workload"):
        return getattr(import_module(".workload", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
