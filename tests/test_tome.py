"""ToMe: which tokens it merges, into what, and what the blocks make of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_tower import DIM, ToyAdapter, run, tokens

from inti_kernels.models.methods import STA, ToMe
from inti_kernels.models.methods.tome import match

pytestmark = pytest.mark.usefixtures("one_thread")


def merged_by_hand(x: Tensor, sizes: Tensor, keys: Tensor, r: int, prefix: int) -> tuple[list, list, list]:
    """One frame: x [N, C], sizes [N], keys [N, D] → tokens, sizes, and for each of them which tokens are in it."""
    patches = list(range(prefix, len(x)))
    a, b = patches[0::2], patches[1::2]
    edges = []
    for i in a:
        cosines = [float(F.cosine_similarity(keys[i], keys[j], dim=0)) for j in b]
        j = max(range(len(b)), key=lambda number: (cosines[number], -number)) if b else 0
        edges.append((cosines[j] if b else 0.0, i, b[j] if b else 0))
    kept = sorted(edges, key=lambda edge: (-edge[0], edge[1]))[:r]
    inside = {j: [j] for j in b}
    for _, i, j in kept:
        inside[j].append(i)
    gone = {i for _, i, _ in kept}
    groups = [[n] for n in range(prefix)] + [[i] for i in a if i not in gone] + [inside[j] for j in b]
    weights = [float(sum(sizes[n] for n in group)) for group in groups]
    means = [sum(sizes[n] * x[n] for n in group) / weight for group, weight in zip(groups, weights, strict=True)]
    return means, weights, groups


@given(
    prefix=st.sampled_from((0, 1, 5)),
    patches=st.integers(2, 12),
    r=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_tome_merges_what_a_loop_would(prefix: int, patches: int, r: int, seed: int) -> None:
    """Against a loop over tokens, in one block whose attention does nothing, from sizes that aren't 1."""
    adapter = ToyAdapter(1, prefix)
    method = ToMe(adapter, r)
    r = min(r, patches // 2)
    n = prefix + patches
    x = tokens(2, n, DIM, seed=seed, dtype=torch.float64)
    sizes = torch.randint(1, 5, (2, n, 1), generator=torch.Generator().manual_seed(seed)).float()
    keys = tokens(2, n, 3, seed=seed + 1000, dtype=torch.float64)
    places = torch.arange(n).expand(2, n)
    merged, merged_sizes, now = method._merge(x, sizes, places, F.normalize(keys, dim=-1), r)
    assert merged.shape == (2, n - r, DIM)
    torch.testing.assert_close(merged_sizes.sum(1), sizes.sum(1))
    torch.testing.assert_close((merged * merged_sizes).sum(1), (x * sizes).sum(1))  # Σ size·token stays
    for frame in range(2):
        means, weights, groups = merged_by_hand(x[frame], sizes[frame, :, 0], keys[frame], r, prefix)
        torch.testing.assert_close(merged[frame], torch.stack(means))
        torch.testing.assert_close(merged_sizes[frame, :, 0].tolist(), weights)
        of_place = {place: number for number, group in enumerate(groups) for place in group}
        assert now[frame].tolist() == [of_place[place] for place in range(n)]


def test_tome_compares_the_mean_keys_of_the_heads() -> None:
    adapter = ToyAdapter(1)
    block, method, x = adapter.blocks[0], ToMe(adapter, 3), tokens(4, 1 + 11, DIM)
    k = block.heads(block.norm1(x))[1].detach()
    _, (_, places) = method.block(adapter, block, 1, x, 4, method.start(x, 4))
    for frame in range(4):
        *_, groups = merged_by_hand(x[frame], torch.ones(12), k[frame].mean(0), 3, 1)
        of_place = {place: number for number, group in enumerate(groups) for place in group}
        assert places[frame].tolist() == [of_place[place] for place in range(12)]


def test_tome_matching_is_the_same_among_equals() -> None:
    """All edges as similar: the first of A go, into the first of B."""
    edges = match(F.normalize(torch.ones(2, 7, 3), dim=-1), 3)
    assert edges.go.tolist() == [[0, 1, 2]] * 2
    assert edges.stay.tolist() == [[3]] * 2
    assert edges.into.tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("patches", [6, 9])
def test_tome_on_duplicates_changes_nothing(prefix: int, patches: int) -> None:
    """Where the tokens that are merged are equal, proportional attention makes every further block see the same: the
    tokens, put back, are those of the plain tower."""
    adapter = ToyAdapter(3, prefix)
    x = tokens(2, prefix + patches, DIM)
    x[:, prefix + 3 :: 2] = x[:, prefix + 1 :: 2][:, :1]  # all of B are one
    x[:, prefix] = x[:, prefix + 2] = x[:, prefix + 1]  # and two of A
    expected = x
    for block in adapter.blocks:
        expected = block(expected)
    method = ToMe(adapter, 2)
    state = method.start(x, 2)
    merged, state = method.block(adapter, adapter.blocks[0], 1, x, 2, state)
    method.r = 0  # only the first block merges
    for number in (2, 3):
        merged, state = method.block(adapter, adapter.blocks[number - 1], number, merged, 2, state)
    assert merged.shape[1] == x.shape[1] - 2
    assert float(state[0].max()) == 3
    torch.testing.assert_close(method.restore(merged, state)[0], expected)


def test_tome_knows_where_each_place_is_now() -> None:
    """Over several blocks: a place's token is the mean over all places with the same source; sizes count these."""
    adapter = ToyAdapter(4)
    x = tokens(3, 1 + 13, DIM)
    method = ToMe(adapter, 3)
    merged, (sizes, places) = run(adapter, method, x, 3)
    counts = [n for n, _ in method.tokens(14, 4)] + [merged.shape[1]]
    assert counts == [14, 11, 8, 5, 3]
    assert places[:, 0].tolist() == [0, 0, 0]
    assert torch.equal(sizes[..., 0], torch.stack([torch.bincount(row, minlength=3) for row in places]).float())
    assert float(sizes[:, 0].max()) == 1
    restored, present = method.restore(merged, (sizes, places))
    assert present is None
    for frame, place in ((0, 0), (1, 5), (2, 13)):
        assert torch.equal(restored[frame, place], merged[frame, places[frame, place]])


def test_tome_that_merges_nothing_is_the_plain_tower() -> None:
    adapter = ToyAdapter(3)
    for r, n in ((0, 9), (4, 2)):  # told not to, and with a single patch
        x = tokens(2, n, DIM)
        merged, state = run(adapter, ToMe(adapter, r), x, 2)
        assert torch.equal(merged, nn.Sequential(*adapter.blocks)(x))
        assert torch.equal(ToMe(adapter, r).restore(merged, state)[0], merged)


def test_tome_refuses() -> None:
    adapter = ToyAdapter(2)
    with pytest.raises(ValueError, match="r must be 0 or more tokens, got -1"):
        ToMe(adapter, -1)
    with pytest.raises(TypeError, match="r must be a whole number, got 0.5"):
        ToMe(adapter, 0.5)
    adapter.pools_class_token = False
    with pytest.raises(ValueError, match="ToMe needs a tower whose head reads the class token"):
        ToMe(adapter)
    STA(adapter)  # drops whole patches: the mean of those left is a mean
