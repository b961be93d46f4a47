"""Equal-size clusters of keys by locality-sensitive hashing: E2LSH on the XBOX+ transform, as in SMYRF (Daras et al.
2020, section 3), or cross-polytopes, as in Reformer (Kitaev et al. 2020, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from scatterbrain.call import Call
from scatterbrain.fields import SEED_MAX, check_int, check_str
from scatterbrain.numerics import squared_norm
from scatterbrain.operators.device_constants import kept
from scatterbrain.operators.tracing import is_known, is_untraced
from scatterbrain.supports.base import BlockLists, Support
from scatterbrain.supports.cluster_lists import cluster_lists

if TYPE_CHECKING:
    from scatterbrain.low_rank import LowRankKernel


@dataclass(frozen=True)
class LSH(Support):
    """Equal-size clusters of queries and keys by locality-sensitive hashing, several rounds, the union counted once per
    pair (SMYRF, Daras et al. 2020).

    Bidirectional only: clusters come from a sort of the whole sequence, so a causal form would let later tokens choose
    what earlier ones read.

    Args:
        keys: keys per query over all rounds; each round's clusters hold ``keys / rounds`` keys.
        rounds: independent hash rounds.
        hash: "e2lsh": a projection on a random direction after the asymmetric XBOX+ transform, the paper's; near are
            queries and keys of large products. "angular": the nearest vertex of a randomly turned cross-polytope
            (Andoni et al. 2015; Reformer, Kitaev et al. 2020); near are queries and keys of a small angle, whatever
            their norms.
        seed: seed of the hash directions. The same seed gives the same clusters for the same input.
    """

    kind: ClassVar[str] = "lsh"
    is_bidirectional_only: ClassVar[bool] = True
    depends_on_content: ClassVar[bool] = True

    keys: int
    rounds: int = 2
    hash: str = "e2lsh"
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("LSH", "keys", self.keys, 1)
        check_int("LSH", "rounds", self.rounds, 1)
        check_int("LSH", "seed", self.seed, 0, SEED_MAX)
        check_str("LSH", "hash", self.hash)
        if self.hash not in ("e2lsh", "angular"):
            raise ValueError(f"LSH: expected hash='e2lsh' or 'angular', got {self.hash!r}")
        if self.keys % self.rounds:
            raise ValueError(
                f"LSH: keys is the total over rounds and must divide by rounds={self.rounds}, got {self.keys}"
            )

    def check(self, low_rank: LowRankKernel | None, is_causal: bool) -> None:
        if is_causal:
            raise ValueError(
                "support=LSH is bidirectional only: clusters come from a sort of the whole sequence, so "
                "later tokens would choose what earlier ones read; use Routed or Window"
            )

    def covers_every_key(self, queries: int, keys: int, is_causal: bool) -> bool:
        return is_known(keys <= self.keys // self.rounds)

    def lists(self, call: Call, query_map: Tensor | None, key_map: Tensor | None) -> BlockLists:
        return lsh_lists(self, call)

    def for_cross_attention(self) -> tuple[Support, str]:
        raise ValueError("LSH sorts all queries, which would show a target token the ones after it; use Routed")


@torch.library.custom_op(
    "scatterbrain::hash_directions",
    mutates_args=(),
    schema="(int rounds, int head_dim, int seed, Device? device=None) -> Tensor",
)
def hash_directions(rounds: int, head_dim: int, seed: int, device: torch.device | None = None) -> Tensor:
    """Gaussian directions (rounds, head_dim + 2) of ``seed``, on the CPU by default. An operator: a constant for
    compile and export, and no random operation in the eyes of vmap."""
    return kept(_draw_directions, device or torch.device("cpu"), rounds, head_dim, seed).clone()


def _draw_directions(rounds: int, head_dim: int, seed: int, device: torch.device) -> Tensor:
    """The same for every device: drawn on the CPU."""
    drawn = torch.randn(
        rounds, head_dim + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu"
    )
    return drawn.to(device)


@hash_directions.register_fake
def _(rounds: int, head_dim: int, seed: int, device: torch.device | None = None) -> Tensor:
    return torch.empty(rounds, head_dim + 2, device=device or "cpu")


def e2lsh_order(
    query: Tensor, key: Tensor, directions: Tensor, query_mask: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, Hq, rounds, N) and (B, Hq, rounds, M) hashes. XBOX+ appends sqrt(R - |q|^2), 0 to queries and 0, sqrt(R -
    |k|^2) to keys with R = max|q|^2 + max|k|^2 over valid tokens, so that the nearest key is the one of largest inner
    product; the hash is a projection, whose order is all that is used. ``directions`` (rounds, head_dim + 2). Masked
    tokens hash to infinity."""
    query_norm, key_norm = squared_norm(query).squeeze(-1), squared_norm(key).squeeze(-1)
    heads = query.shape[1] // key.shape[1]
    key, key_norm = key.repeat_interleave(heads, 1), key_norm.repeat_interleave(heads, 1)
    radius = query_norm.amax(-1, keepdim=True) + key_norm.amax(-1, keepdim=True)
    plain, extra_query, extra_key = directions[:, :-2], directions[:, -2], directions[:, -1]

    def project(tokens: Tensor, norm: Tensor, extra: Tensor, mask: Tensor | None) -> Tensor:
        h = _projected(tokens, plain) + (radius - norm).clamp(min=0).sqrt()[:, :, None] * extra[:, None]
        return h if mask is None else h.masked_fill(mask[:, None, None], torch.inf)

    return project(query, query_norm, extra_query, query_mask), project(key, key_norm, extra_key, key_mask)


