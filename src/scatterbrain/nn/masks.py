"""What attention masks say: whether one is the causal mask, and which tokens are padding.

Each library has its own convention; these functions name the one they take. Layers of a model share one mask tensor, so
an answer is kept until the mask is written to. Numpy, ``.data`` and other processes write to memory behind the version
counter of a tensor, so on the CPU a copy is kept beside the answer; a mask on a GPU is waited for once. Under
torch.compile, where vmap maps over it, for meta tensors and while a CUDA graph is captured the content of a mask cannot
be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from scatterbrain.operators.tracing import is_batched, is_capturing, is_untraced

MASK_STRIPE = 128  # rows of a mask compared at a time
# mask -> (version, copy of its memory on the CPU, {(question, *arguments): answer})
_ANSWERS = WeakTensorKeyDictionary()


def is_unreadable(mask: Tensor) -> bool:
    """Whether the content of ``mask`` cannot be looked at."""
    return torch.compiler.is_compiling() or mask.is_meta or is_batched(mask) or is_capturing(mask.device)


def once_per_mask(mask: Tensor, question: Callable[..., Any], *arguments: Hashable) -> Any:
    """``question(mask, *arguments)``, computed again only after the mask was written to. The answer must not hold the
    mask itself, which would then never be freed."""
    # Inference tensors have no version, and what a trace or a transform makes is of no use outside of it.
    if mask.is_inference() or not is_untraced():
        return question(mask, *arguments)
    version, copy, answers = _ANSWERS.get(mask, (None, None, {}))
    if version != mask._version or (mask.is_cpu and not _is_copy(copy, mask)):
        with torch.inference_mode(False):
            copy = _memory(mask).clone() if mask.is_cpu else None
        answers = {}
        _ANSWERS[mask] = (mask._version, copy, answers)
    key = (question, *arguments)
    if key not in answers:
        with torch.inference_mode(False), torch.no_grad():  # a later call may train with it
            answers[key] = question(mask, *arguments)
    return answers[key]


def _memory(mask: Tensor) -> Tensor:
    """``mask`` without the repetitions that :meth:`torch.Tensor.expand` makes."""
    mask = mask.detach()
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride())):
        mask = mask.narrow(dim, 0, 1) if stride == 0 and size > 1 else mask
    return mask


def _is_copy(copy: Tensor, mask: Tensor) -> bool:
    """Whether ``copy`` holds what the memory of ``mask`` holds now. Words are compared where that can be, which takes a
    fraction of the time of comparing numbers, and a small one of any question's."""
    pair = copy, _memory(mask)
    if pair[0].shape != pair[1].shape or pair[0].dtype != pair[1].dtype:
        return False
    if all(map(_is_words, pair)):
        pair = [t.reshape(-1).view(torch.int64) for t in pair]
    return torch.equal(*pair)


def _is_words(tensor: Tensor) -> bool:
    """Whether the memory of ``tensor`` is a number of aligned words of 8 bytes."""
    size, start = tensor.element_size(), tensor.storage_offset()
    ends = (tensor.numel() * size, start * size, tensor.data_ptr())
    return tensor.is_contiguous() and not any(end % 8 for end in ends)


# -------------------- causality


def is_causal_mask(mask: Tensor, hint: bool = True) -> bool:
    """Whether ``mask`` (..., L, S), bool with True = hidden or float with -inf = hidden, shows query i exactly the keys
    <= i. The caller's ``hint`` is the answer for a mask that cannot be looked at."""
    return hint if is_unreadable(mask) else once_per_mask(mask, _equals_causal)


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


def kept_keys_and_offset(mask: Tensor) -> tuple[Tensor, int | None] | None:
    """Takes apart a mask that is padding, or causality and padding. Its content must be readable.

    Args:
        mask: bool (B, 1, N, M), True = may attend.

    Returns:
        The keys that some query sees, bool (B, 1, 1, M), and the offset o with which query i sees keys <= i + o; None
        in its place if every query sees the same keys. None alone for any other mask.
    """
    queries, keys = mask.shape[2:]
    keep = mask.any(2, keepdim=True)
    if bool((mask == keep).all()):
        return keep, None
    query = torch.arange(queries, dtype=torch.int32, device=mask.device)[:, None]
    key = torch.arange(keys, dtype=torch.int32, device=mask.device)
    for offset in {keys - queries, 0}:
        if bool((mask == (keep & (key - offset <= query))).all()):
            return keep, offset
    return None


