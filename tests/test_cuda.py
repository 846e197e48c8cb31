"""The cuda backend without running a kernel: why it can't run, what chooses it, what loads its module and how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inti_kernels import FusedInTI, backends, ops
from inti_kernels.backends import _compiled, cuda, triton
from inti_kernels.cli import _environment, _traffic, check
from inti_kernels.testing import op_cases

CUDA = torch.device("cuda", 0)
# Tokens on a GPU, as far as the choice of a backend looks at them.
ON_GPU = SimpleNamespace(device=CUDA, dtype=torch.float16)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found out before, or is asked for by the environment, is of other tests."""
    monkeypatch.setattr(backends, "_usable", {})
    monkeypatch.setattr(backends, "_noted", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("INTI_CUDA_LIBRARY", raising=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that there is a GPU of some compute capability."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return pretend


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that the module was built for some architectures, or is the emulator."""

    def pretend(archs: str = "", emulated: bool = False) -> None:
        info = {"version": "0.1.0", "compiler": "g++", "cuda_archs": archs, "cuda_version": "12.8"}
        module = SimpleNamespace(build_info=lambda: {**info, "emulated": emulated})
        monkeypatch.setattr(cuda._compiled, "_module", module)

    return pretend


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty package folder in the place of this package's; returns it."""
    monkeypatch.setattr(cuda._compiled, "_module", None)
    monkeypatch.setattr(_compiled, "_PACKAGE", tmp_path)
    return tmp_path


# --- Why not ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((7, 0), "70", True),
        ((7, 2), "70", True),  # the same major version
        ((7, 5), "70", True),
        ((7, 0), "75", False),
        ((8, 0), "70;75", False),
        ((8, 6), "70;75;80", True),
        ((8, 0), "70;86", False),
        ((9, 0), "70;75+PTX", True),
        ((12, 0), "70;75;80;86;90+PTX", True),
        ((10, 0), "70;75;80;86;90", False),
        ((7, 0), "90+PTX", False),
        ((7, 0), "", False),
    ],
    ids=str,
)
def test_what_was_built_runs_on_which_gpu(gpu, built, capability, archs, runs):
    gpu(capability)
    built(archs)
    for dtype in cuda.DTYPES:  # bfloat16 too: below 8.0 it is converted by its bits
        reasons = backends.why_not("cuda", "depthwise_conv3d", device=CUDA, dtype=dtype)
        assert (reasons == []) is runs
    if not runs:
        have = "{}.{}".format(*capability)
        assert reasons == [
            f"the CUDA kernels were built for {archs.replace(';', ', ') or 'no GPU'}, and this GPU has compute "
            f"capability {have}: rebuild with INTI_CUDA_ARCHS={have.replace('.', '')}."
        ]


def test_gpus_older_than_volta_are_refused_by_name():
    assert cuda.why_not_by_capability((6, 1), ["60"]) == [
        "the CUDA kernels need compute capability 7.0, and this GPU has 6.1."
    ]


def test_devices_dtypes_and_builds(gpu, built, monkeypatch):
    gpu((7, 0))
    built("70")
    assert backends.why_not("cuda", device="cpu") == [
        "the cuda backend takes tensors on CUDA devices, and these are on the CPU."
    ]
    assert "these are on meta" in backends.why_not("cuda", device="meta")[0]
    (reason,) = backends.why_not("cuda", device=CUDA, dtype=torch.float8_e5m2)
    assert reason == "the cuda backend takes float16, float32, bfloat16, float64, and this is float8_e5m2."
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in backends.why_not("cuda", device=CUDA)[0]


def test_the_emulator_takes_tensors_on_the_cpu_and_only_those(gpu, built):
    gpu((7, 0))
    built(emulated=True)
    assert backends.why_not("cuda", device="cpu") == []
    assert "names the emulator, which takes tensors on the CPU" in backends.why_not("cuda", device=CUDA)[0]


# --- The module -------------------------------------------------------------------------------------------------------


def test_never_built_says_why_and_what_to_do(missing):
    (reason,) = cuda._compiled.why_not()
    assert "was never built (the package was imported from its sources without being installed)" in reason
    assert "INTI_CUDA=on pip install" in reason
    for note, why in (
        ({"reason": None, "cuda_reason": "no nvcc was found at install time"}, "no nvcc was found at install time"),
        ({"reason": None, "cuda_reason": None}, "its last build did not finish"),
        ({"reason": None}, "the package was installed without it"),
    ):
        (missing / "_build.json").write_text(json.dumps(note))
        assert f"never built ({why})" in cuda._compiled.why_not()[0]
    on_cpu = backends.why_not("cuda")
    assert on_cpu[0].endswith("these are on the CPU.")
    assert "never built" in on_cpu[1]


