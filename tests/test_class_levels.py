"""The frame and the global level as the op `inti` has them, in PyTorch and by the compiled modules, against autograd of
the reference; in 16 bits, as a GPU has them, in PyTorch on the CPU too."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from conftest import state_of, variants
from op_subject import UNDER_TEST, assert_same_bits
from torch import Tensor

from inti_kernels import InTI
from inti_kernels.backends import _class_levels
from inti_kernels.reference import functional
from inti_kernels.testing import assert_close_three_way, op_cases, three_way

pytestmark = pytest.mark.only_under_test("cpu", "cuda")

EPS = (1e-5, 1e-3)
LEVELS = [(True, True), (True, False), (False, True)]


IN_PYTORCH = ["in PyTorch"] * (UNDER_TEST == "cpu")


@pytest.fixture(params=[*IN_PYTORCH, *variants()])
def kind(request: pytest.FixtureRequest) -> Iterator[type]:
    """What computes the levels: PyTorch, or a compiled module, the CPU's by each instruction set."""
    if request.param in IN_PYTORCH:
        yield _class_levels.ClassLevels
        return
    with state_of(request.param) as name:
        yield of_kernels(name)


@pytest.fixture
def of_module(kernels: str) -> type:
    """What computes the levels, a compiled module's only."""
    return of_kernels(kernels)


def of_kernels(backend: str) -> type:
    return import_module(f"inti_kernels.backends.{backend}.class_levels").ClassLevels


def parameters(frames: int, dtype: torch.dtype, dim: int = 12) -> tuple[list[Tensor], list[Tensor]]:
    """Of the frame level and of the global level, random."""
    torch.manual_seed(frames)
    inti = InTI(dim, frames, (1, 1))
    parts = [inti.frame_pair, inti.frame]
    frame = [p for part in parts for p in (part.norm.weight, part.norm.bias, part.linear.weight, part.linear.bias)]
    convolutions = [p for convolution in inti.global_convs for p in (convolution.weight, convolution.bias)]
    return tuple([(0.5 * torch.randn(p.shape)).to(dtype).requires_grad_() for p in ps] for ps in (frame, convolutions))


