"""The Triton kernels in Triton's interpreter: what tests/test_<op>.py doesn't ask of them. `make triton` runs this."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import op_suite
import pytest
import torch
from op_subject import Subject

from inti_kernels import FusedInTI, backends
from inti_kernels.backends.triton import _launch, depthwise_conv3d
from inti_kernels.cli import _traffic
from inti_kernels.testing import assert_close_three_way, module_case, op_cases, three_way_module

CONVOLUTIONS = {
    "cube level": {},
    "position encoding": {"temporal_stride": 1},
    "local aggregation": {"kernel": (3, 1, 1), "temporal_stride": 1},
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 tokens, blocks of 8 channels, runs of 4 frames: many programs on a small clip."""
    for kernel, rows in _launch._TABLE.items():
        small = [(c, d, replace(at, tokens=4, channels=8, frames=4)) for c, d, at in rows]
        monkeypatch.setitem(_launch._TABLE, kernel, tuple(small))


# --- Programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_many_tiles_blocks_and_runs_of_a_convolution(small_tiles: None, case: dict[str, object]) -> None:
    """Two clips, three tiles of a 3×3 grid, a whole and a ragged block, three runs of which the last is short."""
    subject = Subject("depthwise_conv3d", ("x", "weight", "bias", "position"), case)
    sizes = {"frames": 10, "grid": (3, 3), "dim": 11, "batch": 2}
    op_suite.compare_with_reference(subject, "triton", draws=1, **sizes)


