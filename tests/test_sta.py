"""STA: which patches it drops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_tower import DIM, FRAMES, ToyAdapter, run, tokens

from inti_kernels.models.methods import STA
from inti_kernels.models.methods.sta import kept_patches, semantic_scores

pytestmark = pytest.mark.usefixtures("one_thread")


def kept_by_hand(features: Tensor, semantics: Tensor, dropped: int) -> list[list[int]]:
    """One clip: features [T, P, D] of length 1, semantics [T, P]."""
    frames, patches = semantics.shape
    edges = []
    for i in range(0, patches, 2):
        best = max((float(features[0, i] @ features[0, j]), -j) for j in range(1, patches, 2))[0] if patches > 1 else 0
        edges.append((-best, i))
    gone = {i for _, i in sorted(edges)[:dropped]}
    kept = [[i for i in range(patches) if i not in gone]]
    redundancy = dict.fromkeys(range(patches), 1.0)  # of the first frame all, those that it loses too
    for t in range(1, frames):
        passed = [0.0] * patches
        for before, amount in redundancy.items():
            exponentials = [math.exp(float(features[t, i] @ features[t - 1, before])) for i in range(patches)]
            for i in range(patches):
                passed[i] += amount * exponentials[i] / sum(exponentials)
        scores = [(passed[i] * (1 - float(semantics[t, i])), i) for i in range(patches)]
        kept.append(sorted(i for _, i in sorted(scores)[: patches - dropped]))
        redundancy = {i: passed[i] for i in kept[-1]}
    return kept


@given(frames=st.integers(1, 5), patches=st.integers(2, 9), dropped=st.integers(1, 4), seed=st.integers(0, 99))
def test_sta_keeps_what_a_loop_would(frames: int, patches: int, dropped: int, seed: int) -> None:
    dropped = min(dropped, patches // 2)
    features = F.normalize(tokens(2, frames, patches, 4, seed=seed, dtype=torch.float64), dim=-1)
    semantics = semantic_scores(tokens(2, frames, patches, 5, seed=seed + 1, dtype=torch.float64))
    assert kept_patches(features, semantics, dropped).tolist() == [
        kept_by_hand(features[clip], semantics[clip], dropped) for clip in range(2)
    ]


def test_sta_reads_the_mean_keys_of_the_heads_and_the_output() -> None:
    adapter = ToyAdapter(1)
    block, method, x = adapter.blocks[0], STA(adapter, at=(1,), keep=0.7), tokens(2 * FRAMES, 1 + 11, DIM)
    k = block.heads(block.norm1(x))[1].detach()
    features, output = F.normalize(k.mean(1), dim=-1)[:, 1:], block(x)
    z, (places, _) = method.block(adapter, block, 1, x, FRAMES, method.start(x, FRAMES))
    for clip in range(2):
        frames = slice(clip * FRAMES, (clip + 1) * FRAMES)
        kept = kept_by_hand(features[frames], semantic_scores(output[frames, 1:]), 3)
        assert places[frames].tolist() == [[0, *(1 + patch for patch in frame)] for frame in kept]
    torch.testing.assert_close(z, output.gather(1, places[..., None].expand_as(z)))


def test_sta_semantics_is_activity() -> None:
    x = torch.tensor([[[1.0, -1.0], [4.0, 0.0], [-1.0, 5.0]], [[3.0, 0.0], [0.0, -3.0], [2.0, 1.0]]])
    assert semantic_scores(x).tolist() == [[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]


def planted(new: int, still: int, frames: int = 5) -> Tensor:
    """Features [1, T, new + still, D]: directions of their own; the last ``still`` are the same in every frame."""
    directions = torch.eye(frames * new + still)
    once, always = directions[: frames * new].unflatten(0, (frames, new)), directions[frames * new :]
    return torch.cat((once, always.expand(frames, -1, -1)), dim=1)[None]


def test_sta_drops_what_was_there_and_keeps_what_moves() -> None:
    kept = kept_patches(planted(new=4, still=4), torch.zeros(1, 5, 8), 2)
    assert kept.shape == (1, 5, 6)
    for frame in kept[0, 1:].tolist():
        assert frame[:4] == [0, 1, 2, 3]


def test_sta_keeps_what_matters() -> None:
    """In a still clip of equal patches, redundancy is even and semantics decides."""
    semantics = torch.tensor([0.3, 1.0, 0.1, 0.6, 0.0, 0.9, 0.2, 0.5]).expand(1, 5, 8)
    kept = kept_patches(F.normalize(torch.ones(1, 5, 8, 3), dim=-1), semantics, 3)
    assert kept[0, 1:].tolist() == [[0, 1, 3, 5, 7]] * 4


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_sta_counts_and_places(prefix: int) -> None:
    """In blocks that leave the tokens as they are: what is put back is the first tokens, or nothing."""
    adapter = ToyAdapter(4, prefix)
    for block in adapter.blocks:
        for linear in (block.project, block.mlp[2]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    x = tokens(2 * FRAMES, prefix + 10, DIM)
    method = STA(adapter, at=(1, 3), keep=0.7)
    kept, state = run(adapter, method, x)
    assert [n - prefix for n, _ in method.tokens(prefix + 10, 4)] == [10, 7, 7, 5]
    assert kept.shape[1] == prefix + 5
    restored, present = method.restore(kept, state)
    assert present.sum(dim=1).tolist() == [prefix + 5] * (2 * FRAMES)
    assert bool(present[:, :prefix].all())
    assert torch.equal(restored, x * present[..., None])
    alone, _ = run(adapter, method, x[FRAMES:])
    torch.testing.assert_close(kept[FRAMES:], alone)  # a clip doesn't depend on what it is batched with


def test_sta_runs_backwards_at_every_second_block() -> None:
    """Behind the second of its blocks, it is the last frame that the chain starts from."""
    adapter = ToyAdapter(2)
    x = tokens(FRAMES, 11, DIM)
    forwards, backwards = STA(adapter, at=(2,), keep=0.7), STA(adapter, at=(1, 2), keep=0.7)
    of_reversed, state = forwards.block(adapter, adapter.blocks[1], 2, x.flip(0), FRAMES, forwards.start(x, FRAMES))
    z, state = backwards.block(adapter, adapter.blocks[1], 2, x, FRAMES, backwards.start(x, FRAMES))
    torch.testing.assert_close(z, of_reversed.flip(0))


def test_sta_defaults_and_refusals() -> None:
    assert STA(ToyAdapter(12)).at == {1, 5, 9}
    assert STA(ToyAdapter(1)).at == {1}
    adapter = ToyAdapter(3)
    for keep in (0.4, 1.1):
        with pytest.raises(ValueError, match=f"keep must be from 0.5 to 1 .* got {keep}"):
            STA(adapter, keep=keep)
    with pytest.raises(ValueError, match="at counts blocks from 1 to 3 in this tower, got 4"):
        STA(adapter, at=(1, 4))
    with pytest.raises(TypeError, match="at must be a whole number, got 1.5"):
        STA(adapter, at=(1.5,))
    x = tokens(FRAMES, 9, DIM)
    method = STA(adapter, keep=1)
    z, state = run(adapter, method, x)
    assert torch.equal(z, nn.Sequential(*adapter.blocks)(x))
    assert method.restore(z, state)[1] is None