def test_built_for_another_python_or_not_loadable_are_other_errors(missing, monkeypatch, tmp_path):
    (missing / "_cuda.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    assert "was built for another Python: _cuda.cpython-39" in cuda._compiled.why_not()[0]
    broken = tmp_path / "broken.so"
    monkeypatch.setenv("INTI_CUDA_LIBRARY", str(broken))
    assert "INTI_CUDA_LIBRARY must name the compiled module's file" in cuda._compiled.why_not()[0]
    broken.write_bytes(b"not ELF")
    assert "does not load" in cuda._compiled.why_not()[0]
    with pytest.raises(RuntimeError, match="does not load"):
        cuda.load()


def test_another_version_of_the_sources_is_an_error(missing, monkeypatch):
    class Loader:
        def __init__(self, name: str, path: str) -> None: ...

        def create_module(self, spec: Any) -> Any:
            return SimpleNamespace(build_info=lambda: {"version": "0.0.9"})

        def exec_module(self, module: Any) -> None: ...

    suffix = _compiled.importlib.machinery.EXTENSION_SUFFIXES[0]
    (missing / f"_cuda{suffix}").write_bytes(b"")
    monkeypatch.setattr(_compiled.importlib.machinery, "ExtensionFileLoader", Loader)
    assert "was built from version 0.0.9 of the sources" in cuda._compiled.why_not()[0]


# --- The choice -------------------------------------------------------------------------------------------------------


@pytest.fixture
def both_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "why_not", lambda device, dtype: [])
    monkeypatch.setattr(triton, "why_not", lambda device, dtype: [])


@pytest.mark.parametrize(
    ("capability", "first"),
    [((7, 0), "cuda"), ((7, 5), "cuda"), ((8, 0), "triton"), ((9, 0), "triton"), ((12, 0), "triton")],
    ids=str,
)
def test_auto_prefers_cuda_on_volta_and_turing_and_triton_on_later_gpus(gpu, both_can, capability, first):
    gpu(capability)
    for op in (*ops.OPS, "inti"):
        assert set(backends._in_order(op, CUDA)) == set(backends.HAS_KERNEL[op])
        assert backends.settle(op, "auto", ON_GPU) == first


def test_without_triton_auto_takes_the_cuda_kernels_on_newer_gpus_too(gpu, both_can, monkeypatch):
    gpu((8, 0))
    monkeypatch.setattr(triton, "why_not", lambda device, dtype: ["Triton is not installed."])
    for op in (*ops.OPS, "inti"):
        assert backends.settle(op, "auto", ON_GPU) == "cuda"


def test_where_nothing_can_run_auto_takes_plain_pytorch_once_said(gpu, monkeypatch):
    gpu((7, 0))
    monkeypatch.setattr(cuda, "why_not", lambda device, dtype: ["it was never built."])
    monkeypatch.setattr(triton, "why_not", lambda device, dtype: [])
    assert backends.settle("depthwise_conv3d", "auto", ON_GPU) == "triton"
    monkeypatch.setattr(backends, "_usable", {})
    monkeypatch.setattr(triton, "why_not", lambda device, dtype: ["Triton is not installed."])
    with pytest.warns(UserWarning, match="token_features runs as plain PyTorch.*it was never built"):
        assert backends.settle("token_features", "auto", ON_GPU) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.settle("token_features", "auto", ON_GPU) == "reference"


def test_auto_never_takes_the_emulator(built):
    built(emulated=True)
    assert backends.why_not("cuda", "token_features") == []
    x = torch.randn(1, 2, 3, 4)
    assert backends.settle("token_features", "auto", x) == "cpu"
    assert backends.settle("token_features", "cuda", x) == "cuda"
    assert backends._first_that_can("pair_interpolate", ("cuda", "cpu"), x) == "cpu"
    with pytest.warns(UserWarning, match="the emulator of CUDA is for tests, and runs where it is asked for only"):
        assert backends._first_that_can("pair_interpolate", ("cuda",), x) == "reference"


def test_asked_for_where_it_cannot_run_it_raises_with_the_reasons(missing):
    for op in ops.OPS:
        inputs, kwargs = op_cases(op, dim=6, frames=2, grid=(1, 2))
        with pytest.raises(RuntimeError, match=f"{op} can't run on backend='cuda': .*on the CPU.*The others: .*cpu: "):
            getattr(ops, op)(**inputs, **kwargs, backend="cuda")
    with pytest.raises(RuntimeError, match="can't run on backend='cuda'"):
        FusedInTI(6, 2, (1, 2), backend="cuda", context=())(torch.randn(1, 2, 3, 6))


# --- info, check, bench -----------------------------------------------------------------------------------------------


def test_info_says_what_the_module_was_built_for(gpu, built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built("70;75+PTX")
    assert _environment.cuda_build()["cuda_archs"] == ["70", "75+PTX"]
    rows = {row["capability"]: row["why_not"] for row in _environment.cuda_by_gpu()}
    assert all(reasons == [] for reasons in rows.values())
    built("75")
    assert "built for 75" in next(row for row in _environment.cuda_by_gpu() if row["name"] == "V100")["why_not"][0]
    built(emulated=True)
    assert _environment.cuda_by_gpu() == []


def test_info_says_why_there_is_none(missing):
    assert "never built" in _environment.cuda_build()["missing"][0]
    assert _environment.cuda_by_gpu() == []


def test_check_has_a_line_that_says_why(missing):
    jobs = list(check._jobs("cuda", torch.device("cpu")))
    assert [job.what for job in jobs] == [*ops.OPS, "FusedInTI"]
    assert all(job.run is None and "never built" in job.why_not for job in jobs)


def test_traffic_needs_the_emulator(missing):
    with pytest.raises(RuntimeError, match="counted by the emulator"):
        _traffic.count("pair_interpolate", torch.float16, backend="cuda", dim=8, frames=2, grid=(1, 1))
    environment = {name: value for name, value in os.environ.items() if name != "INTI_CUDA_LIBRARY"}
    command = [sys.executable, "-m", "inti_kernels", "bench", "--traffic", "--backend", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 1
    assert "backend 'cuda' can't run on cpu" in done.stderr
