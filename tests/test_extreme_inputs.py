"""Inputs far from any model's: results and gradients are finite wherever those of exact attention are, and right where
float32 can be."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_exact
from testkit import fitted, leaves, out_and_gradients, projections, rand, supports, weights
from torch import Tensor

import scatterbrain as sb

N, D, H, RANK = 160, 32, 2, 4
SUPPORTS = supports()
LOW_RANKS = {
    "none": (None, None),
    "stored": (sb.Quadratic(RANK), fitted(RANK, heads=H, kv_heads=H, head_dim=D)),
    "learned": (sb.Quadratic(RANK, "learned"), projections(RANK, heads=H, kv_heads=H, head_dim=D)),
    "input": (sb.Quadratic(RANK, "input"), None),
    "favor": (sb.Favor(16), None),
}
EXPONENTS = (3, 5, 9, 15, 18, 25, 30)
KINDS = {"queries": (1, 0, 0), "keys": (0, 1, 0), "values": (0, 0, 1), "queries and keys": (1, 1, 0)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def tokens(kind: str, exponent: int, dtype: torch.dtype) -> list[Tensor]:
    factors = [10.0 ** (exponent * power) for power in KINDS[kind]]
    return [(rand(1, H, N, D, seed=seed, dtype=torch.float64) * f).to(dtype) for seed, f in enumerate(factors)]


def gradient_of_out(dtype: torch.dtype) -> Tensor:
    return rand(1, H, N, D, seed=9, dtype=dtype)


def exact(inputs: list[Tensor], is_causal: bool) -> list[Tensor]:
    """Half types are computed in float32, as the kernels do."""
    inputs = [t.float() if t.dtype == torch.bfloat16 else t for t in inputs]
    attention = partial(F.scaled_dot_product_attention, is_causal=is_causal)
    return out_and_gradients(attention, inputs, d_out=gradient_of_out(inputs[0].dtype))


def ours(inputs: list[Tensor], support: object, low_rank: str, is_causal: bool) -> list[Tensor]:
    kernel, statistics = LOW_RANKS[low_rank]
    parameters = []
    if isinstance(statistics, sb.Projections):
        parameters = leaves(weights(statistics))
        statistics = sb.Projections(*parameters)
    attention = partial(sb.attention, support=support, low_rank=kernel, statistics=statistics, is_causal=is_causal)
    return out_and_gradients(attention, inputs, parameters, gradient_of_out(inputs[0].dtype), allow_unused=True)


def combinations(is_causal: bool) -> list[tuple[str, str]]:
    return [
        (support, low_rank)
        for support, low_rank in itertools.product(SUPPORTS, LOW_RANKS)
        if (support, low_rank) != ("empty", "none") and not (is_causal and (support == "lsh" or low_rank == "input"))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_results_are_finite_where_those_of_exact_attention_are(is_causal: bool, kind: str, dtype: torch.dtype) -> None:
    wrong = []
    for exponent in EXPONENTS:
        inputs = tokens(kind, exponent, dtype)
        if not all(bool(t.isfinite().all()) for t in exact(inputs, is_causal)):
            continue
        for support, low_rank in combinations(is_causal):
            got = ours(inputs, SUPPORTS[support], low_rank, is_causal)
            if not all(bool(t.isfinite().all()) for t in got[:4]):
                wrong.append(f"1e{exponent} {support} {low_rank}")
    assert not wrong, ", ".join(wrong)


@pytest.mark.parametrize("support", ["window", "window of 8", "single queries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_scores_pick_the_largest(support: str, dtype: torch.dtype) -> None:
    """Without a low-rank part, where every score is far from the others, the output is the value of one key and its
    value's gradient arrives whole."""
    for exponent in (5, 9, 12):
        query, key, value = tokens("queries and keys", exponent, dtype)
        for is_causal in (False, True):
            out, _, _, dv = ours([query, key, value], SUPPORTS[support], "none", is_causal)
            want = sb.reference.attention(
                *(t.double() for t in (query, key, value)), SUPPORTS[support], None, is_causal=is_causal
            )
            same = (out.double() - want).norm(dim=-1) < 1e-2 * want.norm(dim=-1)
            assert same.float().mean() > 0.98  # nearly equal scores may swap by rounding
            assert float(dv.double().sum()) == pytest.approx(float(gradient_of_out(dtype).double().sum()), abs=2.0)


# Means of queries and keys, means of the tokens that the statistics come from, and the scale.
MEANS = {
    "tokens of mean 10": (10.0, 10.0, 10.0, 10.0, None),
    "tokens of mean 10, foreign statistics": (10.0, 10.0, 0.0, 0.0, None),
    "keys of mean 100": (0.0, 100.0, 0.0, 100.0, None),
    "keys of mean 100, foreign statistics": (0.0, 100.0, 0.0, 0.0, None),
    "scale 125": (0.0, 0.0, 0.0, 0.0, 125.0),
    "scale 1000": (0.0, 0.0, 0.0, 0.0, 1000.0),
}


@pytest.mark.parametrize("support", ["window", "pooled", "per query", "empty"])
@pytest.mark.parametrize("case", MEANS)
def test_large_means_and_scales_are_as_exact_as_the_same_formula_in_float32(case: str, support: str) -> None:
    """Scores in the hundreds and thousands are rounded by whole parts in a thousand of their weights in any float32
    attention: the clause of the accuracy promise that holds here is the one that compares with torch."""
    mean_q, mean_k, fit_q, fit_k, scale = MEANS[case]
    query, key = rand(1, H, N, D, seed=0) + mean_q, rand(1, H, N, D, seed=1) + mean_k
    value = rand(1, H, N, D, seed=2)
    others = rand(1, H, 400, D, seed=3) + fit_q, rand(1, H, 400, D, seed=4) + fit_k
    settings = {"statistics": sb.fit_statistics(*others, RANK, scale=scale), "scale": scale}
    for is_causal in (False, True):
        lists, kernel = SUPPORTS[support], sb.Quadratic(RANK)
        if isinstance(lists, sb.Routed):
            lists = sb.route(query, key, lists, low_rank=kernel, is_causal=is_causal, **settings)
        out = sb.attention(query, key, value, lists, kernel, is_causal=is_causal, **settings)
        plain, exactly = (
            sb.reference.attention(query, key, value, lists, kernel, is_causal=is_causal, dtype=dtype, **settings)
            for dtype in (torch.float32, torch.float64)
        )
        assert_as_exact(out, exactly, plain)