def _projected(tokens: Tensor, directions: Tensor) -> Tensor:
    """(B, H, rows, tokens) products with ``directions`` (rows, d), by the package's own projection: a hash does not
    depend on the other tokens' number or on threads, as a matrix product's last bit may."""
    return torch.ops.scatterbrain.project(tokens, directions[None, None], None).transpose(-1, -2)


def angular_buckets(tokens: Tensor, directions: Tensor, used: Tensor | None, mask: Tensor | None) -> Tensor:
    """(B, H, rounds, tokens): which of the vertices +-e_r of a cross-polytope is nearest to a token's products with the
    first ``used`` (B, 1, 1, 1) rows r of ``directions`` (rounds, rows, d), as ``r`` or ``used + r``; None: all rows.
    Masked tokens are behind all others."""
    rounds, rows, _ = directions.shape
    products = torch.ops.scatterbrain.project(tokens, directions.flatten(0, 1)[None, None], None)
    products = products.unflatten(3, (rounds, rows))  # (B, H, tokens, rounds, rows)
    sizes = products.abs()
    if used is not None:
        sizes = sizes.masked_fill(torch.arange(rows, device=tokens.device) >= used[..., None], -1)
    largest = sizes.argmax(4, keepdim=True)
    is_negative = torch.gather(products, 4, largest).squeeze(4) < 0
    bucket = largest.squeeze(4) + torch.where(is_negative, rows if used is None else used, 0)
    bucket = bucket.transpose(2, 3).contiguous()
    return bucket if mask is None else bucket.masked_fill(mask[:, None, None], 2 * rows)


def _ranks(order: Tensor) -> Tensor:
    """The inverse of a permutation (last dimension)."""
    position = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, position)


