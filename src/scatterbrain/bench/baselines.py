"""What one would write in plain torch instead: a sliding window, a Performer, balanced clusters. Naive on purpose, and
correct: tests hold each against its dense definition."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from scatterbrain.low_rank import Favor
from scatterbrain.low_rank.favor import favor_sizes, seeded_projection


def sliding_window(query: Tensor, key: Tensor, value: Tensor, keys: int, is_causal: bool = False) -> Tensor:
    """Softmax over the ``keys`` nearest keys of each query, or the last ``keys`` up to it.

    Args:
        query, key, value: (B, H, N, d), as many queries as keys. Memory grows with N keys d.
        keys: width of the window, shifted to stay inside the sequence.
        is_causal: keys after the query are left out.
    """
    n = key.shape[2]
    keys = min(keys, n)
    scale = query.shape[3] ** -0.5
    if is_causal:
        key, value = (torch.nn.functional.pad(t, (0, 0, keys - 1, 0)) for t in (key, value))
        start = torch.arange(n, device=key.device)
        hidden = start[:, None] + torch.arange(keys, device=key.device) < keys - 1
    else:
        start = (torch.arange(n, device=key.device) - keys // 2).clamp(0, n - keys)
        hidden = None
    near_keys, near_values = (t.unfold(2, keys, 1).index_select(2, start) for t in (key, value))  # (B, H, N, d, keys)
    scores = torch.einsum("bhnd,bhndk->bhnk", query * scale, near_keys)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("bhnk,bhndk->bhnd", torch.softmax(scores, -1), near_values)


def performer(query: Tensor, key: Tensor, value: Tensor, features: int, is_causal: bool = False) -> Tensor:
    """FAVOR+ (Choromanski et al. 2021) with orthogonal positive random features; causal by a cumulative sum of outer
    products, whose memory grows with N features d.

    Args:
        query, key, value: (B, H, N, d).
        features: number of random features.
    """
    q_size, k_size = favor_sizes(query.shape[3] ** -0.5)
    projection = _projection(features, query.shape[3]).to(query)

    def logs(tokens: Tensor, size: float) -> Tensor:
        x = tokens * size
        return x @ projection.T - x.square().sum(-1, keepdim=True) / 2

    q_logs, k_logs = logs(query, q_size), logs(key, k_size)
    q = torch.exp(q_logs - q_logs.detach().amax(-1, keepdim=True))
    k = torch.exp(k_logs - k_logs.detach().amax((-1, -2), keepdim=True))
    if not is_causal:
        return (q @ (k.transpose(-1, -2) @ value)) / (q @ k.sum(-2)[..., None])
    states = (k[..., :, None] * value[..., None, :]).cumsum(2)
    return torch.einsum("bhnm,bhnmd->bhnd", q, states) / (q * k.cumsum(2)).sum(-1, keepdim=True)


@functools.cache
def _projection(features: int, head_dim: int) -> Tensor:
    """Drawn once, as a model would."""
    return seeded_projection(Favor(features), head_dim)


def clusters(query: Tensor, key: Tensor, value: Tensor, keys: int, rounds: int = 2, seed: int = 0) -> Tensor:
    """Attention within balanced clusters of queries and keys (SMYRF, Daras et al. 2020): both are sorted by a hash and
    cut into runs of equal length. Rounds are weighted by their normalisers.

    Args:
        query, key, value: (B, H, N, d), as many queries as keys, a multiple of keys / rounds.
        keys: keys per query over all rounds.

    Raises:
        ValueError: where the sequence does not divide into clusters.
    """
    size = keys // rounds
    if size < 1 or query.shape[2] % size:
        raise ValueError(f"clusters: expected a multiple of {size} tokens (keys / rounds), got {query.shape[2]}")
    outs, normalisers = [], []
    for q_order, k_order in cluster_orders(query, key, rounds, seed):
        q, k, v = (_runs(t, order, size) for t, order in ((query, q_order), (key, k_order), (value, k_order)))
        scores = q @ k.transpose(-1, -2) * query.shape[3] ** -0.5
        normaliser = torch.logsumexp(scores, -1, keepdim=True)
        out = torch.exp(scores - normaliser) @ v
        back = torch.argsort(q_order, -1)[..., None]
        outs.append(_reorder(out.flatten(2, 3), back))
        normalisers.append(_reorder(normaliser.flatten(2, 3), back))
    weights = torch.softmax(torch.stack(normalisers), 0)
    return (weights * torch.stack(outs)).sum(0)


def cluster_orders(query: Tensor, key: Tensor, rounds: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """For every round the orders (B, H, N) of queries and of keys by hash: a random direction in the space where all
    queries, and all keys, have one norm, so that near means a large product."""
    q, k = query.detach().float(), key.detach().float()
    q_norm, k_norm = (t.square().sum(-1, keepdim=True) for t in (q, k))
    radius = q_norm.amax(-2, keepdim=True) + k_norm.amax(-2, keepdim=True)
    nothing = torch.zeros_like(q_norm)
    q = torch.cat([q, (radius - q_norm).sqrt(), nothing], -1)
    k = torch.cat([k, nothing, (radius - k_norm).sqrt()], -1)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(rounds, q.shape[-1], generator=generator).to(q)
    return [tuple(torch.argsort(t @ direction, -1) for t in (q, k)) for direction in directions]


def _reorder(tokens: Tensor, order: Tensor) -> Tensor:
    return torch.gather(tokens, 2, order.expand(-1, -1, -1, tokens.shape[-1]))


def _runs(tokens: Tensor, order: Tensor, size: int) -> Tensor:
    """(B, H, clusters, size, d)."""
    return _reorder(tokens, order[..., None]).unflatten(2, (-1, size))
