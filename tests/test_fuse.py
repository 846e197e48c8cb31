"""FusedInTI.from_reference, fuse and unfuse: what is swapped, what is carried over, and what is left alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from inti_kernels import FusedInTI, InTI, backends, fuse, unfuse
from inti_kernels.testing import module_case, randomize

SIZES = {"dim": 6, "frames": 4, "grid": (2, 3)}
ABLATIONS = [
    pytest.param({}, id="default"),
    pytest.param({"context": (), "hidden": 3}, id="none"),
    pytest.param({"fusion": "cat", "head": "attention", "prefix": 0}, id="cat-attention"),
    pytest.param({"fusion": "add", "head": "sigmoid", "context": ("frame",), "prefix": 5}, id="add-sigmoid"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


class Changed(InTI):
    """A subclass whose forward differs."""

    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


class Backbone(nn.Module):
    """InTI nested in everything that holds modules, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = InTI(6, 8, (2, 3))
        self.blocks = nn.Sequential(nn.Linear(6, 6), InTI(6, 4, (2, 3), head="attention"))
        self.parts = nn.ModuleDict({"list": nn.ModuleList([nn.Identity(), InTI(6, 2, (2, 3), context=())])})
        self.again = self.parts["list"][1]

    def forward(self, x):
        return self.again(self.blocks(self.first(x)))


NAMES = ["first", "again", "blocks.1", "parts.list.1"]


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    model = Backbone().double()
    randomize(model, 1)
    return model


def tokens(frames: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, frames, 7, 6, dtype=dtype, generator=torch.Generator().manual_seed(2))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_from_reference_shares_the_parameters(ablation):
    inti, x = module_case(**SIZES, dtype=torch.float64, **ablation)
    inti.eval()
    inti.token.requires_grad_(False)
    fused = FusedInTI.from_reference(inti, backend="cpu")
    assert type(fused) is FusedInTI
    assert fused.backend == "cpu"
    assert not fused.training
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in inti.named_parameters()]
    assert all(a is b for a, b in zip(fused.parameters(), inti.parameters(), strict=True))
    assert_same(fused(x), inti(x))
    fused(x).square().sum().backward()
    assert inti.head.linear1.weight.grad is not None
    assert inti.token.linear.weight.grad is None
    with torch.no_grad():
        inti.position_scale.add_(1)
    assert_same(fused(x), inti(x))
    assert FusedInTI.from_reference(fused).backend is None, "of a FusedInTI too, with the backend asked for here"


def test_from_reference_takes_a_resized_module_and_changes_nothing_else():
    inti, _ = module_case(**SIZES, dtype=torch.float64)
    inti.resize_position(8)
    inti.register_forward_hook(lambda module, args, output: output + 1)
    before = torch.random.get_rng_state()
    fused = FusedInTI.from_reference(inti)
    assert torch.equal(torch.random.get_rng_state(), before), "no random number may be drawn for a swap"
    assert fused.frames == 8
    assert_same(fused(tokens()) + 1, inti(tokens()))


@pytest.mark.parametrize("module", [nn.Linear(2, 2), Changed(6, 4, (2, 3)), None], ids=lambda m: type(m).__name__)
def test_from_reference_refuses_other_classes(module):
    with pytest.raises(TypeError, match=f"from_reference takes an InTI, got {type(module).__name__}"):
        FusedInTI.from_reference(module)


def test_fuse_replaces_every_inti(backbone):
    expected, state = backbone(tokens()), backbone.state_dict()
    parameters = dict(backbone.named_parameters())
    others = {name: module for name, module in backbone.named_modules() if not isinstance(module, InTI)}
    replaced = fuse(backbone, backend="cpu")
    assert sorted(replaced) == sorted(NAMES)
    assert replaced.skipped == {}
    for name in NAMES:
        assert type(backbone.get_submodule(name)) is FusedInTI
        assert backbone.get_submodule(name).backend == "cpu"
    assert backbone.again is backbone.parts["list"][1], "shared instances stay shared"
    assert all(backbone.get_submodule(name) is module for name, module in others.items())
    assert dict(backbone.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in backbone.named_parameters())
    assert list(backbone.state_dict()) == list(state)
    assert not list(backbone.buffers())
    backends.executed.clear()
    assert_same(backbone(tokens()), expected)
    assert backends.executed["inti", "cpu"] + backends.executed["pair_interpolate", "cpu"] == 3


def test_unfuse_is_the_reverse(backbone):
    expected, text = backbone(tokens()), repr(backbone)
    replaced = fuse(backbone)
    assert sorted(unfuse(backbone)) == sorted(replaced)
    assert repr(backbone) == text
    assert not any(isinstance(module, FusedInTI) for module in backbone.modules())
    assert not any(hasattr(module, "backend") for module in backbone.modules())
    assert backbone.again is backbone.parts["list"][1]
    assert torch.equal(backbone(tokens()), expected)


