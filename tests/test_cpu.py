"""What is the cpu backend's own: its GELU, its products, its chunks, and the functions that the whole module's op calls
beside the ops'."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import op_suite
import pytest
import torch
from op_subject import Subject, assert_same_bits
from torch import Tensor

from inti_kernels import ops
from inti_kernels.backends.cpu import _call, _few_rows, _products, depthwise_conv3d, interpolation_head, token_features
from inti_kernels.testing import assert_close_three_way, op_cases, three_way

pytestmark = pytest.mark.only_under_test("cpu")

TOKEN = Subject("token_features", ("x", "norm_weight", "norm_bias", "weight", "bias", "position"), more=(1e-5,), kept=2)
HEAD = Subject(
    "interpolation_head",
    ("features", "cube", "frame_context", "x", "weight1", "bias1", "weight2", "bias2", "position"),
    {"context": ("cube", "frame")},
    kept=2,
)
SUBJECTS = pytest.mark.parametrize("subject", [TOKEN, HEAD], ids=lambda subject: subject.name)
HALVES = (torch.bfloat16, torch.float16)
DRAWS = 12  # enough for the two numbers of bias2; the default takes 32


def multiply_by_kernel(
    patch: pytest.MonkeyPatch, condition: Callable[[torch.dtype], bool], *, forward_only: bool = False
) -> None:
    """Has the compiled module multiply in the dtypes of a condition, and PyTorch in the others, on any processor."""
    patch.setattr(_products, "by_kernel", (lambda dtype: False) if forward_only else condition)
    patch.setattr(_products, "in_one_pass", condition)


# --- GELU -------------------------------------------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    return token_features.token_features_activation(x.view(1, 2, 1, -1)).flatten()


def slope(x: Tensor) -> Tensor:
    """GELU'(x), which the backward multiplies a gradient of ones by."""
    grad = torch.empty_like(x)
    _call.call(
        "token_features_activation_backward",
        shape=(1, 2, 1, 0, x.numel() // 2, 0, 2),
        dtypes=(_call.name_of(x.dtype),) * 3,
        grad_features=torch.ones_like(x),
        grad_features_pitch=x.numel(),
        preactivation=x,
        grad_preactivation=grad,
        partials=None,
    )
    return grad


def floats_of_both_signs() -> Tensor:
    """Every 61st float32 from 2⁻⁴⁰ to 16, and those between 12.9 and 13.1."""
    bits = torch.arange(0x2B800000, 0x41800000, 61, dtype=torch.int32)
    positive = torch.cat((bits.view(torch.float32), torch.linspace(12.9, 13.1, 4001)))
    return torch.cat((positive, -positive))


def in_units(error: Tensor, exact: Tensor) -> Tensor:
    """In units of the last place of float32, of its smallest normal number below that."""
    _, exponent = torch.frexp(exact)
    return error.abs() / torch.exp2(exponent.clamp(min=-125).double() - 24)


def test_gelu_keeps_its_digits(backend: str) -> None:
    """Φ is within 2 units; a unit of the product is up to twice as small, and it rounds."""
    x = floats_of_both_signs()
    wide = x.double()
    exact = 0.5 * wide * torch.special.erfc(-wide * 0.5**0.5)
    error = in_units(gelu(x).double() - exact, exact)
    assert float(error[x > 0].max()) <= 4
    assert float(error[(x < 0) & (x > -12.9)].max()) <= 4
    assert float((gelu(x).double() - exact).abs()[x < -12.9].max()) <= 2**-120


def test_the_normal_distribution_is_within_two_units(backend: str) -> None:
    """Φ(x) is what the product with x is made of, but for the half unit of the product that it rounds off."""
    x = floats_of_both_signs()
    value, wide = gelu(x).double(), x.double()
    there = (x.abs() > 2**-12) & (x > -12.85)
    value, wide = value[there], wide[there]
    exact = 0.5 * torch.special.erfc(-wide * 0.5**0.5)
    half = torch.exp2(torch.frexp(value).exponent.double() - 25) / wide.abs()
    error = (value / wide - exact).abs() - half
    assert float(in_units(error.clamp(min=0), exact).max()) <= 2


def test_the_slope_of_gelu(backend: str) -> None:
    x = floats_of_both_signs()
    wide = x.double()
    exact = 0.5 * torch.special.erfc(-wide * 0.5**0.5) + wide * torch.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    assert float((slope(x).double() - exact).abs().max()) <= 2**-22


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gelu_of_16_bits_is_the_nearest_number(dtype: torch.dtype, backend: str) -> None:
    """Of every number there is, but for one that lies all but in the middle of two."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = x[x.isfinite()]
    wide = x.double()
    cdf = 0.5 * torch.special.erfc(-wide * 0.5**0.5)
    for actual, exact in (
        (gelu(x), wide * cdf),
        (slope(x), cdf + wide * torch.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)),
    ):
        # In units of the last place, no smaller than that of the smallest normal number.
        _, exponent = torch.frexp(exact)
        smallest = torch.frexp(torch.tensor(torch.finfo(dtype).tiny)).exponent
        unit = torch.exp2(exponent.clamp(min=int(smallest)).double()) * torch.finfo(dtype).eps / 2
        error = ((actual.double() - exact).abs() / unit)[x > -12.9]
        assert float(error.max()) <= 0.5 + 2**-5


def test_gelu_falls_to_its_limits(backend: str) -> None:
    """Where Φ is all but 0 or 1 there is no step up or down that rounding doesn't explain."""
    x = torch.linspace(3, 16, 100_000)
    assert bool((gelu(x)[x > 6] == x[x > 6]).all())
    tail = gelu(-x)
    assert bool((tail <= 0).all())
    assert bool((tail[1:] >= tail[:-1] * (1 + 1e-6)).all())
    assert bool((tail[x > 13.0] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gelu_of_what_is_no_ordinary_number(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30, 1e-40], dtype=dtype)
    # In float64: PyTorch's float32 has NaN for inf, on processors with AVX-512.
    expected = torch.nn.functional.gelu(x.double()).to(dtype)
    assert_same_bits(gelu(x), expected)
    assert torch.equal(gelu(x)[3:5].signbit(), x[3:5].signbit())
    leaf = x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(torch.nn.functional.gelu(leaf).sum(), leaf)
    torch.testing.assert_close(slope(x), by_autograd, equal_nan=True)


def test_float64_by_the_library(backend: str) -> None:
    x = torch.linspace(-40, 12, 10_000, dtype=torch.float64)
    exact = 0.5 * x * torch.special.erfc(-x * 0.5**0.5)
    # Below the normal numbers there are few digits.
    torch.testing.assert_close(gelu(x), exact, rtol=1e-13, atol=torch.finfo(torch.float64).tiny)


# --- Products ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def native_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that has 16-bit products, though here they are slow."""
    monkeypatch.setattr(_products, "product_dtype", lambda dtype: dtype)


@SUBJECTS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_in_16_bits(subject: Subject, dtype: torch.dtype, backend: str, native_products: None) -> None:
    case = subject.case(dtype, dim=33, grid=(3, 4))
    assert_close_three_way(three_way(subject.name, *case, backend=backend, draws=DRAWS))


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("context", [(), ("cube",), ("frame",)], ids=str)
@pytest.mark.parametrize(("width", "hidden"), [(0, 5), (4, 0), (0, 0)])
def test_a_head_whose_matrix_has_no_numbers(
    width: int, hidden: int, context: tuple[str, ...], by_kernel: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without features or a hidden layer; forward alone, and what is kept for the backward."""
    multiply_by_kernel(monkeypatch, lambda dtype: by_kernel)
    inputs = {
        "features": (2, 3, 5, width), "cube": (2, 3, 5, 7) if "cube" in context else None,
        "frame_context": (2, 3, 7) if "frame" in context else None, "x": (2, 6, 5, 7),
        "weight1": (hidden, width + 7 * bool(context)), "bias1": (hidden,), "weight2": (2, hidden), "bias2": (2,),
        "position": None,
    }  # fmt: skip
    inputs = {name: shape and torch.randn(shape) for name, shape in inputs.items()}
    leaves = [tensor.requires_grad_() for tensor in inputs.values() if tensor is not None]
    results = []
    for name in (backend, "reference"):
        with torch.no_grad():
            alone = ops.interpolation_head(**inputs, backend=name)
        outputs = ops.interpolation_head(**inputs, backend=name)
        results.append((*alone, *outputs, *torch.autograd.grad(outputs[0].square().sum(), leaves, allow_unused=True)))
    torch.testing.assert_close(*([t for t in run if t is not None] for run in results))


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_token_level_without_features(by_kernel: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_by_kernel(monkeypatch, lambda dtype: by_kernel)
    inputs, kwargs = TOKEN.case()
    inputs |= {"weight": inputs["weight"][:0], "bias": inputs["bias"][:0]}
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    features = ops.token_features(**inputs, **kwargs, backend=backend)
    assert features.shape == ops.token_features(**inputs, **kwargs, backend="reference").shape
    for grad in torch.autograd.grad(features.sum(), list(inputs.values())):
        assert not grad.any()


@SUBJECTS
def test_products_by_onednn(subject: Subject, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on AMD's processors with AVX-512."""
    multiply_by_kernel(monkeypatch, lambda dtype: False)
    monkeypatch.setattr(_products, "BY_ONEDNN", torch.backends.mkldnn.is_available())
    monkeypatch.setattr(_call, "ROWS", dict.fromkeys(_call.ROWS, 20))
    case = subject.case(dim=33, grid=(3, 4))
    assert_close_three_way(three_way(subject.name, *case, backend=kernels, draws=DRAWS))
    op_suite.no_clips(subject)


@SUBJECTS
def test_a_forward_in_one_pass_alone(subject: Subject, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Intel's processors with AVX-512: all other products are PyTorch's."""
    multiply_by_kernel(monkeypatch, lambda dtype: dtype == torch.float32, forward_only=True)
    case = subject.case(dim=33, grid=(3, 4))
    assert_close_three_way(three_way(subject.name, *case, backend=backend, draws=DRAWS))


@pytest.fixture
def products_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on AMD's processors with AVX2 and no more, and there with 16-bit networks too."""
    wide = dict.fromkeys(HALVES, torch.float32)
    monkeypatch.setattr(_products, "product_dtype", lambda dtype: wide.get(dtype, dtype))
    multiply_by_kernel(monkeypatch, lambda dtype: dtype == torch.float32)


@SUBJECTS
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dim", [6, 33, 48])
def test_products_by_the_kernel(
    subject: Subject, dtype: torch.dtype, dim: int, backend: str, products_by_the_kernel: None
) -> None:
    case = subject.case(dtype, dim=dim, grid=(3, 4))
    assert_close_three_way(three_way(subject.name, *case, backend=backend, draws=DRAWS))
    op_suite.no_clips(subject)


@SUBJECTS
def test_the_kernel_gives_the_same_bits_at_any_thread_count(
    subject: Subject, threads: None, products_by_the_kernel: None
) -> None:
    """Without the product of the frames' context, which is torch's."""
    op_suite.same_bits_at_any_thread_count(replace(subject, sizes=subject.sizes and {"context": ("cube",)}))


def as_stored(matrix: Tensor, layout: str) -> Tensor:
    """The same numbers, with rows or columns in one line, or neither."""
    if layout == "rows":
        return matrix.contiguous()
    if layout == "columns":
        return matrix.t().contiguous().t()
    spread = torch.full((2 * matrix.shape[0], 3 * matrix.shape[1]), math.nan)
    spread[::2, ::3] = matrix
    return spread[::2, ::3]


@pytest.mark.parametrize("layouts", [("rows", "columns"), ("columns", "rows"), ("spread", "spread")], ids="-".join)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (5, 31, 7), (14, 32, 4), (50, 33, 401), (12, 70, 1602), (300, 17, 6)], ids=str
)
def test_a_product(sizes: tuple[int, int, int], accumulate: bool, layouts: tuple[str, str], backend: str) -> None:
    """To columns of a wider matrix, whose others stay."""
    rows, columns, depth = sizes
    a, b, before = torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(rows, columns + 3)
    to = before.clone()
    _products.multiply(as_stored(a, layouts[0]), as_stored(b, layouts[1]), to[:, 2:-1], accumulate=accumulate)
    exact = a.double() @ b.double() + accumulate * before[:, 2:-1].double()
    size = a.abs().double() @ b.abs().double() + before[:, 2:-1].abs().double()
    # Sums of sums: far less than a term's rounding for each of the terms.
    assert bool(((to[:, 2:-1] - exact).abs() <= 2 * math.sqrt(depth) * 2**-24 * size).all())
    assert_same_bits((to[:, :2], to[:, -1:]), (before[:, :2], before[:, -1:]))


def test_a_product_of_what_is_no_ordinary_number(backend: str) -> None:
    """NaN and infinity stay in their row, whatever a tile has beside it."""
    a, b, to = torch.ones(9, 5), torch.ones(5, 35), torch.empty(9, 35)
    a[7, 3], a[8, 4] = math.nan, math.inf
    _products.multiply(a, b, to, accumulate=False)
    assert_same_bits(to, a @ b)


# --- The cube level under autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_convolution_of_float32_in_16_bits(dtype: torch.dtype, backend: str) -> None:
    """Its result is the float32 one's, rounded; its gradients are those of what comes back, columns of a wider matrix,
    and x's is added to one in float32."""
    x, weight, bias = torch.randn(2, 4, 13, 35), torch.randn(35, 1, 3, 3, 3), torch.randn(35)
    arguments = (x, weight, bias, torch.randn(4, 35), (3, 4), 2, 1)
    y = depthwise_conv3d.depthwise_conv3d_forward(*arguments)
    assert_same_bits(depthwise_conv3d.depthwise_conv3d_forward(*arguments, dtype), y.to(dtype))
    grad_y, before = torch.randn(2, 2, 13, 40, dtype=dtype)[..., 3:38], torch.randn_like(x)
    found = []
    for upstream in (grad_y, grad_y.float()):
        accumulate = before.clone()
        grads = depthwise_conv3d.depthwise_conv3d_backward(upstream, *arguments, (True,) * 4, accumulate)
        found.append((accumulate, *grads[1:]))
    assert_same_bits(*found)


@pytest.mark.parametrize("row", [0, 2])
def test_a_convolutions_taps_see_no_gradient_outside_of_the_grid(row: int, kernels: str) -> None:
    """Of an infinite x in the first or last row the taps that lead out of the grid know nothing."""
    x, grad_y = torch.randn(1, 2, 12, 8), torch.randn(1, 1, 12, 8)
    x.view(1, 2, 3, 4, 8)[:, :, row] = math.inf
    arguments = (x, torch.randn(8, 1, 3, 3, 3), None, None, (3, 4), 2, 0)
    grad = depthwise_conv3d.depthwise_conv3d_backward(grad_y, *arguments, (False, True, False, False), None)[1]
    assert bool(grad[:, 0, 1:, 2 - row].isfinite().all())
    assert not bool(grad[:, 0, 1:, row].isfinite().any())


@pytest.mark.parametrize(
    "pair",
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_a_convolution_has_no_other_pair_of_dtypes(pair: tuple[torch.dtype, torch.dtype], kernels: str) -> None:
    x, weight, y = torch.randn(1, 2, 5, 8), torch.randn(8, 1, 3, 3, 3), torch.randn(1, 1, 5, 8)
    arguments = (x.to(pair[0]), weight.to(pair[0]), None, None, (2, 2), 2, 1)
    with pytest.raises(ValueError, match="16 bits beside float32"):
        depthwise_conv3d.depthwise_conv3d_forward(*arguments, pair[1])
    with pytest.raises(ValueError, match="16 bits beside float32"):
        depthwise_conv3d.depthwise_conv3d_backward(y.to(pair[1]), *arguments, (True, True, False, False), None)


# --- Linears of a few rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_weight", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (15, 130, 70), (23, 64, 32), (8, 3, 65), (0, 5, 3), (3, 0, 5), (3, 5, 0)], ids=str
)
def test_a_linear_of_a_few_rows(
    sizes: tuple[int, int, int], accumulate: bool, of_weight: torch.dtype, backend: str
) -> None:
    """Of a weight and gradients that are columns of wider matrices, as the head's are."""
    rows, width, out = sizes
    dtype = torch.promote_types(of_weight, torch.float32)
    torch.manual_seed(0)
    x, bias, before = (torch.randn(*size, dtype=dtype) for size in ((rows, width), (out,), (out, width)))
    weight, wide = (
        torch.randn(out, width + 3, dtype=dtype).to(of_weight)[:, 3:],
        torch.empty(out, width + 5, dtype=dtype),
    )
    grad_y = torch.randn(rows, 2, out, dtype=dtype)[:, 0]
    bound = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}

    y = _few_rows.forward(x, weight, bias)
    torch.testing.assert_close(y, (x.double() @ weight.double().t() + bias).to(dtype), **bound)

    grad_x, grad_weight, grad_bias = torch.full_like(x, math.nan), wide[:, 2:-3], torch.full_like(bias, math.nan)
    grad_weight.copy_(before if accumulate else torch.full_like(before, math.nan))
    wide[:, :2], wide[:, -3:] = 7, 7
    given = {"grad_weight": grad_weight, "accumulate": accumulate, "grad_bias": grad_bias}
    _few_rows.backward(grad_y, x, weight, grad_x=grad_x, **given)
    right = grad_y.double().t() @ x.double() + (before if accumulate else 0)
    torch.testing.assert_close(grad_x, (grad_y.double() @ weight.double()).to(dtype), **bound)
    torch.testing.assert_close(grad_weight, right.to(dtype), **bound)
    torch.testing.assert_close(grad_bias, grad_y.double().sum(0).to(dtype), **bound)
    assert bool((wide[:, :2] == 7).all() and (wide[:, -3:] == 7).all())
    # One of them alone.
    alone = torch.full_like(x, math.nan)
    _few_rows.backward(grad_y, x, weight, grad_x=alone, grad_weight=None)
    assert_same_bits(alone, grad_x)
    alone = torch.full_like(before, math.nan) if not accumulate else before
    _few_rows.backward(grad_y, x, weight, grad_x=None, grad_weight=alone, accumulate=accumulate)
    assert_same_bits(alone, grad_weight)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16], ids=str)
