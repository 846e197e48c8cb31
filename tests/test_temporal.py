"""Temporal modules against plain channels-first PyTorch, as UniFormerV2 and ST-Adapter describe themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from inti_kernels.models.temporal import TEMPORAL, STAdapter, TemporalModules, UniFormerV2
from inti_kernels.reference import functional
from inti_kernels.testing import randomize

GRID = (2, 3)
KINDS = {
    "global": (UniFormerV2, {"global_blocks": 2, "heads": 3}),
    "local": (UniFormerV2, {"global_blocks": 0, "local": True}),
    "double and global": (UniFormerV2, {"global_blocks": 3, "local": "double", "heads": 2}),
    "adapter": (STAdapter, {"width": 5}),
    "adapter before the MLP": (STAdapter, {"width": 5, "before": "mlp"}),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS)


pytestmark = pytest.mark.usefixtures("one_thread")


def make(kind: str, *, dtype: torch.dtype = torch.float64, prefix: int = 1, fresh: bool = False, **kwargs: Any) -> Any:
    """Three blocks of width 12, all parameters random unless fresh, and nothing dropped."""
    cls, options = KINDS[kind]
    if cls is UniFormerV2:
        options = {"dropout": 0.0, **options}
    temporal = cls(12, 3, GRID, prefix=prefix, **{"backend": "cpu", **options, **kwargs}).to(dtype)
    if not fresh:
        randomize(temporal, 3)
    return temporal


def tokens(frames: int, prefix: int = 1, seed: int = 0) -> Tensor:
    """x [B·T, N, C] of two clips."""
    shape = (2 * frames, prefix + GRID[0] * GRID[1], 12)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walk(temporal: TemporalModules, x: Tensor, frames: int) -> Tensor:
    """All that a compressed model calls, with blocks that mix the tokens of a frame, and frames halved behind the
    second: the features, or the last tokens."""
    batch = x.shape[0] // frames
    state = temporal.start(batch)
    for number in range(1, temporal.blocks + 1):
        x = temporal.before_attention(number, x, frames, GRID)
        x = x + x.mean(dim=1, keepdim=True)
        if temporal.splits(number):
            x = temporal.before_mlp(number, x, frames, GRID)
        x = x + torch.tanh(x)
        if temporal.reads(number):
            state = temporal.after_block(number, x, frames, GRID, None, state)
        if number == 2 and frames > 1:
            x, frames = x.unflatten(0, (-1, 2)).mean(dim=1), frames // 2
    x = x.unflatten(0, (batch, frames))
    return temporal.features(x, state) if temporal.replaces_head else x


class ChannelsFirst(TemporalModules):
    """The same in plain PyTorch on [B, C, T, H, W], with the parameters of the modules that it stands in for."""

    def __init__(self, temporal: TemporalModules) -> None:
        super().__init__(temporal.dim, temporal.blocks, temporal.grid, prefix=temporal.prefix)
        self.ours = [temporal]  # a list, so that its parameters have no second name
        self.splits, self.reads, self.replaces_head = temporal.splits, temporal.reads, temporal.replaces_head
        self.norms = {m: nn.BatchNorm3d(self.dim).double() for m in temporal.modules() if isinstance(m, nn.BatchNorm1d)}
        for norm, twin in self.norms.items():
            twin.load_state_dict(norm.state_dict())
            twin.weight, twin.bias = norm.weight, norm.bias
            twin.train(norm.training)

    def _bottlenecks(self, name: str) -> nn.ModuleList | None:
        (temporal,) = self.ours
        if isinstance(temporal, STAdapter):
            return temporal.adapters if temporal.before == name else None
        return getattr(temporal, f"local_{name}", None)

    def _bottleneck(self, name: str, number: int, x: Tensor, frames: int) -> Tensor:
        modules = self._bottlenecks(name)
        if modules is None:
            return x
        module = modules[number - 1]
        cube = functional.tokens_to_grid(x.unflatten(0, (-1, frames)), self.grid, self.prefix)
        y = self.norms[module.norm](cube) if module.norm in self.norms else cube
        y = F.conv3d(y, module.down.weight[:, :, None, None, None], module.down.bias)
        y = F.conv3d(y, module.conv.weight, module.conv.bias, padding=(1, 0, 0), groups=y.shape[1])
        y = F.conv3d(y, module.up.weight[:, :, None, None, None], module.up.bias)
        patches = (cube + y).permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2)
        return torch.cat((x[:, : self.prefix], patches), dim=1)

    def before_attention(self, number: int, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        return self._bottleneck("attention", number, x, frames)

    def before_mlp(self, number: int, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        return self._bottleneck("mlp", number, x, frames)

    def start(self, batch: int) -> Tensor | None:
        return self.ours[0].token.repeat(batch, 1, 1) if self.replaces_head else None

    def after_block(
        self, number: int, x: Tensor, frames: int, grid: tuple[int, int], present: Tensor | None, state: Tensor
    ) -> Tensor:
        block = self.ours[0].global_blocks[number - self.ours[0].global_from]
        x = x.unflatten(0, (-1, frames))
        cube = functional.tokens_to_grid(x, self.grid, self.prefix)
        cube = cube + F.conv3d(cube, block.position.weight, block.position.bias, padding=1, groups=self.dim)
        x = torch.cat((x[:, :, : self.prefix], cube.permute(0, 2, 3, 4, 1).flatten(2, 3)), dim=2)
        clips = []
        for index, clip in enumerate(x.flatten(1, 2)):
            there = slice(None) if present is None else present.unflatten(0, (-1, frames))[index].flatten()
            clips.append(cross_attention(block, state[index], clip[there]))
        return torch.stack(clips)

    def features(self, x: Tensor, state: Tensor) -> Tensor:
        (temporal,) = self.ours
        cls = (x[:, :, 0] if self.prefix else x.mean(dim=2)).mean(dim=1)
        share = 1 / (1 + torch.exp(-temporal.balance))
        return temporal.norm(share * cls + (1 - share) * state[:, 0])


def cross_attention(block: nn.Module, token: Tensor, tokens: Tensor) -> Tensor:
    """token [1, C], tokens [K, C] of one clip → [1, C]."""
    query, keys = block.query_norm(token), block.token_norm(tokens)
    of_q, of_k, of_v = block.attention.in_proj_weight.chunk(3)
    bias_q, bias_k, bias_v = block.attention.in_proj_bias.chunk(3)
    heads = block.attention.num_heads
    q, k, v = (
        (rows @ weight.T + bias).unflatten(1, (heads, -1))
        for rows, weight, bias in ((query, of_q, bias_q), (keys, of_k, bias_k), (keys, of_v, bias_v))
    )
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    read = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v).flatten(1)
    token = token + block.attention.out_proj(read)
    hidden = block.mlp[0](block.mlp_norm(token))
    return token + block.mlp[2](hidden * torch.sigmoid(1.702 * hidden))


def run_both(temporal: TemporalModules, x: Tensor, frames: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients of x and all parameters, of the modules and of their twin."""
    results, twin = [], ChannelsFirst(temporal)
    for one in (twin, temporal):
        leaf = x.clone().requires_grad_()
        y = walk(one, leaf, frames)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        names, leaves = zip(("x", leaf), *temporal.named_parameters(), strict=True)
        grads = torch.autograd.grad(y, leaves, upstream)
        results.append({"y": y.detach(), **dict(zip(names, grads, strict=True))})
    for norm, plain in twin.norms.items():
        torch.testing.assert_close(norm.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    return results[0], results[1]


def assert_same(plain: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    for name, expected in plain.items():
        if not name.endswith("in_proj_bias"):  # a third of it, the keys', has none
            assert expected.abs().max() > 1e-4, f"{name} has no gradient to compare"
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frames", [1, 2, 8])
@of_every_kind
def test_equals_channels_first(kind: str, frames: int, training: bool) -> None:
    temporal = make(kind)
    walk(temporal, tokens(2, seed=1), 2)  # running statistics that aren't those of the start
    assert_same(*run_both(temporal.train(training), tokens(frames), frames))


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize("prefix", [0, 5])
@of_every_kind
def test_prefix_and_backend(kind: str, prefix: int, backend: str | None) -> None:
    temporal = make(kind, prefix=prefix, backend=backend)
    assert_same(*run_both(temporal, tokens(4, prefix), 4))


@of_every_kind
def test_sequence_first_tokens(kind: str) -> None:
    """Libraries that run [N, B·T, C] give a transposed view."""
    temporal, x = make(kind).eval(), tokens(4)
    view = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(walk(temporal, view, 4), walk(temporal, x, 4), rtol=1e-12, atol=1e-12)


def test_absent_tokens_are_left_out() -> None:
    temporal, x = make("global"), tokens(4)
    present = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(5)) < 0.6
    present[:, 0] = True
    x = x * present[..., None]
    start, twin = temporal.start(2) + 1, ChannelsFirst(temporal)
    state, expected = (one.after_block(3, x, 4, GRID, present, start) for one in (temporal, twin))
    torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(state, temporal.after_block(3, x, 4, GRID, None, start), rtol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@of_every_kind
def test_starts_as_the_tower(kind: str, training: bool) -> None:
    temporal, x = make(kind, fresh=True).train(training), tokens(4)
    for stage in (temporal.before_attention, temporal.before_mlp):
        assert torch.equal(stage(2, x, 4, GRID), x)
    if temporal.replaces_head:
        state = temporal.after_block(3, x, 4, GRID, None, temporal.start(2))
        assert torch.equal(state, torch.zeros(2, 1, 12, dtype=torch.float64))
        x = x.unflatten(0, (2, 4))
        torch.testing.assert_close(temporal.features(x, state), temporal.norm(x[:, :, 0].mean(1) / 2))


@of_every_kind
def test_trains_from_its_start(kind: str) -> None:
    """Two steps: what starts at zero moves first, and then all the rest has a gradient."""
    temporal, x = make(kind, fresh=True), tokens(4)
    optimizer = torch.optim.SGD(temporal.parameters(), lr=0.1)
    target = torch.randn(walk(temporal, x, 4).shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(walk(temporal, x, 4), target).backward()
        optimizer.step()
    assert [name for name, p in temporal.named_parameters() if not p.grad.any()] == []


def test_mlp_of_a_global_block_starts_xavier_uniform() -> None:
    weight = UniFormerV2(96, 1, GRID, global_blocks=1).global_blocks[0].mlp[0].weight
    bound = (6 / (96 + 4 * 96)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_parameter_counts() -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        kinetics = UniFormerV2(768, 12, (14, 14))
        something = UniFormerV2(768, 12, (14, 14), local="double", global_blocks=8)
        classifier = nn.Linear(768, 400)
        large = UniFormerV2(1024, 24, (16, 16), local=True, global_blocks=0)
        adapter = STAdapter(768, 12, (14, 14))
    assert count(kinetics.global_blocks[0]) == 7_110_912
    assert count(something.local_attention[0]) == count(something.local_mlp[0]) == 791_296
    assert (len(something.local_attention), len(something.local_mlp), len(something.global_blocks)) == (12, 12, 8)
    tower = 12 * (12 * 768**2 + 13 * 768) + 768 * (3 * 16**2 + 1 + 197 + 2)
    assert tower == 85_797_888
    assert tower + count(kinetics) + count(classifier) == 114_552_208
    assert large.local_attention[0].conv.weight.shape == (682, 1, 3, 1, 1)
    assert count(adapter) == 12 * (2 * 768 * 384 + 768 + 384 + 4 * 384)
    assert (kinetics.heads, large.heads) == (12, 16)


@of_every_kind
def test_where_they_stand(kind: str) -> None:
    temporal = make(kind)
    reads = [number for number in (1, 2, 3) if temporal.reads(number)]
    assert reads == {"global": [2, 3], "double and global": [1, 2, 3]}.get(kind, [])
    assert temporal.replaces_head == bool(reads) == (temporal.start(2) is not None)
    assert temporal.precedes(2) == (kind in ("local", "double and global", "adapter"))
    assert temporal.splits(2) == (kind in ("double and global", "adapter before the MLP"))
    x = tokens(4)
    moves = [not torch.equal(stage(2, x, 4, GRID), x) for stage in (temporal.before_attention, temporal.before_mlp)]
    assert moves == [temporal.precedes(2), temporal.splits(2)]
    state = temporal.start(2)
    assert temporal.after_block(min(reads, default=3) - 1, x, 4, GRID, None, state) is state


@of_every_kind
def test_state_dict(kind: str) -> None:
    temporal, x = make(kind), tokens(4)
    walk(temporal, x, 4)
    other = make(kind, fresh=True)
    other.load_state_dict(temporal.state_dict())
    assert torch.equal(walk(other.eval(), x, 4), walk(temporal.eval(), x, 4))
    for module in temporal.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.BatchNorm3d(12).load_state_dict(module.state_dict())
        if isinstance(module, nn.Conv3d):
            width = module.in_channels
            nn.Conv3d(width, width, module.kernel_size, groups=width).load_state_dict(module.state_dict())


@of_every_kind
def test_autocast(kind: str) -> None:
    """Near float32, forward and backward, with tokens of either dtype; the convolutions run in bfloat16."""
    temporal, x = make(kind, dtype=torch.float32), tokens(4).float()
    present = torch.ones(x.shape[:2], dtype=torch.bool)
    seen: list[torch.dtype] = []
    for module in temporal.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    expected = walk(temporal, x, 4)
    grads = torch.autograd.grad(expected.sum(), list(temporal.parameters()))
    assert set(seen) == {torch.float32}
    for dtype in (torch.float32, torch.bfloat16):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            y = walk(temporal, x.to(dtype), 4)
            if temporal.reads(3):
                temporal.after_block(3, x.to(dtype), 4, GRID, present, temporal.start(2))
        assert set(seen) == {torch.bfloat16}
        assert (y - expected).norm() < 0.03 * expected.norm()
        for ours, wide in zip(torch.autograd.grad(y.sum(), list(temporal.parameters())), grads, strict=True):
            assert (ours - wide).norm() < 0.1 * wide.norm() + 1e-2


@pytest.mark.parametrize("kind", ["double and global", "adapter"])
def test_compiles_without_a_break(kind: str) -> None:
    torch._dynamo.reset()
    temporal, x = make(kind, dtype=torch.float32), tokens(4).float()
    present = torch.arange(x.shape[1]).expand(x.shape[:2]) != 4

    def step(x: Tensor) -> Tensor:
        x = temporal.before_mlp(3, temporal.before_attention(3, x, 4, GRID), 4, GRID)
        return temporal.after_block(3, x, 4, GRID, present, temporal.start(2)) if temporal.reads(3) else x

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        y = run(x)
        used = torch.autograd.grad(y.square().sum(), list(temporal.parameters()), allow_unused=True)
        results.append([y, *(grad for grad in used if grad is not None)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reentrant", [False, True])
@of_every_kind
def test_runs_again_in_the_backward(kind: str, reentrant: bool) -> None:
    """Gradient checkpointing changes no bit, of output, gradients or running statistics."""
    results = []
    for run in (walk, lambda *inputs: checkpoint(walk, *inputs, use_reentrant=reentrant)):
        temporal, leaf = make(kind), tokens(4).requires_grad_()
        start = copy.deepcopy(dict(temporal.named_buffers()))
        y = run(temporal, leaf, 4)
        y.square().sum().backward()
        assert all(not torch.equal(buffer, start[name]) for name, buffer in temporal.named_buffers())
        results.append([y, leaf.grad, *(p.grad for p in temporal.parameters()), *temporal.buffers()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_running_statistics_when_compiled() -> None:
    """Taken once under gradient checkpointing there too."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        temporal, leaf = make("local", dtype=torch.float32), tokens(4).float().requires_grad_()

        def step(x: Tensor, temporal: TemporalModules = temporal) -> Tensor:
            return checkpoint(temporal.before_attention, 1, x, 4, GRID, use_reentrant=False)

        y = (torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step)(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *temporal.local_attention[0].buffers()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("prefix", [0, 5])
@of_every_kind
def test_macs(kind: str, prefix: int) -> None:
    """The formula counts what runs, at every block and number of frames."""
    with torch.device("meta"):
        temporal = make(kind, prefix=prefix, fresh=True, backend="reference")
        for number, frames, grid in ((1, 4, GRID), (2, 4, (3, 5)), (3, 2, GRID)):
            n = prefix + grid[0] * grid[1]
            x = torch.empty(frames, n, 12, dtype=torch.float64)
            with FlopCounterMode(display=False) as counter:
                temporal.before_mlp(number, temporal.before_attention(number, x, frames, grid), frames, grid)
                state = temporal.after_block(number, x, frames, grid, None, temporal.start(1))
                if temporal.replaces_head:
                    temporal.features(x[None], state)
            assert temporal.macs(number, frames, n) == counter.get_total_flops() // 2
    assert temporal.macs(3, 2) == temporal.macs(3, 2, prefix + GRID[0] * GRID[1])


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (UniFormerV2, {"heads": 5}, ValueError, "divisible by heads, got 12 channels and 5 heads"),
        (UniFormerV2, {"global_blocks": 4}, ValueError, "from 0 to the tower's 3 blocks, got 4"),
        (UniFormerV2, {"global_blocks": 0}, ValueError, "local=False and global_blocks=0"),
        (UniFormerV2, {"global_blocks": 2.0}, TypeError, "global_blocks must be a whole number"),
        (UniFormerV2, {"global_blocks": 2, "local": "triple"}, ValueError, "local must be one of"),
        (UniFormerV2, {"global_blocks": 2, "dropout": 1.0}, ValueError, "dropout must be"),
        (UniFormerV2, {"global_blocks": 2, "mlp_ratio": 0}, ValueError, "mlp_ratio must be at least 1"),
        (UniFormerV2, {"global_blocks": 1, "local": True, "dim": 1}, ValueError, "at least 2, got 1"),
        (STAdapter, {"width": 0}, ValueError, "width must be at least 1"),
        (STAdapter, {"before": "norm"}, ValueError, "before must be one of"),
        (STAdapter, {"backend": "cupa"}, ValueError, "backend"),
        (STAdapter, {"prefix": -1}, ValueError, "prefix must be 0 or more"),
        (STAdapter, {"grid": (2, 0)}, ValueError, "grid must be"),
        (STAdapter, {"blocks": 0}, ValueError, "blocks must be at least 1"),
    ],
)
def test_options_that_do_not_go(
    cls: type[TemporalModules], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cls(**{"dim": 12, "blocks": 3, "grid": GRID, **options})


@of_every_kind
def test_wrong_grid(kind: str) -> None:
    temporal, x = make(kind), tokens(4)
    names = {"global": "after_block", "local": "before_attention", "double and global": "before_mlp"}
    name = names.get(kind, "before_mlp" if temporal.splits(3) else "before_attention")
    rest = (None, temporal.start(2)) if name == "after_block" else ()
    with pytest.raises(ValueError, match=r"prefix \+ H·W = 1 \+ 2·2 = 5 tokens a frame, got 7"):
        getattr(temporal, name)(3, x, 4, (2, 2), *rest)


def test_names_and_words() -> None:
    assert {"uniformer_v2": UniFormerV2, "st_adapter": STAdapter} == TEMPORAL
    assert "heads=2, global_blocks=3, local='double'" in repr(make("double and global"))
    assert "width=5, before='mlp'" in repr(make("adapter before the MLP"))