def wanted(cls: Tensor, frame: list[Tensor] | None, convolutions: list[Tensor] | None, grad: Tensor) -> list[Tensor]:
    """The context and all gradients, in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (cls, *(frame or []), *(convolutions or []))]
    of_frame, of_convolutions = leaves[1:9] if frame else None, leaves[-6:] if convolutions else None
    context = functional.frame_context(leaves[0], of_frame, of_convolutions, EPS)
    return [context, *torch.autograd.grad(context, leaves, grad.double())]


def computed(
    kind: type[_class_levels.ClassLevels],
    cls: Tensor,
    frame: list[Tensor] | None,
    convolutions: list[Tensor] | None,
    grad: Tensor,
) -> list[Tensor]:
    with torch.no_grad():
        forward, backward = (kind(frame, convolutions, EPS) for _ in range(2))
        context = forward.forward(cls)
        resumed = backward.resume(cls, None, forward.kept)
        assert_same_bits(resumed, context)
        if kind is not _class_levels.ClassLevels and context.numel():
            assert resumed is forward.kept.context  # not computed again
        of_cls, of_parameters = backward.backward(grad)
    return [context, of_cls, *of_parameters]


@pytest.mark.parametrize("which", LEVELS, ids=["both", "frame", "global"])
@pytest.mark.parametrize(
    ("batch", "frames", "dim"), [(0, 4, 12), (1, 2, 6), (2, 4, 12), (3, 6, 12), (3, 10, 140), (2, 14, 140)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_levels_and_their_derivatives(
    batch: int, frames: int, dim: int, dtype: torch.dtype, which: tuple[bool, bool], kind: type
) -> None:
    """Of 6, 10 and 14 frames a pooling leaves one without a neighbour."""
    frame, convolutions = (
        level if has else None for level, has in zip(parameters(frames, dtype, dim), which, strict=True)
    )
    cls, grad = torch.randn(batch, frames, dim, dtype=dtype), torch.randn(batch, frames // 2, dim, dtype=dtype)
    bound = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    right = [tensor.to(dtype) for tensor in wanted(cls, frame, convolutions, grad)]
    torch.testing.assert_close(computed(kind, cls, frame, convolutions, grad), right, **bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_class_tokens_of_every_dtype_get_their_position(dtype: torch.dtype, kind: type) -> None:
    """As they stand among the other tokens of x."""
    wide = torch.promote_types(dtype, torch.float32)
    frame, convolutions = parameters(6, wide, 20)
    x, position, grad = torch.randn(2, 6, 3, 20).to(dtype), torch.randn(6, 20).to(wide), torch.randn(2, 3, 20).to(wide)
    with torch.no_grad():
        levels = kind(frame, convolutions, EPS)
        context = levels.forward(x[:, :, 0], position)
        ours = [context, *levels.backward(grad)]
    right = computed(kind, x[:, :, 0].to(wide) + position, frame, convolutions, grad)
    assert_same_bits([*ours[:2], *ours[2]], right)


def test_of_equal_neighbours_the_first_counts(kind: type) -> None:
    """Frames that are all the same, and convolutions that leave them so: nothing but ties."""
    _, convolutions = parameters(8, torch.float64)
    with torch.no_grad():
        for weight in convolutions[::2]:
            weight[:, :, ::2] = 0
    cls, grad = torch.randn(1, 1, 12).double().expand(2, 8, 12), torch.randn(2, 4, 12).double()
    torch.testing.assert_close(computed(kind, cls, None, convolutions, grad), wanted(cls, None, convolutions, grad))


@pytest.mark.parametrize("frame", range(4))
def test_nan_comes_out_where_the_reference_has_it(frame: int, kind: type) -> None:
    _, convolutions = parameters(4, torch.float64)
    cls, grad = torch.randn(2, 4, 12).double(), torch.randn(2, 2, 12).double()
    cls[0, frame, 3] = float("nan")
    ours, right = computed(kind, cls, None, convolutions, grad)[:2], wanted(cls, None, convolutions, grad)[:2]
    for a, b in zip(ours, right, strict=True):  # the context and its gradient
        torch.testing.assert_close(a, b, equal_nan=True)


def test_a_pooling_takes_nan_wherever_it_stands(kind: type) -> None:
    """A tap that is NaN makes all frames NaN but the first, which has no neighbour before it."""
    _, convolutions = parameters(2, torch.float64)
    with torch.no_grad():
        convolutions[0][3, 0, 0] = float("nan")
    cls, grad = torch.randn(2, 2, 12).double(), torch.randn(2, 1, 12).double()
    ours, right = computed(kind, cls, None, convolutions, grad)[:2], wanted(cls, None, convolutions, grad)[:2]
    assert bool(right[0][:, :, 3].isnan().all())
    torch.testing.assert_close(ours, right, equal_nan=True)


@pytest.mark.parametrize("which", range(14))
def test_the_module_refuses_shapes_that_do_not_go_together(which: int, of_module: type) -> None:
    """An exported graph calls the op past the user's function and its checks."""
    frame, convolutions = parameters(4, torch.float32)
    (frame if which < 8 else convolutions)[which % 8] = [*frame, *convolutions][which].detach()[:-1]
    with pytest.raises(ValueError, match="expected"):
        computed(of_module, torch.randn(2, 4, 12), frame, convolutions, torch.randn(2, 2, 12))


@pytest.mark.parametrize("which", range(3))
def test_the_module_refuses_what_another_forward_kept(which: int, of_module: type) -> None:
    frame, convolutions = ([p.detach() for p in level] for level in parameters(4, torch.float32))
    levels, cls = of_module(frame, convolutions, EPS), torch.randn(2, 4, 12)
    context = levels.forward(cls)
    kept = list(levels.kept)
    kept[which] = kept[which][:1]
    with pytest.raises(ValueError, match="expected"):
        levels.resume(cls, None, _class_levels.Kept(*kept))
    # What is missing is computed again.
    kept[which] = None
    assert_same_bits(levels.resume(cls, None, _class_levels.Kept(*kept)), context)


@pytest.mark.parametrize("levels", [(), ("global",)], ids=str)
def test_what_another_forward_kept_of_a_level_is_nothing_without_it(levels: tuple[str, ...], of_module: type) -> None:
    """Kernels would take it for the level's."""
    frame, convolutions = ([p.detach() for p in level] for level in parameters(4, torch.float32))
    cls, grad = torch.randn(2, 4, 12), torch.randn(2, 2, 12)
    other, plain = of_module(frame, convolutions, EPS), of_module(None, convolutions if levels else None, EPS)
    context, expected = other.forward(cls), plain.forward(cls)
    kept = other.kept._replace(context=torch.zeros_like(context) if expected is None else expected)
    again = of_module(None, convolutions if levels else None, EPS)
    resumed = again.resume(cls, None, kept)
    if not levels:
        assert resumed is None
        return
    assert_same_bits(resumed, expected)
    ours, right = again.backward(grad), plain.backward(grad)
    assert_same_bits([ours[0], *ours[1]], [right[0], *right[1]])


