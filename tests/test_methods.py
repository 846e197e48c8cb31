"""What holds for the methods that take tokens out of frames, ToMe and STA, and for all methods' choices."""

from __future__ import annotations

import io
from collections.abc import Callable

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from toy_tower import DIM, FRAMES, HEADS, ToyAdapter, run, tokens

from inti_kernels.models import TokenReduction
from inti_kernels.models.methods import METHODS, STA, ToMe, choices
from inti_kernels.models.methods.tome import match, order

pytestmark = pytest.mark.usefixtures("one_thread")


REDUCTIONS = pytest.mark.parametrize(
    "make", [lambda adapter: ToMe(adapter, 2), lambda adapter: STA(adapter, at=(1, 3), keep=0.7)], ids=["tome", "sta"]
)
Make = Callable[[ToyAdapter], TokenReduction]


@REDUCTIONS
def test_reduction_trains_the_same_when_checkpointed(make: Make) -> None:
    adapter = ToyAdapter(3)
    method = make(adapter)
    x = tokens(2 * FRAMES, 12, DIM).requires_grad_()
    leaves = (x, *adapter.model.parameters())
    z, _ = run(adapter, method, x)
    expected = torch.autograd.grad(z.square().sum(), leaves)
    again, state = x, method.start(x, FRAMES)
    for number, block in enumerate(adapter.blocks, 1):
        again, state = checkpoint(method.block, adapter, block, number, again, FRAMES, state, use_reentrant=False)
    assert torch.equal(again, z)
    for actual, right in zip(torch.autograd.grad(again.square().sum(), leaves), expected, strict=True):
        assert bool(right.any())
        torch.testing.assert_close(actual, right)


@REDUCTIONS
def test_reduction_has_right_gradients(make: Make) -> None:
    adapter = ToyAdapter(3)
    adapter.model.double()
    method = make(adapter)
    x = tokens(2, 8, DIM, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: method.restore(*run(adapter, method, x, 2))[0], (x,), fast_mode=True)


@pytest.mark.parametrize(
    "make", [lambda adapter: ToMe(adapter, 2), lambda adapter: STA(adapter, at=(2,), keep=0.7)], ids=["tome", "sta"]
)
def test_reduction_compiles_without_a_break(make: Make) -> None:
    """Two blocks: ToMe's second has sizes to add, STA's second drops."""
    adapter = ToyAdapter(2)
    method = make(adapter)

    def call(x: Tensor) -> Tensor:
        return method.on_grid(torch.tanh, *run(adapter, method, x, 2))

    x = tokens(4, 12, DIM)
    with torch.no_grad():
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


