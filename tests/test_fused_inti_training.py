"""FusedInTI under compile, export, checkpoint, DDP and FSDP2, and in a tiny model that learns."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from inti_kernels import FusedInTI, InTI, backends, fuse
from inti_kernels.testing import module_case, randomize

SIZES = {"dim": 6, "frames": 4, "grid": (2, 3), "batch": 2}
ABLATIONS = [
    pytest.param({}, id="default"),
    pytest.param({"fusion": "cat", "head": "attention", "prefix": 0}, id="cat-attention"),
    pytest.param({"fusion": "add", "head": "sigmoid", "context": ("cube",), "prefix": 5}, id="add-sigmoid"),
]
# Of the module as in the paper, which is one op, and of the ablations, which are several.
ONE_NODE = {(op, "cpu") for op in ("inti", "token_features", "depthwise_conv3d", "interpolation_head")}
OPS = {
    "softmax": ONE_NODE,
    "attention": {("depthwise_conv3d", "cpu"), ("pair_interpolate", "cpu")},
    "sigmoid": {("depthwise_conv3d", "cpu"), ("token_features", "cpu")},
}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """PyTorch counts a function's recompilations over the whole process, and gives up at 8."""
    torch._dynamo.reset()


pytestmark = pytest.mark.usefixtures("one_thread")


def case(**ablation):
    """A FusedInTI on its kernels, in float64, and tokens for it."""
    inti, x = module_case(**SIZES, dtype=torch.float64, **ablation)
    return FusedInTI.from_reference(inti, backend="cpu"), x


def results(function, module, x):
    """z, the weights, and the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    z, weights = function(x, return_weights=True)
    loss = z.square().sum() + weights.sin().sum()
    return [z, weights, *torch.autograd.grad(loss, [x, *module.parameters()])]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_compile_in_training_has_no_graph_break(ablation):
    module, x = case(**ablation)
    expected = results(module, module, x)
    backends.executed.clear()
    assert_same(results(torch.compile(module, fullgraph=True, backend="aot_eager"), module, x), expected)
    ops = OPS[module.head_type]
    assert set(backends.executed) == ops | {(f"{op}_backward", backend) for op, backend in ops}


def test_compile_with_inductor():
    """The smallest module that has all ops: what takes time here is the C++ that inductor writes."""
    module, x = case(context=("cube",))
    expected = results(module, module, x)
    backends.executed.clear()
    assert_same(results(torch.compile(module, fullgraph=True), module, x), expected)
    assert set(backends.executed) >= ONE_NODE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compile_under_autocast(dtype):
    inti, x = module_case(**SIZES)
    module = FusedInTI.from_reference(inti, backend="cpu")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=dtype):
        expected, actual = results(module, module, x), results(compiled, module, x)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        atol = 8 * torch.finfo(dtype).eps * float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_compile_serves_another_batch_without_compiling_again():
    module, x = case()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    counts = []  # of the first call too there may be several
    for batch in (2, 3, 5):
        clips = x[:1].expand(batch, -1, -1, -1) * torch.arange(1, batch + 1).view(-1, 1, 1, 1)
        assert_same(results(compiled, module, clips), results(module, module, clips))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()  # strict export of an autograd.Function with a dynamic batch fails in torch 2.7
def test_export(strict, ablation):
    module, x = case(**ablation)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module.eval(), (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    ours = {op for op, _ in OPS[module.head_type]} if module.head_type != "softmax" else {"inti"}
    assert {target for target in targets if "inti_kernels" in target} == {f"inti_kernels.{op}.default" for op in ours}
    for clips in (x, torch.cat((x, -x, 2 * x))):
        assert_same([program.module()(clips)], [module(clips)])


def test_export_of_the_reference_backend_holds_no_op_of_ours():
    module, x = case()
    module.backend = "reference"
    program = torch.export.export(module, (x,))
    assert not any("inti_kernels" in str(node.target) for node in program.graph.nodes)
    assert_same([program.module()(x)], [module(x)])


def test_export_for_training():
    """Not strict (the default from torch 2.8 on): strict export cuts every autograd.Function off from its backward."""
    module, x = case()
    exported = torch.export.export(module, (x,), strict=False).module()
    parameters = {name: exported.get_parameter(name) for name, _ in module.named_parameters()}
    actual = torch.autograd.grad(exported(x).square().sum(), list(parameters.values()))
    assert_same(actual, torch.autograd.grad(module(x).square().sum(), list(module.parameters())))


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant, ablation):
    module, x = case(**ablation)
    expected = results(module, module, x)
    backends.executed.clear()
    if reentrant:  # whose inputs can't be differentiated by autograd.grad
        value = x.detach().requires_grad_()
        z, weights = checkpoint(functools.partial(module, return_weights=True), value, use_reentrant=True)
        (z.square().sum() + weights.sin().sum()).backward()
        actual = [z, weights, value.grad, *(parameter.grad for parameter in module.parameters())]
    else:
        actual = results(functools.partial(checkpoint, module, use_reentrant=False), module, x)
    assert_same(actual, expected)
    assert backends.executed["depthwise_conv3d", "cpu"] == 2, "once, and once again for the backward"


def test_functional_call_grad_and_vmap():
    module, x = case()
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(values, clip):
        return torch.func.functional_call(module, values, (clip[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for number, clip in enumerate(x):
        gradients = torch.autograd.grad(module(clip[None]).square().sum(), list(module.parameters()))
        assert_same([each[name][number] for name in parameters], gradients)


class Tiny(nn.Module):
    """A video classifier in small: embedding, block, InTI, block, InTI, mean, linear."""

    def __init__(self, **ablation) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(3))
        self.compress = nn.ModuleList(InTI(8, frames, (2, 2), **ablation) for frames in (8, 4))
        self.classify = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            x = block(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            if number < 2:
                x = self.compress[number](x)
        return self.classify(x[:, :, 0].mean(1))


def train(model, steps=8, autocast=None):
    """The losses of a few steps on clips whose class can be seen; the data is the same at every call."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    labels = torch.arange(12) % 3
    x = torch.randn(12, 8, 5, 5, generator=generator, dtype=torch.float64)
    x[range(12), 3:5, 0, labels] += 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = nn.functional.cross_entropy(model(x.to(dtype)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def pair_of_models(dtype, **ablation):
    """The same tiny model twice, the second one fused."""
    torch.manual_seed(0)
    plain = Tiny(**ablation).to(dtype)
    fused = copy.deepcopy(plain)
    assert len(fuse(fused, backend="cpu")) == 2
    return plain, fused


@pytest.mark.parametrize("ablation", [{}, {"head": "attention", "fusion": "cat"}, {"head": "sigmoid"}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, None, 1e-9),
        (torch.float32, None, 1e-4),
        (torch.float32, torch.bfloat16, 0.03),
    ],
    ids=str,
)
def test_training_gives_the_same_losses(dtype, autocast, tolerance, ablation):
    """From the initial state, where the weights are all ½, on."""
    plain, fused = pair_of_models(dtype, **ablation)
    before = copy.deepcopy(fused.compress.state_dict())
    backends.executed.clear()
    losses = train(fused, autocast=autocast)
    assert backends.executed["depthwise_conv3d_backward", "cpu"] == 16
    expected = train(plain, autocast=autocast)
    assert losses == pytest.approx(expected, rel=tolerance)
    assert losses[-1] < 0.9 * losses[0]
    after = fused.compress.state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name])], "every parameter learns"
    if dtype == torch.float64:
        for name, tensor in plain.compress.state_dict().items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("when", ["fused before", "fused inside"])
