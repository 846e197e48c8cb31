"""The triton backend without running a kernel: why it can't run, what chooses it, what is compiled ahead of time."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from inti_kernels import backends, ops
from inti_kernels.backends import triton
from inti_kernels.cli import _environment, _traffic, check

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU of some compute capability."""

    def pretend(capability: tuple[int, int], name: str = "a GPU") -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        properties = type("Properties", (), {"name": name, "major": capability[0], "minor": capability[1],
                                              "total_memory": 16 << 30, "multi_processor_count": 80})  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)

    return pretend


# --- Why not ----------------------------------------------------------------------------------------------------------


def test_on_the_cpu_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (reason,) = backends.why_not("triton", "pair_interpolate")
    assert "these tensors are on the CPU" in reason
    assert f"torch {torch.__version__}" in reason
    assert "TRITON_INTERPRET=1" in reason


@pytest.fixture(autouse=True)
def nothing_is_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)], ids=str)
def test_what_runs_on_which_gpu(gpu, capability):
    gpu(capability)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert backends.why_not("triton", "depthwise_conv3d", device=CUDA, dtype=dtype) == []
    reasons = backends.why_not("triton", "depthwise_conv3d", device=CUDA, dtype=torch.bfloat16)
    if capability >= (8, 0):
        assert reasons == []
    else:
        assert reasons == [
            f"bfloat16 needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}; use float16, as "
            "autocast does with dtype=torch.float16."
        ]


def test_gpus_older_than_volta_are_refused_by_name(gpu):
    gpu((6, 1))
    assert backends.why_not("triton", device=CUDA) == [
        "Triton compiles for compute capability 7.0 and newer, and this GPU has 6.1."
    ]


def test_products_of_a_v100_go_to_cublas():
    assert "no tensor-core products below compute capability 8.0" in triton.products_by_capability((7, 0))
    assert triton.products_by_capability((7, 5)).startswith("cuBLAS, through PyTorch")
    assert triton.products_by_capability((8, 0)).startswith("Triton, for the token level and the head in 16 bits")


def test_other_dtypes_devices_and_builds(gpu, monkeypatch):
    gpu((8, 0))
    (reason,) = backends.why_not("triton", device=CUDA, dtype=torch.float8_e5m2)
    assert "takes float16, float32, bfloat16, float64, and this is float8_e5m2" in reason
    assert "these are on meta" in backends.why_not("triton", device="meta")[0]
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in backends.why_not("triton", device=CUDA)[0]


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("missing", "Triton is not installed"),
        ("broken", "does not import: ImportError: undefined symbol"),
        ("old", r"Triton 3\.2\.0 is older than 3\.3"),
    ],
)
def test_a_triton_that_cannot_be_used(gpu, monkeypatch, fault, match):
    gpu((7, 0))
    if fault == "missing":
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    else:
        fake = type(sys)("triton")
        fake.__version__ = "3.2.0"

        class Finder:
            def find_spec(self, name, *_):
                if name == "triton":
                    raise ImportError("undefined symbol")

        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())
        if fault == "old":
            monkeypatch.setitem(sys.modules, "triton", fake)
        else:
            monkeypatch.delitem(sys.modules, "triton", raising=False)
            monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    (reason,) = backends.why_not("triton", device=CUDA)
    assert re.search(match, reason)


def test_asked_for_where_it_cannot_run_it_raises_with_the_reasons(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="pair_interpolate can't run on backend='triton': .*The others: .*cpu: "):
        ops.pair_interpolate(torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 2), backend="triton")


def test_auto_takes_triton_on_a_gpu_and_never_its_interpreter(gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "_usable", {})
    monkeypatch.setattr(backends, "_noted", set())
    x = torch.randn(1, 2, 3, 4)
    assert backends.why_not("triton") == []
    with pytest.warns(UserWarning, match="runs where it is asked for only"):
        assert backends._first_that_can("pair_interpolate", ("triton",), x) == "reference"
    gpu((7, 0))
    assert "would run in Triton's interpreter" in backends.why_not("triton", device=CUDA)[0]
    monkeypatch.delenv("TRITON_INTERPRET")
    on_gpu = type("OnGpu", (), {"device": CUDA, "dtype": torch.float16})()
    assert backends._first_that_can("pair_interpolate", backends.HAS_KERNEL["pair_interpolate"], on_gpu) == "triton"


# --- info -------------------------------------------------------------------------------------------------------------


