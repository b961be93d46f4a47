"""LSH: equal-size clusters of keys by the order of their hashes, which are E2LSH on the XBOX+ transform, as in SMYRF
(Daras et al. 2020, section 3), or cross-polytopes, as in Reformer (Kitaev et al. 2020, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from scatterbrain.reference.inputs import Inputs
from scatterbrain.supports import LSH


def transformed(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """XBOX+ of queries (B, Hq, N, d + 2) and keys (B, Hq, M, d + 2): q, sqrt(R - |q|^2), 0 and k, 0, sqrt(R - |k|^2)
    with R = max |q|^2 + max |k|^2 over a head's valid tokens. Queries then lie on one sphere and keys on another, and
    the nearest key is the one of the largest inner product."""
    query, key = inputs.query, inputs.key.repeat_interleave(inputs.group, 1)
    q_norm, k_norm = query.square().sum(-1), key.square().sum(-1)
    radius = q_norm.amax(-1, keepdim=True) + k_norm.amax(-1, keepdim=True)
    q_extra, k_extra = (radius - q_norm).sqrt(), (radius - k_norm).sqrt()
    return (
        torch.cat([query, torch.stack([q_extra, torch.zeros_like(q_extra)], -1)], -1),
        torch.cat([key, torch.stack([torch.zeros_like(k_extra), k_extra], -1)], -1),
    )


def directions(rounds: int, head_dim: int, seed: int) -> Tensor:
    """(rounds, head_dim + 2): one draw of float32 normal numbers from torch's CPU generator, seeded with ``seed``."""
    return torch.randn(rounds, head_dim + 2, generator=torch.Generator().manual_seed(seed))


def clusters(support: LSH, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Cluster of each query, (B, Hq, rounds, N), and of each key, (B, Hq, rounds, M); padded queries are in -1, padded
    keys in -2.

    A row with n queries and m keys that are not padding has C = ceil(m / (keys / rounds)) clusters. Keys are ranked by
    hash, equal ones in their order, and cluster c holds the keys of ranks c m // C to (c + 1) m // C - 1. Hashes are
    those of float32 copies of the tokens.

    "e2lsh": a round hashes a transformed token to its inner product with the round's direction. Queries are ranked in
    the same way, and the query of rank r is in cluster r C // n.

    "angular": a round multiplies a token with R = ceil(C / 2) directions, at most head_dim. Its hash, one of 2 R
    buckets, is r for the largest magnitude if that product is not negative, else R + r. Query t of the n' in its bucket
    goes with key t m' // n' of the m' there, into the same cluster; without keys in its bucket, with the first key of
    the next bucket that has one, or the last of all.
    """
    if inputs.is_causal:
        raise ValueError(
            "LSH is bidirectional only: later tokens would choose the clusters of earlier ones; use is_causal=False"
        )
    inputs = inputs.to(torch.float32, torch.float64)
    (batch, heads, n, d), m = inputs.query.shape, inputs.key.shape[2]
    of_query = torch.full((batch, heads, support.rounds, n), -1, device=inputs.query.device)
    of_key = torch.full((batch, heads, support.rounds, m), -2, device=inputs.query.device)
    if n == 0 or m == 0:
        return of_query, of_key
    is_angular = support.hash == "angular"
    drawn = directions(support.rounds * (d if is_angular else 1), d, support.seed).to(inputs.query)
    if is_angular:
        tokens = inputs.query, inputs.key.repeat_interleave(inputs.group, 1)
        of_round = drawn[:, :d].reshape(support.rounds, 1, 1, d, d)
        products = [(t @ of_round.transpose(-1, -2)).movedim(0, 2) for t in tokens]  # (B, Hq, rounds, tokens, d)
    else:
        q_hash, k_hash = ((t @ drawn.T).transpose(-1, -2) for t in transformed(inputs))  # (B, Hq, rounds, tokens)
    for b in range(batch):
        q_valid, k_valid = ~inputs.query_padding[b], ~inputs.key_padding[b]
        n_valid, m_valid = int(q_valid.sum()), int(k_valid.sum())
        if n_valid == 0 or m_valid == 0:
            continue
        count = -(-m_valid // (support.keys // support.rounds))
        of_rank = torch.empty(m_valid, dtype=torch.long, device=of_key.device)
        for c in range(count):
            of_rank[c * m_valid // count : (c + 1) * m_valid // count] = c
        if not is_angular:
            of_query[b, :, :, q_valid] = _rank(q_hash[b, :, :, q_valid]) * count // n_valid
            of_key[b, :, :, k_valid] = of_rank[_rank(k_hash[b, :, :, k_valid])]
            continue
        q_bucket, k_bucket = (
            _bucket(t[b][..., valid, :], min(-(-count // 2), d)) for t, valid in zip(products, (q_valid, k_valid))
        )
        of_key[b, :, :, k_valid] = of_rank[_rank(k_bucket)]
        for h in range(heads):
            for r in range(support.rounds):
                of_query[b, h, r, q_valid] = of_rank[_partners(q_bucket[h, r].tolist(), k_bucket[h, r].tolist())]
    return of_query, of_key


def _bucket(products: Tensor, rows: int) -> Tensor:
    """The vertex of the cross-polytope that is nearest to ``products`` (..., d) with the first ``rows`` directions."""
    vertices = torch.cat([products[..., :rows], -products[..., :rows]], -1)
    return vertices.argmax(-1)


def _partners(queries: list[int], keys: list[int]) -> list[int]:
    """The rank of the key that each query goes with, from the buckets of both."""
    ranks = []
    for i, bucket in enumerate(queries):
        before, inside = sum(k < bucket for k in keys), keys.count(bucket)
        turn = queries[:i].count(bucket) * inside // queries.count(bucket)
        ranks.append(min(before + turn, len(keys) - 1))
    return ranks


def _rank(hashes: Tensor) -> Tensor:
    """Each token's place in ascending order (last dimension), ties in the order of tokens."""
    return hashes.argsort(dim=-1, stable=True).argsort(dim=-1)