def test_a_second_time_nothing_is_left_to_do(backbone):
    assert unfuse(backbone) == []
    fuse(backbone, backend="cpu")
    first = backbone.first
    assert fuse(backbone, backend="cpu") == []
    assert backbone.first is first
    assert fuse(nn.Linear(2, 2)) == []


def test_an_inti_as_root_comes_back_as_the_new_module():
    inti, x = module_case(**SIZES, dtype=torch.float64)
    fused = fuse(inti, backend="cpu")
    assert type(fused) is FusedInTI
    assert fused.backend == "cpu"
    assert all(a is b for a, b in zip(fused.parameters(), inti.parameters(), strict=True))
    assert_same(fused(x), inti(x))
    assert fuse(fused) is fused
    back = unfuse(fused)
    assert type(back) is InTI
    assert unfuse(back) is back
    assert torch.equal(back(x), inti(x))


def test_a_wrong_backend_changes_nothing(backbone):
    with pytest.raises(ValueError, match="backend must be one of .*got 'tpu'"):
        fuse(backbone, backend="tpu")
    assert not any(isinstance(module, FusedInTI) for module in backbone.modules())


def test_subclasses_are_left_alone_and_reported():
    model = nn.Sequential(InTI(6, 4, (2, 3)), Changed(6, 2, (2, 3)))
    with pytest.warns(UserWarning, match="left alone: 1: Changed is a subclass") as warned:
        replaced = fuse(model)
    assert warned[0].filename == __file__, "the warning points at who called fuse"
    assert replaced == ["0"]
    assert list(replaced.skipped) == ["1"]
    assert type(model[1]) is Changed
    with pytest.warns(UserWarning, match="left alone: 1: Changed is a subclass"):
        assert unfuse(model) == ["0"]
    root = Changed(6, 4, (2, 3))
    with pytest.warns(UserWarning, match="left alone: the model itself: Changed is a subclass"):
        replaced = fuse(root)
    assert replaced == []
    assert list(replaced.skipped) == [""]


@pytest.mark.parametrize("swap", [fuse, unfuse])
@pytest.mark.parametrize("training", [True, False])
def test_mode_and_requires_grad_carry_over(swap, training):
    model = nn.Sequential(FusedInTI(6, 4, (2, 3)) if swap is unfuse else InTI(6, 4, (2, 3)))
    model.train(training)
    model[0].head.requires_grad_(False)
    model[0].note = "kept"
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert swap(model) == ["0"]
    assert model[0].training == model[0].token.training == training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model[0].note == "kept", "what users hang on a module stays on it"
    model.train(not training)
    assert model[0].head.training != training


def test_hooks_fire_and_their_handles_remove_them():
    model = nn.Sequential(InTI(6, 4, (2, 3)).double())
    randomize(model, 0)
    seen = []
    inti = model[0]
    handles = [
        inti.register_forward_pre_hook(lambda module, args: seen.append(("before", type(module)))),
        inti.register_forward_hook(lambda module, args, output: seen.append(("after", type(module)))),
        inti.register_full_backward_hook(lambda module, grads, outs: seen.append(("backward", type(module)))),
        inti.register_forward_hook(lambda module, args, kw, output: seen.append(("kw", len(kw))), with_kwargs=True),
        inti.token.register_forward_hook(lambda module, args, output: seen.append(("token", type(module)))),
        inti.register_state_dict_pre_hook(lambda module, *rest: seen.append(("state", type(module)))),
        inti.position.register_hook(lambda grad: seen.append(("position", grad.shape))),
    ]
    fuse(model)
    model(tokens(4).requires_grad_()).sum().backward()
    model.state_dict()
    names = {name for name, _ in seen}
    assert {"before", "after", "backward", "kw", "state", "position"} <= names
    assert {what for name, what in seen if name in ("before", "after", "backward", "state")} == {FusedInTI}
    for handle in handles:
        handle.remove()
    seen.clear()
    model(tokens(4).requires_grad_()).sum().backward()
    model.state_dict()
    assert seen == []
    late = model[0].register_forward_hook(lambda module, args, output: output + 1)
    unfuse(model)
    z = model(tokens(4))
    late.remove()
    assert_same(z, model(tokens(4)) + 1)


def test_an_optimizer_goes_on(backbone):
    """Momentum and all: swapped in mid-training, the steps are those of the reference."""
    models = [backbone, copy.deepcopy(backbone)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models]
    for step in range(6):
        if step == 2:
            assert len(fuse(models[1], backend="cpu")) == 4
        if step == 4:
            assert len(unfuse(models[1])) == 4
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(tokens()).square().mean().backward()
            optimizer.step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)
    assert not torch.equal(models[0].first.cube.weight, Backbone().double().first.cube.weight)