# -------------------- padding


def as_bool_padding(mask: Tensor | None) -> Tensor | None:
    """A padding mask of nn.MultiheadAttention as bool, True = ignore. None for no mask, and for a float mask with other
    values than 0 and -inf; if such a mask cannot be looked at, a RuntimeError is raised when the graph runs."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    if is_unreadable(mask):
        return _hidden_unread(mask, -math.inf, "key_padding_mask")
    return once_per_mask(mask, _hidden, -math.inf)


def padding_of(mask: Tensor, batch: int, keys: int, lowest: float | None = None) -> Tensor | None:
    """The padding that a mask of (query, key) pairs stands for; None if it says anything else.

    Recognised are masks that hide the same keys from every query, and square ones that also hide every key from padded
    queries (both tokens of a pair must be valid), whose rows carry no meaning.

    Args:
        mask: bool, True = may attend, or float, added; (queries or 1, keys), or with (batch or 1, 1) before it.
        batch, keys: sizes that the mask broadcasts to.
        lowest: floats up to this one hide a pair; default the dtype's lowest number.

    Returns:
        bool (batch, keys), True = padding, or None. Of masks that cannot be looked at only those of one query row are
        recognised; their values are then checked when the graph runs (RuntimeError).
    """
    if mask.dim() not in (2, 4) or mask.shape[-1] != keys:
        return None
    if mask.dim() == 4 and (mask.shape[1] != 1 or mask.shape[0] not in (1, batch)):
        return None
    if not is_unreadable(mask):
        padding = once_per_mask(mask, _padding, lowest)
    elif mask.shape[-2] == 1:
        padding = _hidden_unread(mask, lowest, "attention mask")[..., 0, :]
    else:
        return None
    return None if padding is None else padding.reshape(-1, keys).expand(batch, keys)


def _padding(mask: Tensor, lowest: float | None) -> Tensor | None:
    """bool (..., keys): the query dimension of the mask is gone."""
    hidden = _hidden(mask, lowest)
    if hidden is None:
        return None
    padded = hidden.all(-2)
    same_for_all = bool((hidden == padded[..., None, :]).all())
    if same_for_all or mask.shape[-2] != mask.shape[-1]:
        return padded if same_for_all else None
    return padded if bool((hidden == (padded[..., None, :] | padded[..., :, None])).all()) else None


def _hidden(mask: Tensor, lowest: float | None) -> Tensor | None:
    """bool, True = hidden; None for a float mask that holds values between ``lowest`` and 0, or above 0."""
    hidden = _below(mask, lowest)
    return hidden if mask.dtype == torch.bool or bool((hidden | (mask == 0)).all()) else None


def _hidden_unread(mask: Tensor, lowest: float | None, name: str) -> Tensor:
    """:func:`_hidden` of a mask that cannot be looked at: its values are checked when the graph runs."""
    if mask.dtype != torch.bool and is_batched(mask):
        raise ValueError(
            f"{name}: expected bool where torch.func.vmap maps over it, since the values of a float mask cannot be "
            f"looked at there, got {mask.dtype}; pass a bool mask"
        )
    hidden = _below(mask, lowest)
    if mask.dtype != torch.bool:
        torch._assert_async(
            (hidden | (mask == 0)).all(),
            f"{name}: expected 0 and -inf only under torch.compile, got other values; pass a bool mask",
        )
    return hidden


def _below(mask: Tensor, lowest: float | None) -> Tensor:
    if mask.dtype == torch.bool:
        return ~mask
    return mask <= (torch.finfo(mask.dtype).min if lowest is None else lowest)
