"""depthwise_conv3d: every backend against the reference, in all three cases of kernel and stride."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import op_suite
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_subject import Subject
from op_suite import sizes

from inti_kernels import ops, reference
from inti_kernels.testing import assert_close_three_way, three_way

ARGUMENTS = ("x", "weight", "bias", "position")
CUBE = Subject("depthwise_conv3d", ARGUMENTS)
SUBJECTS = {
    "cube level": CUBE,
    "position encoding": Subject("depthwise_conv3d", ARGUMENTS, {"temporal_stride": 1}),
    "local aggregation": Subject("depthwise_conv3d", ARGUMENTS, {"kernel": (3, 1, 1), "temporal_stride": 1}),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("check", op_suite.CHECKS, ids=lambda check: check.__name__)
def test_recipe(check: Callable[[Subject], None], kernels: str, threads: None) -> None:
    check(replace(CUBE, backend=kernels))


@pytest.mark.parametrize("subject", list(SUBJECTS.values())[1:], ids=list(SUBJECTS)[1:])
@pytest.mark.parametrize(
    "check",
    [
        op_suite.gradcheck,
        op_suite.only_what_is_needed,
        op_suite.accumulates_into_a_buffer,
        *sizes((op_suite.same_bits_at_any_thread_count, op_suite.fallback_differentiates), ()),
    ],
    ids=lambda check: check.__name__,
)
def test_recipe_of_the_other_kernels(
    subject: Subject, check: Callable[[Subject], None], kernels: str, threads: None
) -> None:
    check(replace(subject, backend=kernels))


@given(
    subject=st.sampled_from(sorted(SUBJECTS)).map(SUBJECTS.get),
    batch=sizes(st.integers(1, 3), st.integers(1, 2)),
    frames=sizes(st.sampled_from((2, 4, 6)), st.sampled_from((2, 4)), st.sampled_from((2, 4, 6, 10))),
    grid=st.one_of(
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        # One row, one column; for Triton a full tile of 64 patches, and more than one; for CUDA the grids of models.
        st.sampled_from(
            ((1, 1), (1, 7), (7, 1), *sizes(((2, 29), (9, 8)), ((8, 8), (13, 5)), ((14, 14), (16, 16), (24, 5))))
        ),
    ),
    dim=sizes(
        st.one_of(st.integers(1, 20), st.sampled_from((31, 32, 63, 64, 65, 127, 130))),
        st.sampled_from((16, 16, 19, 32, 37)),  # a block is 16 channels
        st.one_of(st.integers(1, 20), st.sampled_from((16, 24, 32, 33, 40, 48, 64, 72))),
    ),
    prefix=st.sampled_from((0, 1, 5)),
    dtype=st.sampled_from(DTYPES),
    position=st.booleans(),
    layout=st.sampled_from((None, "sequence first", "an offset and a wider row", "a slice of the tokens")),
    seed=st.integers(0, 9),
)
def test_matches_reference(backend: str, subject: Subject, **sizes: object) -> None:
    op_suite.compare_with_reference(subject, backend, **sizes)


@pytest.mark.parametrize("dtype", sizes(DTYPES, (torch.float16,), DTYPES), ids=str)
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_matches_reference_at_682_channels(backend: str, subject: Subject, dtype: torch.dtype) -> None:
    """UniFormerV2's local module at ViT-L works on ⌊1024 / 1.5⌋ channels, no multiple of any vector."""
    frames, grid = (2, (2, 2)) if backend == "triton" else (4, (5, 4))
    op_suite.compare_with_reference(subject, backend, batch=1, frames=frames, grid=grid, dim=682, dtype=dtype)


@pytest.mark.parametrize(
    "grid",
    sizes([(2, 30), (3, 31), (1, 61), (2, 64)], [(2, 33)], [(2, 30), (24, 24), (3, 31), (2, 64), (31, 3)]),
    ids=str,
)
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_wide_grids(backend: str, subject: Subject, grid: tuple[int, int]) -> None:
    """The C++ kernels cut rows wider than 30 columns (32 without a halo) into tiles; the others cut anywhere."""
    for dim in sizes((5,), (32,), (5, 32)):
        op_suite.compare_with_reference(subject, backend, batch=1, grid=grid, dim=dim, draws=sizes(None, None, 2))


def test_many_clips_share_partial_sums(backend: str) -> None:
    """More output frames than chunks of partial sums: a chunk then sums several frames."""
    many = {"batch": 9, "frames": 8}
    op_suite.compare_with_reference(CUBE, backend, **sizes(many, {}, many), grid=(2, 3), dim=17)


