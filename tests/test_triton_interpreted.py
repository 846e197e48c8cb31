"""The Triton kernels in Triton's interpreter: what tests/test_<op>.py doesn't ask of them. `make triton` runs this."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import op_suite
import pytest
import torch
from op_subject import Subject

from inti_kernels import FusedInTI, backends
from inti_kernels.backends.triton import _launch, _products, depthwise_conv3d, interpolation_head, token_features
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
        small = [(c, d, replace(at, tokens=4, channels=8, frames=4, inner=at.inner and 8)) for c, d, at in rows]
        monkeypatch.setitem(_launch._TABLE, kernel, tuple(small))


@pytest.fixture(params=[70, 80], ids=["cuBLAS", "tl.dot"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """On both sides of where Triton multiplies on tensor cores."""
    monkeypatch.setattr(_launch, "capability", lambda x: request.param)
    return request.param


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_tiles_and_blocks_of_token_features(small_tiles: None, capability: int, dtype: torch.dtype) -> None:
    """Two tiles of five tokens; three blocks of 20 channels and two of the Linear's ten, the last ones ragged."""
    subject = Subject("token_features", ("x", "norm_weight", "norm_bias", "weight", "bias", "position"))
    sizes = {"frames": 2, "grid": (2, 2), "dim": 20, "batch": 1, "dtype": dtype}
    op_suite.compare_with_reference(subject, "triton", draws=4, **sizes)


@pytest.mark.parametrize("context", [("cube", "frame"), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_tiles_and_blocks_of_the_head(
    small_tiles: None, capability: int, dtype: torch.dtype, context: tuple[str, ...]
) -> None:
    """Two tiles of five pairs of tokens in each of two frames, and a product whose tiles know no frames; two blocks
    of the hidden layer."""
    subject = Subject("interpolation_head", ())
    sizes = {"frames": 4, "grid": (2, 2), "dim": 10, "batch": 1, "hidden": 11, "dtype": dtype, "context": context}
    op_suite.compare_with_reference(subject, "triton", draws=6, **sizes)


def test_only_16_bits_from_ampere_on_are_multiplied_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for arch, dtypes in ((75, ()), (80, (torch.float16, torch.bfloat16)), (120, (torch.float16, torch.bfloat16))):
        monkeypatch.setattr(_launch, "capability", lambda x, arch=arch: arch)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert _products.dots(torch.empty(1, dtype=dtype)) == (dtype in dtypes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_a_backward_computes_again_has_the_same_bits(capability: int, dtype: torch.dtype) -> None:
    """The features from what their GELU was taken of, up to its rounding; that of the head's without the head."""
    sizes = {"dtype": dtype, "frames": 2, "grid": (2, 1), "dim": 12}
    features, _, kept = token_features.token_features_forward(
        *op_cases("token_features", **sizes).inputs.values(), 1e-5, True
    )
    again = token_features.token_features_activation(kept)
    torch.testing.assert_close(again, features, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    for context in ((), ("frame",), ("cube", "frame")):
        values = list(op_cases("interpolation_head", context=context, **sizes).inputs.values())
        *_, kept = interpolation_head.interpolation_head_forward(*values, True)
        again = interpolation_head.interpolation_head_preactivation(*values[:3], *values[4:6])
        torch.testing.assert_close(again, kept, rtol=0, atol=0)


def test_token_features_of_tokens_wider_than_the_linear(capability: int) -> None:
    """float32 tokens, as autocast finds them, and a gradient that is columns of a wider matrix."""
    inputs, _ = op_cases("token_features", frames=2, grid=(2, 1), dim=12)
    x, norm_weight, norm_bias, weight, bias, position = inputs.values()
    wide = (x, norm_weight, norm_bias, weight.half().float(), bias.half().float(), position, 1e-5)
    narrow = (*wide[:3], weight.half(), bias.half(), *wide[5:])
    expected = token_features.token_features_forward(*wide, True)
    features, statistics, kept = token_features.token_features_forward(*narrow, True)
    assert (features.dtype, kept.dtype, statistics.dtype) == (torch.float16, torch.float16, torch.float32)
    for ours, theirs in zip((features, statistics, kept), expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=5e-3, atol=5e-3)
    matrix = torch.randn(1, 1, 3, 15).half()
    upstream, needs = matrix[..., 2:14], (True,) * 6
    ours = token_features.token_features_backward(upstream, *narrow, statistics, kept, needs, None)
    theirs = token_features.token_features_backward(upstream.float(), *wide, *expected[1:], needs, None)
    for number, (grad, exact) in enumerate(zip(ours, theirs, strict=True)):
        assert grad.dtype == narrow[number].dtype
        torch.testing.assert_close(grad.float(), exact, rtol=1e-2, atol=1e-2 * float(exact.abs().max()))


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


@pytest.mark.parametrize(
    ("autocast", "recompute", "capability"),
    [(None, False, 70), (torch.float16, False, 70), (torch.bfloat16, True, 80)],
    indirect=["capability"],
    ids=["float32", "float16", "bfloat16 by tl.dot, recomputed"],
)
def test_fused_inti(autocast: torch.dtype | None, recompute: bool, capability: int) -> None:
    inti, x = module_case(dim=16, frames=4, grid=(2, 3))
    fused = FusedInTI.from_reference(inti, backend="triton", recompute=recompute)
    before = backends.executed.copy()
    assert_close_three_way(three_way_module(fused, x, autocast=autocast, draws=6))
    ran = backends.executed - before
    assert ran["inti", "triton"] == ran["inti_backward", "triton"] == 6
    for op in ("token_features", "depthwise_conv3d", "interpolation_head"):  # the parts of its chain
        assert ran[op, "triton"] >= 6
        assert ran[f"{op}_backward", "triton"] >= 6


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
