"""Lists of keys from clusters of queries and keys, several rounds of them."""

from __future__ import annotations

import torch
from torch import Tensor

from scatterbrain.operators import library  # noqa: F401  (loads the operators)
from scatterbrain.operators.tracing import is_transformed
from scatterbrain.padding import PaddingInfo
from scatterbrain.supports.base import BlockLists


def cluster_lists(query_cluster: Tensor, key_cluster: Tensor, padding: PaddingInfo, largest: int) -> BlockLists:
    """Per-query lists (block_q = block_k = 1): the sorted union over the rounds of the keys in the query's cluster.
    Memory is linear in the tokens.

    Args:
        query_cluster: int64 (B, H, rounds, N), key_cluster: (B, H, rounds, M): cluster of each token in each round, -1
            for padded ones.
        largest: keys of the largest cluster, or more.
    """
    if query_cluster.is_cpu and not is_transformed():
        of_query, of_key = (t.to(torch.int32).contiguous() for t in (query_cluster, key_cluster))
        ranges = padding.query_range, padding.key_range
        return BlockLists(*torch.ops.scatterbrain.cluster_lists(of_query, of_key, *ranges, largest), block_q=1)
    return composed_cluster_lists(query_cluster, key_cluster, padding, largest)


def _capacity(key_cluster: Tensor, largest: int) -> int:
    """The most keys that a query can share its clusters with."""
    return torch.sym_min(key_cluster.shape[2] * largest, key_cluster.shape[3])


@torch.library.register_fake("scatterbrain::cluster_lists")
def _(
    query_cluster: Tensor,
    key_cluster: Tensor,
    query_range: Tensor | None,
    key_range: Tensor | None,
    largest: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, _, n = query_cluster.shape
    capacity = _capacity(key_cluster, largest)
    return query_cluster.new_empty((batch, heads, n, capacity)), query_cluster.new_empty((batch, heads, n))


def composed_cluster_lists(
    query_cluster: Tensor, key_cluster: Tensor, padding: PaddingInfo, largest: int
) -> BlockLists:
    """:func:`cluster_lists` of torch's own operations, for every device and transform."""
    (_, _, rounds, n), m = query_cluster.shape, key_cluster.shape[3]
    device = query_cluster.device
    width, capacity = torch.sym_min(largest, m), _capacity(key_cluster, largest)
    members, key_order = key_cluster.masked_fill(key_cluster < 0, m).sort(dim=-1, stable=True)
    begin = torch.searchsorted(members, query_cluster.contiguous())
    end = torch.searchsorted(members, query_cluster.contiguous(), right=True)
    begin, end = (torch.where(query_cluster < 0, 0, t) for t in (begin, end))

    def of_round(r: int) -> Tensor:
        """(B, H, N, width): the keys of the queries' clusters in a round; m: no key."""
        position = begin[:, :, r, :, None] + torch.arange(width, device=device)
        order = key_order[:, :, r, None].expand(-1, -1, n, -1)
        return torch.gather(order, -1, position.clamp(max=m - 1)).masked_fill(position >= end[:, :, r, :, None], m)

    # A round at a time: memory follows the keys that there are, whatever the budget.
    member = of_round(0)
    for r in range(1, rounds):
        member = _union(torch.cat([member, of_round(r)], -1), m)[..., :capacity]
    if padding.query_range is not None:  # lists count from the row's first valid query
        slot = torch.arange(n, device=device) + padding.query_range[:, :1].long()
        member = torch.gather(member, 2, slot.clamp(max=n - 1)[:, None, :, None].expand_as(member)).masked_fill(
            (slot >= n)[:, None, :, None], m
        )
    used = member < m
    first = 0 if padding.key_range is None else padding.key_range[:, 0].long()[:, None, None, None]
    index = torch.where(used, member - first, -1).to(torch.int32)
    return BlockLists(index, used.sum(-1, dtype=torch.int32), block_q=1)


def _union(member: Tensor, m: int) -> Tensor:
    """Sorted along the last dimension, duplicates and empty slots (``m``) moved to the end."""
    member = member.sort(-1).values
    repeated = torch.zeros_like(member, dtype=torch.bool)
    repeated[..., 1:] = member[..., 1:] == member[..., :-1]
    return member.masked_fill(repeated, m).sort(-1).values
