"""Calls that were checked before skip the checks; whatever differs from them goes through every one."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import scatterbrain as sb
from scatterbrain import prepared

H, N, D = 2, 150, 32
SUPPORTS = [sb.Window(32), sb.Routed(32), sb.Routed(32, block_q=1, block_k=8, window=16)]


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tokens() -> list[Tensor]:
    return [rand(1, H, N, D, seed=s) for s in (1, 2, 3)]


@pytest.fixture
def statistics(tokens: list[Tensor]) -> sb.Statistics:
    prepared._prepared.clear()
    return sb.fit_statistics(*tokens[:2], 4)


def call(tokens: list[Tensor], statistics: sb.Statistics, support: object = SUPPORTS[0], **arguments: object) -> Tensor:
    return sb.attention(*tokens, support, sb.Quadratic(4), statistics=statistics, **arguments)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_a_call_that_was_checked_gives_the_same_bits(tokens, statistics, support, is_causal) -> None:
    results = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in tokens]
        out = call(leaves, statistics, support, is_causal=is_causal)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    assert len(prepared._prepared) == 1
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_statistics_that_change_in_place_are_noticed(tokens, statistics) -> None:
    call(tokens, statistics)
    statistics.query_projection.data.mul_(0.5)  # no version counter moves
    fresh = sb.Statistics(**{name: t.clone() if isinstance(t, Tensor) else t for name, t in vars(statistics).items()})
    assert torch.equal(call(tokens, statistics), call(tokens, fresh))


def test_statistics_made_anew_are_not_taken_for_those_that_were_freed(tokens, statistics) -> None:
    call(tokens, statistics)
    key, plan = next(iter(prepared._prepared.items()))
    ids = [id(t) for t in plan.tensors]
    assert plan.tensors[0] is statistics.query_projection and list(key[:4]) == ids
    del statistics, plan
    gc.collect()
    assert [id(t) for t in next(iter(prepared._prepared.values())).tensors] == ids


def test_modules_have_plans() -> None:
    """They make the object around their statistics anew for every call."""
    prepared._prepared.clear()
    module = sb.ScatterbrainAttention(H, D, support=SUPPORTS[0], low_rank=sb.Quadratic(4))
    heads = [rand(1, H, N, D, seed=s) for s in (1, 2, 3)]
    with sb.calibrate(module), torch.no_grad():
        module(*heads)
    prepared._prepared.clear()
    for _ in range(3):
        module(*heads)
    assert len(prepared._prepared) == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"is_causal": 1}, TypeError),
        ({"is_causal": 0}, TypeError),
        ({"scale": True}, TypeError),
        ({"scale": float("nan")}, ValueError),
        ({"scale": 0.3}, ValueError),  # fitted for another one
        ({"query_offset": False}, TypeError),
        ({"query_offset": 3}, ValueError),
        ({"return_lse": 0}, TypeError),
        ({"key_padding_mask": torch.zeros(1, 7, dtype=torch.bool)}, ValueError),
    ],
    ids=str,
)
def test_wrong_arguments_raise_after_a_right_call(tokens, statistics, arguments, error) -> None:
    for _ in range(2):
        call(tokens, statistics)
    with pytest.raises(error):
        call(tokens, statistics, **arguments)


def test_tokens_of_mixed_types_raise_after_a_right_call(tokens, statistics) -> None:
    call(tokens, statistics)
    with pytest.raises(TypeError, match="one dtype"):
        call([tokens[0], tokens[1], tokens[2].double()], statistics)


def test_autocast_and_forward_mode_go_through_the_checks(tokens, statistics) -> None:
    want = call(tokens, statistics)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(tokens, statistics).dtype == torch.bfloat16
    assert torch.equal(call(tokens, statistics), want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tokens[0], torch.ones_like(tokens[0]))
        with pytest.raises(RuntimeError, match="forward-mode"):
            call([dual, *tokens[1:]], statistics)


def test_no_more_plans_are_kept_than_a_program_needs(tokens, statistics) -> None:
    for n in range(40, 40 + prepared._MOST + 5):
        call([t[:, :, :n] for t in tokens], statistics)
    assert len(prepared._prepared) == prepared._MOST


def test_exact_attention_is_planned_too(tokens, statistics) -> None:
    short = [t[:, :, :20] for t in tokens]
    first, second = call(short, statistics), call(short, statistics)
    assert [plan.call for plan in prepared._prepared.values()] == [None]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.nn.functional.scaled_dot_product_attention(*short))


def test_plans_that_nobody_holds_are_forgotten(tokens, statistics) -> None:
    call(tokens, statistics)
    planned = next(iter(prepared._prepared.values())).call
    number = planned.number
    leaves = [t.clone().requires_grad_() for t in tokens]
    out = call(leaves, statistics)
    prepared._prepared.clear()
    del planned
    gc.collect()
    call([t[:, :, :-1] for t in tokens], statistics)
    out.sum().backward()  # the graph still holds it
    del out
    gc.collect()
    call([t[:, :, :-2] for t in tokens], statistics)  # the next plan drops it
    with pytest.raises(RuntimeError, match=f"got {number}"):
        torch.ops.scatterbrain.prepared_attention(*tokens, number)


def test_gradients_of_a_graph_of_gradients_are_those_of_a_first_call(tokens, statistics) -> None:
    """create_graph=True goes through the operators' own autograd, with no plan in it."""
    results = []
    for create_graph in (False, True):
        leaves = [t.clone().requires_grad_() for t in tokens]
        for _ in range(2):
            out = call(leaves, statistics)
        results.append(torch.autograd.grad(out.square().sum(), leaves, create_graph=create_graph))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


def test_what_watches_the_backward_pass_sees_operators_it_knows(tokens, statistics) -> None:
    """Where a mode is entered after the forward pass of a plan."""
    counts, gradients = [], []
    for return_lse in (False, True):  # with the log-sum-exp there is no plan
        leaves = [t.clone().requires_grad_() for t in tokens]
        call(leaves, statistics)
        out = call(leaves, statistics, return_lse=return_lse)
        out = out[0] if return_lse else out
        with FlopCounterMode(display=False) as flops:
            gradients.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert all(map(torch.equal, *gradients))
