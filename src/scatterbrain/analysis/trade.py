"""The trade between error and time: which pairs, and which combinations of them, nothing beats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from scatterbrain.layer_settings import Pair
from scatterbrain.supports import Full

EXACT: Pair = (Full(), None)
KEPT, UNSURE = 4, 1.2  # combinations of a step that are kept, and by how much predicted squared errors may be wrong


def by_head(seconds: Mapping[Pair, float], squares: Mapping[Pair, Tensor]) -> list[Pair]:
    """Pairs whose heads have their own numbers of keys, made of those that differ in nothing else: of every head the
    number that costs least, where time, shared out evenly over the heads, has a price in squared error. Prices are
    those at which one number for all heads changes to the next, and between these. Of all pairs those on the lower
    convex hull of the squared error and the time that are expected.

    Args:
        seconds: measured, by pair.
        squares: squared errors by head, (Hq,), by pair.
    """
    families: dict[tuple, list[Pair]] = {}
    for support, low_rank in squares:
        if support.takes_keys_by_head and isinstance(support.keys, int):
            others = *(getattr(support, f.name) for f in fields(support) if f.name != "keys"), low_rank
            families.setdefault(others, []).append((support, low_rank))
    expected_seconds, expected_errors = (
        dict(seconds),
        {p: float(of_heads.sum()) ** 0.5 for p, of_heads in squares.items()},
    )
    for members in families.values():
        members.sort(key=lambda pair: pair[0].keys)
        times = torch.tensor([seconds[pair] for pair in members], dtype=torch.float64)
        lost = torch.stack([squares[pair] for pair in members])  # (members, heads)
        for price in _prices(times, lost.sum(1)):
            choice = (times[:, None] / lost.shape[1] + price * lost).argmin(0)
            pair = replace(members[0][0], keys=tuple(members[i][0].keys for i in choice.tolist())), members[0][1]
            if len(set(pair[0].keys)) > 1:
                expected_seconds[pair] = float(times[choice].mean())
                expected_errors[pair] = float(lost.gather(0, choice[None]).sum()) ** 0.5
    return [pair for pair in hull(expected_seconds, expected_errors) if pair not in squares]


def _prices(times: Tensor, squares: Tensor) -> list[float]:
    """Of squared error in time, ascending."""
    steps = zip(times.diff().tolist(), squares.diff().neg().tolist())
    rates = sorted(more / less for more, less in steps if more > 0 and less > 0)
    return [*rates, *((a * b) ** 0.5 for a, b in zip(rates, rates[1:]))]


Combination = tuple[float, float, tuple[Pair, ...]]  # seconds, squared error, pairs


def best_of_every_step(combinations: list[Combination], width: float) -> list[Combination]:
    """The few that err least of each step of time, none much more than a faster step's, from the fastest on."""
    found: list[Combination] = []
    least, step, count = float("inf"), -1, 0
    for combination in sorted(combinations, key=lambda c: (int(c[0] / width), c[1], c[0])):
        if int(combination[0] / width) != step:
            step, count = int(combination[0] / width), 0
        if count < KEPT and combination[1] < UNSURE * least:
            found.append(combination)
            least, count = min(least, combination[1]), count + 1
    return sorted(found, key=lambda combination: combination[:2])


def front(seconds: Mapping[Pair, float], errors: Mapping[Pair, float]) -> list[Pair]:
    """The pairs of which no other is faster and errs less, from exact attention and the slowest on."""
    kept: list[Pair] = []
    least = float("inf")
    for pair in sorted(errors, key=lambda pair: (seconds[pair], errors[pair])):
        if errors[pair] < least:
            kept.append(pair)
            least = errors[pair]
    return [EXACT, *(pair for pair in reversed(kept) if pair != EXACT)]


def hull(seconds: Mapping[Pair, float], errors: Mapping[Pair, float]) -> list[Pair]:
    """Of the front those on the lower convex hull of squared error over time."""
    kept: list[Pair] = []

    def rate(a: Pair, b: Pair) -> float:
        return (seconds[a] - seconds[b]) / max(errors[b] ** 2 - errors[a] ** 2, 1e-30)

    for pair in front(seconds, errors):
        if kept and seconds[pair] >= seconds[kept[-1]]:
            continue
        while len(kept) > 1 and rate(kept[-2], kept[-1]) <= rate(kept[-1], pair):
            kept.pop()
        kept.append(pair)
    return kept
