"""Routing where keys are no numbers; blocks of keys as one mean and as two groups, unequal in place or all alike."""

import pytest
import torch
from testkit import rand

import scatterbrain as sb


@pytest.mark.parametrize("pools", [0, 1, 2])
def test_keys_that_are_no_numbers_are_listed_where_the_mask_says_so(pools: int) -> None:
    """Key 56 begins block 7, which a superblock of valid keys has besides: a window holds it, and hides no other."""
    query, key = rand(1, 1, 64, 16), rand(1, 1, 64, 16, seed=1)
    key[:, :, 56] = torch.nan
    support = sb.Routed(24, 1, 8, 8, pools=pools)
    lists = sb.route(query, key, support, None, is_causal=True)
    assert all(7 in lists.index[0, 0, i].tolist() for i in range(56, 64))
    out = sb.attention(query, key, key.nan_to_num(), support, None, is_causal=True)
    assert out[:, :, 56:].isnan().all() and not out[:, :, :56].isnan().any()
    key[:] = torch.nan
    assert sb.attention(query, key, query, support, None, is_causal=True).isnan().all()


def assert_runs_of_infinite_keys_come_first(value: float, dtype: torch.dtype = torch.float32) -> None:
    """Two groups of a run with an infinite key are inf - inf apart, a NaN whose sign differs between processors."""
    query, key = rand(1, 1, 64, 16).to(dtype), rand(1, 1, 64, 16, seed=1).to(dtype)
    key[:, :, 20, 3] = value
    support = sb.Routed(24, 1, 8, 8, pools=2)
    expected, _ = sb.reference.routed_lists(support, sb.reference.Inputs.of(query, key))
    for index in (expected, sb.route(query, key, support, None).index):
        assert all(2 in row for row in index[0, 0].tolist())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_come_first(value: float) -> None:
    assert_runs_of_infinite_keys_come_first(value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -3e38])
@pytest.mark.parametrize("pools", [0, 1, 2])
def test_no_list_depends_on_later_keys_beside_a_hole(pools: int, value: float) -> None:
    query, key = rand(1, 1, 64, 16), 5 + 0.01 * rand(1, 1, 64, 16, seed=1)
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 56] = True
    arguments = dict(support=sb.Routed(24, 1, 8, 8, pools=pools), low_rank=None, key_padding_mask=mask, is_causal=True)
    before = sb.route(query, key, **arguments)
    key[:, :, 60:] = value
    after = sb.route(query, key, **arguments)
    assert torch.equal(before.index[:, :, :60], after.index[:, :, :60])


def test_runs_whose_keys_weigh_the_same_tie_exactly_with_two_pools() -> None:
    """Groups of other sizes in every block: a query of zeros weighs all keys the same."""
    key = torch.randn(1, 1, 900, 16, generator=torch.Generator().manual_seed(0))
    for size in (1.0, 1e20):
        index = sb.route(torch.zeros(1, 1, 900, 16), size * key, sb.Routed(40, 1, 8, pools=2), None).index
        assert (index[..., :5] == torch.arange(5)).all()


@pytest.mark.parametrize("pools", [1, 2])
@pytest.mark.parametrize("tokens", [96, 700])  # of more than 512 keys candidates are chosen first
def test_pooled_lists_begin_with_keys_that_are_no_numbers(tokens: int, pools: int) -> None:
    """In whichever lane of a vector such a key is, the others keep their order; among several pools, whose scores are
    relative to a sum over all keys, they have none."""
    query, keys = rand(1, 1, 32, 16), rand(1, 1, tokens, 16, seed=1)
    support = sb.Routed(24, 16, pools=pools)
    for at in range(tokens - 40, tokens - 8, 3):
        key = keys.clone()
        key[:, :, at] = torch.nan
        index = sb.route(query, key, support, None).index
        assert (index == at).any(-1).all()
        expected, _ = sb.reference.routed_lists(support, sb.reference.Inputs.of(query, key))
        assert pools == 2 or torch.equal(index, expected)
