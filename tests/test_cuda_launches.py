"""How many kernels FusedInTI launches on CUDA, counted in the emulator; and the sums that are left to one launch.

INTI_CUDA_LIBRARY names the emulator, which asks for this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from op_subject import as_tuple, loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inti_kernels import FusedInTI, ops
from inti_kernels.backends import cuda
from inti_kernels.backends.cuda import depthwise_conv3d, interpolation_head, token_features
from inti_kernels.backends.cuda._launch import deferred_sums, launch, rows
from inti_kernels.ops import _recipe
from inti_kernels.testing import module_case, op_cases

DIM, FRAMES, GRID = 16, 4, (24, 25)
TOKEN_PAIRS = FRAMES // 2 * (1 + GRID[0] * GRID[1])  # more than any parameter has numbers
# What starts no kernel beside views: memory, which tests fill with NaN, and questions.
NO_LAUNCH = (
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "full",
    "_unsafe_view",
    "promote_types",
    "scalar_tensor",
)


class Launches(TorchDispatchMode):
    """What runs inside: kernels of this package by name, and PyTorch's ops that aren't views.

    Attributes:
        tokens: those that read or write something of every token pair.
        small: the others, of class tokens, positions and parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[str] = []
        self.small: list[str] = []

    def __enter__(self) -> Launches:
        cuda.load().start_recording()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for kernel in (launched["kernel"] for launched in cuda.load().stop_recording()):
            (self.small if kernel.startswith("class_levels_") else self.tokens).append(kernel)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = op(*args, **(kwargs or {}))
        if not op.is_view and op.overloadpacket.__name__ not in NO_LAUNCH:
            tensors = [t for t in tree_leaves((args, kwargs, outputs)) if isinstance(t, Tensor)]
            text = f"{op} {', '.join(str(tuple(t.shape)) for t in tensors)}"
            large = max((t.numel() for t in tensors), default=0) >= TOKEN_PAIRS
            (self.tokens if large else self.small).append(text)
        return outputs


@pytest.fixture
def without_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no mode is active: inside a custom op a mode sees nothing."""
    monkeypatch.setattr(_recipe, "plain_eager", lambda x: True)


def ran(fused: FusedInTI, x: Tensor, autocast: torch.dtype | None) -> tuple[Launches, Launches]:
    leaves = [x.requires_grad_(), *fused.parameters()]
    with Launches() as forward, torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = fused(x, return_weights=True)
    upstream = [torch.ones_like(out) for out in outputs]
    with Launches() as backward:
        torch.autograd.grad(outputs, leaves, upstream)
    for launches in (forward, backward):
        print(*launches.tokens, f"beside {len(launches.small)}:", *launches.small, sep="\n  ")
    return forward, backward


@pytest.mark.parametrize("autocast", [False, True], ids=["float16", "autocast of float32"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_launches_of_fused_inti(recompute: bool, autocast: bool, without_dispatcher: None) -> None:
    """Every gradient wanted. Computed again, the features are a product's in place of an activation's, and the cube and
    the hidden layer take a kernel each. Under autocast the tokens are converted each way."""
    inti, x = module_case(dim=DIM, frames=FRAMES, grid=GRID, dtype=torch.float32 if autocast else torch.float16)
    fused = FusedInTI.from_reference(inti, backend="cuda", recompute=recompute)
    forward, backward = ran(fused, x, torch.float16 if autocast else None)
    assert len(forward.tokens) <= 6
    assert len(backward.tokens) <= 13 + 2 * recompute + autocast
    sums = [launch for launch in backward.tokens if launch == "partial_sums_kernel"]
    assert len(sums) == 1
    copies = [launch for launch in forward.tokens + backward.tokens if "copy" in launch or "cat" in launch]
    assert len(copies) == 2 * autocast
    # Of class tokens and parameters: what these take is launched, not computed. Four are σ's own.
    assert len(forward.small) <= 11
    assert len(backward.small) <= 21 + 8 * recompute


def test_nothing_is_launched_for_a_frozen_module(without_dispatcher: None) -> None:
    """Only x's gradient is wanted: no partial sums."""
    inti, x = module_case(dim=DIM, frames=FRAMES, grid=GRID, dtype=torch.float16, context=("cube",))
    fused = FusedInTI.from_reference(inti, backend="cuda").requires_grad_(False)
    outputs = fused(x.requires_grad_(), return_weights=True)
    with Launches() as backward:
        torch.autograd.grad(outputs, [x], [torch.ones_like(out) for out in outputs])
    assert "partial_sums_kernel" not in backward.tokens


