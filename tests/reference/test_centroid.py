"""The centroid kernel by its definition: clusters by hand, and what must hold whatever the clusters are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from testkit import padding, qkv, rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain.reference import Inputs
from scatterbrain.reference.centroid import cluster_head, directions, nearest, orthonormal, spread

# -------------------- clustering


def draw(tokens: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 8) -> list[Tensor]:
    return qkv(tokens, tokens + 3, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.float64)


def log_kernel(query: Tensor, key: Tensor, low_rank: sb.Centroid, **arguments: object) -> Tensor:
    exponent, factor = sb.reference.log_kernel(low_rank, Inputs.of(query, key, **arguments))
    assert factor.eq(1).all()
    return exponent


def test_positions_are_spread_from_the_first_to_the_last() -> None:
    assert spread(1, 7) == [0] and spread(7, 7) == [0, 1, 2, 3, 4, 5, 6]
    assert spread(4, 11) == [0, 3, 7, 10]
    assert spread(3, 6) == [0, 2, 5] and spread(3, 8) == [0, 4, 7]  # 2.5 and 3.5: the even one
    assert spread(5, 3) == [0, 0, 1, 2, 2]


def test_clusters_by_hand() -> None:
    """Three groups on a line: at 0, 10 and 20 in the first coordinate. Four centres start at keys 0, 2, 4 and 6, where
    the first and second are in one group and divide it."""
    key = torch.zeros(7, 2, dtype=torch.float64)
    key[:, 0] = torch.tensor([0.0, 0.2, 1.0, 1.1, 10.0, 20.0, 20.5])
    query = torch.tensor([[0.4, 1.0], [0.0, -1.0]], dtype=torch.float64)  # mean (0.2, 0)
    index, b, kappa, a = cluster_head(query, key, 4)
    assert a.tolist() == [0.2, 0.0]
    assert index.tolist() == [0, 0, 1, 1, 2, 3, 3]
    for members in ([0, 1], [2, 3], [4], [5, 6]):
        weight = torch.exp(0.2 * key[members, 0])
        mean = (weight * key[members, 0]).sum() / weight.sum()
        assert torch.allclose(b[index[members[0]]], torch.stack([mean, torch.zeros_like(mean)]))
        assert torch.allclose(kappa[members], 0.2 * (key[members, 0] - mean))


def test_ties_go_to_the_lowest_and_empty_clusters_keep_their_centre() -> None:
    z, centre = torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0], [0.0], [2.0]])
    assert nearest(z, centre).tolist() == [0, 0]
    index, b, _, _ = cluster_head(rand(5, 3), torch.ones(6, 3), 4)  # equal keys: one cluster, three without a key
    assert index.eq(0).all() and b[0].allclose(torch.ones(3)) and b[1:].eq(0).all()


def test_the_mean_query_is_that_of_all_heads_that_share_the_keys() -> None:
    query, key, _ = draw(20)
    found = sb.reference.cluster(query, key, 4, scale=0.3)
    want = torch.stack([0.3 * query[:, :2].mean((1, 2)), 0.3 * query[:, 2:].mean((1, 2))], 1)
    assert torch.allclose(found.query_mean, want) and found.scale == 0.3


@pytest.mark.parametrize("n, d", [(300, 24), (40, 24), (10, 24), (40, 3), (1, 5)])
def test_directions_are_orthonormal_and_near_the_principal_ones(n: int, d: int) -> None:
    samples = rand(n, d, dtype=torch.float64) * torch.arange(d, 0, -1) ** 2
    samples = samples - samples.mean(0)
    w = directions(samples)
    count = min(16, d, max(n - 1, 0))
    gram = w.T @ w
    assert torch.allclose(gram, torch.diag((gram.diagonal() > 0.5).double()), atol=1e-9)
    assert int(gram.diagonal().sum().round()) == count
    best = torch.linalg.svdvals(samples)[:count].square().sum()
    assert (samples @ w).square().sum() >= 0.98 * best


def test_columns_that_depend_on_earlier_ones_add_no_direction() -> None:
    columns = rand(6, 4, dtype=torch.float64)
    columns[:, 2] = columns[:, 0] - 3 * columns[:, 1]
    q = orthonormal(columns)
    assert q[:, 2].eq(0).all() and torch.allclose(q.T @ q, torch.diag(torch.tensor([1.0, 1, 0, 1]).double()))


@pytest.mark.parametrize("tokens", [1, 2, 15, 255, 256, 257, 600])
def test_every_key_is_in_the_cluster_of_its_nearest_centre(tokens: int) -> None:
    """Of any number of keys: the parts of the recipe, put together again."""
    key, query = rand(tokens, 8, dtype=torch.float64), rand(9, 8, seed=1, dtype=torch.float64)
    index, b, kappa, a = cluster_head(query, key, 6)
    sample = key[spread(min(256, tokens), tokens)]
    w = directions(sample - sample.mean(0))
    z = sample @ w
    centre = z[spread(6, len(z))]
    means = [z[nearest(z, centre) == c].mean(0) if (nearest(z, centre) == c).any() else centre[c] for c in range(6)]
    assert torch.equal(index, torch.cdist(key @ w, torch.stack(means)).argmin(1))
    for c in index.unique():
        assert torch.allclose(
            torch.logsumexp((key @ a)[index == c], 0), torch.logsumexp(kappa[index == c], 0) + b[c] @ a
        )


def test_padding_is_as_if_it_were_not_there() -> None:
    """Any pattern, whatever it holds: the clusters are those of the valid tokens alone."""
    query, key, _ = draw(40)
    generator = torch.Generator().manual_seed(3)
    of_query, of_key = (torch.rand(2, n, generator=generator) < 0.3 for n in (40, 43))
    query, key = query.clone(), key.clone()
    query[of_query[:, None].expand(2, 4, 40)], key[of_key[:, None].expand(2, 2, 43)] = math.nan, 1e4
    found = sb.reference.cluster(query, key, 5, of_key, query_padding_mask=of_query)
    for row in range(2):
        kept = slice(row, row + 1), slice(None)
        alone = sb.reference.cluster(query[kept][:, :, ~of_query[row]], key[kept][:, :, ~of_key[row]], 5)
        assert torch.equal(found.index[row, :, ~of_key[row]], alone.index[0])
        assert torch.equal(found.representatives[row], alone.representatives[0])
        assert torch.equal(found.log_mass[row, :, ~of_key[row]], alone.log_mass[0])
    assert found.index[:, 0][of_key].eq(-1).all() and found.log_mass[:, 0][of_key].eq(0).all()


def test_rows_without_a_valid_token_have_no_clusters() -> None:
    query, key, value = qkv(12)
    mask = padding(12, (12, 0))
    found = sb.reference.cluster(query, key, 3, mask)
    assert found.index[0].eq(-1).all() and found.representatives[0].eq(0).all() and found.index[1].ge(0).all()
    out = sb.reference.attention(query, key, value, sb.Empty(), sb.Centroid(3), mask)
    assert out[0].eq(0).all() and out[1].ne(0).all() and out.isfinite().all()


# -------------------- the kernel


def test_the_mean_query_weighs_every_key_exactly() -> None:
    query, key, _ = draw(30, heads=2)
    found = sb.reference.cluster(query, key, 4)
    mean = found.query_mean[:, :, None] / found.scale
    exact = mean @ key.mT * found.scale
    assert torch.allclose(log_kernel(mean, key, sb.Centroid(4), statistics=found), exact)
    assert not torch.allclose(log_kernel(query, key, sb.Centroid(4), statistics=found), query @ key.mT * found.scale)


def test_equal_keys_of_a_cluster_are_weighed_exactly_by_every_query() -> None:
    query, _, _ = draw(30)
    places = rand(2, 2, 5, 8, seed=7, dtype=torch.float64)
    key = places[:, :, torch.arange(33) % 5]
    assert torch.allclose(log_kernel(query, key, sb.Centroid(33)), query @ key.repeat_interleave(2, 1).mT * 8**-0.5)


def test_as_many_clusters_as_keys_are_exact_attention() -> None:
    query, key, value = draw(30)
    exact = sb.reference.attention(query, key, value, sb.Full(), None)
    assert torch.allclose(sb.reference.attention(query, key, value, sb.Empty(), sb.Centroid(33)), exact)
    assert not torch.allclose(sb.reference.attention(query, key, value, sb.Empty(), sb.Centroid(32)), exact)


@pytest.mark.parametrize("support", [sb.Empty(), sb.Window(8)], ids=str)
def test_a_vector_added_to_all_keys_changes_nothing(support: object) -> None:
    query, key, value = draw(40)
    moved = key + rand(8, seed=9, dtype=torch.float64)
    results = [sb.reference.attention(query, k, value, support, sb.Centroid(5)) for k in (key, moved)]
    assert torch.allclose(*results)


def test_weights_are_positive_and_so_rows_are_averages() -> None:
    query, key, value = draw(40)
    out = sb.reference.attention(5 * query, key, torch.ones_like(value), sb.Empty(), sb.Centroid(3))
    assert torch.allclose(out, torch.ones_like(out))
    assert log_kernel(query, key, sb.Centroid(3)).isfinite().all()


def test_coordinates_make_the_same_kernel() -> None:
    query, key, _ = draw(30)
    inputs = Inputs.of(query, key)
    log, factor = sb.reference.coordinates(sb.Centroid(6), inputs).log_kernel()
    assert torch.allclose(log + factor.log(), log_kernel(query, key, sb.Centroid(6)))


def test_given_clusters_take_the_place_of_the_calls_own() -> None:
    query, key, value = draw(30)
    found = sb.reference.cluster(query, key, 4)
    own, given = (
        sb.reference.attention(query, key, value, sb.Window(8), sb.Centroid(4), statistics=s) for s in (None, found)
    )
    assert torch.equal(own, given)
    other = replace(found, representatives=found.representatives + 0.1)
    assert not torch.allclose(
        own, sb.reference.attention(query, key, value, sb.Window(8), sb.Centroid(4), statistics=other)
    )


# -------------------- gradients


def test_gradients_are_those_of_constant_clusters_shares_and_mean() -> None:
    """By differences of the output, where only what is not constant moves: k, and b as a mean with constant shares."""
    query, key, value = qkv(12, batch=1, heads=2, dtype=torch.float64)
    found = sb.reference.cluster(query, key, 3)
    index = found.index.long()[0, 0]
    share = torch.stack([torch.where(index == c, torch.exp(found.log_mass[0, 0]), 0) for c in range(3)])
    share = share / share.sum(1, keepdim=True)
    assert torch.allclose(share @ key[0, 0], found.representatives[0, 0])

    def out(k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        b = share @ k[0, 0]
        kappa = (k[0, 0] - b[index]) @ found.query_mean[0, 0]
        weights = torch.softmax(q[0] * 8**-0.5 @ b[index].T + kappa, -1)
        return weights @ v[0, 0]

    leaves = [t.clone().requires_grad_() for t in (key, query, value)]
    want = torch.autograd.grad((out(*leaves) * rand(12, 8, dtype=torch.float64)).sum(), leaves)
    defined = sb.reference.attention(leaves[1], leaves[0], leaves[2], sb.Empty(), sb.Centroid(3), statistics=found)
    got = torch.autograd.grad((defined * rand(12, 8, dtype=torch.float64)).sum(), leaves)
    assert all(torch.allclose(mine, theirs, atol=1e-12) for mine, theirs in zip(got, want))


def test_gradients_approach_those_of_exact_attention_with_more_clusters() -> None:
    query, key, value = (t.requires_grad_() for t in qkv(60, dtype=torch.float64))
    d_out = rand(2, 2, 60, 8, seed=4, dtype=torch.float64)

    def gradients(support: object, low_rank: object) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            (sb.reference.attention(query, key, value, support, low_rank) * d_out).sum(), (query, key, value)
        )

    exact = gradients(sb.Full(), None)
    errors = [
        [float((g - e).norm() / e.norm()) for g, e in zip(gradients(sb.Empty(), sb.Centroid(c)), exact)]
        for c in (8, 32, 60)
    ]
    assert all(few > more > all_ for few, more, all_ in zip(*errors)) and max(errors[2]) < 1e-9


# -------------------- what has no meaning


def test_what_has_no_meaning_is_refused() -> None:
    query, key, value = qkv(9)
    found = sb.reference.cluster(query, key, 4)
    attend = sb.reference.attention
    with pytest.raises(ValueError, match="leak the future"):
        attend(query, key, value, sb.Window(4), sb.Centroid(4), is_causal=True)
    with pytest.raises(ValueError, match="made for scale"):
        attend(query, key, value, sb.Window(4), sb.Centroid(4), scale=0.1, statistics=found)
    with pytest.raises(ValueError, match="expected 5 clusters.*got 4"):
        attend(query, key, value, sb.Window(4), sb.Centroid(5), statistics=found)
