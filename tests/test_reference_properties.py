"""What the paper's equations say of the reference InTI, as properties; and its derivatives, first and second."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inti_kernels import InTI, reference
from inti_kernels.testing import module_case, op_cases

CONTEXTS = [subset for n in range(4) for subset in itertools.combinations(("cube", "frame", "global"), n)]
HEADS = ("softmax", "sigmoid", "attention")
# Every head and fusion that go together, with the whole context; and the head alone.
COMBINATIONS = [
    {"fusion": fusion, "head": head}
    for fusion in ("separate", "add", "cat")
    for head in HEADS
    if (fusion, head) != ("add", "attention")
] + [{"context": (), "head": head} for head in HEADS]


pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def cases(draw, heads=HEADS, contexts=CONTEXTS, dtypes=(torch.float64,), prefixes=(0, 1, 5)):
    """An InTI with random parameters (none of them zero), and tokens for it."""
    head, context = draw(st.sampled_from(heads)), draw(st.sampled_from(contexts))
    fusions = ("separate", "cat") if head == "attention" and context else ("separate", "cat", "add")
    return module_case(
        dim=2 * draw(st.integers(1, 5)),
        frames=2 * draw(st.integers(1, 4)),
        grid=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        batch=draw(st.integers(1, 3)),
        prefix=draw(st.sampled_from(prefixes)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 1 << 16)),
        head=head,
        context=context,
        fusion=draw(st.sampled_from(fusions)),
    )


def with_position(module: InTI, x: torch.Tensor) -> torch.Tensor:
    """x + σP, which is what Eq. 7 interpolates."""
    return x + module.position_scale * module.position


def assert_equal_to_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@given(cases(heads=("softmax", "attention"), dtypes=(torch.float64, torch.float32, torch.bfloat16)))
def test_weights_sum_to_one_and_the_output_lies_between_the_frames(case):
    module, x = case
    with torch.no_grad():
        z, weights = module(x, return_weights=True)
        moved = with_position(module, x)
    eps = torch.finfo(x.dtype).eps
    assert ((weights >= 0) & (weights <= 1)).all()
    torch.testing.assert_close(weights.double().sum(-1), torch.ones(()).double().expand(z.shape[:-1]), rtol=0, atol=eps)
    first, second = moved[:, 0::2].double(), moved[:, 1::2].double()
    # The weights are rounded, the sum of position too, and the products: each by eps of the larger frame.
    slack = 4 * eps * torch.maximum(first.abs(), second.abs())
    assert (z.double() >= torch.minimum(first, second) - slack).all()
    assert (z.double() <= torch.maximum(first, second) + slack).all()
    # And on the straight line between them, where the weights say.
    line = weights[..., :1].double() * first + weights[..., 1:].double() * second
    assert ((z.double() - line).abs() <= slack).all()


@given(cases(heads=("sigmoid",)))
def test_sigmoid_weights_are_each_their_own(case):
    module, x = case
    with torch.no_grad():
        z, weights = module(x, return_weights=True)
        moved = with_position(module, x)
    assert ((weights > 0) & (weights < 1)).all()
    assert (weights.sum(-1) - 1).abs().max() > 1e-6, "they would sum to one only by accident"
    assert_equal_to_rounding(z, weights[..., :1] * moved[:, 0::2] + weights[..., 1:] * moved[:, 1::2])


@given(cases(heads=("softmax", "attention")))
def test_equal_frames_are_a_fixed_point(case):
    """With σ = 0: a pair of equal frames becomes that frame, whatever the weights."""
    module, x = case
    with torch.no_grad():
        module.position_scale.zero_()
        x[:, 1::2] = x[:, 0::2]
        assert_equal_to_rounding(module(x), x[:, 0::2])


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_batch_does_not_matter(case, random):
    module, x = case
    order = list(range(x.shape[0]))
    random.shuffle(order)
    with torch.no_grad():
        for moved, still in zip(module(x[order], return_weights=True), module(x, return_weights=True), strict=True):
            assert_equal_to_rounding(moved, still[order])


@given(cases(), st.randoms(use_true_random=False))
def test_one_clip_knows_nothing_of_another(case, random):
    module, x = case
    chosen = random.randrange(x.shape[0])
    with torch.no_grad():
        before = module(x)[chosen]
        noise = torch.randn_like(x)
        noise[chosen] = x[chosen]
        assert_equal_to_rounding(module(noise)[chosen], before)


@given(cases(contexts=[c for c in CONTEXTS if "cube" not in c]), st.randoms(use_true_random=False))
def test_without_the_cube_level_patches_may_be_permuted(case, random):
    module, x = case
    order = list(range(module.prefix, x.shape[2]))
    random.shuffle(order)
    order = list(range(module.prefix)) + order
    with torch.no_grad():
        moved, still = module(x[:, :, order], return_weights=True), module(x, return_weights=True)
    for actual, expected in zip(moved, still, strict=True):
        assert_equal_to_rounding(actual, expected[:, :, order])


@pytest.mark.parametrize("context", [c for c in CONTEXTS if "cube" in c], ids="+".join)
def test_with_the_cube_level_the_place_of_a_patch_matters(context):
    module, x = module_case(dim=6, frames=4, grid=(2, 3), dtype=torch.float64, context=context)
    order = [0, 6, 1, 2, 3, 4, 5]
    assert (module(x[:, :, order]) - module(x)[:, :, order]).abs().max() > 1e-3
    assert_equal_to_rounding(module(x[:, :, order])[:, :, 0], module(x)[:, :, 0])  # the class token has no cube feature


@given(cases(), st.integers(0, 1 << 16))
def test_zero_sigma_means_no_position(case, seed):
    module, x = case
    with torch.no_grad():
        before = module(x)
        module.position.copy_(torch.randn(module.position.shape, generator=torch.Generator().manual_seed(seed)))
        assert not torch.equal(module(x), before), "with another σ than zero P does matter"
        module.position_scale.zero_()
        without = module(x)
        module.position.fill_(1e3)
        assert torch.equal(module(x), without)


@given(cases(dtypes=(torch.float64,)))
def test_position_is_added_before_everything_else(case):
    """Eq. 8: InTI of x with σP is InTI of x + σP without."""
    module, x = case
    with torch.no_grad():
        expected = module(x, return_weights=True)
        moved = with_position(module, x)
        module.position_scale.zero_()
        for actual, one in zip(module(moved, return_weights=True), expected, strict=True):
            assert torch.equal(actual, one)


@given(cases(contexts=[()]))
def test_without_context_a_token_pair_stands_alone(case):
    module, x = case
    with torch.no_grad():
        whole = module(x)
        module.prefix, module.grid = 0, (1, 1)
        for token in range(x.shape[2]):
            assert_equal_to_rounding(module(x[:, :, token : token + 1]), whole[:, :, token : token + 1])


@given(st.integers(0, 8).map(lambda n: 2 * n + 1))
def test_odd_frames_are_an_error(frames):
    message = f"frames must be even to form pairs, got {frames}"
    with pytest.raises(ValueError, match=message):
        InTI(4, frames, (1, 2))
    with pytest.raises(ValueError, match=message):
        InTI(4, 20, (1, 2))(torch.zeros(1, frames, 3, 4))
    for op in ("pair_interpolate", "depthwise_conv3d", "token_features", "interpolation_head"):
        inputs, kwargs = op_cases(op, dim=4, frames=frames + 1, grid=(1, 2))
        inputs["x"], inputs["position"] = inputs["x"][:, 1:], inputs["position"][1:]
        with pytest.raises(ValueError, match=message):
            getattr(reference, op)(**inputs, **kwargs)


def _assert_derivatives(function, tensors, fast):
    """Both orders in float64: the second, and with ``fast`` the first too, along random directions."""
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("pair_interpolate", {}),
        ("depthwise_conv3d", {}),
        ("depthwise_conv3d", {"temporal_stride": 1, "prefix": 0}),
        ("depthwise_conv3d", {"temporal_stride": 1, "kernel": (3, 1, 1)}),
        ("token_features", {}),
        ("interpolation_head", {"hidden": 3}),
        ("interpolation_head", {"context": ()}),
    ],
    ids=str,
)
def test_derivatives_of_the_functional_forms(op, options, position):
    sizes = {"dim": 4, "frames": 4, "grid": (1, 2), "dtype": torch.float64}
    inputs, kwargs = op_cases(op, **sizes, **options, position=position)
    given_inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    absent = dict.fromkeys(inputs.keys() - given_inputs.keys())

    def function(*tensors):
        values = dict(zip(given_inputs, tensors, strict=True))
        return getattr(reference, op)(**values, **absent, **kwargs)

    _assert_derivatives(function, given_inputs.values(), fast=False)


@pytest.mark.parametrize("ablation", COMBINATIONS, ids=str)
@pytest.mark.parametrize("prefix", [0, 1])
def test_derivatives_of_the_module(ablation, prefix):
    module, x = module_case(dim=4, frames=4, grid=(1, 2), prefix=prefix, dtype=torch.float64, hidden=3, **ablation)
    names = [name for name, _ in module.named_parameters()]

    def function(x, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, values, (x,), {"return_weights": True})

    _assert_derivatives(function, (x, *module.parameters()), fast=True)