# --- The sums ---------------------------------------------------------------------------------------------------------


@contextmanager
def recorded() -> Iterator[list[str]]:
    names: list[str] = []
    cuda.load().start_recording()
    try:
        yield names
    finally:
        names += [launch["kernel"] for launch in cuda.load().stop_recording()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sums(dtype: torch.dtype) -> None:
    """Contiguous and in runs, of few columns, of both signs, more than a launch takes; against sums in float64."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cases, outputs = [], []
    with recorded() as launched, deferred_sums() as sums:
        for shape, columns in [((70, 40), slice(None)), ((9, 33, 28), slice(27)), ((13, 5), slice(None)),
                               ((600, 1), slice(None)), ((0, 34), slice(None)), ((3, 2, 7), slice(None))]:  # fmt: skip
            partials = torch.randn(shape, dtype=wide)[..., columns]
            for negated in (False, True):
                cases.append((partials, -1 if negated else 1))
                outputs.append(torch.full(partials.shape[1:], float("nan"), dtype=dtype))
                sums.add(partials, outputs[-1], negated=negated)
        every = torch.randn(40, 31, 28, dtype=wide)
        both = torch.full((2, 31), float("nan"), dtype=dtype)
        sums.add_both_signs(every[..., 27], both)
        cases += [(every[..., 27], 1), (every[..., 27], -1)]
        outputs += both
        for _ in range(3):
            cases.append((every[..., 3], 1))
            outputs.append(torch.full((31,), float("nan"), dtype=dtype))
            sums.add(every[..., 3], outputs[-1])
    assert len(cases) == 17
    assert launched == ["partial_sums_kernel"] * 2
    for (partials, sign), actual in zip(cases, outputs, strict=True):
        expected = sign * partials.double().sum(0)
        eps = torch.finfo(dtype).eps if dtype != wide else 16 * torch.finfo(wide).eps
        torch.testing.assert_close(actual.double(), expected, rtol=eps, atol=100 * torch.finfo(wide).eps)


def test_long_sums_of_one_sign_lose_as_little_as_pytorch() -> None:
    """A bias of two numbers has one column of as many terms as there are pairs of tokens."""
    partials, outputs = torch.full((4096, 1), 0.1), torch.empty(1)
    with deferred_sums() as sums:
        sums.add(partials, outputs)
    torch.testing.assert_close(
        outputs.double(), partials.double().sum(0), rtol=4 * torch.finfo(torch.float32).eps, atol=0
    )


def test_sums_of_one_position_are_one() -> None:
    position, other = torch.zeros(2, 40), torch.zeros(2, 40)
    parts = [torch.randn(rows, 2, 40) for rows in (3, 50, 1)]
    with recorded() as launched, deferred_sums() as sums:
        first, alone, *rest = (sums.position(p, to) for p, to in zip(parts, (position, other, position), strict=True))
    assert launched == ["partial_sums_kernel"]
    assert rest == [None]
    torch.testing.assert_close(first, parts[0].sum(0) + parts[2].sum(0))
    torch.testing.assert_close(alone, parts[1].sum(0))


def test_blocks_join_and_an_exception_leaves_nothing() -> None:
    partials, out = torch.ones(4, 32), torch.zeros(32)
    with recorded() as launched, deferred_sums() as outer:
        with deferred_sums() as inner:
            assert inner is outer
            inner.add(partials, out)
        assert not out.any(), "the outer block launches"
    assert launched == ["partial_sums_kernel"]
    assert (out == 4).all()

    def fails() -> None:
        with deferred_sums() as sums:
            sums.add(partials, out)
            raise ZeroDivisionError

    with recorded() as launched, pytest.raises(ZeroDivisionError):
        fails()
    assert launched == []
    with deferred_sums() as sums:
        assert sums is not outer


def test_the_module_refuses_sums_that_it_cannot_make() -> None:
    module, partials, out = cuda.load(), torch.ones(4, 32), torch.zeros(32)
    one = (partials.data_ptr(), 4, 32, 32, 32, 32, out.data_ptr(), "float32", False, False)
    for sums, said in [
        ((one,) * 17, "up to 16"),
        (((*one[:-1], True),), "the last sum goes on"),
        (((*one[:-1], True), (*one[:3], 16, 16, *one[5:])), "another number of columns"),
        ((one[:-1],), "ten members"),
    ]:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=said):
            module.partial_sums(sums=sums, dtype="float32", stream=0)
    module.partial_sums(sums=(one,), dtype="float32", stream=0)
    assert (out == 4).all()


# Gradients that an entry point sums itself where it is given their address; the backends leave all of them to one
# launch. Of frame_bias, which is no input of the op, the partial sums are added up here.
SUMMED = {
    "pair_interpolate_backward": ("position",),
    "depthwise_conv3d_backward": ("weight", "bias", "position"),
    "token_features_backward_activation": ("bias",),
    "token_features_backward_norm": ("norm_weight", "norm_bias", "position"),
    "interpolation_head_backward": ("bias1", "weight2", "bias2", "position", "frame_bias"),
}


@pytest.mark.parametrize(
    ("op", "more"),
    [(op, {}) for op in ops.OPS] + [("depthwise_conv3d", {"kernel": (3, 1, 1), "temporal_stride": 1})],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_entry_points_sum_as_the_deferred_sums_do(
    dtype: torch.dtype, op: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every backward launch of the backend again, with somewhere for its sums to go: the same bits."""
    calls: list[tuple[str, Tensor, dict[str, Any]]] = []

    def kept(entry: str, like: Tensor, /, **arguments: Any) -> None:
        calls.append((entry, like, arguments))
        launch(entry, like, **arguments)

    monkeypatch.setattr(import_module(f"{cuda.__name__}.{op}"), "launch", kept)
    inputs, kwargs = op_cases(op, dim=40, frames=4, grid=(7, 9), batch=2, dtype=dtype, **more)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    outputs = as_tuple(getattr(ops, op)(**leaves, **kwargs, backend="cuda"))
    expected = dict(zip(leaves, torch.autograd.grad(loss(outputs), list(leaves.values())), strict=True))
    again = [call for call in calls if call[0] in SUMMED]
    assert {entry for entry, _, _ in again} == {entry for entry in SUMMED if entry.startswith(op)}
    wide = dict.fromkeys(("position", "frame_bias"), torch.promote_types(dtype, torch.float32))
    for entry, like, arguments in again:
        if (partials := arguments.get("frame_partials")) is not None:
            expected["frame_bias"] = torch.empty(partials.shape[1:], dtype=partials.dtype)
            with deferred_sums() as sums:
                sums.add(partials, expected["frame_bias"])
        to = {
            f"grad_{name}": torch.full_like(expected[name], float("nan"), dtype=wide.get(name))
            for name in SUMMED[entry]
        }
        assert all(arguments[name] is None for name in to), "else it was no deferred sum"
        launch(entry, like, **{**arguments, **to})
        for name in SUMMED[entry]:
            assert torch.equal(to[f"grad_{name}"].to(expected[name].dtype), expected[name]), name


# --- What the chain asks of the ops beside their forward and backward -------------------------------------------------

SHAPES = [{"dim": 16, "grid": (3, 5)}, {"dim": 5, "grid": (2, 2)}, {"dim": 40, "grid": (7, 9), "batch": 2}]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_activation_gives_the_features_again(dtype: torch.dtype, shape: dict[str, Any]) -> None:
    """Up to the rounding of what was kept, which in float32 and float64 is none."""
    inputs, _ = op_cases("token_features", frames=4, dtype=dtype, **shape)
    features, _, preactivation = token_features.token_features_forward(*inputs.values(), 1e-5, True)
    again = token_features.token_features_activation(preactivation)
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(again, features, rtol=eps, atol=eps)


def _into_a_total(dtype: torch.dtype, shape: dict[str, Any], accumulates: bool, of_total: torch.dtype) -> None:
    inputs, _ = op_cases("token_features", frames=4, dtype=dtype, **shape)
    features, *of_forward = token_features.token_features_forward(*inputs.values(), 1e-5, True)
    upstream = torch.randn(features.shape).to(dtype)
    before = torch.randn(inputs["x"].shape).to(dtype) if accumulates else None
    total = torch.randn(inputs["x"].shape, dtype=of_total)

    def backward(*to: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = (upstream, *inputs.values(), 1e-5, *of_forward, [True] * 6)
        return token_features.token_features_backward(*arguments, *to)

    of_x, *of_parameters = backward(None)
    expected, kept = total + of_x, None if before is None else before.clone()
    expected = expected if before is None else expected + before
    nothing, *as_before = backward(before, total)
    assert nothing is None
    assert all(torch.equal(a, b) for a, b in zip(as_before, of_parameters, strict=True))
    assert before is None or torch.equal(before, kept)
    # Of the gradient alone, which was rounded.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=eps * float(of_x.float().abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_token_features_adds_the_gradient_to_a_total(
    dtype: torch.dtype, accumulates: bool, shape: dict[str, Any]
) -> None:
    """In float32, beside tokens in 16 bits; what other ops have added up in 16 bits comes with it, and stays."""
    _into_a_total(dtype, shape, accumulates, torch.float32)


@pytest.mark.parametrize(("dtype", "of_total"), [(torch.float16, torch.float16), (torch.float32, torch.float32)])
def test_a_total_is_float32_beside_16_bits(dtype: torch.dtype, of_total: torch.dtype) -> None:
    with pytest.raises(ValueError, match="expected a contiguous total in float32"):
        _into_a_total(dtype, SHAPES[0], False, of_total)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("context", [("cube", "frame"), ("cube",), ("frame",), ()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_preactivation_alone_has_the_same_bits(
    dtype: torch.dtype, context: tuple[str, ...], shape: dict[str, Any]
) -> None:
    inputs, _ = op_cases("interpolation_head", frames=4, dtype=dtype, context=context, **shape)
    *_, kept = interpolation_head.interpolation_head_forward(*inputs.values(), True)
    names = ("features", "cube", "frame_context", "weight1", "bias1")
    alone = interpolation_head.interpolation_head_preactivation(*(inputs[name] for name in names))
    assert torch.equal(alone, kept)


@pytest.mark.parametrize("dim", [16, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_gradients_that_are_columns_of_one_matrix(dtype: torch.dtype, dim: int) -> None:
    """As the head leaves those of features and cube: no copy, and the same bits."""
    inputs, _ = op_cases("token_features", dim=dim, frames=4, grid=(3, 5), dtype=dtype)
    features, statistics, preactivation = token_features.token_features_forward(*inputs.values(), 1e-5, True)
    both = torch.randn(*features.shape[:3], features.shape[3] + dim).to(dtype)
    columns = both[..., : features.shape[3]]
    assert rows(columns)[0] is columns
    results = [
        token_features.token_features_backward(
            grad, *inputs.values(), 1e-5, statistics, preactivation, (True,) * 6, None
        )
        for grad in (columns, columns.contiguous())
    ]
    inputs, kwargs = op_cases("depthwise_conv3d", dim=dim, frames=4, grid=(3, 5), dtype=dtype)
    columns = both[..., features.shape[3] :]
    arguments = (*inputs.values(), kwargs["grid"], kwargs["temporal_stride"], kwargs["prefix"], (True,) * 4, None)
    of_cube = [depthwise_conv3d.depthwise_conv3d_backward(g, *arguments) for g in (columns, columns.contiguous())]
    for a, b in zip(results[0] + of_cube[0], results[1] + of_cube[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("tensor", "pitch"),
    [
        (torch.zeros(2, 3, 4, 5), 5),
        (torch.zeros(2, 3, 4, 9)[..., 2:7], 9),
        (torch.zeros(2, 1, 4, 9)[..., :5], 9),
        (torch.zeros(1, 1, 1, 9)[..., :5], 5),
        (torch.zeros(2, 3, 6, 5)[:, :, 1:5], None),
        (torch.zeros(5).expand(2, 3, 4, 5), None),
        (torch.zeros(2, 3, 5, 4).transpose(2, 3), None),
    ],
)
def test_rows(tensor: Tensor, pitch: int | None) -> None:
    """Rows at one distance are taken as they are; others are copied."""
    taken, distance = rows(tensor)
    assert (taken is tensor) == (pitch is not None)
    assert distance == (pitch or 5)
    assert taken.stride(-1) == 1