def test_many_tiles_and_blocks_of_pairs(small_tiles: None) -> None:
    subject = Subject("pair_interpolate", ("x", "logits", "position"))
    op_suite.compare_with_reference(subject, "triton", frames=6, grid=(3, 3), dim=21, batch=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_partial_sums(count: int, dtype: torch.dtype) -> None:
    """More than a turn's eight, more rows than a tile's 32, columns that are no multiple of a block; out transposed."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    partials = torch.randn(count, 35, 19, dtype=wide)
    out = torch.full((19, 35), float("nan"), dtype=dtype)
    _launch.sum_partials(partials, out, (1, 35))
    tolerance = {} if dtype in (torch.float32, torch.float64) else {"rtol": torch.finfo(dtype).eps, "atol": 1e-3}
    torch.testing.assert_close(out, partials.double().sum(0).t().to(dtype), **tolerance)


def test_no_partial_sums_are_zero() -> None:
    out = torch.full((3,), float("nan"))
    _launch.sum_partials(torch.empty(0, 1, 3), out, (3, 1))
    assert out.tolist() == [0, 0, 0]


# --- The module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=str)
def test_fused_inti(autocast: torch.dtype | None) -> None:
    inti, x = module_case(dim=16, frames=4, grid=(2, 3))
    fused = FusedInTI.from_reference(inti, backend="triton")
    before = backends.executed.copy()
    assert_close_three_way(three_way_module(fused, x, autocast=autocast, draws=6))
    ran = backends.executed - before
    for op in ("depthwise_conv3d", "pair_interpolate"):
        assert ran[op, "triton"] == ran[f"{op}_backward", "triton"] == 6


# --- Traffic ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pair_interpolate", "depthwise_conv3d"])
def traffic(request: pytest.FixtureRequest) -> list[_traffic.Traffic]:
    """At batch 1, dim 768, 14×14, 16 frames, float16."""
    return _traffic.count(request.param, torch.float16)


def test_traffic(traffic: list[_traffic.Traffic]) -> None:
    assert len(traffic) in (2, 9), "forward and backward, or three passes of three convolutions"
    for row in traffic:
        print(row)
        assert row.programs >= 160, row
        # A prefix token isn't read by a convolution, so that a little less than everything can be moved.
        assert 0.95 < row.through_l2 <= row.traffic <= 1.3, row
        assert row.through_l2 <= 1.15, row


def test_traffic_of_every_program_is_that_of_the_first_block_moved() -> None:
    """`count` runs two blocks of channels and moves the first to the others' places; here all are run."""
    small = {"dim": 64, "frames": 4, "grid": (3, 3)}
    assert _traffic.count("depthwise_conv3d", torch.float32, **small) == _traffic.count(
        "depthwise_conv3d", torch.float32, every=True, **small
    )


def test_bench_counts_the_traffic_in_a_process_of_its_own() -> None:
    small = {"dim": 32, "frames": 2, "grid": (2, 2)}
    there = _traffic.count_elsewhere("pair_interpolate", torch.float16, **small)
    assert there == _traffic.count("pair_interpolate", torch.float16, **small)
    with pytest.raises(RuntimeError, match="counting the traffic of nothing failed"):
        _traffic.count_elsewhere("nothing", torch.float16, **small)


# --- Launch settings --------------------------------------------------------------------------------------------------


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """INTI_AUTOTUNE=1, and a stopwatch that runs every candidate and likes a later one best; returns its calls."""
    import triton

    calls: list[int] = []
    real = triton.autotune

    def timing(run, quantiles):  # type: ignore[no-untyped-def]
        run()
        calls.append(len(calls))
        return [1.0 / len(calls)] * 3

    monkeypatch.setenv("INTI_AUTOTUNE", "1")
    monkeypatch.setattr(triton, "autotune", lambda configs, **more: real(configs, do_bench=timing, **more))
    _launch._tuned.cache_clear()
    yield calls
    _launch._tuned.cache_clear()


def test_tuning_changes_settings_and_no_result(tuner: list[int]) -> None:
    """The buffer that gradients are added to gets them once, however often the tuner ran the kernel."""
    inputs, kwargs = op_cases("depthwise_conv3d", dim=16, frames=2, grid=(2, 2))
    x, weight, bias, position = inputs.values()
    arguments = (x, weight, bias, position, kwargs["grid"], 2, 1)

    def step() -> tuple[torch.Tensor, ...]:
        y = depthwise_conv3d.depthwise_conv3d_forward(*arguments)
        buffer = torch.ones_like(x)
        grads = depthwise_conv3d.depthwise_conv3d_backward(y, *arguments, (True,) * 4, buffer)
        return y, buffer, *grads[1:]

    tuned = step()
    timed = len(tuner)
    assert timed > 10
    settings = _launch.settings("depthwise_conv3d_forward", x)
    forward = _launch._tuned(depthwise_conv3d._depthwise_conv3d_forward_kernel, settings, False, x.device)
    assert len({str(config) for config in forward.configs}) > 3
    assert forward.configs[0].all_kwargs()["maxnreg"] == settings.registers, "the table's settings are a candidate"
    torch.testing.assert_close(step(), tuned, rtol=0, atol=0)
    assert len(tuner) == timed, "the second step takes what the first found"
    torch.use_deterministic_algorithms(True)
    try:
        assert not _launch.autotunes(x)
        by_table = step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(tuner) == timed
    torch.testing.assert_close(tuned, by_table)


def test_settings_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """By architecture, dim and dtype; whatever they are, what a program wants an SM has."""
    for arch in (70, 75, 80, 86, 90, 120):
        monkeypatch.setattr(_launch, "capability", lambda x, arch=arch: arch)
        for kernel in _launch._TABLE:
            for dim in (8, 384, 768, 1024):
                for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                    at = _launch.settings(kernel, torch.empty(1, 2, 3, dim, dtype=dtype))
                    assert (at.registers or 0) * 32 * at.warps <= _launch.SM_REGISTERS
                    # Every thread has at least one access of 16 bytes in a tile.
                    assert at.tokens * at.channels * dtype.itemsize >= 16 * 32 * at.warps, (kernel, dim, dtype, at)


def test_vectors_are_as_wide_as_the_strides_allow() -> None:
    x = torch.empty(2, 4, 6, 48, dtype=torch.float16)
    assert _launch.vector(x) == 8
    assert _launch.vector(x[..., :44]) == 4
    assert _launch.vector(x[..., :47]) == 1
    assert _launch.vector(torch.empty(2, 4, 6, 50)[..., :48]) == 2
    assert _launch.vector(torch.ones(()).expand(2, 4, 6, 48)) == 4
    # The stride of an axis of one is nothing.
    assert _launch.vector(torch.empty(3, 4, 6, 49)[:, :1, :1, :48].as_strided((1, 1, 1, 48), (7, 5, 3, 1))) == 4
