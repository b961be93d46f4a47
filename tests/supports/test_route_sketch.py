"""Routing per query by sketches: the signs of random projections, which find single keys."""

import pytest
import torch
from testkit import rand

import scatterbrain as sb
from scatterbrain.reference.sketch import sketches

BY_SKETCH = sb.Routed(24, block_q=1, block_k=8, window=8, pools=0)


@pytest.mark.parametrize("head_dim", [1, 8, 63, 64, 65, 130, 520])
@pytest.mark.parametrize("scale", [None, -0.4, 0.0])
def test_lists_of_all_widths_are_those_of_the_definition(head_dim: int, scale: float | None) -> None:
    """A token is filled up to 64 columns, or to the next power of two. Bits are exact, so lists are the same."""
    query, key = rand(1, 2, 40, head_dim), rand(1, 1, 300, head_dim, seed=1)
    lists = sb.route(query, key, BY_SKETCH, None, scale=scale)
    inputs = sb.reference.Inputs.of(query, key, scale=scale)
    expected, count = sb.reference.routed_lists(BY_SKETCH, inputs)
    assert torch.equal(lists.index, expected) and torch.equal(lists.count, count)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
def test_one_key_in_thousands_is_found(is_causal: bool) -> None:
    """The one that a query resembles, among others of the same length; a mean of 8 hides it from the other forms."""
    query, key = rand(1, 1, 4096, 32), rand(1, 1, 4096, 32, seed=1)
    place = torch.randint(0, 4000, (96,), generator=torch.Generator().manual_seed(2))
    key[0, 0, place] = query[0, 0, -96:] + 0.3 * rand(96, 32, seed=3)

    def found(pools: int) -> float:
        support = sb.Routed(64, block_q=1, block_k=8, window=16, pools=pools)
        index = sb.route(query, key, support, None, is_causal=is_causal).index[0, 0, -96:]
        return float((index == place[:, None] // 8).any(-1).float().mean())

    assert found(0) >= 0.98 > 0.7 > found(1)
    assert found(0) > found(2)


def test_a_sketch_is_the_signs_of_projections_that_keep_angles() -> None:
    """Two tokens disagree in a share of bits that is the angle between them, in half turns."""
    first, second = rand(3000, 24), rand(3000, 24, seed=1)
    (bits, counts, _), (others, _, _) = sketches(first), sketches(second)
    angle = torch.nn.functional.cosine_similarity(first, second).acos() / torch.pi
    apart = (bits != others).float().mean(1)
    assert (apart - angle).mean().abs() < 0.005
    assert (apart - angle).std() < 1.1 * (0.25 / 64) ** 0.5  # as of independent signs
    assert bits.float().mean(0).sub(0.5).abs().max() < 0.05
    assert 0.4 < counts.float().mean() < 0.7
    wrong = sketches(first + 0.5 * second)[0] != bits
    assert wrong[counts].float().mean() < wrong[~counts].float().mean() / 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_blocks_of_keys_that_are_not_finite_are_candidates(value: float) -> None:
    """3e38 has no finite sketch. A score that is no number, or infinite, is the first of all."""
    query, key = rand(1, 1, 8, 16).abs(), rand(1, 1, 900, 16, seed=1)
    key[:, :, 703] = value
    index = sb.route(query, key, BY_SKETCH, None).index[0, 0]
    assert (index == 703 // 8).any(-1).all() == (value != -torch.inf)
    expected, _ = sb.reference.routed_lists(BY_SKETCH, sb.reference.Inputs.of(query, key))
    assert torch.equal(index, expected[0, 0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
def test_more_blocks_that_are_not_finite_than_candidates(value: float, is_causal: bool) -> None:
    """A step of training that has diverged."""
    query, key = rand(1, 1, 300, 16).abs(), torch.full((1, 1, 300, 16), value)
    index = sb.route(query, key, BY_SKETCH, None, is_causal=is_causal).index
    expected, _ = sb.reference.routed_lists(BY_SKETCH, sb.reference.Inputs.of(query, key, is_causal=is_causal))
    assert torch.equal(index, expected)


@pytest.mark.parametrize("pools", [0, 2])
def test_no_number_comes_before_infinity(pools: int) -> None:
    query, key = rand(1, 1, 3, 16).abs(), rand(1, 1, 400, 16, seed=1)
    key[:, :, 80], key[:, :, 320] = torch.inf, torch.nan
    support = sb.Routed(8, block_q=1, block_k=8, pools=pools)
    if pools == 2:  # an infinite key is inf - inf from its group's mean: no number either
        key[:, :, 80] = 1e30
    index = sb.route(query, key, support, None).index
    expected, _ = sb.reference.routed_lists(support, sb.reference.Inputs.of(query, key))
    assert (index[..., 0] == 40).all() and torch.equal(index, expected)


def test_padded_keys_have_no_sketch() -> None:
    """What they hold does not matter, and a block that has no other key is not listed."""
    query, key = rand(2, 2, 60, 16), rand(2, 2, 500, 16, seed=1)
    mask = torch.zeros(2, 500, dtype=torch.bool)
    mask[0, 100:140] = mask[0, 201] = mask[1, :30] = mask[1, 450:] = True
    before = sb.route(query, key, BY_SKETCH, None, key_padding_mask=mask)
    key[mask[:, None].expand(2, 2, 500)] = torch.nan
    after = sb.route(query, key, BY_SKETCH, None, key_padding_mask=mask)
    assert torch.equal(before.index, after.index) and torch.equal(before.count, after.count)
    assert not (after.index[0] == 110 // 8).any()


def test_equal_keys_go_to_the_lowest_blocks() -> None:
    key = rand(1, 1, 1, 16).expand(1, 1, 2000, 16)
    index = sb.route(rand(1, 1, 5, 16, seed=1), key, sb.Routed(24, 1, 8, pools=0), None).index
    assert index[0, 0, 0].tolist() == [0, 1, 2, -1]


def test_lists_that_queries_share_need_a_mean() -> None:
    with pytest.raises(ValueError, match="pools=0 finds every query's keys by sketches, expected block_q=1"):
        sb.Routed(32, pools=0)
