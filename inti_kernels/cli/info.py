"""`python -m inti_kernels info`: what is installed, what can run here and, where something can't, why not."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from .. import backends
from ..backends import triton
from ..modules.fused_inti import PLAIN_PARTS
from . import _environment
from ._tables import kibibytes, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Prints; always succeeds."""
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print(facts)
    return 0


def collect() -> dict[str, Any]:
    """Everything that the command prints, as plain data."""
    return {
        "versions": _environment.versions(),
        "build": _environment.build(),
        "cpu": _environment.cpu(),
        "devices": _environment.devices(),
        "active_backend": _active_backend(),
        "backends": {
            kind: {"backends": _environment.backend_states(kind), "ops": _environment.op_states(kind)}
            for kind in sorted({device["device"].split(":")[0] for device in _environment.devices()})
        },
        "cuda": {"build": _environment.cuda_build(), "by_gpu": _environment.cuda_by_gpu()},
        "triton": {"settings": triton.tuning(), "by_gpu": _environment.triton_by_gpu()},
        "plain_pytorch": PLAIN_PARTS,
        "environment": {name: os.environ.get(name) for name in _environment.VARIABLES},
    }


def _active_backend() -> str:
    """The choice in force or, if INTI_BACKEND names no backend, the sentence that every op would raise."""
    try:
        return backends.active_backend()
    except ValueError as error:
        return f"none: {error}"


def _print(facts: dict[str, Any]) -> None:
    print_table("Versions", ("package", "version"), [(k, v or "not installed") for k, v in facts["versions"].items()])
    _print_pairs("Compiled module", facts["build"])
    _print_pairs("CPU", facts["cpu"])
    devices = [(d["device"], d["name"], d.get("capability", ""), kibibytes(d.get("memory"))) for d in facts["devices"]]
    print_table("Devices", ("device", "name", "capability", "memory"), devices)
    for kind, states in facts["backends"].items():
        rows = [(name, _state(reasons)) for name, reasons in states["backends"].items()]
        print_table(f"Backends on {kind} (active: {facts['active_backend']})", ("backend", "state"), rows)
        names = tuple(states["backends"])
        rows = [(op, *(_state(by_backend[name]) for name in names)) for op, by_backend in states["ops"].items()]
        print_table(f"Ops on {kind}", ("op", *names), rows)
    _print_pairs("CUDA kernels", facts["cuda"]["build"])
    rows = [(f"{gpu['capability']} {gpu['name']}", _state(gpu["why_not"])) for gpu in facts["cuda"]["by_gpu"]]
    if rows:
        print_table("CUDA kernels on GPUs, as this module was built", ("capability", "state"), rows)
    rows = []
    for gpu in facts["triton"]["by_gpu"]:
        dtypes = " ".join([", ".join(gpu["dtypes"]) + ".", *gpu["why_not"]])
        rows.append((f"{gpu['capability']} {gpu['name']}", ", ".join(gpu["ops"]), dtypes, gpu["products"]))
    columns = ("capability", "ops with Triton kernels", "dtypes", "matrix products of the module")
    print_table(f"Triton on GPUs ({facts['triton']['settings']})", columns, rows)
    rows = list(facts["plain_pytorch"].items())
    print_table("Parts of FusedInTI that are plain PyTorch", ("part", "why"), rows)
    rows = [(n, facts["environment"][n] or "(unset)", what) for n, what in _environment.VARIABLES.items()]
    print_table("Environment variables", ("variable", "value", "what it does"), rows)


def _print_pairs(title: str, pairs: dict[str, Any]) -> None:
    rows = []
    for name, value in pairs.items():
        text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        rows.append((name.replace("_", " "), text or "none"))
    print_table(title, (), rows)


def _state(reasons: list[str]) -> str:
    return " ".join(reasons) or "available"
