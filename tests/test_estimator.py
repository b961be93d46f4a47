"""The estimator of the paper (Scatterbrain, Chen et al., NeurIPS 2021, section 4), LSH + FAVOR+, over draws of hashes
and features: its unnormalised weights have the mean exp(q.k), and their variance is that of FAVOR+ times the chance
that a pair falls into no cluster together. The weights are read off the operator: out times exp(lse) with one-hot
values.

Every assertion is about a mean over draws, with its standard error, from fixed seeds, and is shown to fail for weights
that are wrong by little.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from testkit import qkv
from torch import Tensor

import scatterbrain as sb
from scatterbrain.low_rank.favor import draw_projection

N, D, DRAWS = 16, 8, 500
FAVORS = {
    "independent": sb.Favor(16, orthogonal=False),
    "orthogonal": sb.Favor(16),
    "hyperbolic": sb.Favor(16, hyperbolic=True),
    "centred": sb.Favor(16, centred=True),
    "hyperbolic, centred": sb.Favor(16, hyperbolic=True, centred=True),
}
SUPPORTS = {"e2lsh": sb.LSH(8), "angular": sb.LSH(8, hash="angular"), "four rounds": sb.LSH(8, rounds=4)}


class Draws(NamedTuple):
    """Weights relative to exp(q.k), (draws, N, N), of the estimator and of its features alone, and which pairs were in
    one cluster."""

    weights: Tensor
    features: Tensor
    collided: Tensor


@functools.lru_cache
def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Short ones with means, so that hundreds of draws show a bias of per cents, and one-hot values."""
    q, k, _ = (0.25 * t for t in qkv(N, batch=1, heads=1, kv_heads=1, head_dim=D))
    return q + 0.25, k - 0.2, torch.eye(N)[None, None]


def relative_weights(support: object, low_rank: sb.Favor, projection: sb.RandomFeatures) -> Tensor:
    q, k, one_hot = tokens()
    out, lse = sb.attention(q, k, one_hot, support, low_rank, statistics=projection, return_lse=True)
    scores = q.double() @ k.double().transpose(-1, -2) * D**-0.5
    return (out.double() * torch.exp(lse.double()[..., None] - scores))[0, 0]


@functools.lru_cache(None)
def drawn_lists(support: sb.LSH, seed: int) -> tuple[sb.Blocks, Tensor]:
    """The support with another seed, and its pairs."""
    q, k, _ = tokens()
    lists = sb.route(q, k, replace(support, seed=seed), None)
    pairs = torch.zeros(N, N + 1, dtype=torch.bool)  # the last column is for unused slots, -1
    pairs[torch.arange(N)[:, None], lists.index[0, 0].long()] = True
    return lists, pairs[:, :N]


@functools.lru_cache(None)
def of_features(favor: str, draw: int) -> tuple[sb.RandomFeatures, Tensor]:
    """A projection, and the weights of its features alone."""
    kernel = FAVORS[favor]
    projection = sb.RandomFeatures(draw_projection(kernel, D, torch.Generator().manual_seed(draw)))
    return projection, relative_weights(sb.Empty(), kernel, projection)


@functools.lru_cache(None)
def draws(support: str, favor: str) -> Draws:
    found = []
    for i in range(DRAWS):
        lists, collided = drawn_lists(SUPPORTS[support], i)
        projection, features = of_features(favor, i)
        found.append((relative_weights(lists, FAVORS[favor], projection), features, collided))
    return Draws(*(torch.stack(t) for t in zip(*found)))


@functools.lru_cache
def chance_to_collide(support: str) -> Tensor:
    """P of every pair, from other seeds than those of the estimator."""
    return torch.stack([drawn_lists(SUPPORTS[support], DRAWS + i)[1] for i in range(600)]).double().mean(0)


def assert_zero_mean(numbers: Tensor, smallest: float) -> None:
    """That the mean over the first dimension is zero within 4.5 standard errors, and that these are less than
    ``smallest``, so that a mean which is off by a few times as much cannot pass."""
    error = numbers.std(0) / math.sqrt(len(numbers))
    z = numbers.mean(0).abs() / error.clamp(min=1e-6)  # pairs that are always exact have rounding alone
    assert float(z.max()) < 4.5, f"mean {float(numbers.mean(0).flatten()[z.argmax()]):.3g}, {float(z.max()):.1f} errors"
    assert float(error.max()) < smallest, f"standard error {float(error.max()):.3g}, expected {smallest}"