def test_info_says_what_a_v100_runs(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = {row["capability"]: row for row in _environment.triton_by_gpu()}
    v100 = rows["7.0"]
    assert v100["name"] == "V100"
    assert v100["ops"] == list(ops.OPS)
    assert v100["dtypes"] == ["float16", "float32", "float64"]
    assert "bfloat16 needs compute capability 8.0" in v100["why_not"][0]
    assert "cuBLAS" in v100["products"]
    assert "bfloat16" in rows["8.0"]["dtypes"]
    gpu((6, 1), "an old one")
    old = next(row for row in _environment.triton_by_gpu() if row["capability"] == "6.1")
    assert (old["ops"], old["dtypes"]) == ([], [])
    gpu((12, 1), "a new one")
    assert "a new one (cuda:0)" in [row["name"] for row in _environment.triton_by_gpu()]


def test_info_says_how_settings_are_found(monkeypatch):
    monkeypatch.delenv("INTI_AUTOTUNE", raising=False)
    assert "INTI_AUTOTUNE=1 tunes instead" in triton.tuning()
    monkeypatch.setenv("INTI_AUTOTUNE", "1")
    from inti_kernels.backends.triton import _launch

    for caches, words in ((True, "kept on disk"), (False, "Triton before 3.4 keeps none")):
        monkeypatch.setattr(_launch, "caches_tuning", lambda caches=caches: caches)
        assert words in triton.tuning()
    torch.use_deterministic_algorithms(True)
    try:
        assert "PyTorch is told to be deterministic" in triton.tuning()
    finally:
        torch.use_deterministic_algorithms(False)


def test_check_does_not_fail_for_what_a_v100_has_not(gpu):
    gpu((7, 0))
    jobs = list(check._module_jobs("triton", CUDA))
    autocast = {job.dtype: job for job in jobs if job.case == "autocast"}
    assert autocast["bfloat16"].run is None
    assert "bfloat16 needs compute capability 8.0" in autocast["bfloat16"].why_not
    assert autocast["float16"].run is not None


# --- The models -------------------------------------------------------------------------------------------------------


def test_the_modelled_cache():
    """By hand: a cache of two sectors."""
    program = _traffic.Program(dict.fromkeys([1, 2, 1, 3]), dict.fromkeys([3, 4]))
    # Reads 1, 2, 3 from memory (giving 1 up, clean), writes 3 in place, writes 4 (giving 2 up), then 3 and 4 go back.
    assert _traffic.through_l2([_traffic.Launched("k", [program])], capacity=2) == 3 + 2
    again = _traffic.Launched("k", [program, program])
    # The second time 1, 2 and 3 are read again; making room, 3 and 4 were written; then 3 and 4 once more.
    assert _traffic.through_l2([again], capacity=2) == (3 + 2) * 2
    assert _traffic.through_l2([again], capacity=8) == 3 + 2


def test_programs_that_run_at_the_same_time_take_turns():
    turn = _traffic.TURN
    long, short, late = (
        _traffic.Program(order=[(start + i, False) for i in range(count)])
        for start, count in ((0, turn + 1), (1000, 1), (2000, 1))
    )
    sectors = [sector for sector, _ in _traffic.Launched("k", [long, short, late], together=2).touches()]
    assert sectors == [*range(turn), 1000, turn, 2000]


def test_programs_are_moved_tensor_by_tensor():
    program = _traffic.Program({0: None, 100: None}, {200: None})
    moved = program.moved([(0, 99 * 32, 64), (100 * 32, 300 * 32, 32)])
    assert moved == _traffic.Program({2: None, 101: None}, {201: None})


def test_kernels_compile_with_no_size_in_their_key():
    """Other grids, clips and layouts get the same code; in a process of its own, where nothing is interpreted."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import triton_aot as aot, torch, json\n"
        "from inti_kernels.backends.triton import depthwise_conv3d as conv\n"
        "from inti_kernels.testing import op_cases\n"
        "keys = set()\n"
        "for t, grid, batch, prefix in ((16, (14, 14), 1, 1), (8, (7, 9), 3, 0), (2, (1, 1), 1, 5)):\n"
        "    sizes = {'frames': t, 'grid': grid, 'batch': batch, 'prefix': prefix}\n"
        "    inputs, kwargs = op_cases('depthwise_conv3d', dim=64, **sizes)\n"
        "    x = inputs['x'].transpose(0, 1).contiguous().transpose(0, 1)\n"
        "    arguments = (x, *list(inputs.values())[1:], grid, 2, prefix)\n"
        "    (launch,) = aot._intercepted(lambda: conv.depthwise_conv3d_forward(*arguments), 70, '')\n"
        "    keys.add(launch.key)\n"
        "print(len(keys))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert done.stdout == "1\n", done.stderr


def test_the_budget_has_every_supported_triton_and_architecture():
    root = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(root, "triton_budget.json")) as file:
        budget = json.load(file)
    assert set(budget) >= {"3.3.1", "3.5.1", "3.8.0", "3.9.0"}
    for by_arch in budget.values():
        assert set(by_arch) == {"70", "75", "80", "86", "90"}
        assert all(figures["spilled"] == 0 for kernels in by_arch.values() for figures in kernels.values())
