"""Per-row padding masks, valid ranges and causal offset."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PaddingInfo(NamedTuple):
    """Per-row padding masks, valid ranges and causal offset; None where there is none. Fields are named as the
    operators' arguments.

    Args:
        query_mask: bool (B, N), True = ignore. key_mask: bool (B, M).
        query_range: int32 (B, 2), [first, last + 1) of the queries that are not ignored. key_range: of the keys.
        query_offset: int32 (B,), position of query 0 among the keys.
    """

    query_mask: Tensor | None = None
    key_mask: Tensor | None = None
    query_range: Tensor | None = None
    key_range: Tensor | None = None
    query_offset: Tensor | None = None

    def is_everything(self) -> bool:
        """Whether there is no mask and no offset."""
        return self.query_mask is None and self.key_mask is None and self.query_offset is None


EVERYTHING = PaddingInfo()


def valid_range(mask: Tensor) -> Tensor:
    """int32 (B, 2), [first, last + 1) of the tokens that bool ``mask`` (B, tokens) does not ignore; (0, 0) if it
    ignores all."""
    tokens = mask.shape[1]
    if tokens == 0:
        return torch.zeros(mask.shape[0], 2, dtype=torch.int32, device=mask.device)
    position = torch.arange(tokens, device=mask.device)
    end = torch.where(mask, 0, position + 1).amax(1)
    first = torch.minimum(torch.where(mask, tokens, position).amin(1), end)
    return torch.stack([first, end], 1).to(torch.int32)


def check_mask(name: str, mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> None:
    """bool (batch, tokens), True = ignore."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name} must be a bool tensor, True = ignore, got {kind}; a mask of kept tokens is inverted "
            "with `mask == 0`"
        )
    if tuple(mask.shape) != (batch, tokens):
        raise ValueError(f"{name} must be (batch, tokens) = ({batch}, {tokens}), got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{name} must be on the device of query, {device}, got {mask.device}")


def padding_info(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    query_offset: int | Tensor,
) -> PaddingInfo:
    """Masks with their ranges; the query mask defaults to the key mask where there are as many queries as keys."""
    if key_padding_mask is None and query_padding_mask is None and type(query_offset) is int and query_offset == 0:
        return EVERYTHING
    batch, n, m = query.shape[0], query.shape[2], key.shape[2]
    check_mask("key_padding_mask", key_padding_mask, batch, m, query.device)
    check_mask("query_padding_mask", query_padding_mask, batch, n, query.device)
    if query_padding_mask is None and key_padding_mask is not None and n == m:
        query_padding_mask = key_padding_mask
    key_range = None if key_padding_mask is None else valid_range(key_padding_mask)
    query_range = (
        None
        if query_padding_mask is None
        else key_range
        if query_padding_mask is key_padding_mask
        else valid_range(query_padding_mask)
    )
    offset = None
    if isinstance(query_offset, Tensor):
        if query_offset.dtype == torch.int64:  # not checked where it cannot be read: far away, not around the corner
            query_offset = query_offset.clamp(-(2**31), 2**31 - 1)
        offset = query_offset.to(device=query.device, dtype=torch.int32)
    elif not (isinstance(query_offset, int) and query_offset == 0):
        offset = torch.full((batch,), query_offset, dtype=torch.int32, device=query.device)
    return PaddingInfo(query_padding_mask, key_padding_mask, query_range, key_range, offset)