def test_checkpoints_load_both_ways():
    inti, x = module_case(**SIZES, dtype=torch.float64, head="attention", fusion="cat")
    fused = FusedInTI(6, 4, (2, 3), head="attention", fusion="cat", backend="cpu").double()
    result = fused.load_state_dict(inti.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(fused(x), inti(x))
    other = InTI(6, 4, (2, 3), head="attention", fusion="cat").double()
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), inti(x))


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_stand_alone(way, ablation):
    inti, x = module_case(**SIZES, dtype=torch.float64, **ablation)
    fused = FusedInTI.from_reference(inti, backend="cpu").eval()
    if way == "deepcopy":
        twin = copy.deepcopy(fused)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is FusedInTI
    assert twin.backend == "cpu"
    assert not twin.training
    assert repr(twin) == repr(fused)
    expected = fused(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.position_scale.add_(1)
    assert not torch.equal(twin(x), expected)
    assert torch.equal(fused(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_to_another_dtype(dtype, backbone):
    fuse(backbone, backend="cpu")
    assert backbone.to(dtype) is backbone
    assert {parameter.dtype for parameter in backbone.parameters()} == {dtype}
    x = tokens(dtype=dtype)
    z = backbone(x)
    assert z.dtype == dtype
    unfuse(backbone)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(z, backbone(x), rtol=0, atol=64 * eps)


def test_a_module_that_was_compiled_runs_the_new_forward():
    """Module.compile() keeps a compiled call of the old class, which the swap must not inherit."""
    model = nn.Sequential(InTI(6, 4, (2, 3)))
    model[0].compile(backend="eager")
    model(tokens(4, torch.float32))
    fuse(model, backend="cpu")
    backends.executed.clear()
    model(tokens(4, torch.float32))
    assert ("inti", "cpu") in backends.executed
    model[0].compile(backend="eager")
    expected = model(tokens(4, torch.float32))
    unfuse(model)
    backends.executed.clear()
    torch.testing.assert_close(model(tokens(4, torch.float32)), expected)
    assert not backends.executed


def test_a_compiled_model_notices_the_swap():
    model = nn.Sequential(nn.Linear(6, 6), InTI(6, 4, (2, 3)))
    compiled = torch.compile(model, backend="eager")
    expected = compiled(tokens(4, torch.float32))
    assert fuse(compiled, backend="cpu") == ["_orig_mod.1"]
    backends.executed.clear()
    torch.testing.assert_close(compiled(tokens(4, torch.float32)), expected)
    assert backends.executed["inti", "cpu"] == 1


def test_a_patched_forward_is_left_alone() -> None:
    """It is bound to the old module: carried over, it would run InTI under FusedInTI's name."""
    model = nn.Sequential(InTI(6, 4, (2, 3)))
    model[0].forward = model[0].forward
    with pytest.warns(UserWarning, match="left alone: 0: its forward was patched"):
        replaced = fuse(model)
    assert replaced == []
    assert type(model[0]) is InTI
    assert list(replaced.skipped) == ["0"]


def test_what_is_fused_already_takes_the_backend() -> None:
    model = nn.Sequential(InTI(6, 4, (2, 3)))
    fuse(model)
    fused = model[0]
    assert fuse(model, backend="reference") == []
    assert model[0] is fused
    assert fused.backend == "reference"
    assert fuse(fused, backend="cpu").backend == "cpu"
    assert fuse(fused).backend == "cpu"


class Adapted(nn.Linear):
    """What LoRA does: the same weight, and something more in forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.low = nn.Parameter(torch.randn(linear.out_features, linear.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.nn.functional.linear(x, self.low)


@pytest.mark.parametrize("where", ["token.linear", "head.linear1", "head.linear2", "frame.linear"])
def test_an_adapter_inside_is_called(where: str) -> None:
    module, x = module_case(dim=6, frames=4, grid=(2, 3))
    parent, name = where.split(".")
    setattr(getattr(module, parent), name, Adapted(getattr(getattr(module, parent), name)))
    fused = FusedInTI.from_reference(module)
    results = []
    for run in (module, fused):
        z = run(x)
        (grad,) = torch.autograd.grad(z.square().sum(), getattr(getattr(run, parent), name).low)
        results.append((z, grad))
    torch.testing.assert_close(results[1], results[0])
    assert results[0][1].abs().sum() > 0


@pytest.mark.parametrize("where", ["token", "token.norm", "token.linear", "head.linear1", "head.linear2", "cube"])
def test_hooks_on_what_is_inside_fire(where: str) -> None:
    module, x = module_case(dim=6, frames=4, grid=(2, 3))
    fused = FusedInTI.from_reference(module)
    fired: list[str] = []
    module.get_submodule(where).register_forward_hook(lambda *_: fired.append(where))
    for run in (module, fused):
        run(x)
    assert fired == [where, where]


def test_the_old_module_keeps_its_own_position() -> None:
    old = InTI(6, 4, (2, 3))
    new = fuse(old)
    new.resize_position(8)
    assert old.position.shape[0] == 4
    assert new(torch.randn(1, 8, 7, 6)).shape[1] == 4