def test_a_linear_of_a_few_rows_is_wide_beside_its_weight(other: torch.dtype, backend: str) -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4).half(), torch.randn(5)
    with pytest.raises(ValueError, match="beside a weight"):
        _few_rows.forward(x.to(other), weight, bias)
    with pytest.raises(ValueError, match="beside a weight"):
        _few_rows.backward(torch.randn(3, 5), x, weight, grad_x=None, grad_weight=torch.empty(5, 4, dtype=other))


def test_what_is_multiplied_in_what() -> None:
    """A processor that lacks 16-bit products multiplies 16-bit numbers in float32; no other number is converted."""
    assert _products.product_dtype(torch.float32) == torch.float32
    assert _products.product_dtype(torch.float64) == torch.float64
    for dtype, has in zip(HALVES, ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"), strict=True):
        supported = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, has)()
        assert _products.product_dtype(dtype) == (dtype if supported else torch.float32)


# --- Chunks and threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halve", [False, True])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("tokens", [5, 197, 3000])
@pytest.mark.parametrize("frames", [0, 2, 16, 34])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_cover_all_frames_once(frames: int, tokens: int, step: int, halve: bool, dtype: torch.dtype) -> None:
    cut, rows = list(_call.chunks(frames, tokens, step, dtype, halve=halve)), _call.ROWS[dtype.itemsize]
    assert [frame for first, count in cut for frame in range(first, first + count)] == list(range(frames))
    assert all(first % step == 0 for first, _ in cut)
    largest = _call.largest(cut)
    assert largest * tokens <= rows or largest == step
    if halve:
        assert frames <= step or largest <= (frames + 1) // 2
    else:
        assert largest == min(frames, max(rows // tokens // step * step, step))


@SUBJECTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_chunks(subject: Subject, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_call, "ROWS", dict.fromkeys(_call.ROWS, 1))
    case = subject.case(dtype, frames=6, dim=20)
    assert_close_three_way(three_way(subject.name, *case, backend=backend, draws=DRAWS))


@SUBJECTS
def test_passes_give_the_same_bits_at_any_thread_count(
    subject: Subject, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the products, which are torch's, in one thread, and without that of the frames' context."""
    multiply_by_kernel(monkeypatch, lambda dtype: False)

    def in_one_thread(run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            result = run(*args)
            torch.set_num_threads(before)
            return result

        return wrapped

    for module in (token_features, interpolation_head):
        for name in ("product", "add_product", "add_product_over_rows"):
            monkeypatch.setattr(module, name, in_one_thread(getattr(_products, name)), raising=False)
    op_suite.same_bits_at_any_thread_count(replace(subject, sizes=subject.sizes and {"context": ("cube",)}))


# --- What the chain of the whole module asks for ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_features_from_what_was_kept(dtype: torch.dtype, backend: str) -> None:
    inputs, _ = TOKEN.case(dtype, dim=40)
    features, _, preactivation = token_features.token_features_forward(*inputs.values(), 1e-5, True)
    again = token_features.token_features_activation(preactivation)
    assert again.dtype == dtype
    eps = 0 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps  # kept in 16 bits
    torch.testing.assert_close(again, features, rtol=eps, atol=eps)


@pytest.mark.parametrize("context", [(), ("cube",), ("frame",), ("cube", "frame")], ids=str)
@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_the_first_linear_alone(
    dtype: torch.dtype, by_kernel: bool, context: tuple[str, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits that the forward keeps."""
    multiply_by_kernel(monkeypatch, lambda dtype: by_kernel and dtype == torch.float32)
    monkeypatch.setattr(_call, "ROWS", dict.fromkeys(_call.ROWS, 10))
    inputs, _ = HEAD.case(dtype, dim=40, context=context)
    values = list(inputs.values())
    *_, kept = interpolation_head.interpolation_head_forward(*values, True)
    assert_same_bits(interpolation_head.interpolation_head_preactivation(*values[:3], *values[4:6]), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_go_from_op_to_op_as_columns(dtype: torch.dtype, kernels: str) -> None:
    """The head's gradients of features and cube are columns of one matrix, and token_features reads them there."""
    head = HEAD.case(dtype, dim=40).inputs
    z, weights, *kept = interpolation_head.interpolation_head_forward(*head.values(), True)
    upstream = torch.randn_like(z), torch.randn_like(weights)
    grad_features, grad_cube, *_ = interpolation_head.interpolation_head_backward(
        *upstream, *head.values(), *kept, [True] * 9, None
    )
    assert grad_features.untyped_storage().data_ptr() == grad_cube.untyped_storage().data_ptr()
    token = TOKEN.case(dtype, dim=40).inputs
    assert grad_features.shape[-1] == 2 * token["weight"].shape[0]
    args = (*token.values(), 1e-5, *token_features.token_features_forward(*token.values(), 1e-5, True)[1:])
    copied, read = (
        token_features.token_features_backward(grad, *args, [True] * 6, None)
        for grad in (grad_features.contiguous(), grad_features)
    )
    assert_same_bits(read, copied)


@pytest.mark.parametrize("products", ["float32", "16-bit"])
@pytest.mark.parametrize("network", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_of_another_dtype_than_the_linear(
    tokens: torch.dtype, network: torch.dtype, products: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast: as near as rounding to the dtype of what a result belongs to allows; the parameters' gradients
    are not rounded to theirs."""
    if products == "16-bit":
        monkeypatch.setattr(_products, "product_dtype", lambda dtype: dtype)
    inputs = op_cases("token_features", dtype=torch.float64, dim=40, frames=4, grid=(3, 4), batch=2).inputs
    dtypes = dict.fromkeys(("weight", "bias"), network) | dict.fromkeys(("x", "norm_weight", "norm_bias"), tokens)
    inputs = {name: value.to(dtypes.get(name, torch.float32)) for name, value in inputs.items()}
    features, *kept = token_features.token_features_forward(*inputs.values(), 1e-5, True)
    upstream = torch.randn(features.shape).to(network)
    grads = token_features.token_features_backward(upstream, *inputs.values(), 1e-5, *kept, [True] * 6, None)

    exact = [value.double().requires_grad_() for value in inputs.values()]
    expected = op_suite.functional.token_features(*exact, eps=1e-5)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    assert (features.dtype, kept[0].dtype, kept[1].dtype) == (network, torch.float32, network)
    assert [grad.dtype for grad in grads] == [tokens, *[torch.float32] * 5]
    for ours, theirs in zip((features, *grads), (expected, *wanted), strict=True):
        theirs = theirs.detach()
        error = (ours.double() - theirs).square().mean().sqrt()
        eps = max(torch.finfo(network).eps, torch.finfo(ours.dtype).eps)  # x's gradient is rounded to x's dtype
        assert float(error) <= 1.5 * eps * float(theirs.square().mean().sqrt())


def test_small_weights_keep_their_digits(backend: str) -> None:
    inputs, _ = HEAD.case(context=(), position=False)
    inputs |= {"bias2": torch.tensor([0.0, 60.0]), "weight2": torch.zeros_like(inputs["weight2"])}
    _, weights, *_ = interpolation_head.interpolation_head_forward(*inputs.values(), False)
    expected = torch.tensor([math.exp(-60), 1.0]).expand_as(weights)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


def test_sums_of_many_terms_of_one_sign_are_rounded_once() -> None:
    """A sum in float32 of 0.1 each is off by 3e-5 of itself after 2000 terms."""
    sums = _call.add_up(torch.full((1, 2000, 3), 0.1))
    torch.testing.assert_close(sums, torch.full((1, 3), 200.0), rtol=1e-7, atol=0)