class Restored(nn.Module):
    """A tower with a method in it, and behind it a module for which the tokens are put back in their places."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.adapter = ToyAdapter(2)
        self.tower, self.method = self.adapter.model, make(self.adapter)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.on_grid(torch.tanh, *run(self.adapter, self.method, x, 2))


class Order(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return order(x, descending=True)


@pytest.mark.parametrize("name", ["tome", "sta", "order"])
def test_reduction_in_onnx(name: str) -> None:
    """onnxruntime gives the same, and keeps the order of equals."""
    makes = {"tome": lambda adapter: ToMe(adapter, 2), "sta": lambda adapter: STA(adapter, at=(2,), keep=0.7)}
    model = Restored(makes[name]) if name in makes else Order()
    x = tokens(4, 12, DIM) if name in makes else torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0] * 20] * 2)
    program = io.BytesIO()
    torch.onnx.export(model.eval(), (x,), dynamo=True, verbose=False).save(program)
    session = onnxruntime.InferenceSession(program.getvalue())
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), model(x).detach())


def neighbours(whole: Tensor) -> Tensor:
    """Two clips of 4 frames [8, N, C]: a module of the grid, that reads the place before and the frame before."""
    return whole + whole.roll(1, dims=1) * whole.unflatten(0, (2, FRAMES)).roll(1, dims=1).flatten(0, 1)


@REDUCTIONS
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_module_on_the_grid_changes_what_is_left(make: Make, prefix: int) -> None:
    """A merged token gets the mean change of its places, one that was not its own."""
    adapter = ToyAdapter(3, prefix)
    method = make(adapter)
    first = tokens(2 * FRAMES, prefix + 11, DIM)
    assert torch.equal(method.on_grid(neighbours, first, method.start(first, FRAMES)), neighbours(first))
    x, state = run(adapter, method, first)
    assert x.shape[1] < first.shape[1]
    whole, present = method.restore(x, state)
    change, actual = neighbours(whole) - whole, method.on_grid(neighbours, x, state)
    places = state[1] if present is None else torch.full_like(present, -1, dtype=torch.long).scatter(
        1, state[0], torch.arange(x.shape[1]).expand(x.shape[:2])
    )  # fmt: skip
    for frame in range(2 * FRAMES):
        for token in range(x.shape[1]):
            expected = x[frame, token] + change[frame, places[frame] == token].mean(dim=0)
            torch.testing.assert_close(actual[frame, token], expected)
    assert torch.equal(method.on_grid(lambda whole: whole, x, state), x)


@REDUCTIONS
def test_what_stands_between_attention_and_mlp(make: Make) -> None:
    """A shift there is one of the attention's output, in blocks that merge or drop and in those that don't."""
    adapter = ToyAdapter(3)
    method, x, shift = make(adapter), tokens(2 * FRAMES, 12, DIM), tokens(DIM, seed=4)
    plain, _ = run(adapter, method, x)
    state, actual = method.start(x, FRAMES), x
    for number, block in enumerate(adapter.blocks, 1):
        actual, state = method.block(adapter, block, number, actual, FRAMES, state, lambda x: x + shift)
    with torch.no_grad():
        for block in adapter.blocks:
            block.project.bias += shift
    expected, places = run(adapter, method, x)
    assert all(map(torch.equal, state, places))
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, plain)


@REDUCTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reduction_under_autocast(make: Make, dtype: torch.dtype) -> None:
    """The same tokens, within what rounding to the dtype allows, wherever it decides as in float32."""
    adapter = ToyAdapter(3)
    method = make(adapter)
    x = tokens(2 * FRAMES, 12, DIM)
    expected, state = run(adapter, method, x)
    with torch.autocast("cpu", dtype):
        z, own_state = run(adapter, method, x)
    assert z.dtype == x.dtype
    same = [torch.equal(own_state[0][f], state[0][f]) and torch.equal(own_state[1][f], state[1][f]) for f in range(8)]
    assert sum(same) >= 6
    torch.testing.assert_close(z[same], expected[same], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_comparison_alone(dtype: torch.dtype) -> None:
    features = F.normalize(1 + 0.01 * tokens(2, 20, 8), dim=-1)
    with torch.autocast("cpu", dtype):
        edges = match(features, 5)
    for actual, expected in zip(edges, match(features, 5), strict=True):
        assert torch.equal(actual, expected)


@REDUCTIONS
@pytest.mark.parametrize("count", [12, 9, 2])
def test_reduction_costs_what_it_says(make: Make, count: int) -> None:
    adapter = ToyAdapter(3)
    method, frames = make(adapter), 2 * FRAMES
    blocks = sum(n * 4 * DIM**2 + 2 * n * n * DIM + left * 4 * DIM**2 for n, left in method.tokens(count, 3))
    expected = frames * blocks + 2 * method.macs(FRAMES, count, 3, DIM // HEADS)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        adapter.model.to("meta")
        run(adapter, method, torch.empty(frames, count, DIM, device="meta"))
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize("name", METHODS)
def test_choices_go_from_the_costliest_to_the_cheapest(name: str) -> None:
    blocks, count, prefix = 12, 30, 1
    kind, adapter = METHODS[name], ToyAdapter(blocks, prefix)
    costs = []
    for choice in choices(name, blocks, count, prefix):
        if issubclass(kind, TokenReduction):
            pairs = kind(adapter, **choice).tokens(count, blocks)
        else:
            first, second = choice["after"]
            assert 1 <= first < second < blocks
            pairs = [(count / 2 ** ((number > first) + (number > second)),) * 2 for number in range(1, blocks + 1)]
        costs.append(sum(map(sum, pairs)))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] / 2


def test_choices_have_the_places_of_the_paper() -> None:
    for blocks, places in ((12, [(3, 5), (5, 7), (7, 9)]), (24, [(6, 10), (10, 14), (14, 18)])):
        found = [choice["after"] for choice in choices("inti", blocks, 197, 1)]
        assert set(places) < set(found)
