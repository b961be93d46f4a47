"""Keys that outweigh all others in the low-rank part, as the attention sinks of language models do: the states hold
them out, so that no list has to take them back from a state that they dominate."""

from __future__ import annotations

import pytest
import torch
from heavy_keys import SINKS, Call, D, N
from oracle import assert_as_exact, row_error
from testkit import RESULTS, assert_same_bits, attend, padding, rand, supports

import scatterbrain as sb

SUPPORTS = supports()


def assert_parity(call: Call, support: object, is_causal: bool, **arguments: object) -> None:
    """out and lse within what float32 allows. Gradients of rows in which a single key has all weight are differences of
    nearly equal numbers, which grow with its score."""
    support = call.fixed(support, is_causal, **arguments)
    got = call.run(support, is_causal, **arguments)
    plain = call.defined(support, is_causal, torch.float32, **arguments)
    exact = call.defined(support, is_causal, torch.float64, **arguments)
    for i, results in enumerate(zip(got, plain, exact)):
        mine, same, right = (t.nan_to_num(neginf=0.0) for t in results) if i == 1 else results
        floor = 1e-5 if i < 2 or call.strength <= 10 else 1e-3
        assert_as_exact(mine, right, same, floor, f"{support}, {RESULTS[i]}:")


def pairs() -> list[tuple[str, bool]]:
    return [(name, causal) for name in SUPPORTS for causal in (False, True) if not (causal and name == "lsh")]


def stages(call: Call, support: object, is_causal: bool) -> set[str]:
    """Stages of a forward and a backward pass."""
    with sb.profile() as profile:
        call.run(support, is_causal)
    return set(profile.stages)


AGAIN = "queries again in double"


@pytest.mark.parametrize("support, is_causal", pairs())
@pytest.mark.parametrize("strength", [10.0, 40.0])
def test_a_sink_costs_no_second_pass(support: str, is_causal: bool, strength: float) -> None:
    """The time of a call is then that of its stages, which are linear, whatever is listed."""
    assert AGAIN not in stages(Call(strength), SUPPORTS[support], is_causal)


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("support", ["window", "pooled", "per query"])
def test_several_sinks_cost_no_second_pass(support: str, sinks: str) -> None:
    for is_causal in (False, True):
        call = Call(40.0, SINKS[sinks], growth=5.0 if sinks == "later ones heavier" else 0.0)
        assert AGAIN not in stages(call, SUPPORTS[support], is_causal)


@pytest.mark.parametrize("support, is_causal", pairs())
@pytest.mark.parametrize("strength", [10.0, 40.0, 200.0])
def test_a_sink_changes_no_result(support: str, is_causal: bool, strength: float) -> None:
    assert_parity(Call(strength), SUPPORTS[support], is_causal)


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_several_sinks_change_no_result(sinks: str, is_causal: bool) -> None:
    growth = 5.0 if sinks == "later ones heavier" else 0.0
    for name in ("window", "pooled", "per query"):
        assert_parity(Call(30.0, SINKS[sinks], growth=growth), SUPPORTS[name], is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
def test_sinks_of_a_negative_scale_of_groups_of_heads_and_among_padding(is_causal: bool) -> None:
    assert_parity(Call(30.0, [3, 150], sign=-1), SUPPORTS["window"], is_causal)
    mask = padding(N, [40], [20])
    for heads, kv_heads in ((4, 2), (2, 2)):
        call = Call(30.0, [1, 25, 150, 310], heads=heads, kv_heads=kv_heads)  # the first and the last are padding
        for name in ("window", "per query"):
            assert_parity(call, SUPPORTS[name], is_causal, key_padding_mask=mask, query_padding_mask=mask)


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_key_may_outweigh_all_before_it(is_causal: bool) -> None:
    """Each is held out until heavier ones take its place, and enters a state then."""
    call = Call(0.0, list(range(N)), growth=0.7)
    for name in ("window", "single queries", "empty"):
        assert_parity(call, SUPPORTS[name], is_causal)


def test_narrow_heads_and_float64_are_exact_with_sinks() -> None:
    call = Call(30.0, [5, 150], dtype=torch.float64)
    for name in ("window", "per query"):
        for is_causal in (False, True):
            support = call.fixed(SUPPORTS[name], is_causal)
            want = call.defined(support, is_causal, torch.float64)
            for got, exact in zip(call.run(support, is_causal), want):
                assert row_error(got, exact) < 1e-11


@pytest.mark.parametrize("support", ["window", "single queries", "per query", "empty"])
def test_a_later_sink_changes_no_bit_of_earlier_rows(support: str) -> None:
    """What a state holds out depends on the keys before it alone."""
    for cut, sinks in ((64, []), (130, [40]), (200, [40, 129])):
        results = []
        for later in ([], [cut], list(range(cut, cut + 40))):
            out, lse, *_ = Call(40.0, sinks + later, growth=3.0).run(SUPPORTS[support], True)
            results.append([out[:, :, :cut], lse[:, :, :cut]])
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_around_sinks_changes_no_bit(is_causal: bool) -> None:
    call = Call(40.0, [5, 150])
    before, behind = 24, 8
    want = call.run(SUPPORTS["window"], is_causal)
    padded = Call(40.0, [5, 150])
    for name in ("query", "key", "value"):
        t = getattr(padded, name)
        fill = [torch.full((1, t.shape[1], n, D), 1e4) for n in (before, behind)]
        setattr(padded, name, torch.cat([fill[0], t, fill[1]], 2))
    mask = padding(N + before + behind, [behind], [before])
    inner = slice(before, before + N)
    arguments = {"key_padding_mask": mask, "query_padding_mask": mask}
    out, lse, *_ = padded.run(SUPPORTS["window"], is_causal, **arguments)
    assert_same_bits([out[:, :, inner], lse[:, :, inner]], want[:2])


@pytest.mark.parametrize("zeros", [slice(64), slice(64, 128)], ids=["first", "second"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_whose_features_are_all_zero_leave_later_sinks_held(is_causal: bool, zeros: slice) -> None:
    """A whole chunk of them weighs nothing in a state."""
    query, key, value = (rand(1, 2, N, D, seed=seed) for seed in range(3))
    query, key = query.abs(), key.abs()
    key[:, :, zeros] *= -1
    key[:, :, 250, : D // 2], key[:, :, 250, D // 2 :] = 5000, -6000  # weighs much where it is not listed, else nothing
    kernel = sb.Features(torch.relu, lambda t: 1000 * torch.relu(t))
    with sb.profile() as profile:
        out, *_ = attend([query, key, value], sb.Window(32), kernel, is_causal=is_causal)
    assert not [stage for stage in profile.stages if stage.startswith("queries again")]
    want = sb.reference.attention(query, key, value, sb.Window(32), kernel, is_causal=is_causal)
    assert row_error(out, want) < 1e-5


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("support", ["window", "per query"])
def test_sinks_give_the_same_bits_for_any_number_of_threads(support: str, is_causal: bool) -> None:
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(Call(30.0, SINKS["forty"], tokens=600).run(SUPPORTS[support], is_causal))
    assert_same_bits(*results)
