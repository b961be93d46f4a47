"""Cases of clustering that every device runs, and what a result must agree with."""

from __future__ import annotations

import torch
from testkit import B, qkv
from torch import Tensor

import scatterbrain as sb

SIZES = {  # queries, keys, head_dim, heads, key/value heads, clusters
    "few": (37, 40, 8, 4, 2, 5),
    "one key": (3, 1, 8, 1, 1, 4),
    "two keys": (1, 2, 16, 2, 2, 2),
    "fewer keys than clusters": (9, 20, 24, 2, 1, 64),
    "as many samples as keys": (64, 256, 64, 2, 2, 64),
    "one key more": (64, 257, 64, 2, 2, 64),
    "segments": (1100, 1030, 32, 2, 1, 33),
    "narrow": (50, 90, 3, 2, 2, 16),
    "one dimension": (50, 90, 1, 1, 1, 7),
    "odd width": (40, 300, 65, 1, 1, 48),
    "wide": (40, 300, 256, 1, 1, 48),
    "one cluster": (40, 300, 16, 1, 1, 1),
    "most clusters": (40, 700, 16, 1, 1, 256),
    "no queries": (0, 40, 8, 1, 1, 4),
    "no keys": (40, 0, 8, 2, 1, 4),
}
PADDING = ["left", "right", "both", "holes", "everything", "all but one"]


def tokens_of(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Query, key and clusters. Normal tokens, no two centres of which are equally near within rounding."""
    queries, keys, d, heads, kv_heads, clusters = SIZES[name]
    query, key, _ = qkv(queries, keys, heads=heads, kv_heads=kv_heads, head_dim=d, dtype=dtype)
    return query, key, clusters


def padding_of(pattern: str, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """Masks of queries and of keys."""
    mask = torch.zeros(B, keys, dtype=torch.bool)
    mask[1, : keys // 5] = pattern in ("left", "both")
    mask[1, -(keys // 4) :] = pattern in ("right", "both")
    if pattern == "holes":
        mask = torch.rand(B, keys, generator=torch.Generator().manual_seed(1)) < 0.4
    if pattern.startswith("all") or pattern == "everything":
        mask[1] = True
        mask[1, keys // 2] = pattern == "everything"
    return torch.rand(B, queries, generator=torch.Generator().manual_seed(2)) < 0.4, mask


def fields(found: sb.Clusters) -> list[Tensor]:
    return [found.index, found.representatives, found.log_mass, found.query_mean]


def assert_agree(found: sb.Clusters, want: sb.Clusters, **tolerance: float) -> None:
    assert torch.equal(found.index, want.index)
    for mine, theirs in zip(fields(found)[1:], fields(want)[1:], strict=True):
        assert torch.allclose(mine.double(), theirs, **tolerance)
