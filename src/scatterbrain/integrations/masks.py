"""Masks of (query, key) pairs that say no more than which tokens are padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KNOWN = WeakTensorKeyDictionary()  # mask -> (version, lowest, padding): the layers of a model share one mask


def padding_of(mask: Tensor, batch: int, keys: int, lowest: float | None = None) -> Tensor | None:
    """The padding that an attention mask stands for, or None if it says anything else.

    Recognised are masks that hide the same keys from every query, and square ones that also hide every key from padded
    queries (both tokens of a pair must be valid), whose rows carry no meaning.

    Args:
        mask: bool, True = may attend, or float, added; (queries or 1, keys), or with (batch or 1, 1) before it.
        batch, keys: sizes that the mask broadcasts to.
        lowest: floats up to this one hide a pair; default the dtype's lowest number.

    Returns:
        bool (batch, keys), True = padding, or None. Under torch.compile only masks of one query row are recognised; their
        values are then checked when the graph runs (RuntimeError).
    """
    if mask.dim() not in (2, 4) or mask.shape[-1] != keys:
        return None
    if mask.dim() == 4 and (mask.shape[1] != 1 or mask.shape[0] not in (1, batch)):
        return None
    if torch.compiler.is_compiling() or mask.is_meta:
        if mask.shape[-2] != 1:
            return None
        hidden = _hidden(mask, lowest)
        if mask.dtype != torch.bool:
            torch._assert_async(
                (hidden | (mask == 0)).all(),
                "attention mask: expected 0 and -inf only under torch.compile, got other values; pass a bool mask",
            )
        padding = hidden[..., 0, :]
    elif mask.is_inference():  # has no version
        padding = _padding(mask, lowest)
    else:
        known = _KNOWN.get(mask)
        if known is None or known[:2] != (mask._version, lowest):
            known = _KNOWN[mask] = (mask._version, lowest, _padding(mask, lowest))
        padding = known[2]
    return None if padding is None else padding.reshape(-1, keys).expand(batch, keys)


def _hidden(mask: Tensor, lowest: float | None) -> Tensor:
    if mask.dtype == torch.bool:
        return ~mask
    return mask <= (torch.finfo(mask.dtype).min if lowest is None else lowest)


def _padding(mask: Tensor, lowest: float | None) -> Tensor | None:
    """bool (..., keys); the mask's query dimension is gone."""
    hidden = _hidden(mask, lowest)
    if mask.dtype != torch.bool and not bool((hidden | (mask == 0)).all()):
        return None
    padded = hidden.all(-2)
    same_for_all = bool((hidden == padded[..., None, :]).all())
    if same_for_all or mask.shape[-2] != mask.shape[-1]:
        return padded if same_for_all else None
    return padded if bool((hidden == (padded[..., None, :] | padded[..., :, None])).all()) else None
