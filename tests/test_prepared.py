"""Prepared calls skip the checks that they passed once; a call that differs in anything is checked again."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import testkit
import torch
from testkit import assert_same_bits, leaves
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import scatterbrain as sb
from scatterbrain import prepared
from scatterbrain.analysis.times import GROUP

H, N, D = 2, 150, 32
SUPPORTS = [
    sb.Window(32),
    sb.Window(32, sinks=4),
    sb.Routed(32),
    sb.Routed(32, window=16, sinks=4),
    sb.Routed(32, block_q=1, block_k=8, window=16),
    sb.Routed((32, 24)),
]


@pytest.fixture
def tokens() -> list[Tensor]:
    return testkit.qkv(N, batch=1, heads=H, kv_heads=H, head_dim=D)


@pytest.fixture
def statistics(tokens: list[Tensor]) -> sb.Statistics:
    prepared._prepared.clear()
    return sb.fit_statistics(*tokens[:2], 4)


def call(
    tokens: list[Tensor], statistics: sb.Statistics | None, support: object = SUPPORTS[0], **arguments: object
) -> Tensor:
    """With clusters of its own keys where there are no statistics."""
    low_rank = sb.Centroid(8) if statistics is None else sb.Quadratic(4)
    return sb.attention(*tokens, support, low_rank, statistics=statistics, **arguments)


@pytest.mark.parametrize("kind", ["quadratic", "quadratic, causal", "centroid"])
@pytest.mark.parametrize("support", [*SUPPORTS, sb.Routed(32, pools=2)], ids=str)
def test_a_prepared_call_gives_the_same_bits(tokens, statistics, support, kind) -> None:
    """As the same call before it, and as one that returns its log-sum-exp too, which is not prepared."""
    results, fitted, is_causal = [], None if kind == "centroid" else statistics, kind.endswith("causal")
    for return_lse in (False, False, True):
        inputs = leaves(tokens)
        out = call(inputs, fitted, support, is_causal=is_causal, return_lse=return_lse)
        out = out[0] if return_lse else out
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert len(prepared._prepared) == 1
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("support", [SUPPORTS[0], SUPPORTS[2]], ids=str)
def test_clusters_are_made_in_prepared_calls_of_every_dtype(tokens, statistics, support, dtype) -> None:
    results = []
    for return_lse in (False, False, True):
        inputs = leaves([t.to(dtype) for t in tokens])
        out = call(inputs, None, support, return_lse=return_lse)
        out = out[0] if return_lse else out
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_statistics_that_change_in_place_are_noticed(tokens, statistics) -> None:
    call(tokens, statistics)
    statistics.query_projection.data.mul_(0.5)  # no version counter moves
    fresh = sb.Statistics(**{name: t.clone() if isinstance(t, Tensor) else t for name, t in vars(statistics).items()})
    assert torch.equal(call(tokens, statistics), call(tokens, fresh))


def test_statistics_made_anew_are_not_taken_for_those_that_were_freed(tokens, statistics) -> None:
    call(tokens, statistics)
    key, found = next(iter(prepared._prepared.items()))
    ids = [id(t) for t in found.tensors]
    assert found.tensors[0] is statistics.query_projection and list(key[:4]) == ids
    del statistics, found
    gc.collect()
    assert [id(t) for t in next(iter(prepared._prepared.values())).tensors] == ids


def test_modules_have_prepared_calls(tokens) -> None:
    """A module makes a new Statistics object around the same tensors for every call."""
    prepared._prepared.clear()
    module = sb.ScatterbrainAttention(H, D, support=SUPPORTS[0], low_rank=sb.Quadratic(4))
    with sb.calibrate(module), torch.no_grad():
        module(*tokens)
    prepared._prepared.clear()
    for _ in range(3):
        module(*tokens)
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


def test_the_number_of_prepared_calls_is_bounded(tokens, statistics) -> None:
    short = [t[:, :, :48] for t in tokens]
    for n in range(1, prepared._MOST + 6):
        call(short, None, scale=1 / n)
    assert len(prepared._prepared) == prepared._MOST


@pytest.fixture
def missed(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Keys of the calls that had to be checked, of calls that can be kept."""
    found, keep = [], prepared.keep

    def noted(key: tuple, *arguments: object) -> None:
        found.append(key)
        keep(key, *arguments)

    monkeypatch.setattr(prepared, "keep", noted)
    prepared._prepared.clear()
    return found