def assert_unbiased(weights: Tensor) -> None:
    """Every pair by itself, and all of them together, where a common bias shows soonest."""
    assert_zero_mean(weights - 1, 0.04)
    assert_zero_mean((weights - 1).mean((1, 2))[:, None], 0.003)


def assert_variance(draws: Draws, chance: Tensor) -> None:
    """Var[w] = (1 - P) Var[FAVOR+], summed over pairs: each draw's squared errors of the estimator are those of the
    features alone on the pairs that did not collide."""
    of_features = (draws.features - 1).square()
    difference = (draws.weights - 1).square() - (1 - chance) * of_features
    assert_zero_mean(difference.sum((1, 2))[:, None] / of_features.sum((1, 2)).mean(), 0.025)


@pytest.mark.parametrize("support, favor", [*(("e2lsh", favor) for favor in FAVORS), ("angular", "orthogonal")])
def test_the_unnormalised_weights_are_unbiased(support: str, favor: str) -> None:
    found = draws(support, favor)
    assert_unbiased(found.weights)
    assert_unbiased(found.features)


@pytest.mark.parametrize("support", ["e2lsh", "angular"])
def test_they_are_exact_on_the_support_and_the_features_alone_off_it(support: str) -> None:
    found = draws(support, "orthogonal")
    assert 0.1 < float(found.collided.double().mean()) < 0.6
    exact, rest = found.weights[found.collided], found.weights[~found.collided]
    torch.testing.assert_close(exact, torch.ones_like(exact), rtol=0, atol=2e-5)
    torch.testing.assert_close(rest, found.features[~found.collided], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "support, favor",
    [("e2lsh", "independent"), ("e2lsh", "hyperbolic, centred"), *((support, "orthogonal") for support in SUPPORTS)],
)
def test_the_variance_is_that_of_the_features_times_the_chance_not_to_collide(support: str, favor: str) -> None:
    found, chance = draws(support, favor), chance_to_collide(support)
    of_features, of_both = ((t - 1).square().mean(0) for t in (found.features, found.weights))
    ratio = float(of_both.sum() / of_features.sum())
    predicted = float(((1 - chance) * of_features).sum() / of_features.sum())
    assert 0.3 < predicted < 0.8 and abs(ratio - predicted) < 0.05
    assert_variance(found, chance)


def test_every_refinement_of_the_features_lowers_the_variance() -> None:
    variance = {f: float((draws("e2lsh", f).features - 1).square().mean()) for f in FAVORS}
    assert variance["orthogonal"] < 0.9 * variance["independent"]
    assert variance["centred"] < 0.9 * variance["orthogonal"]
    assert variance["hyperbolic, centred"] < variance["hyperbolic"]


WRONG = {
    "weights that are 3 % too large": lambda found: found._replace(weights=found.weights * 1.03),
    "features that are 5 % too small": lambda found: found._replace(
        weights=torch.where(found.collided, found.weights, 0.95 * found.features)
    ),
    "L added on the support": lambda found: found._replace(
        weights=found.weights + torch.where(found.collided, found.features, 0)
    ),
    "a pair for each round": lambda found: found._replace(weights=torch.where(found.collided, 2.0, found.weights)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights_are_found_biased(name: str) -> None:
    wrong = WRONG[name](draws("e2lsh", "orthogonal"))
    with pytest.raises(AssertionError, match="errors"):
        assert_unbiased(wrong.weights)


def test_a_wrong_variance_is_found() -> None:
    found, chance = draws("e2lsh", "orthogonal"), chance_to_collide("e2lsh")
    for wrong_chance in (chance * 0.8, chance * 1.25, chance_to_collide("four rounds") * 0):
        with pytest.raises(AssertionError, match="errors"):
            assert_variance(found, wrong_chance)
    inexact = found._replace(weights=torch.where(found.collided, found.features, found.weights))
    with pytest.raises(AssertionError, match="errors"):
        assert_variance(inexact, chance)
