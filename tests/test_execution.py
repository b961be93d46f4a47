"""Which way a call takes, and that every way computes the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from testkit import fitted, leaves, padding, projections, qkv, rand
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import scatterbrain as sb
from scatterbrain import execution, prepared
from scatterbrain.operators import untraced

N, D, RANK = 70, 32, 4
WAYS = {
    "torch": (execution, "exact"),
    "prepared": (untraced.PreparedCall, "attention"),
    "one operator": (untraced, "quadratic_attention"),
    "composed": (untraced, "attention"),
}


@pytest.fixture(autouse=True)
def nothing_prepared() -> Iterator[None]:
    prepared._prepared.clear()
    yield
    prepared._prepared.clear()


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The ways that calls took, in order."""
    found: list[str] = []
    for name, (owner, attribute) in WAYS.items():
        original = getattr(owner, attribute)

        def recorded(*arguments, _name=name, _original=original):
            found.append(_name)
            return _original(*arguments)

        monkeypatch.setattr(owner, attribute, recorded)
    return found


def tokens(n: int = N, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return qkv(n, head_dim=D, dtype=dtype)


STORED = dict(low_rank=sb.Quadratic(RANK), statistics=fitted(head_dim=D, rank=RANK))
LEARNED = dict(low_rank=sb.Quadratic(RANK, "learned"), statistics=projections(head_dim=D, rank=RANK))
MASK = padding(N, [0, 9])
INDEX = torch.arange(4, dtype=torch.int32).expand(2, 2, 5, 4).contiguous()
BLOCKS = sb.Blocks(INDEX, torch.full((2, 2, 5), 4, dtype=torch.int32), 16, 8)

CALLS = {
    "every key is listed": ("torch", dict(support=sb.Full(), low_rank=None)),
    "a window of every key": ("torch", dict(support=sb.Window(96), **STORED)),
    "a window of every key, with lse": ("one operator", dict(support=sb.Window(96), return_lse=True, **STORED)),
    "a window of every key, with padding": (
        "one operator",
        dict(support=sb.Window(96), key_padding_mask=MASK, **STORED),
    ),
    "a window": ("prepared", dict(support=sb.Window(16), **STORED)),
    "routed": ("prepared", dict(support=sb.Routed(24), **STORED)),
    "routed, causal": ("prepared", dict(support=sb.Routed(24), is_causal=True, **STORED)),
    "own clusters": ("prepared", dict(support=sb.Window(16), low_rank=sb.Centroid(8))),
    "own clusters, routed": ("prepared", dict(support=sb.Routed(24, pools=2), low_rank=sb.Centroid(8))),
    "own clusters, padding": (
        "composed",
        dict(support=sb.Window(16), low_rank=sb.Centroid(8), key_padding_mask=MASK),
    ),
    "lists of the caller": ("one operator", dict(support=BLOCKS, **STORED)),
    "clusters": ("one operator", dict(support=sb.LSH(16), **STORED)),
    "padding": ("one operator", dict(support=sb.Window(16), key_padding_mask=MASK, **STORED)),
    "an offset": ("one operator", dict(support=sb.Window(16), is_causal=True, query_offset=3, **STORED)),
    "log-sum-exp": ("one operator", dict(support=sb.Window(16), return_lse=True, **STORED)),
    "learned projections": ("one operator", dict(support=sb.Window(16), **LEARNED)),
    "statistics of the input": ("prepared", dict(support=sb.Window(16), low_rank=sb.Quadratic(RANK, "input"))),
    "statistics of the input, routed": ("prepared", dict(support=sb.Routed(24), low_rank=sb.Quadratic(RANK, "input"))),
    "statistics of the input, padding": (
        "one operator",
        dict(support=sb.Window(16), low_rank=sb.Quadratic(RANK, "input"), key_padding_mask=MASK),
    ),
    "random features": ("composed", dict(support=sb.Window(16), low_rank=sb.Favor(8))),
    "no low-rank kernel": ("composed", dict(support=sb.Window(16), low_rank=None)),
    "a scale that torch's kernel cannot mask": (
        "composed",
        dict(support=sb.Full(), low_rank=None, is_causal=True, scale=-0.2),
    ),
}


@pytest.mark.parametrize(("way", "arguments"), CALLS.values(), ids=CALLS)
def test_a_call_takes_its_way_the_first_time_and_the_second(taken: list[str], way: str, arguments: dict) -> None:
    for _ in range(2):
        sb.attention(*tokens(), **arguments)
    assert taken == [way, way]


def test_float64_is_routed_in_float32_outside_the_operator(taken: list[str]) -> None:
    sb.attention(*tokens(dtype=torch.float64), sb.Routed(24), **STORED)
    assert taken == ["one operator"]


@pytest.mark.parametrize("name", [name for name, (way, _) in CALLS.items() if way != "torch"])
def test_a_watched_call_is_composed_and_has_the_same_bits(taken: list[str], name: str) -> None:
    """A dispatch mode sees the operators that have formulas, shapes and gradients."""
    arguments, results = CALLS[name][1], []
    for watch in (False, True):
        inputs = leaves(tokens())
        if watch:
            taken.clear()
            with FlopCounterMode(display=False):
                out = sb.attention(*inputs, **arguments)
            assert taken == []
        else:
            out = sb.attention(*inputs, **arguments)
        out = out[0] if isinstance(out, tuple) else out
        results.append([out, *torch.autograd.grad(out, inputs, rand(*out.shape, seed=9))])
    assert all(map(torch.equal, *results))


def test_a_prepared_call_whose_statistics_changed_is_prepared_anew(taken: list[str]) -> None:
    statistics = fitted(head_dim=D, rank=RANK)
    arguments = dict(support=sb.Window(16), low_rank=sb.Quadratic(RANK), statistics=statistics)
    before = sb.attention(*tokens(), **arguments)
    statistics.query_mean.mul_(2)
    after = sb.attention(*tokens(), **arguments)
    assert taken == ["prepared", "prepared", "prepared"]  # the second notices, the third is the new one
    fresh = fitted(head_dim=D, rank=RANK)
    fresh.query_mean.mul_(2)
    assert torch.equal(after, sb.attention(*tokens(), **(arguments | {"statistics": fresh})))
    assert not torch.equal(before, after)


def test_parameters_that_exact_attention_does_not_need_get_gradients_of_zero() -> None:
    """DDP waits for every parameter's gradient."""
    inputs = leaves(tokens(20))
    learned = sb.Projections(*leaves(LEARNED["statistics"].tensors()))
    out = sb.attention(*inputs, sb.Window(96), LEARNED["low_rank"], statistics=learned)
    for gradient in torch.autograd.grad(out.sum(), learned.tensors()):
        assert not gradient.any()