def test_a_model_of_more_layers_than_calls_are_kept_finds_most_of_them(tokens, missed) -> None:
    short = [t[:, :, :48] for t in tokens]
    for _ in range(3):
        missed.clear()
        for n in range(1, prepared._MOST + 9):
            call(short, None, scale=1 / n)
    assert len(missed) < prepared._MOST / 4


def test_calls_that_are_timed_in_turn_are_kept_all(tokens, missed) -> None:
    short = [t[:, :, :48] for t in tokens]
    for n in range(1, prepared._MOST + 1):
        call(short, None, scale=1 / n)
    missed.clear()
    for _ in range(3):
        for n in range(1, GROUP + 2):
            call(short, None, scale=2.0 + n)
    assert len(missed) == GROUP + 1


def test_exact_attention_is_prepared_too(tokens, statistics) -> None:
    short = [t[:, :, :20] for t in tokens]
    first, second = call(short, statistics), call(short, statistics)
    assert [kept.call for kept in prepared._prepared.values()] == [None]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.nn.functional.scaled_dot_product_attention(*short))


def test_prepared_calls_that_nobody_holds_are_freed(tokens, statistics) -> None:
    call(tokens, statistics)
    kept = next(iter(prepared._prepared.values())).call
    number = kept.number
    out = call(leaves(tokens), statistics)
    prepared._prepared.clear()
    del kept
    gc.collect()
    call([t[:, :, :-1] for t in tokens], statistics)
    out.sum().backward()  # the graph still holds it
    del out
    gc.collect()
    call([t[:, :, :-2] for t in tokens], statistics)  # preparing another call frees it
    with pytest.raises(RuntimeError, match=f"got {number}"):
        torch.ops.scatterbrain.prepared_attention(*tokens, number, [])


@pytest.mark.parametrize("kernel", ["quadratic", "centroid"])
def test_gradients_of_a_graph_of_gradients_are_those_of_a_first_call(tokens, statistics, kernel) -> None:
    """create_graph=True takes the registered autograd, without a prepared call."""
    results = []
    for create_graph in (False, True):
        inputs = leaves(tokens)
        for _ in range(2):
            out = call(inputs, statistics if kernel == "quadratic" else None)
        results.append(torch.autograd.grad(out.square().sum(), inputs, create_graph=create_graph))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["quadratic", "centroid"])
def test_a_mode_around_the_backward_pass_alone_sees_registered_operators(tokens, statistics, kernel) -> None:
    """The mode is entered after the forward pass of a prepared call."""
    statistics = statistics if kernel == "quadratic" else None
    counts, gradients = [], []
    for return_lse in (False, True):  # calls with the log-sum-exp are not prepared
        inputs = leaves(tokens)
        call(inputs, statistics)
        out = call(inputs, statistics, return_lse=return_lse)
        out = out[0] if return_lse else out
        with FlopCounterMode(display=False) as flops:
            gradients.append(torch.autograd.grad(out, inputs, torch.ones_like(out)))
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert_same_bits(*gradients, testkit.RESULTS[2:])


def test_a_derived_support_is_not_taken_for_its_base(tokens, statistics) -> None:
    """Instances of a class without its own equality compare equal whatever its fields are."""

    @dataclass(frozen=True, eq=False)
    class Shifted(sb.Window):
        shift: int = 0

        def lists(self, call, query_map, key_map):
            lists = super().lists(call, query_map, key_map)
            return lists._replace(span=(lists.span - self.shift).clamp(min=0))

    outs = [call(tokens, statistics, Shifted(32, shift=shift)) for shift in (0, 8)]
    assert torch.equal(outs[0], call(tokens, statistics, sb.Window(32))) and not torch.equal(*outs)


def test_a_derived_routed_support_makes_its_own_lists(tokens, statistics) -> None:
    @dataclass(frozen=True)
    class Halved(sb.Routed):
        def lists(self, call, query_map, key_map):
            lists = super().lists(call, query_map, key_map)
            return lists._replace(count=lists.count // 2)

    assert not torch.equal(call(tokens, statistics, Halved(32)), call(tokens, statistics, sb.Routed(32)))
