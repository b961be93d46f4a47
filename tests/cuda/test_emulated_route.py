"""Lists by the CUDA kernels, run by the registered operator through the emulator, against the definition."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulator
from supports.test_route import (
    ALWAYS,
    PER_QUERY,
    POOLED,
    TWO_POOLS,
    Inputs,
    assert_as_defined,
    assert_near,
    ids,
    padded,
    random_mask,
)
from testkit import rand

import scatterbrain as sb

FORMS = [POOLED[1], TWO_POOLS[1], ALWAYS[2], ALWAYS[5]]


@pytest.fixture(autouse=True)
def installed(emulator: Emulator):
    with emulator.installed():
        yield


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("form", POOLED + TWO_POOLS + PER_QUERY[1:] + ALWAYS, ids=ids)
def test_lists_are_those_of_the_definition(form: dict, is_causal: bool) -> None:
    for n, m in ((0, 0), (5, 0), (1, 1), (77, 77), (40, 130)):
        inputs = Inputs(n, m, low_rank=(n + m + form["keys"] // 8) % 3, d=24, seed=n + m)
        key_mask = random_mask(2, m, n)
        inputs.mask(key_mask, key_mask if n == m else random_mask(2, n, m + 1))
        assert_as_defined(inputs.causal() if is_causal else inputs, **form)


@pytest.mark.parametrize("low_rank", [0, 1, 2])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
def test_stages_choose_as_the_definition(low_rank: int, is_causal: bool) -> None:
    """More keys than all candidate blocks hold, so that the stages really drop some."""
    inputs = Inputs(90, 1100, low_rank=low_rank, heads=1, batch=1, seed=low_rank)
    if is_causal:
        inputs.causal([1010])
    assert_as_defined(inputs, **POOLED[1])
    every_key, _ = sb.reference.routed_lists(sb.Routed(**POOLED[1]), inputs.definition(), stages=False)
    assert (every_key != inputs.route(**POOLED[1])[0]).any()


def test_queries_choose_among_the_best_superblocks() -> None:
    assert_as_defined(Inputs(3, 1400, heads=1, batch=1), **PER_QUERY[1])


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
def test_superblocks_of_long_rows_choose_as_the_definition(is_causal: bool) -> None:
    inputs = Inputs(20, 17000, heads=1, d=4, batch=1, seed=5)
    if is_causal:
        inputs.causal([16960])
    assert_as_defined(inputs, **POOLED[1])


@pytest.mark.parametrize("form", FORMS[:3], ids=ids)
def test_clusters_serve_keys_as_in_the_definition(form: dict) -> None:
    query, key, mask = rand(2, 4, 90, 12), rand(2, 2, 90, 12, seed=1), random_mask(2, 90, 4)
    low_rank = sb.Centroid(7)
    arguments = dict(statistics=sb.reference.cluster(query, key, 7, mask), key_padding_mask=mask)
    lists = sb.route(query, key, sb.Routed(**form), low_rank, **arguments)
    definition = sb.reference.Inputs.of(query, key, low_rank, **arguments)
    assert_near((lists.index, lists.count), sb.Routed(**form), definition)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_other_types_are_routed_as_their_float_copies(form: dict, dtype: torch.dtype) -> None:
    query, key = (
        t.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for t in (rand(1, 6, 60, 16), rand(1, 2, 60, 16))
    )
    given, copies = (sb.route(q, k, sb.Routed(**form), None) for q, k in ((query, key), (query.float(), key.float())))
    assert torch.equal(given.index, copies.index) and torch.equal(given.count, copies.count)


def test_equal_scores_go_to_the_lowest_keys() -> None:
    index = sb.route(rand(1, 1, 64, 16), torch.zeros(1, 1, 90, 16), sb.Routed(24, 16), None).index
    assert torch.equal(index, torch.arange(24, dtype=torch.int32).expand_as(index))


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_padding_changes_no_list(form: dict, is_causal: bool) -> None:
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.1
    mask[:, 0] = mask[:, -1] = False
    inputs = Inputs(70).mask(mask)
    inputs.is_causal = is_causal
    index, count = inputs.route(**form)
    for left, right, fill in ((0, 45, torch.nan), (13, 0, 1e4), (40, 3, torch.inf)):
        wide_index, wide_count = padded(inputs, left, right, fill).route(**form)
        blocks = index.shape[2]
        assert torch.equal(wide_index[:, :, :blocks, : index.shape[3]], index)
        assert torch.equal(wide_count[:, :, :blocks], count)
        assert (wide_count[:, :, blocks:] == 0).all() and (wide_index[:, :, blocks:] == -1).all()


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_lists_read_nothing_after_the_first_query(form: dict) -> None:
    before = Inputs(101, heads=1, batch=1).causal()
    index, count = before.route(**form)
    for cut in (1, 16, 33, 100):
        after = Inputs(101, heads=1, batch=1, seed=99).causal()
        for name in ("query", "key", "query_map", "key_map"):
            changed = getattr(after, name).mul(3)
            changed[:, :, :cut] = getattr(before, name)[:, :, :cut]
            setattr(after, name, changed)
        unchanged = -(-cut // form["block_q"])
        for got, want in zip(after.route(**form), (index, count)):
            assert torch.equal(got[:, :, :unchanged], want[:, :, :unchanged])


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_two_runs_give_the_same_lists(form: dict) -> None:
    for got, again in zip(Inputs(90).route(**form), Inputs(90).route(**form)):
        assert torch.equal(got, again)