def lsh_clusters(support: LSH, call: Call, rounds: int) -> tuple[Tensor, Tensor]:
    """Cluster of each query (B, Hq, rounds, N) and of each key (B, Hq, rounds, M), int64, -1 for padded tokens.

    A row with m valid keys has C = ceil(m / (keys / rounds)) clusters, and cluster c holds the keys of ranks c m // C
    .. (c + 1) m // C - 1 in the order of their hashes. "e2lsh": a query of rank r among n belongs to cluster r C // n.
    "angular": the keys of each bucket are in the order of the tokens, and query r of the n in a bucket goes with key r
    m // n of the m there; where there is none, with the first of the next bucket.
    """
    padding, head_dim = call.padding, call.query.shape[3]
    query, key = (
        t if mask is None else t.masked_fill(mask[:, None, :, None], 0)
        for t, mask in (
            (call.query.detach().float(), padding.query_mask),
            (call.key.detach().float(), padding.key_mask),
        )
    )
    (batch, heads, n, _), m, device = query.shape, key.shape[2], query.device

    def count(mask: Tensor | None, tokens: int) -> Tensor:
        valid = torch.full((batch,), tokens, device=device) if mask is None else (~mask).sum(1)
        return valid[:, None, None, None]

    n_valid, m_valid = count(padding.query_mask, n), count(padding.key_mask, m)
    per_round = support.keys // support.rounds
    clusters = (-(-m_valid // per_round)).clamp(min=1)

    def cluster_of_key(rank: Tensor) -> Tensor:
        return ((rank + 1) * clusters - 1) // m_valid.clamp(min=1)

    if support.hash == "e2lsh":
        directions = hash_directions(support.rounds, head_dim, support.seed, device)[:rounds]
        query_hash, key_hash = e2lsh_order(query, key, directions, padding.query_mask, padding.key_mask)
        # A stable sort: equal hashes keep the order of the tokens.
        query_rank, key_rank = (_ranks(t.argsort(dim=-1, stable=True)) for t in (query_hash, key_hash))
        of_query = (query_rank * clusters // n_valid.clamp(min=1)).clamp(max=clusters - 1)
    else:
        # A graph serves any length, so it multiplies with all directions, of which fewer may be used.
        rows = min((-(-m // per_round) + 1) // 2, head_dim) if is_untraced() else head_dim
        directions = hash_directions(support.rounds * head_dim, head_dim, support.seed, device)
        directions = directions.unflatten(0, (support.rounds, head_dim))[:rounds, :rows, :head_dim].contiguous()
        used = ((clusters + 1) // 2).clamp(max=head_dim)
        if padding.key_mask is None and is_untraced():
            used = None  # all of them
        query_bucket = angular_buckets(query, directions, used, padding.query_mask)
        key_bucket = angular_buckets(key, directions, used, padding.key_mask)
        key_bucket = key_bucket.repeat_interleave(heads // key.shape[1], 1)
        (query_sorted, query_order), (key_sorted, key_order) = (
            t.sort(dim=-1, stable=True) for t in (query_bucket, key_bucket)
        )
        query_rank, key_rank = _ranks(query_order), _ranks(key_order)

        def first_and_count(tokens: Tensor) -> tuple[Tensor, Tensor]:
            first = torch.searchsorted(tokens, query_bucket)
            return first, torch.searchsorted(tokens, query_bucket, right=True) - first

        (first_query, queries), (first_key, keys) = first_and_count(query_sorted), first_and_count(key_sorted)
        place = first_key + (query_rank - first_query) * keys // queries
        of_query = cluster_of_key(torch.minimum(place, (m_valid - 1).clamp(min=0)))
    of_key = cluster_of_key(key_rank)
    if padding.query_mask is not None:
        of_query = of_query.masked_fill(padding.query_mask[:, None, None], -1)
    if padding.key_mask is not None:
        of_key = of_key.masked_fill(padding.key_mask[:, None, None], -1)
    return of_query, of_key


def lsh_lists(support: LSH, call: Call) -> BlockLists:
    """The sorted union over rounds of the keys in each query's cluster."""
    (batch, heads, n, _), m = call.query.shape, call.key.shape[2]
    per_round, device = support.keys // support.rounds, call.query.device
    if n == 0 or m == 0:
        index = torch.full((batch, heads, n, 0), -1, dtype=torch.int32, device=device)
        return BlockLists(index, torch.zeros(batch, heads, n, dtype=torch.int32, device=device), block_q=1)
    rounds = 1 if per_round >= m else support.rounds  # a cluster of every key is the same in every round
    return cluster_lists(*lsh_clusters(support, call, rounds), call.padding, per_round)
