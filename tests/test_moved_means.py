"""Keys whose mean lies far from that of the statistics: states expand about a mean of their own, so that no term of
theirs cancels, and no query is computed again for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from oracle import assert_as_exact
from testkit import assert_same_bits, attend, padding, rand, supports
from torch import Tensor

import scatterbrain as sb

N, D, RANK = 320, 32, 4
SUPPORTS = supports()
# How far the mean of key j of n has moved. Where keys move at different places they move the one way in even
# coordinates and the other way in odd ones: their weights in a state stay alike.
MEANS = {
    "5": lambda j, n: torch.full_like(j, 5.0),
    "30": lambda j, n: torch.full_like(j, 30.0),
    "100": lambda j, n: torch.full_like(j, 100.0),
    "30 from the middle on": lambda j, n: 30.0 * (j >= n // 2),
    "two ways": lambda j, n: torch.where(j < n // 2, -10.0, 10.0),
    "ever farther": lambda j, n: 30.0 * j / n,
}


def inputs(mean: str, tokens: int = N) -> tuple[list[Tensor], sb.Statistics]:
    """query, key and value, and statistics of tokens whose keys have mean 0."""
    query, key, value = (rand(1, 2, tokens, D, seed=seed) for seed in range(3))
    fitted = sb.fit_statistics(rand(1, 2, 400, D, seed=3) + 0.5, rand(1, 2, 400, D, seed=4), RANK)
    moved = MEANS[mean](torch.arange(tokens, dtype=torch.float32), tokens)
    way = torch.where(torch.arange(D) % 2 == 0, 1.0, 1.0 if moved.unique().numel() == 1 else -1.0)
    return [query + 0.5, key + moved[:, None] * way, value], fitted


def defined(mean: str, dtype: torch.dtype, support: object, is_causal: bool) -> list[Tensor]:
    tokens, fitted = inputs(mean)
    leaves = [t.to(dtype).requires_grad_() for t in tokens]
    settings = dict(is_causal=is_causal, statistics=fitted, return_lse=True, dtype=dtype)
    out, lse = sb.reference.attention(*leaves, support, sb.Quadratic(RANK), **settings)
    upstream = [rand(*t.shape, seed=20 + i, dtype=dtype) for i, t in enumerate((out, lse))]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, upstream)]


def ours(mean: str, support: object, is_causal: bool, tokens: int = N, **arguments: object) -> list[Tensor]:
    given, fitted = inputs(mean, tokens)
    return attend(given, support, sb.Quadratic(RANK), fitted, is_causal=is_causal, **arguments)


def fixed(mean: str, support: object, is_causal: bool) -> object:
    """The lists of a support that chooses by content: parity is judged at fixed lists."""
    if not isinstance(support, (sb.Routed, sb.LSH)):
        return support
    (query, key, _), fitted = inputs(mean)
    return sb.route(query, key, support, low_rank=sb.Quadratic(RANK), statistics=fitted, is_causal=is_causal)


def combinations() -> list[tuple[str, bool]]:
    return [(name, causal) for name in SUPPORTS for causal in (False, True) if not (causal and name == "lsh")]


@pytest.mark.parametrize(("name", "is_causal"), combinations())
@pytest.mark.parametrize("mean", MEANS)
def test_results_and_gradients_are_those_of_the_definition(mean: str, name: str, is_causal: bool) -> None:
    support = fixed(mean, SUPPORTS[name], is_causal)
    exact, rounded = (defined(mean, dtype, support, is_causal) for dtype in (torch.float64, torch.float32))
    for got, want, same_dtype in zip(ours(mean, support, is_causal), exact, rounded):
        assert_as_exact(got, want, same_dtype, largest=4)


@pytest.mark.parametrize(("name", "is_causal"), combinations())
@pytest.mark.parametrize("mean", [mean for mean in MEANS if mean != "ever farther"])
def test_no_query_is_computed_in_double(mean: str, name: str, is_causal: bool) -> None:
    with sb.profile() as profile:
        ours(mean, SUPPORTS[name], is_causal, tokens=1000)
    assert "queries again in double" not in profile.stages


@pytest.mark.parametrize("name", [name for name in SUPPORTS if name != "lsh"])
@pytest.mark.parametrize("mean", ["30", "30 from the middle on"])
def test_no_bit_depends_on_later_tokens(mean: str, name: str) -> None:
    """In the first chunk of 64 tokens, in the second, at the boundary, and where the mean changes."""
    run = partial(attend, support=SUPPORTS[name], low_rank=sb.Quadratic(RANK), is_causal=True)
    tokens, fitted = inputs(mean)
    before = run(tokens, statistics=fitted)[0]
    for t in (20, 63, 64, 100, 192, 230):
        changed = [x.clone() for x in tokens]
        for x in changed:
            x[:, :, t:] = 100.0 - x[:, :, t:]
        assert torch.equal(before[:, :, :t], run(changed, statistics=fitted)[0][:, :, :t])


@pytest.mark.parametrize(("name", "is_causal"), combinations())
@pytest.mark.parametrize("mean", ["30", "30 from the middle on"])
def test_padding_changes_no_bit(mean: str, name: str, is_causal: bool) -> None:
    tokens, fitted = inputs(mean)
    mask = padding(N + 40, [25], [15])
    holed = mask.clone()
    holed[:, 60:70] = True
    run = partial(attend, support=SUPPORTS[name], low_rank=sb.Quadratic(RANK), statistics=fitted, is_causal=is_causal)

    def padded(contents: float, mask: Tensor) -> Tensor:
        outer = [torch.full((1, 2, N + 40, D), contents) for _ in range(3)]
        for to, x in zip(outer, tokens):
            to[:, :, 15 : N + 15] = x
            to.masked_fill_(mask[:, None, :, None], contents)
        return run(outer, key_padding_mask=mask)[0]

    assert torch.equal(padded(3.0, mask)[:, :, 15 : N + 15], run(tokens)[0])
    valid = ~holed[0]
    assert torch.equal(padded(3.0, holed)[:, :, valid], padded(-1e4, holed)[:, :, valid])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mean", ["30", "30 from the middle on"])
def test_the_result_is_the_same_for_any_number_of_threads(mean: str, is_causal: bool) -> None:
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(ours(mean, sb.Window(48), is_causal, tokens=2000))
    assert_same_bits(*results)


def test_a_head_is_computed_alike_whatever_the_others_hold() -> None:
    """Of the two heads, the second has a moved mean in one of the calls alone."""
    tokens, fitted = inputs("30")
    tokens[1][:, 1] -= 30.0
    run = partial(attend, support=sb.Window(48), low_rank=sb.Quadratic(RANK), statistics=fitted)
    plain = run(tokens)
    tokens[1][:, 1] += 20.0
    for one, other in zip(plain, run(tokens)):
        assert torch.equal(one[:, 0], other[:, 0])