@op_suite.kernels_only
@pytest.mark.parametrize("dim", [16, 32, 40, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_the_grid_of_vit_b(backend: str, subject: Subject, dtype: torch.dtype, dim: int) -> None:
    """14×14 patches: whole tiles and runs, with 16-byte accesses and without."""
    op_suite.compare_with_reference(subject, backend, batch=1, frames=4, grid=(14, 14), dim=dim, dtype=dtype, draws=1)


def test_without_bias(backend: str) -> None:
    inputs, kwargs = CUBE.case()
    assert_close_three_way(three_way("depthwise_conv3d", {**inputs, "bias": None}, kwargs, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_of_another_dtype(backend: str, dtype: torch.dtype) -> None:
    """bfloat16 tokens and float32 parameters, as under autocast, and the other way round."""
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    inputs, kwargs = CUBE.case(dtype, dim=33)
    inputs = {name: value if name == "x" else value.to(other) for name, value in inputs.items()}
    assert_close_three_way(three_way("depthwise_conv3d", inputs, kwargs, backend=backend))


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_tokens_have_no_part(backend: str, prefix: int) -> None:
    inputs, kwargs = CUBE.case(prefix=prefix)
    x = inputs["x"].requires_grad_()
    y = ops.depthwise_conv3d(**inputs, **kwargs, backend=backend)
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert not y[:, :, :prefix].any()
    assert not grad[:, :, :prefix].any()
    with torch.no_grad():
        x[:, :, :prefix] = float("nan")
        torch.testing.assert_close(ops.depthwise_conv3d(**inputs, **kwargs, backend=backend), y, rtol=0, atol=0)


def test_nan_stays_nan(backend: str) -> None:
    inputs, kwargs = CUBE.case(grid=(5, 6), dim=19)
    inputs["x"][0, 2, 9, 4] = float("nan")
    y = ops.depthwise_conv3d(**inputs, **kwargs, backend=backend)
    assert torch.equal(y.isnan(), reference.depthwise_conv3d(**inputs, **kwargs).isnan())
    assert bool(y.isnan().any())


def test_position_is_not_added_to_the_padding(backend: str) -> None:
    """A clip of zeros on a 1×1 grid: only the centre taps see σP."""
    weight, position = torch.rand(4, 1, 3, 3, 3), torch.rand(2, 4)
    y = ops.depthwise_conv3d(
        torch.zeros(1, 2, 1, 4), weight, None, (1, 1), prefix=0, position=position, backend=backend
    )
    expected = (weight[:, 0, 1:, 1, 1] * position.T).sum(-1)
    torch.testing.assert_close(y[0, 0, 0], expected)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"grid": (3, 3)}, r"prefix \+ H·W = 1 \+ 3·3 = 10 tokens a frame, got 7"),
        ({"grid": (3,)}, r"grid must be \(H, W\)"),
        ({"grid": (0, 6)}, r"grid must be \(H, W\), both at least 1"),
        ({"prefix": -1}, "prefix must be 0 or more tokens, got -1"),
        ({"weight": torch.ones(5, 1, 5, 3, 3)}, "kernel and temporal stride out of: 3×3×3 with stride 2"),
        ({"weight": torch.ones(5, 1, 3, 1, 1)}, "kernel and temporal stride out of: 3×3×3 with stride 2"),
        ({"temporal_stride": 4}, "kernel and temporal stride out of"),
        ({"weight": torch.ones(4, 1, 3, 3, 3)}, r"weight must be \[C, 1, KT, KH, KW\] = \(5, 1, 3, 3, 3\)"),
        ({"bias": torch.ones(4)}, r"bias must be \[C\] = \(5,\)"),
    ],
)
def test_bad_sizes(changes: dict[str, object], match: str) -> None:
    inputs, kwargs = CUBE.case()
    with pytest.raises(ValueError, match=match):
        ops.depthwise_conv3d(**{**inputs, **kwargs, **changes})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"grid": (3.0, 2.0)}, "grid must be a whole number, got 3.0"),
        ({"grid": 6}, r"grid must be \(H, W\), two whole numbers, got 6"),
        ({"grid": None}, r"grid must be \(H, W\), two whole numbers, got None"),
        ({"grid": ("3", "2")}, "grid must be a whole number, got '3'"),
        ({"prefix": 1.0}, "prefix must be a whole number, got 1.0"),
        ({"temporal_stride": 2.0}, "temporal_stride must be a whole number, got 2.0"),
    ],
)
def test_sizes_are_whole_numbers(changes: dict[str, object], match: str, backend: str) -> None:
    inputs, kwargs = CUBE.case()
    with pytest.raises(TypeError, match=match):
        ops.depthwise_conv3d(**{**inputs, **kwargs, **changes}, backend=backend)
