"""What the masks of nn.MultiheadAttention say: whether one is the causal mask, and which tokens are padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

MASK_STRIPE = 128  # rows of a mask compared at a time
_KNOWN_MASKS = WeakTensorKeyDictionary()  # mask -> (version, answer): an encoder's layers share one mask tensor


def _once_per_mask(mask: Tensor, answer: Callable[[Tensor], Any]) -> Any:
    """``answer(mask)``, computed again only after the mask was written to."""
    if mask.is_inference():  # has no version
        return answer(mask)
    known = _KNOWN_MASKS.get(mask)
    if known is None or known[0] != mask._version:
        known = _KNOWN_MASKS[mask] = (mask._version, answer(mask))
    return known[1]


def is_causal_mask(mask: Tensor, hint: bool = True) -> bool:
    """Whether ``mask`` (..., L, S) allows exactly the keys <= i to query i. Under torch.compile and for meta tensors,
    whose content cannot be looked at, the caller's ``hint`` is the answer."""
    if torch.compiler.is_compiling() or mask.is_meta:
        return hint
    return _once_per_mask(mask, _equals_causal)


def _equals_causal(mask: Tensor) -> bool:
    seen, hidden = (False, True) if mask.dtype == torch.bool else (0.0, -math.inf)
    # In stripes of rows: all seen, then a triangle, then all hidden. Extremes are several times cheaper than
    # elementwise comparison, and pass NaN on.
    for start in range(0, mask.shape[-2], MASK_STRIPE):
        rows = mask[..., start : start + MASK_STRIPE, :]
        past, corner, later = rows.tensor_split((start, start + MASK_STRIPE), -1)
        future = torch.ones(corner.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
        if not (corner == torch.where(future, hidden, seen).to(mask.dtype)).all():
            return False
        if past.numel() and not (past.amin() == seen and past.amax() == seen):
            return False
        if later.numel() and not (later.amin() == hidden and later.amax() == hidden):
            return False
    return True


def as_bool_padding(mask: Tensor | None) -> Tensor | None:
    """The padding mask as bool, True = ignore; None for no mask, and for a float mask with values other than 0 and -inf
    (under torch.compile such a value raises a RuntimeError when the graph runs)."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    if torch.compiler.is_compiling() or mask.is_meta:
        torch._assert_async(
            ((mask == 0) | (mask == -math.inf)).all(),
            "key_padding_mask: expected 0 and -inf only under torch.compile, got other values; pass a bool mask",
        )
        return mask == -math.inf
    return _once_per_mask(mask, _float_to_bool)


def _float_to_bool(mask: Tensor) -> Tensor | None:
    padding = mask == -math.inf
    return padding if bool((padding | (mask == 0)).all()) else None
