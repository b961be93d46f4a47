"""Equal-size clusters of queries and keys by locality-sensitive hashing (E2LSH on the XBOX+ transform, as in SMYRF,
Daras et al. 2020, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from scatterbrain.call import Call
from scatterbrain.fields import INT64_MAX, check_int, check_str
from scatterbrain.numerics import squared_norm
from scatterbrain.operators import library  # noqa: F401  (loads the operators)
from scatterbrain.operators.device_constants import kept
from scatterbrain.operators.tracing import is_known
from scatterbrain.supports.base import BlockLists, Support

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
        hash: "e2lsh" on the asymmetric XBOX+ transform, the paper's.
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
        check_int("LSH", "seed", self.seed, 0, INT64_MAX)
        check_str("LSH", "hash", self.hash)
        if self.hash != "e2lsh":
            raise ValueError(f"LSH: expected hash='e2lsh', got {self.hash!r}")
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


def hash_tokens(
    query: Tensor, key: Tensor, directions: Tensor, query_mask: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, Hq, rounds, N) and (B, Hq, rounds, M) hashes. XBOX+ appends sqrt(R - |q|^2), 0 to queries and 0, sqrt(R -
    |k|^2) to keys with R = max|q|^2 + max|k|^2 over valid tokens, so that the nearest key is the one of largest inner
    product; the hash is a projection, whose order is all that is used. ``directions`` (rounds, head_dim + 2). Masked
    tokens hash to infinity."""

    def norms(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if mask is not None:
            tokens = tokens.masked_fill(mask[:, None, :, None], 0)
        return tokens, squared_norm(tokens).squeeze(-1)

    query, query_norm = norms(query.detach().float(), query_mask)
    key, key_norm = norms(key.detach().float(), key_mask)
    heads = query.shape[1] // key.shape[1]
    key, key_norm = key.repeat_interleave(heads, 1), key_norm.repeat_interleave(heads, 1)
    radius = query_norm.amax(-1, keepdim=True) + key_norm.amax(-1, keepdim=True)
    plain, extra_query, extra_key = directions[:, :-2], directions[:, -2], directions[:, -1]

    def project(tokens: Tensor, norm: Tensor, extra: Tensor, mask: Tensor | None) -> Tensor:
        # The package's own projection: a hash does not depend on the other tokens' number or on threads, as a matrix
        # product's last bit may.
        h = (
            torch.ops.scatterbrain.project(tokens, plain[None, None], None).transpose(-1, -2)
            + (radius - norm).clamp(min=0).sqrt()[:, :, None] * extra[:, None]
        )
        return h if mask is None else h.masked_fill(mask[:, None, None], torch.inf)

    return project(query, query_norm, extra_query, query_mask), project(key, key_norm, extra_key, key_mask)


def _union(member: Tensor, m: int) -> Tensor:
    """Sorted along the last dimension, duplicates and empty slots (``m``) moved to the end."""
    member = member.sort(-1).values
    repeated = torch.zeros_like(member, dtype=torch.bool)
    repeated[..., 1:] = member[..., 1:] == member[..., :-1]
    return member.masked_fill(repeated, m).sort(-1).values


def lsh_lists(support: LSH, call: Call) -> BlockLists:
    """Per-query lists (block_q = block_k = 1): the sorted union over rounds of the keys in the query's cluster. Memory
    is linear in the tokens.

    A row with n valid queries and m valid keys has ceil(m / (keys / rounds)) clusters; query of rank r in hash order
    belongs to cluster r clusters // n, and cluster c holds the keys of ranks c m // clusters .. (c + 1) m // clusters -
    1.
    """
    query, key, padding = call.query, call.key, call.padding
    query_mask, key_mask = padding.query_mask, padding.key_mask
    batch, heads, n, d = query.shape
    m = key.shape[2]
    per_round = support.keys // support.rounds
    device = query.device
    if n == 0 or m == 0:
        index = torch.full((batch, heads, n, 0), -1, dtype=torch.int32, device=device)
        return BlockLists(index, torch.zeros(batch, heads, n, dtype=torch.int32, device=device), block_q=1)
    rounds = 1 if per_round >= m else support.rounds  # a cluster of every key is the same in every round
    directions = hash_directions(support.rounds, d, support.seed, device)[:rounds]
    query_hash, key_hash = hash_tokens(query, key, directions, query_mask, key_mask)

    def count(mask: Tensor | None, tokens: int) -> Tensor:
        return torch.full((batch,), tokens, device=device) if mask is None else (~mask).sum(1)

    n_valid, m_valid = (c[:, None, None, None] for c in (count(query_mask, n), count(key_mask, m)))
    clusters = (-(-m_valid // per_round)).clamp(min=1)

    # A stable sort: equal hashes keep the order of the tokens.
    rank = torch.argsort(torch.argsort(query_hash, dim=-1, stable=True), dim=-1)  # argsort of a permutation: no ties
    cluster = (rank * clusters // n_valid.clamp(min=1)).clamp(max=clusters - 1)
    begin, end = cluster * m_valid // clusters, (cluster + 1) * m_valid // clusters  # (B, H, rounds, N)
    key_order = torch.argsort(key_hash, dim=-1, stable=True)
    width = min(per_round, m)

    def members(rounds: slice) -> Tensor:
        """(B, H, N, keys): the keys of the query's clusters in some rounds; m: no key."""
        position = begin[:, :, rounds, :, None] + torch.arange(width, device=device)
        order = key_order[:, :, rounds, None].expand(-1, -1, -1, n, -1)
        keys = torch.gather(order, -1, position.clamp(max=m - 1)).masked_fill(position >= end[:, :, rounds, :, None], m)
        return keys.transpose(2, 3).flatten(3)

    # The union is made of so many rounds at a time that memory follows the keys that there are, whatever the budget.
    if rounds * width <= m:
        member = _union(members(slice(rounds)), m)
    else:
        member, at_once = torch.empty(batch, heads, n, 0, dtype=torch.int64, device=device), max(1, m // width)
        for first in range(0, rounds, at_once):
            member = _union(torch.cat([member, members(slice(first, first + at_once))], -1), m)[..., :m]
    if query_mask is not None:
        member = member.masked_fill(query_mask[:, None, :, None], m)
    if padding.query_range is not None:  # lists count from the row's first valid query
        slot = torch.arange(n, device=device) + padding.query_range[:, :1].long()
        member = torch.gather(member, 2, slot.clamp(max=n - 1)[:, None, :, None].expand_as(member)).masked_fill(
            (slot >= n)[:, None, :, None], m
        )
    used = member < m
    first = 0 if padding.key_range is None else padding.key_range[:, 0].long()[:, None, None, None]
    index = torch.where(used, member - first, -1).to(torch.int32)
    return BlockLists(index, used.sum(-1, dtype=torch.int32), block_q=1)
