"""Routed: the lists of keys, dense, one block of queries at a time.

A key's position counts from its row's first valid key. The pooled form scores what the low-rank part would get wrong,
|exp(s_j) - L_j| with s_j = q.k_j + v/4 |k_j|^2, where q is the mean of the block's scaled queries and v their variance,
averaged over coordinates: half of the second-order correction of log mean exp(q_i.k_j) for a variance that is equal in
all directions. Measured, it selects as well as one variance per coordinate and, in the causal form, better, for one
multiply-add per pair instead of head_dim. L_j is the kernel at the block's mean coordinates, or for kernels that
replace keys by others at its mean query, and single keys are then scored by the expected squared residual. Where
several pools stand for a block, the squared residuals of each, relative to the square of its sum of exp(s_j) over the
candidates, are added. The per-query form scores blocks of keys by q.mean(k) and the spread of their keys, or by the
same of two groups of their keys, or by the keys themselves, of blocks that have a key whose sketch is like the query's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scatterbrain.reference.inputs import Inputs
from scatterbrain.reference.low_rank import Coordinates, coordinates
from scatterbrain.reference.sketch import BITS, agreement, sketches
from scatterbrain.supports import Routed

LEAF = 32  # keys of a candidate block (pooled)
SUPER = 16  # candidate blocks of a superblock (pooled)
LONG_ROW = 16384  # valid keys from which superblocks are used (pooled)
GROUP = 4  # pools, of one query block or of neighbouring ones, that share candidate blocks (pooled)
BRANCH = 8  # listed blocks of a superblock (per query)


def candidate_blocks(keys: int) -> int:
    """Candidate blocks of 32 keys that the pooled form keeps for a budget of ``keys``."""
    return max(16, -(-3 * keys // 16))


def candidate_superblocks(routed: int, pools: int = 1) -> int:
    """Superblocks, or without pools blocks, that the per-query form keeps for ``routed`` listed blocks."""
    return max(16, 2 * routed) // max(pools, 1)


def budget_of(support: Routed, head: int) -> int:
    """Keys of a query head."""
    return support.keys[head] if isinstance(support.keys, tuple) else support.keys


def largest_budget(support: Routed) -> int:
    """The most keys of any head."""
    return max(support.keys) if isinstance(support.keys, tuple) else support.keys


class Choice(NamedTuple):
    """The list of one block of queries, ascending, and the score of every key or block of keys, listed or not."""

    row: int
    head: int
    block: int
    entries: list[int]
    score: Tensor


def routed_lists(support: Routed, inputs: Inputs, stages: bool = True) -> tuple[Tensor, Tensor]:
    """index (B, Hq, ceil(N / block_q), capacity) and count, int32, as :class:`scatterbrain.Blocks` describes them; of
    :func:`choices`."""
    batch, heads, n, _ = inputs.query.shape
    # A per-query window whose ends are rounded to blocks touches one block more than it fills. No list has more entries
    # than all keys make.
    most = largest_budget(support)
    capacity = most if support.block_k == 1 else most // support.block_k + 1
    capacity = min(capacity, -(-inputs.key.shape[2] // support.block_k))
    index = torch.full((batch, heads, -(-n // support.block_q), capacity), -1, dtype=torch.int32)
    count = torch.zeros(index.shape[:3], dtype=torch.int32)
    for row, head, block, entries, _ in choices(support, inputs, stages):
        index[row, head, block, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
        count[row, head, block] = len(entries)
    return index.to(inputs.query.device), count.to(inputs.query.device)


@torch.no_grad()
def choices(support: Routed, inputs: Inputs, stages: bool = True) -> Iterator[Choice]:
    """The list of every block that has a valid query. ``stages=False`` drops the candidate stages: every key is scored.
    Scores are those of float32 copies of the tokens, in float64; a low-rank kernel takes part with its coordinates."""
    inputs = inputs.to(torch.float32, torch.float64)
    maps = coordinates(inputs.low_rank, inputs)
    lists = pooled_lists if support.block_k == 1 else per_query_lists
    for b in range(inputs.query.shape[0]):
        for h in range(inputs.query.shape[1]):
            queries, keys = Queries.of(inputs, maps, support.block_q, b, h), Keys.of(inputs, maps, b, h)
            for block, entries, score in lists(support, budget_of(support, h), queries, keys, stages):
                yield Choice(b, h, block, entries, score)


class Keys(NamedTuple):
    """The keys of one batch row and key/value head by position, with their low-rank coordinates. Padded keys are
    zero."""

    key: Tensor  # (Mv, d)
    valid: Tensor  # (Mv,)
    y: Tensor | None  # (Mv, r)
    kappa: Tensor | None
    is_quadratic: bool = False
    apart: Tensor | None = None  # squared distances to the keys that stand for them; of single keys

    @classmethod
    def of(cls, inputs: Inputs, maps: Coordinates | None, b: int, h: int) -> Keys:
        span, head = slice(*inputs.key_range(b)), h // inputs.group
        key, valid = inputs.key[b, head, span].cpu(), ~inputs.key_padding[b, span].cpu()
        if maps is None:
            return cls(key, valid, None, None)
        y = maps.y[b, head, span].cpu().where(valid[:, None], 0)
        apart = None if maps.apart is None else maps.apart[b, head, span].cpu().where(valid, 0)
        return cls(key, valid, y, maps.kappa[b, head, span].cpu().where(valid, 0), maps.is_quadratic, apart)

    def means(self, size: int) -> Keys:
        """Every run of ``size`` keys as one key: the mean key, and the mean of the low-rank features, (1, y / 2)
        exp(kappa / 2) of the quadratic kernel, y exp(kappa) of others."""
        count = -(-len(self.valid) // size)

        def runs(t: Tensor) -> Tensor:  # (count, size, ..), so that what is no number stays in its run
            filled = torch.zeros(count * size, *t.shape[1:], dtype=self.key.dtype)
            filled[: len(t)] = t
            return filled.unflatten(0, (count, size))

        member = runs(self.valid)
        total = member.sum(1)
        share = member / total.clamp_min(1)[:, None]
        key = (share[:, :, None] * runs(self.key)).sum(1)
        if self.y is None:
            return Keys(key, total > 0, None, None)
        power = 2 if self.is_quadratic else 1
        log_share = torch.log(share) + runs(self.kappa) / power
        mean = torch.logsumexp(log_share, 1)
        y = (torch.exp(log_share - mean[:, None]).nan_to_num(0.0)[:, :, None] * runs(self.y)).sum(1)
        return Keys(key, total > 0, y, power * mean, self.is_quadratic)

    def spread(self, size: int) -> Tensor:
        """Mean squared distance of the valid keys of every run of ``size`` to their mean."""
        square = Keys(self.key.square().sum(-1, keepdim=True), self.valid, None, None).means(size).key[:, 0]
        return (square - self.means(size).key.square().sum(-1)).clamp_min(0)

    def runs_in_two(self, size: int) -> list[Group]:
        """Every run of ``size`` keys as two groups."""
        count, width = -(-len(self.valid) // size), self.key.shape[1]
        key, weight = (torch.zeros(count * size, n, dtype=self.key.dtype) for n in (width, 1))
        key[: len(self.valid)], weight[: len(self.valid), 0] = self.key, self.valid.to(self.key.dtype)
        weight = weight.view(count, size)
        return in_two(key.view(count, size, width), weight, torch.zeros_like(weight))


class Group(NamedTuple):
    """Keys that stand together, one group of every run: their mean (runs, d), their number and their mean squared
    distance to the mean (runs,)."""

    mean: Tensor
    count: Tensor
    spread: Tensor


def in_two(point: Tensor, weight: Tensor, spread: Tensor) -> list[Group]:
    """The points (runs, n, d) of every run, which stand for ``weight`` keys each that are ``spread`` apart, as two
    groups: around the point that is farthest from the run's mean, and around the one that is farthest from that."""

    def of(points: Tensor) -> Group:
        weights = weight * points
        count = weights.sum(1)
        share = weights / count.clamp_min(1)[:, None]
        mean = (share[:, :, None] * point).sum(1)
        return Group(mean, count, (share * (spread + (point - mean[:, None]).square().sum(-1))).sum(1))

    def from_points(centre: Tensor) -> Tensor:
        return (point - centre[:, None]).square().sum(-1).masked_fill(weight == 0, -1)

    def farthest(centre: Tensor) -> Tensor:
        return point[torch.arange(len(point)), from_points(centre).argmax(1)]

    first = farthest(of(torch.ones_like(weight)).mean)
    is_first = ~(from_points(first) > from_points(farthest(first)))
    return [of(is_first.to(point.dtype)), of((~is_first).to(point.dtype))]


