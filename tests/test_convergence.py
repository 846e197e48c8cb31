"""A tiny compressed ViT trains alike with InTI and with FusedInTI: the same losses from the same seed and data."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from op_subject import INTERPRETED, UNDER_TEST
from torch import Tensor, nn

from inti_kernels import InTI, backends, fuse
from inti_kernels.testing import assert_close_three_way, compare

DIM, GRID, PIXELS, CLASSES = 32, (2, 2), 8, 4
# A step takes long in the emulator, and seconds in Triton's interpreter: fewer and smaller ones there, learning faster.
CLIPS, FRAMES, STEPS, RATE = {"cpu": (8, 8, 100, 0.005), "cuda": (8, 8, 12, 0.03), "triton": (2, 4, 2, 0.1)}[UNDER_TEST]
# bfloat16's losses are compared over so many trainings, averaged over so many steps each time.
SEEDS, WINDOW = {"cpu": (2, 10), "cuda": (1, 2), "triton": (0, 1)}[UNDER_TEST]


pytestmark = pytest.mark.usefixtures("one_thread")


class CompressedViT(nn.Module):
    """Patch embedding with a class token, three blocks with an InTI behind the first two, a classifier of the clip.

    The last Linear of InTI's head starts at zero, where both frames count alike; here it starts at random numbers, and
    so does σ, so that from the first step on the losses hang on all of InTI.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, DIM)
        self.cls = nn.Parameter(0.02 * torch.randn(DIM))
        self.place = nn.Parameter(0.02 * torch.randn(1 + GRID[0] * GRID[1], DIM))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.compress = nn.ModuleList(InTI(DIM, FRAMES >> level, GRID) for level in range(2))
        self.classify = nn.Linear(DIM, CLASSES)
        for module in self.compress:
            nn.init.normal_(module.head.linear2.weight, std=0.5)
            nn.init.constant_(module.position_scale, 0.5)

    def forward(self, clips: Tensor) -> Tensor:
        """Patches [B, T, H·W, pixels] → logits [B, classes]."""
        patches = self.embed(clips)
        tokens = torch.cat((self.cls.to(patches.dtype).expand_as(patches[:, :, :1]), patches), dim=2) + self.place
        for number, block in enumerate(self.blocks):
            tokens = block(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
            if number < len(self.compress):
                tokens = self.compress[number](tokens)
        return self.classify(tokens[:, :, 0].mean(1))


def model(seed: int) -> CompressedViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CompressedViT()


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips of noise, in which both frames of a pair show a class: the one that counts has a mark in another pixel."""
    clips = torch.randn(CLIPS, FRAMES, GRID[0] * GRID[1], PIXELS, generator=generator, dtype=torch.float64)
    labels = torch.arange(CLIPS) % CLASSES
    marked = torch.randint(2, (CLIPS, FRAMES // 2), generator=generator)
    marked = torch.stack((marked, 1 - marked), dim=2).flatten(1)  # [B, T]
    others = torch.randint(1, CLASSES, (CLIPS, FRAMES), generator=generator)
    shown = (labels[:, None] + (1 - marked) * others) % CLASSES
    clips[..., :CLASSES] += F.one_hot(shown, CLASSES)[:, :, None]
    clips[..., CLASSES] += 2 * marked[:, :, None] - 1
    return clips, labels


def train(model: nn.Module, seed: int, autocast: torch.dtype | None = None) -> Tensor:
    """The losses of all steps, on new clips each time, [steps] in float64."""
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        clips, labels = batch(generator)
        clips = clips.to(next(model.parameters()).dtype)
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            logits = model(clips)
        # In the wide dtype: rounded to bfloat16, a loss would have steps of its own.
        loss = F.cross_entropy(logits if autocast is None else logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64)


def train_fused(seed: int, autocast: torch.dtype | None = None, recompute: bool = False) -> Tensor:
    """`train` with every InTI fused, on the kernels."""
    fused = model(seed)
    assert len(fuse(fused, backend=UNDER_TEST, recompute=recompute)) == 2
    before = backends.executed.copy()
    losses = train(fused, seed, autocast)
    ran = backends.executed - before
    assert ran["inti", UNDER_TEST] == ran["inti_backward", UNDER_TEST] == 2 * STEPS
    return losses


@cache
def train_inti(seed: int) -> tuple[CompressedViT, Tensor]:
    """A model after `train` in float32, and its losses."""
    plain = model(seed)
    return plain, train(plain, seed)


@pytest.mark.only_under_test("cpu")
def test_the_model_learns_and_its_interpolation_matters() -> None:
    trained, losses = train_inti(0)
    tenth = STEPS // 10
    print("losses", [round(float(loss), 3) for loss in losses[::tenth]])
    assert losses[-tenth:].mean() < 0.5 * losses[:tenth].mean()
    clips, labels = batch(torch.Generator().manual_seed(0))
    for module in trained.compress:
        module.register_forward_hook(lambda _, inputs, out: (inputs[0][:, 0::2] + inputs[0][:, 1::2]) / 2)
    with torch.no_grad():
        averaged = F.cross_entropy(trained(clips.float()), labels)
        for module in trained.compress:
            module._forward_hooks.clear()
        interpolated = F.cross_entropy(trained(clips.float()), labels)
    print(f"loss {interpolated:.4f}, with the pairs' mean in InTI's place {averaged:.4f}")
    assert abs(averaged - interpolated) > 0.05 * interpolated


@pytest.mark.parametrize("recompute", [False] if INTERPRETED else [False, True])
def test_float32_gives_the_same_losses(recompute: bool) -> None:
    _, expected = train_inti(0)
    actual = train_fused(0, recompute=recompute)
    print(f"largest relative difference {float(((actual - expected) / expected).abs().max()):.1e}")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


@pytest.mark.only_under_test("cpu", "cuda")  # of the interpreter's few losses nothing could be said
def test_bfloat16_losses_are_as_near_to_float64_as_those_of_inti() -> None:
    """The three-way rule, for the loss averaged over windows of steps, of several trainings together.

    Rounding pushes two trainings apart step by step, either way: one step's loss under bfloat16 is a sample of a noise
    that hangs on its clips, and that the steps after it share. Of two such noises of one law, one is often more than
    twice the other. Averaged over the clips of a window what stays is how far a training has drifted, which is what a
    wrong kernel changes; the maximum, the RMS and the mean are then taken over the windows of all trainings.
    """
    runs = []
    for seed in range(SEEDS):
        kernel = train_fused(seed, torch.bfloat16)
        plain = train(model(seed), seed, torch.bfloat16)
        reference = train(model(seed).double(), seed)
        runs.append([losses.view(-1, WINDOW).mean(1) for losses in (kernel, plain, reference)])
    k, t, r = map(torch.stack, zip(*runs, strict=True))
    assert_close_three_way([compare("loss", k, t, r, torch.bfloat16)])
