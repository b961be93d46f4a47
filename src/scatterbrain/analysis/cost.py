"""Multiply-adds per query and head of a support with a low-rank kernel: what "equal cost" means in this package.

One product and its addition count one; additions, exponentials, comparisons and sorting count nothing, but those of
sketches (Routed, pools=0) do. What is done once for each key is shared out over the queries. For N queries, M keys,
head_dim d, values of dv, and

    n   listed keys of a query                        m   features of the kernel: Quadratic (r + 1)(r + 2) / 2
    r   rank: products of a pair's low-rank weight    C   clusters of Centroid, of D = min(16, d) directions

    exact      n (d + dv)                                          scores and their weighted values
    low rank   Quadratic   n r + m (dv + 1) (1 + M/N) + (r + 1) d (1 + M/N)
               Favor       n m + m (dv + 1) (1 + M/N) + m d (1 + M/N)             m / 2 rows if hyperbolic;
                                                                                  (d + 1) d (1 + M/N) more if centred
               Features    n m + m (dv + 1) (1 + M/N)                             and what its functions do
               Centroid    C (d + dv + 1) + (dv + 1) M/N
    search     Routed, LSH, Centroid, Quadratic("input") and Favor(centred): the functions below state theirs

The sum of exact and low rank is half of what ``torch.utils.flop_counter`` counts, which knows no search. A support or a
kernel of your own is counted once it is registered::

    @analysis.cost.support_cost.register
    def _(support: MySupport, low_rank: LowRank, shape: Shape) -> tuple[float, float]:
        return ..., ...  # listed keys of a query, multiply-adds of choosing them

    @analysis.cost.low_rank_cost.register
    def _(low_rank: MyKernel, listed: float, shape: Shape) -> tuple[float, float]:
        return ..., ...  # multiply-adds of attention, and of what the kernel finds in the input beforehand
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import torch

from scatterbrain.low_rank import Centroid, Favor, Features, LowRank, LowRankKernel, Quadratic
from scatterbrain.supports import LSH, Blocks, Empty, Routed, Support, Window

# csrc/math/routing.h, csrc/math/clustering.h and low_rank/input_statistics.py; docs/algorithm.md, sections 2 and 3.
RUN, SUPER, LONG_ROW = 32, 16, 16384
DIRECTIONS, SAMPLES = 16, 256
BITS, ROUNDS = 64, 3  # of sketches
COMPARISON = 5  # two sketches take the time of about so many multiply-adds

Sized = TypeVar("Sized", Support, LowRankKernel)


class Shape(NamedTuple):
    """Geometry of one head."""

    queries: int
    keys: int
    head_dim: int
    value_dim: int

    @property
    def keys_per_query(self) -> float:
        return self.keys / self.queries


@dataclass(frozen=True)
class Cost:
    """Multiply-adds per query and head."""

    exact: float
    low_rank: float
    search: float

    @property
    def total(self) -> float:
        return self.exact + self.low_rank + self.search


def cost(support: Support, low_rank: LowRank, shape: Shape) -> Cost:
    """Of one bidirectional forward call; of causal calls an upper bound.

    Raises:
        TypeError: a support or a kernel whose cost is not registered.
    """
    if support.covers_every_key(shape.queries, shape.keys, False):  # torch's own kernel computes it
        return Cost(float(shape.keys * (shape.head_dim + shape.value_dim)), 0.0, 0.0)
    listed, choosing = support_cost(support, low_rank, shape)
    attention, finding = (0.0, 0.0) if low_rank is None else low_rank_cost(low_rank, listed, shape)
    exact = listed * (shape.head_dim + shape.value_dim)
    return Cost(float(exact), float(attention), float(choosing + finding))


# -------------------- supports: listed keys of a query, and multiply-adds of choosing them


@functools.singledispatch
def support_cost(support: Support, low_rank: LowRank, shape: Shape) -> tuple[float, float]:
    raise TypeError(
        f"cost: {type(support).__name__} has no registered cost; write a function of (support, low_rank, shape) that "
        "returns its listed keys and what choosing them costs, under @scatterbrain.analysis.cost.support_cost.register"
    )


@support_cost.register
def _(support: Empty, low_rank: LowRank, shape: Shape) -> tuple[float, float]:
    return 0, 0


@support_cost.register
def _(support: Window, low_rank: LowRank, shape: Shape) -> tuple[float, float]:
    return min(support.keys, shape.keys), 0


@support_cost.register
def _(support: Blocks, low_rank: LowRank, shape: Shape) -> tuple[float, float]:
    """The mean over lists: unused entries cost nothing."""
    return min(float(support.count.float().mean()) * support.block_k, shape.keys), 0


@support_cost.register
def _(support: LSH, low_rank: LowRank, shape: Shape) -> tuple[float, float]:
    """At most: a key that several rounds find counts once. A round multiplies every token with one direction, of
    d + 2, or with as many as half of the clusters, if it is angular."""
    directions, width = 1, shape.head_dim + 2
    if support.hash == "angular":
        clusters = math.ceil(shape.keys / (support.keys / support.rounds))
        directions, width = min(math.ceil(clusters / 2), shape.head_dim), shape.head_dim
    hashing = support.rounds * directions * width * (1 + shape.keys_per_query)
    return min(support.keys, shape.keys), hashing


@support_cost.register
def _(support: Routed, low_rank: LowRank, shape: Shape) -> tuple[float, float]:
    """The mean over heads."""
    listed = statistics.mean(min(keys, shape.keys) for keys in support.budgets)
    return listed, _pooled(support, low_rank, shape) if support.is_pooled else _per_query(support, shape)


def _pooled(support: Routed, low_rank: LowRank, shape: Shape) -> float:
    """A pool scores the mean keys of runs of 32, then the keys of the best runs: d products for q.k, and what the
    low-rank weight takes. |k|^2 takes d products of a key once."""
    runs = math.ceil(shape.keys / RUN)
    kept = min(runs, max(16, math.ceil(3 * support.most_keys / 16)))
    means = runs if shape.keys < LONG_ROW else math.ceil(runs / SUPER) + min(runs, 2 * kept * SUPER)
    of_pair, of_pool, of_key = scoring_cost(low_rank, shape)
    per_pool = (means + RUN * kept) * (shape.head_dim + of_pair) + of_pool
    return support.pools * per_pool / support.block_q + (shape.head_dim + of_key) * shape.keys_per_query


def _per_query(support: Routed, shape: Shape) -> float:
    """Every query scores the mean keys of blocks of 8, or those of 64 and then the blocks of the best: d + 1 products
    each. Squared distances from the mean take d products of a key once. With two pools there are two means of each,
    and half as many superblocks do. Distances are then from the mean, from two keys and from the own group's mean; a
    superblock of 64 keys divides the 16 groups of its blocks in the same way. By sketches a query compares its own with
    every key's, makes one as every key does, and scores the keys of the best blocks."""
    blocks, kept = math.ceil(shape.keys / 8), max(16, 2 * (support.most_keys - support.window) // 8)
    pools = support.pools
    if pools == 0:
        found = COMPARISON * shape.keys if blocks > kept else 0
        return found + 8 * min(kept, blocks) * shape.head_dim + sketch_cost(shape) * (1 + shape.keys_per_query)
    best = kept // pools
    superblocks = math.ceil(blocks / 8)
    scored = pools * (blocks if superblocks <= best else superblocks + 8 * best)
    of_key = shape.head_dim if pools == 1 else 4 * (1 + 16 / 64) * shape.head_dim
    return scored * (shape.head_dim + 1) + shape.head_dim + of_key * shape.keys_per_query


def sketch_cost(shape: Shape) -> float:
    """Of a token: additions, which take as long as multiply-adds."""
    width = max(BITS, 2 ** math.ceil(math.log2(shape.head_dim)))
    return ROUNDS * width * math.log2(width)


# -------------------- low-rank kernels: multiply-adds of attention, and of what is found in the input beforehand


@functools.singledispatch
def low_rank_cost(low_rank: LowRankKernel, listed: float, shape: Shape) -> tuple[float, float]:
    raise TypeError(
        f"cost: {type(low_rank).__name__} has no registered cost; write a function of (low_rank, listed, shape) that "
        "returns the multiply-adds of attention and of what comes before it, under "
        "@scatterbrain.analysis.cost.low_rank_cost.register"
    )


@low_rank_cost.register
def _(low_rank: Quadratic, listed: float, shape: Shape) -> tuple[float, float]:
    attention = _of_features(feature_count(low_rank), (low_rank.rank + 1) * shape.head_dim, shape)
    return attention + listed * low_rank.rank, _statistics_of_input(shape) if low_rank.reads_input else 0


@low_rank_cost.register
def _(low_rank: Favor, listed: float, shape: Shape) -> tuple[float, float]:
    """Centred, tokens are balanced before they are projected, by d x d maps and one more row."""
    balancing = shape.head_dim * (shape.head_dim + 1) if low_rank.centred else 0
    attention = _of_features(low_rank.features, low_rank.rows * shape.head_dim + balancing, shape)
    return attention + listed * low_rank.features, _statistics_of_input(shape) if low_rank.centred else 0


@low_rank_cost.register
def _(low_rank: Features, listed: float, shape: Shape) -> tuple[float, float]:
    """With as many features as the functions make of a token. What they do to make them is not counted."""
    made = low_rank.query_features(torch.zeros(1, 1, 1, shape.head_dim))
    features = (made[0] if isinstance(made, tuple) else made).shape[-1]
    return _of_features(features, 0, shape) + listed * features, 0


@low_rank_cost.register
def _(low_rank: Centroid, listed: float, shape: Shape) -> tuple[float, float]:
    """Clustering: directions and centres from the samples (two steps of subspace iteration, one of Lloyd's algorithm);
    of every key its coordinates, the nearest centre, its product with the mean query and its share of a
    representative."""
    d, clusters, directions = shape.head_dim, low_rank.clusters, min(DIRECTIONS, shape.head_dim)
    attention = clusters * (d + shape.value_dim + 1) + (shape.value_dim + 1) * shape.keys_per_query
    samples = min(SAMPLES, shape.keys) * directions * (5 * d + clusters)
    each_key = directions * (d + clusters) + 2 * d
    return attention, samples / shape.queries + each_key * shape.keys_per_query


def _statistics_of_input(shape: Shape) -> float:
    """Every key's product with the mean query and its share of the mean key, and d^2 products of each sample of queries
    and of keys. What is done with d x d matrices, once a head, is left out."""
    samples = min(SAMPLES, shape.queries) + min(SAMPLES, shape.keys)
    return samples * shape.head_dim**2 / shape.queries + 2 * shape.head_dim * shape.keys_per_query


def _of_features(features: int, projection: int, shape: Shape) -> float:
    """Coordinates of every token, states of the keys and their product with the queries."""
    return (projection + features * (shape.value_dim + 1)) * (1 + shape.keys_per_query)


@functools.singledispatch
def feature_count(low_rank: LowRankKernel) -> int:
    """Features m of the kernel, the rank of its matrix of weights."""
    raise TypeError(
        f"feature_count: {type(low_rank).__name__} has no registered number of features; write a function of the "
        "kernel that returns it, under @scatterbrain.analysis.cost.feature_count.register"
    )


@feature_count.register
def _(low_rank: Quadratic) -> int:
    return (low_rank.rank + 1) * (low_rank.rank + 2) // 2


@feature_count.register
def _(low_rank: Favor) -> int:
    return low_rank.features


@feature_count.register
def _(low_rank: Centroid) -> int:
    return low_rank.clusters


# -------------------- pooled routing: multiply-adds for a kernel, of a scored pair, of a pool and of a key


@functools.singledispatch
def scoring_cost(low_rank: LowRank, shape: Shape) -> tuple[int, int, int]:
    """Without a kernel: q.k alone. Coordinates of a pool are the mean of its queries' and take additions alone."""
    return 0, 0, 0


@scoring_cost.register
def _(low_rank: Quadratic, shape: Shape) -> tuple[int, int, int]:
    return low_rank.rank, 0, 0


@scoring_cost.register
def _(low_rank: Favor, shape: Shape) -> tuple[int, int, int]:
    return low_rank.features, 0, 0


@scoring_cost.register
def _(low_rank: Centroid, shape: Shape) -> tuple[int, int, int]:
    """The pool meets every representative once; a key its own, for their squared distance."""
    return 0, low_rank.clusters * shape.head_dim, shape.head_dim


# -------------------- equal cost

SIZES = ("clusters", "features", "rank")  # the field of a kernel that says how much of it there is


def with_keys_for(budget: float, support: Support, low_rank: LowRank, shape: Shape) -> Support | None:
    """The support with as many keys as ``budget`` multiply-adds per query pay for beside the kernel, None for a support
    alone; None where the fewest cost more."""
    makes = _variants(support, "keys", range(1, shape.keys + 1))
    return _largest_within(budget, makes, lambda made: cost(made, low_rank, shape))


def with_size_for(budget: float, low_rank: LowRankKernel, shape: Shape) -> LowRankKernel | None:
    """The kernel in the greatest size that ``budget`` multiply-adds per query pay for without a support; None where the
    least costs more, or a kernel has none of the fields ``SIZES``."""
    names = {field.name for field in fields(low_rank)}
    size = next((name for name in SIZES if name in names), None)
    if size is None:
        return None
    most = math.ceil(budget / shape.value_dim)  # a feature takes at least so many products
    makes = (made for made in _variants(low_rank, size, range(1, most + 1)) if made.least_head_dim <= shape.head_dim)
    return _largest_within(budget, makes, lambda made: cost(Empty(), made, shape))


def _variants(of: Sized, field: str, sizes: Iterable[int]) -> Iterator[Sized]:
    """Those that there are: lists of whole blocks or rounds, clusters up to a limit."""
    for size in sizes:
        try:
            yield replace(of, **{field: size})
        except ValueError:
            continue


def _largest_within(budget: float, ascending: Iterable[Sized], cost_of: Callable[[Sized], Cost]) -> Sized | None:
    found = None
    for made in ascending:
        if cost_of(made).total > budget:
            break
        found = made
    return found