def run_scores(query: Tensor, groups: list[Group]) -> Tensor:
    """(runs,): the log of what a query weighs the keys of every run with, from the groups that they are in."""
    spread_weight = query.square().mean() / 2
    score = torch.stack([group.mean @ query + spread_weight * group.spread for group in groups])
    count = torch.stack([group.count for group in groups])
    top = score.masked_fill(count == 0, -torch.inf).amax(0)  # runs of keys that weigh the same tie exactly
    return top + (count * torch.exp(score - top).where(count > 0, 0)).sum(0).log()


@dataclass
class Queries:
    """The queries of one batch row and head with their low-rank coordinates, in blocks that start at the first valid
    one. Query i stands at position i + ``shift`` among the keys."""

    token: Tensor  # (N, d)
    query: Tensor  # the same, scaled
    is_turned: bool  # by a negative scale
    valid: Tensor
    x: Tensor | None
    rho: Tensor | None
    first: int
    end: int
    block_q: int
    shift: int
    are_the_keys: bool  # as many queries as keys: the same tokens
    is_causal: bool
    at_mean: Callable[[Tensor], tuple[Tensor, Tensor]] | None  # x and rho of a pool, where not their means

    @classmethod
    def of(cls, inputs: Inputs, maps: Coordinates | None, block_q: int, b: int, h: int) -> Queries:
        valid = ~inputs.query_padding[b].cpu()
        x, rho = (None, None) if maps is None else (maps.x[b, h].cpu(), maps.rho[b, h].cpu())
        token = inputs.query[b, h].cpu()
        return cls(
            token,
            token * inputs.scale,
            inputs.scale < 0,
            valid,
            x,
            rho,
            *inputs.query_range(b),
            block_q,
            inputs.query_offset[b] - inputs.key_range(b)[0],
            inputs.query.shape[2] == inputs.key.shape[2],
            inputs.is_causal,
            None if maps is None or maps.at_mean is None else functools.partial(maps.at_mean, b, h),
        )

    def blocks(self) -> int:
        return -(-(self.end - self.first) // self.block_q)

    def slots(self, t: int) -> list[int]:
        begin = self.first + t * self.block_q
        return list(range(begin, min(begin + self.block_q, self.end)))

    def valid_slots(self, t: int) -> list[int]:
        return [i for i in self.slots(t) if self.valid[i]]

    def pools(self, t: int, count: int) -> list[Pool]:
        """The pools of a block, of equal runs of its slots, or if causal of the 16 slots that its first valid query
        ends; those without a valid query are left out."""
        first, size = self.first + t * self.block_q, self.block_q
        if self.is_causal:
            first, size = self.valid_slots(t)[0] - 15, 16
        share = size // count
        runs = [range(begin, begin + share) for begin in range(first, first + size, share)]
        members = [[i for i in run if self.first <= i < self.end and self.valid[i]] for run in runs]
        return [self.pool(slots) for slots in members if slots]

    def pool(self, members: list[int]) -> Pool:
        rows = self.query[members]
        x, rho = (None, None) if self.x is None else (self.x[members].mean(0), self.rho[members].mean())
        if self.at_mean is not None:
            x, rho = self.at_mean(rows.mean(0))
        return Pool(rows.mean(0), rows.var(0, correction=0).mean(), x, rho)


class Pool(NamedTuple):
    """What stands for a block of queries."""

    mean: Tensor
    variance: Tensor
    x: Tensor | None
    rho: Tensor | None

    def log_residual(self, keys: Keys) -> Tensor:
        """log |exp(s_j) - L_j| of every key; s_j without a low-rank kernel. Where other keys stand for keys, half the
        log of the expected squared residual over the pool's queries, by which e_j = exp(s_j) and L_j vary apart by
        about e_j sqrt(variance) |k_j - b|."""
        s = keys.key @ self.mean + self.variance / 4 * keys.key.square().sum(-1)
        if keys.y is None:
            return s
        inner = keys.y @ self.x
        log_l = self.rho + keys.kappa
        log_l = log_l + (2 * torch.log((1 + inner / 2).abs()) if keys.is_quadratic else torch.log(inner))
        larger, smaller = torch.maximum(s, log_l), torch.minimum(s, log_l)
        if keys.apart is not None:
            e, low_rank = torch.exp(s - larger), torch.exp(log_l - larger)
            return larger + torch.log((e - low_rank).square() + e.square() * self.variance * keys.apart) / 2
        return larger + torch.log(-torch.expm1(smaller - larger))

    def log_weight(self, keys: Keys, counted: list[int]) -> Tensor:
        """log sum exp(s_j) over the keys ``counted``."""
        s = keys.key @ self.mean + self.variance / 4 * keys.key.square().sum(-1)
        return torch.logsumexp(s[counted], 0) if counted else s.new_zeros(())


def best(score: Tensor, eligible: list[int], n: int) -> list[int]:
    """The n of ``eligible`` (ascending) with the highest scores, ascending; ties go to the lowest. What is no number
    comes before all others."""
    value = score.tolist()
    order = sorted(eligible, key=lambda i: (not math.isnan(value[i]), -value[i]))  # sorted() is stable
    return sorted(order[: max(n, 0)])


def list_score(pools: list[Pool], keys: Keys, counted: list[int]) -> Tensor:
    """What the keys of a block's list are chosen by: the residual of its pool, or of several the log of the sum of
    their squared residuals, each relative to the square of its weight over the keys ``counted``."""
    if len(pools) == 1:
        return pools[0].log_residual(keys)
    relative = [2 * (pool.log_residual(keys) - pool.log_weight(keys, counted)) for pool in pools]
    return torch.logsumexp(torch.stack(relative), 0)


def shared_score(pools: list[Pool], means: Keys, eligible: list[int]) -> Tensor:
    """The largest residual of each run of keys over some pools, each pool's relative to its own largest."""
    scores = [pool.log_residual(means) for pool in pools]
    tops = [s[eligible].nan_to_num(-torch.inf, torch.inf, -torch.inf).max() for s in scores if eligible]
    return torch.stack([s - top for s, top in zip(scores, tops)]).amax(0) if eligible else scores[0]


def pooled_lists(
    support: Routed, budget: int, queries: Queries, keys: Keys, stages: bool
) -> Iterator[tuple[int, list[int], Tensor]]:
    length, valid = len(keys.valid), keys.valid.tolist()
    leaf, coarse = keys.means(LEAF), keys.means(LEAF * SUPER)
    kept_blocks = candidate_blocks(largest_budget(support))

    def end(t: int) -> int:  # candidates are the keys before this position, where a causal window begins
        near = max(support.window, support.block_q) - support.block_q
        return min(max(queries.slots(t)[0] + queries.shift - near, 0), length) if queries.is_causal else length

    together = GROUP // support.pools
    for first in range(0, queries.blocks(), together):
        group = [t for t in range(first, min(first + together, queries.blocks())) if queries.valid_slots(t)]
        if not group:
            continue
        pools = {t: queries.pools(t, support.pools) for t in group}

        # The causal form may look at the group's first block only.
        judges = [pool for t in (group[:1] if queries.is_causal else group) for pool in pools[t]]

        # 1. Candidate blocks: all that are complete, or the best of those in the best superblocks. What follows the
        # last complete one always stays.
        if stages:
            size = LEAF * SUPER
            complete = end(first) // LEAF if queries.is_causal else -(-length // LEAF)
            blocks_left = list(range(complete))
            if length >= LONG_ROW:
                supers = end(first) // size if queries.is_causal else -(-length // size)
                eligible = [c for c in range(supers) if coarse.valid[c]]
                kept = set(best(shared_score(judges, coarse, eligible), eligible, 2 * kept_blocks))
                blocks_left = [c for c in blocks_left if c // SUPER in kept or c // SUPER >= supers]
            eligible = [c for c in blocks_left if leaf.valid[c]]
            kept = set(best(shared_score(judges, leaf, eligible), eligible, kept_blocks))
            candidates = [j for j in range(length) if valid[j] and (j // LEAF in kept or j // LEAF >= complete)]
        else:
            candidates = [j for j in range(length) if valid[j]]

        # 2. The sinks, the window or the block's own keys, and the best of the candidates.
        for t in group:
            begin = queries.slots(t)[0] + queries.shift
            last = min(begin + len(queries.slots(t)), length)  # after the block's own keys
            first_keys, nearby = range(min(support.sinks, length)), range(0)
            if queries.is_causal:
                first_keys, nearby = range(min(support.sinks, max(last, 0))), range(end(t), last)
            elif support.window:
                centre = (2 * t + 1) * support.block_q * length // (2 * (queries.end - queries.first))
                low = max(min(centre - support.window // 2, length - support.window), support.sinks)
                nearby = range(low, min(low + support.window, length))
            elif queries.are_the_keys:
                nearby = range(max(begin, 0), last)
            always = {j for j in (*first_keys, *nearby) if valid[j]}
            eligible = [j for j in candidates if j < end(t) and j not in always]
            score = list_score(pools[t], keys, [j for j in candidates if j < end(t)])
            yield t, sorted(always | set(best(score, eligible, budget - len(always)))), score


def agreeing_blocks(block_k: int, queries: Queries, keys: Keys, turned: bool) -> Tensor:
    """(N, blocks): in how many bits of its sketch a query agrees with the key of every block that agrees best, more
    than all of them where a key is not finite; with the opposite of the query where it is ``turned`` around."""
    sign, counts, _ = sketches(queries.token.float())
    of_key, _, is_finite = sketches(keys.key.float())
    found = agreement(sign ^ turned, counts, of_key).masked_fill(~is_finite, BITS + 1).masked_fill(~keys.valid, -1)
    short = -len(keys.valid) % block_k
    return torch.nn.functional.pad(found, (0, short), value=-1).unflatten(1, (-1, block_k)).amax(-1)


def block_scorers(support: Routed, keys: Keys) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """From a query to the scores of all blocks, and to those of all superblocks."""
    block_k = support.block_k
    if support.pools == 0:
        alone = torch.cat([keys.key, keys.key.new_zeros(-len(keys.key) % block_k, keys.key.shape[1])])
        present = torch.zeros(len(alone), dtype=torch.bool)
        present[: len(keys.valid)] = keys.valid

        def by_keys(q: Tensor) -> Tensor:
            return (alone @ q).masked_fill(~present, -torch.inf).unflatten(0, (-1, block_k)).logsumexp(1)

        return by_keys, by_keys
    if support.pools == 2:
        fine = keys.runs_in_two(block_k)
        # A superblock's points are the groups of its blocks: the first ones, then the second ones.
        count = -(-len(fine[0].count) // BRANCH)

        def by_super(of_block: Tensor) -> Tensor:
            filled = torch.zeros(count * BRANCH, *of_block.shape[1:], dtype=of_block.dtype)
            filled[: len(of_block)] = of_block
            return filled.unflatten(0, (count, BRANCH))

        points = [torch.cat([by_super(part) for part in parts], 1) for parts in zip(*fine)]
        coarse = in_two(*points)
        return (lambda q: run_scores(q, fine)), (lambda q: run_scores(q, coarse))

    def by_mean(size: int) -> Callable[[Tensor], Tensor]:
        mean, spread = keys.means(size).key, keys.spread(size)
        return lambda q: mean @ q + q.square().mean() / 2 * spread

    return by_mean(block_k), by_mean(block_k * BRANCH)


def per_query_lists(
    support: Routed, budget: int, queries: Queries, keys: Keys, stages: bool
) -> Iterator[tuple[int, list[int], Tensor]]:
    block_k, window = support.block_k, support.window
    length = len(keys.valid)
    count = -(-length // block_k)
    sinks = -(-support.sinks // block_k)  # blocks
    kept_supers = candidate_superblocks((largest_budget(support) - window) // block_k, support.pools)
    routed = (budget - window) // block_k - sinks
    fine, coarse = keys.means(block_k), keys.means(block_k * BRANCH)
    score_blocks, score_supers = block_scorers(support, keys)
    has_sketches = stages and support.pools == 0
    agreeing = agreeing_blocks(block_k, queries, keys, queries.is_turned) if has_sketches else None
    for i in range(queries.first, queries.end):
        if not queries.valid[i]:
            continue

        # 1. The window, whole blocks [low, high), and the blocks that hold the sinks.
        p = i + queries.shift
        if queries.is_causal:
            low = max(p - window + 1, 0) // block_k
            high = min(p // block_k + 1, count)
        else:
            if not queries.are_the_keys:
                p = (i - queries.first) * length // (queries.end - queries.first)
            low = max(p - window // 2, 0) // block_k
            high = min(-(-min(p + window // 2, length) // block_k), count) if window > 1 else low
        low, high = min(low, count), max(high, 0)
        first_blocks = range(min(sinks, max(low, high) if queries.is_causal else count))
        nearby = [c for c in sorted({*first_blocks, *range(low, high)}) if fine.valid[c]]

        # 2. The best of the other blocks, from the best superblocks.
        q = queries.query[i]
        elsewhere = [
            c
            for c in range(len(first_blocks), count)
            if fine.valid[c] and (c < low or (c >= max(high, low) and not queries.is_causal))
        ]
        if agreeing is not None:
            elsewhere = best(agreeing[i].double(), elsewhere, kept_supers)
        elif stages:
            supers = low // BRANCH if queries.is_causal else -(-count // BRANCH)
            if supers > kept_supers:
                eligible = [c for c in range(supers) if coarse.valid[c]]
                kept = set(best(score_supers(q), eligible, kept_supers))
                elsewhere = [c for c in elsewhere if c // BRANCH in kept or c // BRANCH >= supers]
        score = score_blocks(q)
        sees_none = queries.is_causal and p < 0  # before the row's first key
        yield i - queries.first, [] if sees_none else sorted(nearby + best(score, elsewhere, routed)), score