@pytest.mark.only_under_test("cuda")
@pytest.mark.parametrize(
    ("own", "products", "expected"),
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_the_frame_level_is_never_narrower_than_asked_for(
    own: torch.dtype, products: torch.dtype, expected: torch.dtype, of_module: type
) -> None:
    """Parameters in another type of 16 bits than autocast's: in that, digits would be lost, or numbers overflow."""
    frame, convolutions = ([p.detach().to(own) for p in level] for level in parameters(4, torch.float32))
    levels = of_module(frame, convolutions, EPS, products)
    context = levels.forward(torch.randn(2, 4, 12))
    assert [tensor.dtype for tensor in levels.kept] == [expected, expected, torch.float32]
    assert context.dtype == torch.float32
    # Nor where one parameter is wider than the others.
    mixed = of_module([frame[0].float(), *frame[1:]], convolutions, EPS, products)
    mixed.forward(torch.randn(2, 4, 12))
    assert mixed.kept.frame_preactivation.dtype == torch.float32


def test_the_module_refuses_an_odd_number_of_frames(of_module: type) -> None:
    _, convolutions = parameters(4, torch.float32)
    with pytest.raises(ValueError, match="expected"):
        computed(of_module, torch.randn(2, 3, 12), None, convolutions, torch.randn(2, 1, 12))


def test_the_module_takes_parameters_of_any_strides(of_module: type) -> None:
    frame, convolutions = parameters(6, torch.float64)
    cls, grad = torch.randn(6, 2, 12).double().transpose(0, 1), torch.randn(3, 2, 12).double().transpose(0, 1)
    spread = [
        [torch.stack((p, p), dim=-1).detach()[..., 0].requires_grad_() for p in level]
        for level in (frame, convolutions)
    ]
    assert not any(p.is_contiguous() for level in spread for p in level)
    torch.testing.assert_close(computed(of_module, cls, *spread, grad), wanted(cls, frame, convolutions, grad))


@pytest.mark.only_under_test("cpu")  # beside CUDA's kernels run torch's products
def test_the_module_gives_the_same_bits_at_any_thread_count(of_module: type, threads: None) -> None:
    frame, convolutions = parameters(10, torch.float32, 1100)
    cls, grad = torch.randn(3, 10, 1100), torch.randn(3, 5, 1100)
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(computed(of_module, cls, frame, convolutions, grad))
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


def test_a_batch_of_hundreds_of_clips(backend: str) -> None:
    """The gradients of the parameters are sums over 4096 pairs of frames."""
    case = op_cases("inti", dim=24, frames=16, grid=(1, 1), batch=512, context=("frame", "global"))
    assert_close_three_way(three_way("inti", *case, backend=backend, draws=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_frame_level_in_16_bits_rounds_as_plain_pytorch_does(dtype: torch.dtype) -> None:
    """Beside tokens and a global level in float32, whose gradients are those of float32."""
    frame, convolutions = parameters(16, torch.float32)
    cls, grad = torch.randn(8, 16, 12), torch.randn(8, 8, 12)
    halves = [p.detach().to(dtype) for p in frame]
    right = wanted(cls, halves, convolutions, grad)
    ours = computed(_class_levels.ClassLevels, cls, halves, convolutions, grad)
    leaves = [cls.to(dtype).requires_grad_(), *(p.requires_grad_() for p in halves)]
    context = functional.frame_level(*leaves, eps=EPS)
    plain = torch.autograd.grad(context, leaves, grad.to(dtype))
    assert [t.dtype for t in ours] == [torch.float32] * 2 + [dtype] * 8 + [torch.float32] * 6
    for a, b, r in zip(ours[2:10], plain[1:], right[2:10], strict=True):
        assert (a.double() - r).norm() <= 1.5 * (b.double() - r).norm()
    torch.testing.assert_close(ours[10:], [r.float() for r in right[10:]], rtol=1e-5, atol=1e-5)
