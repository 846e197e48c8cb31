"""The compiled module: the choice of the instruction set, and the 16-bit numbers that it converts itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from inti_kernels import ops
from inti_kernels.backends import native

HALVES = (torch.bfloat16, torch.float16)


def every_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def mean_of(first: torch.Tensor, second: torch.Tensor, backend: str) -> torch.Tensor:
    """(first + second) / 2, computed in float32 and rounded once, by the kernel; 1-D in and out."""
    x = torch.stack((first, second)).reshape(1, 2, -1, 64)
    z, _ = ops.pair_interpolate(x, torch.zeros(1, 1, x.shape[2], 2), backend=backend)
    return z.flatten()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_16_bit_number_survives(backend: str, dtype: torch.dtype) -> None:
    numbers = every_number(dtype)
    mean = mean_of(numbers, numbers, backend)
    nan = numbers.isnan()
    assert torch.equal(mean.isnan(), nan)
    # 0.5·x + 0.5·x is x, and the sign of zero stays
    assert torch.equal(mean[~nan].view(torch.int16), numbers[~nan].view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounds_to_nearest_even(backend: str, dtype: torch.dtype) -> None:
    """Means of neighbours are ties; means with a random number are everything else, subnormals included."""
    numbers = every_number(dtype)
    numbers = numbers[numbers.isfinite()]
    numbers = numbers[: numbers.numel() // 64 * 64]
    shuffled = numbers[torch.randperm(numbers.numel(), generator=torch.Generator().manual_seed(0))]
    for other in (numbers.roll(1), shuffled):
        expected = (numbers.float() * 0.5 + other.float() * 0.5).to(dtype)
        assert torch.equal(mean_of(numbers, other, backend), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_infinities_stay(backend: str, dtype: torch.dtype) -> None:
    """Infinity isn't the number that its bits would be: the mean of it and any finite number is infinite."""
    numbers = every_number(dtype)
    numbers = numbers[numbers.isfinite()]
    numbers = numbers[: numbers.numel() // 64 * 64]
    for infinity in (float("inf"), float("-inf")):
        mean = mean_of(numbers, torch.full_like(numbers, infinity), backend)
        assert bool((mean == infinity).all())


def test_instruction_sets_can_be_chosen() -> None:
    module = native.load()
    isas = module.cpu_isas()
    assert isas[0] == "baseline"
    before = module.cpu_isa()
    for isa in isas:
        module.set_cpu_isa(isa)
        assert native.cpu_isa() == isa
    with pytest.raises(ValueError, match=r"INTI_CPU must name an instruction set .*baseline.*got 'sse9'"):
        module.set_cpu_isa("sse9")
    assert module.cpu_isa() == isas[-1]
    module.set_cpu_isa(before)


def run_with(inti_cpu: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import torch; from inti_kernels import ops; from inti_kernels.backends import native;"
        "ops.pair_interpolate(torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 1, 2), backend='cpu'); print(native.cpu_isa())"
    )
    environment = {**os.environ, "INTI_CPU": inti_cpu}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_environment_forces_an_instruction_set() -> None:
    assert run_with("baseline").stdout.strip() == "baseline"
    wrong = run_with("sse9")
    assert wrong.returncode == 1
    assert "INTI_CPU must name an instruction set" in wrong.stderr


def test_dtypes_are_checked_at_the_boundary() -> None:
    with pytest.raises(ValueError, match="dtype must be float32, float64, bfloat16 or float16, got int8"):
        native.load().pair_interpolate_forward(
            shape=(0, 2, 1, 1), dtype="int8", threads=1, x=0, x_strides=(0, 0, 0), logits=0, position=0, z=0, weights=0
        )
