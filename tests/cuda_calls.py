"""Calls that the CUDA kernels are judged by, in the emulator and on a GPU, and the error that they may have."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
from oracle import Case, row_error
from testkit import rand
from torch import Tensor

import scatterbrain as sb

CPU = torch.device("cpu")


class Machine(Protocol):
    """What runs the kernels: on tensors of ``device``, while it is installed."""

    device: torch.device

    def installed(self) -> Any: ...


class Gpu:
    """The current CUDA device."""

    device = torch.device("cuda")

    @contextmanager
    def installed(self) -> Iterator[Gpu]:
        yield self


def placed(given: Any, device: torch.device) -> Any:
    """The same with every tensor on the device, within tuples, lists, dictionaries and dataclasses too."""
    if isinstance(given, Tensor):
        return given.to(device)
    if isinstance(given, dict):
        return {name: placed(value, device) for name, value in given.items()}
    if isinstance(given, (list, tuple)):
        return type(given)(placed(value, device) for value in given)
    if is_dataclass(given) and not isinstance(given, type):
        moved = copy.copy(given)
        for field in fields(given):
            object.__setattr__(moved, field.name, placed(getattr(given, field.name), device))
        return moved
    return given


# -------------------- errors


def excess(machine: Machine, case: Case, dtype: torch.dtype, floor: float) -> str:
    """Empty where every row of out and lse errs by at most max(floor, twice the same formula in torch at ``dtype``),
    else what errs by how much."""
    tokens = [t.to(dtype) for t in (case.query, case.key, case.value)]
    with machine.installed():
        given = placed((tokens, case.support, case.arguments), machine.device)
        got = placed(sb.attention(*given[0], given[1], return_lse=True, **given[2]), CPU)
    exact, plain = (
        sb.reference.attention(
            *(t.to(precision) for t in tokens), case.support, return_lse=True, **case.definition | {"dtype": precision}
        )
        for precision in (torch.float64, dtype)
    )
    assert got[0].dtype == dtype and got[0].shape == exact[0].shape and got[1].shape == exact[1].shape
    empty = exact[1] == -torch.inf
    if not torch.equal(got[1] == -torch.inf, empty):
        return f"lse of rows without weight; {case.support} {case.low_rank}"
    error, allowed = row_error(got[0], exact[0]), max(floor, 2 * row_error(plain[0], exact[0]))
    if not error <= allowed:
        return f"out: error {error:.2e}, allowed {allowed:.2e}; {case.support} {case.low_rank}"
    error, allowed = (
        float((lse.double() - exact[1]).masked_fill(empty, 0).abs().max()) if lse.numel() else 0.0
        for lse in (got[1], plain[1])
    )
    allowed = max(floor, 1e-5, 2 * allowed)
    if not error <= allowed:
        return f"lse: error {error:.2e}, allowed {allowed:.2e}; {case.support} {case.low_rank}"
    return ""


# -------------------- calls of every kind

N, D = 130, 24

SUPPORTS = {
    "window": sb.Window(20, 8),
    "window with sinks": sb.Window(29, 16, sinks=5),
    "pooled": sb.Routed(24, 16),
    "per query": sb.Routed(32, block_q=1, block_k=8, window=16),
    "per query of two pools": sb.Routed(32, block_q=1, block_k=8, window=16, pools=2),
    "per query by sketches": sb.Routed(32, block_q=1, block_k=8, window=16, pools=0),
    "empty": sb.Empty(),
}
LOW_RANKS = {"none": None, "quadratic": sb.Quadratic(4), "favor": sb.Favor(16), "centroid": sb.Centroid(5)}
PAIRS = [(s, k) for s in SUPPORTS for k in LOW_RANKS if (s, k) != ("empty", "none")]
CAUSAL_PAIRS = [(s, k) for s, k in PAIRS if k != "centroid"]  # its clusters are of all keys


def tokens(heads: int = 2) -> list[Tensor]:
    """Two heads of queries share one of keys."""
    return [rand(1, heads, N, D, seed=1), rand(1, heads // 2, N, D, seed=2), rand(1, heads // 2, N, D + 3, seed=3)]


def statistics_of(low_rank: object) -> object:
    others = rand(1, 2, 99, D, seed=4), rand(1, 1, 99, D, seed=5)
    return sb.fit_statistics(*others, 4) if isinstance(low_rank, sb.Quadratic) else None


def attend(
    machine: Machine, tokens: list[Tensor], support: object, low_rank: object, **arguments: object
) -> list[Tensor]:
    """out and lse at given arguments."""
    arguments.setdefault("statistics", statistics_of(low_rank))
    with machine.installed():
        given = placed((tokens, arguments), machine.device)
        return placed(list(sb.attention(*given[0], support, low_rank, return_lse=True, **given[1])), CPU)


def cancelling_call(n: int, is_causal: bool) -> tuple:
    """Arguments of a call in which L overrates the listed keys by far: few keys have nearly all of it, and every query
    lists them."""
    query, key, value = (rand(1, 2, n, 16, seed=seed) for seed in range(3))
    query_map, key_map = 30 * torch.ones(1, 2, n, 3), 30 * torch.ones(1, 2, n, 3)
    query_map[..., -1] = key_map[..., -1] = 0
    key_map[:, :, 20:] = 0
    index = torch.arange(20, dtype=torch.int32).expand(1, 2, 1, 20).contiguous()
    count = torch.full((1, 2, 1), 20, dtype=torch.int32)
    return (
        query,
        key,
        value,
        query_map,
        key_map,
        *[None] * 4,
        index,
        count,
        *[None] * 7,
        1,
        n + 30,
        1,
        0,
        0,
        is_causal,
        0.2,
    )
