"""One call of the attention of one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scatterbrain import functional


@dataclass(frozen=True)
class LayerCall:
    """One call of the attention of one layer.

    Args:
        path: of the layer in the model.
        query: (B, Hq, N, d). key, value: (B, Hkv, M, d), (B, Hkv, M, dv). Detached, in the model's dtype.
        key_padding_mask, query_padding_mask: bool (B, M), (B, N), True = ignore; None: every token counts.
        is_causal: whether query i sees keys <= i + ``query_offset`` only.
        scale: factor of q.k.
        query_offset: position of the first query among the keys.
        exact_queries: of these first queries the layer computes exact attention whatever its support is.
        is_query_by_query: whether the layer is the cross-attention of a decoder, of which
            :func:`scatterbrain.replace_attention` decides that every query has a list of its own.
    """

    path: str
    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    query_padding_mask: Tensor | None
    is_causal: bool
    scale: float
    query_offset: int | Tensor
    exact_queries: int = 0
    is_query_by_query: bool = False

    def masks(self) -> dict[str, Any]:
        """The arguments of :func:`scatterbrain.attention` beside tokens, support and kernel."""
        return dict(
            key_padding_mask=self.key_padding_mask,
            query_padding_mask=self.query_padding_mask,
            is_causal=self.is_causal,
            scale=self.scale,
            query_offset=self.query_offset,
        )

    def valid_queries(self) -> Tensor:
        """bool (B, N), True where a query counts."""
        mask = self.query_padding_mask
        if mask is None and self.key_padding_mask is not None and self.query.shape[2] == self.key.shape[2]:
            mask = self.key_padding_mask
        batch, _, queries, _ = self.query.shape
        return torch.ones(batch, queries, dtype=torch.bool, device=self.query.device) if mask is None else ~mask

    def valid_keys(self) -> Tensor:
        """bool (B, M), True where a key counts."""
        batch, _, keys, _ = self.key.shape
        mask = self.key_padding_mask
        return torch.ones(batch, keys, dtype=torch.bool, device=self.key.device) if mask is None else ~mask

    def seen_keys(self) -> Tensor:
        """int64 (B, N), how many keys each query sees."""
        seen = self.valid_keys().cumsum(1)
        batch, _, queries, _ = self.query.shape
        if not self.is_causal:
            return seen[:, -1:].expand(batch, queries)
        offset = torch.as_tensor(self.query_offset, device=seen.device).reshape(-1, 1)
        before = torch.arange(1, queries + 1, device=seen.device) + offset  # keys up to each query's own position
        before = before.clamp(0, seen.shape[1]).expand(batch, queries)
        return torch.cat((seen.new_zeros(batch, 1), seen), 1).gather(1, before)

    def first_queries(self, count: int) -> LayerCall:
        """The call of its first queries alone."""
        is_padded = self.key_padding_mask is not None or self.query_padding_mask is not None
        mask = ~self.valid_queries()[:, :count] if is_padded else None
        return replace(self, query=self.query[:, :, :count], query_padding_mask=mask)

    def attention(self, support: object, low_rank: object, **arguments: Any) -> Any:
        """:func:`scatterbrain.attention` of these tokens."""
        return functional.attention(self.query, self.key, self.value, support, low_rank, **self.masks(), **arguments)