def test_ddp(one_rank, when):
    plain, fused = pair_of_models(torch.float64)
    expected = train(plain, steps=3)
    if when == "fused before":
        wrapped = nn.parallel.DistributedDataParallel(fused)
    else:
        torch.manual_seed(0)
        wrapped = nn.parallel.DistributedDataParallel(Tiny().double())
        assert fuse(wrapped, backend="cpu") == ["module.compress.0", "module.compress.1"]
    backends.executed.clear()
    assert train(wrapped, steps=3) == pytest.approx(expected, rel=1e-9)
    assert set(backends.executed) >= ONE_NODE


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2(one_rank, reshard):
    """Each FusedInTI a shard group of its own, and the whole model around them; σ's shape [1] is for this."""
    from torch.distributed.fsdp import fully_shard

    plain, fused = pair_of_models(torch.float64)
    expected = train(plain, steps=3)
    mesh = dist.init_device_mesh("cpu", (1,))
    for module in fused.compress:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(fused, mesh=mesh)
    assert all(isinstance(module, FusedInTI) for module in fused.compress)
    backends.executed.clear()
    assert train(fused, steps=3) == pytest.approx(expected, rel=1e-9)
    assert set(backends.executed) >= ONE_NODE
    assert all(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in fused.parameters())


def test_two_modules_that_share_their_parameters_add_their_gradients():
    inti, x = module_case(**SIZES, dtype=torch.float64)
    fused = FusedInTI.from_reference(inti, backend="cpu")
    twice = [*(2 * gradient for gradient in results(inti, inti, x)[3:])]
    for module in (inti, fused):
        z, weights = module(x, return_weights=True)
        (z.square().sum() + weights.sin().sum()).backward()
    assert_same([parameter.grad for parameter in inti.parameters()], twice)


def test_frozen_parameters_get_no_gradient_and_cost_none():
    """Only what is needed is computed: with all but the head frozen, the cube level has no backward."""
    inti, x = module_case(**SIZES)
    randomize(inti, 3)
    fused = FusedInTI.from_reference(inti.requires_grad_(False), backend="cpu")
    fused.head.requires_grad_(True)
    backends.executed.clear()
    fused(x).square().sum().backward()
    assert fused.head.linear1.weight.grad.any()
    assert fused.cube.weight.grad is None
    assert ("depthwise_conv3d_backward", "cpu") not in backends.executed
    assert ("interpolation_head_backward", "cpu") in backends.executed
