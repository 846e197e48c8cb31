"""What all tests share: Hypothesis profiles, scratch memory full of NaN, and the backends under test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, register_random, settings

# What PyTorch computes beside the emulated kernels, which they are held against, is what it computes without AVX-512,
# with the products that MKL has for every processor: that code's own errors, of GELU above all, would be in the bounds.
# PyTorch reads this when it is imported.
CPUINFO = Path("/proc/cpuinfo")
if os.environ.get("INTI_CUDA_LIBRARY") and CPUINFO.is_file() and "avx512f" in CPUINFO.read_text():
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}

import torch  # noqa: E402
from op_subject import EMULATED, INTERPRETED, UNDER_TEST, allocate_by  # noqa: E402

from inti_kernels.backends import native  # noqa: E402

# `fast` draws the same examples every time, so that a change and not the weather turns the suite red; `full` is for
# finding what nobody thought of (HYPOTHESIS_PROFILE=full); `mutants` only wants to know whether something fails, and
# `lines` which lines of the kernels are executed, after `fast` has passed.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("fast", max_examples=4 if INTERPRETED else 25, derandomize=True, **_COMMON)
settings.register_profile("full", max_examples=400, **_COMMON)
settings.register_profile("lines", max_examples=5, derandomize=True, **_COMMON)
settings.register_profile(
    "mutants", max_examples=25, derandomize=True, phases=[Phase.explicit, Phase.generate], **_COMMON
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


class TorchRandom:
    """PyTorch's generator as Hypothesis wants one: seeded for each example, put back afterwards."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # Hypothesis holds a weak reference
register_random(TORCH_RANDOM)


collect_ignore = [
    *([] if INTERPRETED else ["test_triton_interpreted.py"]),
    *([] if EMULATED else ["test_cuda_emulated.py", "test_cuda_launches.py", "test_cuda_sizes.py"]),
]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "only_under_test(*backends): left out where another backend is under test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def belongs(item: pytest.Item) -> bool:
        return all(UNDER_TEST in mark.args for mark in item.iter_markers("only_under_test"))

    config.hook.pytest_deselected(items=[item for item in items if not belongs(item)])
    items[:] = filter(belongs, items)


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    """What a test draws without a generator of its own is the same in every run, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def scratch_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and workspaces start as NaN: what a kernel doesn't write shows."""

    def empty_of_nan(shape, like, dtype=None):  # type: ignore[no-untyped-def]
        return torch.full(tuple(shape), float("nan"), dtype=dtype or like.dtype, device=like.device)

    allocate_by(monkeypatch, empty_of_nan)


def variants() -> list[str]:
    """Every backend under test: the cpu backend once for each instruction set of this machine or, where Triton's
    interpreter or the emulator of CUDA is asked for, triton or cuda alone."""
    if UNDER_TEST != "cpu":
        return [UNDER_TEST]
    if native.why_not_native():
        return ["cpu"]  # and the tests fail with the reason
    forced = os.environ.get("INTI_CPU")
    return [f"cpu-{isa}" for isa in ([forced] if forced else native.load().cpu_isas())]


@contextmanager
def state_of(variant: str) -> Iterator[str]:
    """The name of a variant's backend, in the state that the variant names."""
    name, _, isa = variant.partition("-")
    if not isa:
        yield name
        return
    module = native.load()
    before = module.cpu_isa()
    module.set_cpu_isa(isa)
    yield name
    module.set_cpu_isa(before)


@pytest.fixture(params=variants())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend; while the test runs, it is in the state that the variant names."""
    with state_of(request.param) as name:
        yield name


@pytest.fixture(params=[UNDER_TEST])
def kernels(request: pytest.FixtureRequest) -> str:
    """The backend under test, in the one state that it starts in."""
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores PyTorch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """For tests of tiny tensors, on which threads cost more than they give."""
    torch.set_num_threads(1)
