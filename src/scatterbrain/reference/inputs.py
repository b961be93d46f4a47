"""What one call is given: tokens, padding, valid ranges, causal edge."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """One call, as every definition of this package reads it. Padded tokens hold zeros, whatever they held.

    Args:
        query: (B, Hq, N, d). key: (B, Hkv, M, d). Query head h reads key/value head h // (Hq / Hkv).
        low_rank, statistics: as :func:`scatterbrain.attention`.
        scale: factor of q.k.
        is_causal: query i sees keys <= i + query_offset only.
        query_padding: bool (B, N), key_padding: bool (B, M), True = ignore.
        query_offset: int per batch row, position of the first query among the keys.
    """

    query: Tensor
    key: Tensor
    low_rank: object
    statistics: object
    scale: float
    is_causal: bool
    query_padding: Tensor
    key_padding: Tensor
    query_offset: list[int]

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        low_rank: object = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        statistics: object = None,
        query_padding_mask: Tensor | None = None,
        query_offset: int | Tensor = 0,
    ) -> Inputs:
        """From arguments as :func:`scatterbrain.attention` takes them. ``query_padding_mask`` defaults to
        ``key_padding_mask`` where there are as many queries as keys: they are then the same tokens."""
        if query.dim() != 4 or key.dim() != 4 or query.shape[1] % key.shape[1]:
            raise ValueError(
                "expected query (B, Hq, N, d) and key (B, Hkv, M, d) with Hq a multiple of Hkv, got "
                f"{tuple(query.shape)} and {tuple(key.shape)}"
            )
        (batch, _, n, d), m = query.shape, key.shape[2]
        scale = 1 / math.sqrt(d) if scale is None else float(scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        offsets = query_offset.tolist() if isinstance(query_offset, Tensor) else [query_offset] * batch
        if any(offsets) and not is_causal:
            raise ValueError(f"query_offset shifts the causal edge and needs is_causal=True, got {query_offset}")
        key_padding = query_padding = _mask("key_padding_mask", key_padding_mask, key)
        if query_padding_mask is not None or n != m:
            query_padding = _mask("query_padding_mask", query_padding_mask, query)
        return cls(
            query.masked_fill(query_padding[:, None, :, None], 0),
            key.masked_fill(key_padding[:, None, :, None], 0),
            low_rank,
            statistics,
            scale,
            is_causal,
            query_padding,
            key_padding,
            offsets,
        )

    def to(self, *dtypes: torch.dtype) -> Inputs:
        """The same call on tokens cast to the dtypes, one after the other."""
        query, key = self.query, self.key
        for dtype in dtypes:
            query, key = query.to(dtype), key.to(dtype)
        return replace(self, query=query, key=key)

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    def pairs(self, value: bool) -> Tensor:
        """bool (B, Hq, N, M), all of them ``value``."""
        batch, heads, n, _ = self.query.shape
        return torch.full((batch, heads, n, self.key.shape[2]), value, device=self.query.device)

    def visible(self) -> Tensor:
        """bool (B, 1, N, M): pairs that any attention may use: neither side padded, and j <= i + offset if causal."""
        seen = ~self.query_padding[:, None, :, None] & ~self.key_padding[:, None, None, :]
        if self.is_causal:
            i = torch.arange(seen.shape[2], device=seen.device)[:, None]
            j = torch.arange(seen.shape[3], device=seen.device)
            seen &= torch.stack([j <= i + offset for offset in self.query_offset])[:, None]
        return seen

    def query_range(self, b: int) -> tuple[int, int]:
        """[first, end) of the queries of batch row b: from the first that is not padding to the last. (0, 0) if all
        are."""
        return _range(self.query_padding[b])

    def key_range(self, b: int) -> tuple[int, int]:
        """The same of the keys. Supports count keys from the row's first."""
        return _range(self.key_padding[b])


def _mask(name: str, mask: Tensor | None, tokens: Tensor) -> Tensor:
    batch, _, n, _ = tokens.shape
    if mask is None:
        return torch.zeros(batch, n, dtype=torch.bool, device=tokens.device)
    if mask.dtype != torch.bool or mask.shape != (batch, n):
        raise ValueError(
            f"{name} must be bool (batch, tokens) = ({batch}, {n}), True = ignore, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    return mask


def _range(padding: Tensor) -> tuple[int, int]:
    valid = (~padding).nonzero().flatten().tolist()
    return (valid[0], valid[-1] + 1) if valid else (0, 0)
