"""LinearPooling and ConvPooling, which stand in InTI's place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from toy_tower import DIM, FRAMES, tokens

from inti_kernels.models.methods import ConvPooling, LinearPooling
from inti_kernels.reference import functional
from inti_kernels.testing import randomize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kernel", [(3, 3, 3), (2, 1, 1), (2, 3, 3), (4, 1, 3), (5, 3, 1)], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_conv_pooling_is_a_convolution_that_starts_as_the_mean(kernel: tuple[int, int, int], prefix: int) -> None:
    pooling = ConvPooling(DIM, FRAMES, (3, 2), prefix=prefix, kernel=kernel, groups=2)
    x = tokens(2, FRAMES, prefix + 6, DIM)
    torch.testing.assert_close(pooling(x), x.unflatten(1, (-1, 2)).mean(2))

    randomize(pooling, 1)
    weight, bias = pooling.conv.weight, pooling.conv.bias
    channels_first = x[:, :, prefix:].permute(0, 3, 1, 2).unflatten(-1, (3, 2))
    before = (kernel[0] - 1) // 2
    z = F.conv3d(channels_first, weight, bias, (2, 1, 1), (before, kernel[1] // 2, kernel[2] // 2), groups=2)
    torch.testing.assert_close(pooling(x)[:, :, prefix:], z.flatten(-2).permute(0, 2, 3, 1))
    for number in range(prefix):
        one = F.conv1d(x[:, :, number].mT, weight[..., kernel[1] // 2, kernel[2] // 2], bias, 2, before, groups=2)
        torch.testing.assert_close(pooling(x)[:, :, number], one.mT)


def test_linear_pooling_weighs_the_two_frames_of_all_pairs() -> None:
    pooling = LinearPooling(DIM, FRAMES, (3, 2))
    x = tokens(2, FRAMES, 7, DIM)
    assert torch.equal(pooling(x), functional.weighted_sum(x, torch.full((2, FRAMES // 2, 7, 2), 0.5)))
    with torch.no_grad():
        pooling.coefficients.copy_(torch.tensor([0.25, -2.0]))
    torch.testing.assert_close(pooling(x), 0.25 * x[:, 0::2] - 2 * x[:, 1::2])


@pytest.mark.parametrize("kind", [LinearPooling, ConvPooling])
def test_pooling_trains(kind: type[LinearPooling] | type[ConvPooling]) -> None:
    pooling = kind(8, FRAMES, (2, 2), **({} if kind is LinearPooling else {"groups": 2})).double()
    randomize(pooling, 2)
    x = tokens(1, FRAMES, 5, 8, dtype=torch.float64).requires_grad_()
    parameters = tuple(pooling.parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(dict(pooling.named_parameters()), values, strict=True))
        return torch.func.functional_call(pooling, named, (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert all(bool(g.any()) for g in torch.autograd.grad(pooling(x).square().sum(), parameters))


@pytest.mark.parametrize("kind", [LinearPooling, ConvPooling])
def test_pooling_in_other_settings(kind: type[LinearPooling] | type[ConvPooling]) -> None:
    """Another grid than it was built for, low precision, autocast, and the cost that it says it has."""
    pooling = kind(DIM, FRAMES, (3, 2))
    randomize(pooling, 3)
    x = tokens(2, FRAMES, 1 + 12, DIM)
    z = pooling(x, grid=(4, 3))
    assert z.shape == (2, FRAMES // 2, 13, DIM)
    low = pooling.bfloat16()(x.bfloat16(), grid=(4, 3))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), z, rtol=0.05, atol=0.05)
    pooling = pooling.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert pooling(x, grid=(4, 3)).dtype == x.dtype
    with FlopCounterMode(display=False) as counter:
        pooling(x[:1], grid=(4, 3))
    assert counter.get_total_flops() == 2 * pooling.macs(FRAMES, 13)


def test_pooling_refuses() -> None:
    for arguments, match_ in (
        ({"frames": 3}, "frames must be even to form pairs, got 3"),
        ({"groups": 3}, "groups must divide dim 16, got 3"),
        ({"kernel": (1, 3, 3)}, "KT at least 2"),
        ({"kernel": (3, 2, 3)}, "KH and KW odd"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match_):
            ConvPooling(**{"dim": DIM, "frames": FRAMES, "grid": (2, 2)} | arguments)
    pooling = LinearPooling(DIM, FRAMES, (2, 2))
    for shape, match_ in (
        ((1, 3, 5, DIM), "must be even to form pairs, got 3"),
        ((1, 4, 6, DIM), "1 \\+ 2·2 = 5 tokens a frame, got 6"),
        ((1, 4, 5, DIM + 1), "x must have dim 16, got 17"),
        ((4, 5, DIM), "got 3 dimensions"),
    ):
        with pytest.raises(ValueError, match=match_):
            pooling(torch.zeros(shape))
