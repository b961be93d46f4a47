"""Means and second moments of queries and keys, from which statistics are fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scatterbrain.operators.tracing import is_readable
from scatterbrain.padding import PaddingInfo

MOMENTS = ("tokens", "query_mean", "query_second", "key_mean", "key_second")


def moment_shapes(kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the moments that a module gathers, in the order of :data:`MOMENTS`."""
    mean, second = (kv_heads, head_dim), (kv_heads, head_dim, head_dim)
    return (kv_heads,), mean, second, mean, second


@dataclass(frozen=True, eq=False)
class Moments:
    """Token-weighted first and second moments in float64, per key/value head: the mean of scaled queries and of keys
    weighted by exp(a.k)."""

    tokens: Tensor  # (...) queries that were counted
    query_mean: Tensor  # (..., d)
    query_second: Tensor  # (..., d, d)
    key_mean: Tensor  # (..., d)
    key_second: Tensor  # (..., d, d)

    def if_finite(self) -> Moments:
        """These moments, or those of no tokens where anything is NaN or infinite; nothing is read on the host."""
        tensors = [getattr(self, name) for name in MOMENTS]
        is_finite = torch.stack([torch.isfinite(t).all() for t in tensors]).all()
        return Moments(*(torch.where(is_finite, t, 0) for t in tensors))

    def merge(self, other: Moments) -> Moments:
        """The moments of both together, each weighted by its tokens."""
        total = self.tokens + other.tokens
        share = torch.where(total > 0, other.tokens / total.clamp(min=1), torch.zeros_like(total))
        return self.blend(other, share, total)

    def blend(self, other: Moments, share: Tensor | float, tokens: Tensor | None = None) -> Moments:
        """``(1 - share) self + share other``."""

        def mix(mine: Tensor, theirs: Tensor) -> Tensor:
            weight = (
                share.reshape(share.shape + (1,) * (mine.dim() - share.dim())) if isinstance(share, Tensor) else share
            )
            return mine + weight * (theirs - mine)

        names = ("query_mean", "query_second", "key_mean", "key_second")
        return Moments(
            other.tokens if tokens is None else tokens, *(mix(getattr(self, n), getattr(other, n)) for n in names)
        )


def moments(
    query: Tensor,
    key: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Moments:
    """Moments of one batch, pooled over its rows. query (B, Hq, N, d), key (B, Hkv, M, d), masks
    bool (B, tokens), True = ignore."""
    heads = key.shape[1]

    def gather(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, all_heads, n, d = tokens.shape
        valid = torch.ones(batch, n, dtype=torch.bool, device=tokens.device) if mask is None else ~mask
        # Contiguous: sums over memory of another layout would round in another order.
        tokens = torch.where(valid[:, None, :, None], tokens.detach(), 0).double().contiguous()
        shared = (
            all_heads // heads * n
        )  # tokens of a key/value head; written out, since a batch of 0 leaves none to infer
        tokens = tokens.reshape(batch, heads, shared, d)
        valid = valid[:, None, None, :].expand(batch, heads, all_heads // heads, n).reshape(batch, heads, shared)
        pooled = batch * shared
        return tokens.transpose(0, 1).reshape(heads, pooled, d), valid.transpose(0, 1).reshape(heads, pooled)

    q, q_valid = gather(query, query_mask)
    k, k_valid = gather(key, key_mask)
    q = q * scale
    count = q_valid.sum(-1).double()
    weight = q_valid.double() / count.clamp(min=1)[..., None]
    a = (weight[..., None] * q).sum(-2)
    q_second = (weight[..., None] * q).transpose(-1, -2) @ q
    logits = (k @ a[..., None]).squeeze(-1).masked_fill(~k_valid, -math.inf)
    weight = torch.where(k_valid, torch.softmax(logits, -1), 0)
    b = (weight[..., None] * k).sum(-2)
    k_second = (weight[..., None] * k).transpose(-1, -2) @ k
    return Moments(count, a, q_second, b, k_second)


def check_finite_moments(moments: tuple[Tensor, ...], owner: str, cure: str) -> None:
    """Raises ValueError for moments of tokens that hold NaN or infinity, where values can be looked at."""
    if is_readable(*moments) and not all(math.isfinite(float(t.sum(dtype=torch.float64))) for t in moments):
        raise ValueError(
            f"{owner}: query or key holds NaN or infinity among the valid tokens (or is too large to square); {cure}, "
            "mask bad tokens"
        )


def checked_moments(query: Tensor, key: Tensor, scale: float, padding: PaddingInfo) -> Moments:
    """Moments of calibration tokens, refused where they are not finite or there are none."""
    if query.is_meta:
        raise ValueError(
            "calibration: expected queries and keys that hold values, got tensors on the meta device; load the model "
            "first, and calibrate on real inputs"
        )
    m = moments(query, key, scale, padding.key_mask, padding.query_mask)
    check_finite_moments((m.query_second, m.key_second, m.key_mean), "calibration", "calibrate on clean inputs")
    keys = key.shape[0] * key.shape[2] if padding.key_mask is None else int((~padding.key_mask).sum())
    if keys == 0 or not bool((m.tokens > 0).all()):
        raise ValueError(
            "calibration: expected at least one valid token, got none; check key_padding_mask (True = ignore)"
        )
    return m
