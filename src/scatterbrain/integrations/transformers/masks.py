"""Masks between transformers' models and attention: as long as the keys, not queries times keys.

A model asks :func:`compact_mask` for a mask and hands it to its layers, where :func:`read_mask` turns it into arguments
of attention. All forms are plain 4-D tensors, which transformers passes on untouched:

    None                      every key; causal if the layer says that it is
    bool  (B, 1, 1, M)        True: every query sees key j
    int32 (B, 1, 1, M)        query i sees key j if i >= mask[j]; causal, with the offset of a cache and padding
    int32 (B, 1, 2, M)        the same twice, where it is known without a look at it that the queries are behind others
    int32 (B, 1, N, 1)        under a trace: query i sees key j if i >= j and mask[i] == mask[j], packed sequences
    bool  (B, 1, N, M)        anything else (sliding windows, packed sequences, ...), as transformers' sdpa has it
    float (B, 1, N, M)        0 or the lowest number, as transformers' eager attention has it: for :data:`ADDED`

Packed sequences are rows whose position ids start again. A trace has no values, so transformers takes every row without
a mask and a cache for one that may be packed. The mask is then a number per token, and the operator ``exact_if_packed``
looks when the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing

from scatterbrain.nn.masks import is_unreadable, kept_keys_and_offset, once_per_mask
from scatterbrain.operators.tracing import is_batched, is_known

NEVER = 2**31 - 1  # no query sees the key
# Families whose code takes a mask of queries times keys apart, by the folders of transformers. They forbid to skip it,
# as transformers itself does wherever rows may be packed, which is every row in a trace.
READ_MASKS = (
    "axk2",
    "deepseek_v32",
    "diffusion_gemma",
    "doge",
    "dots3_note",
    "falcon",
    "glm_moe_dsa",
    "hy_v4",
    "hy_v4_vl",
    "mistral_large4",
    "qwen4_exp",
    "t5gemma2",
    "unlimited_ocr",
)
# Families whose layers do not say that they are causal: without a mask they would take themselves for bidirectional.
SILENT = ("aimv2", "bigbird_pegasus", "informer", "nllb_moe", "pegasus_x", "videoprism")
# Configurations of families in which attention that asks for no function adds the mask to its scores.
ADDED = ("BigBirdPegasusConfig", "Gemma4AudioConfig", "GitConfig", "InformerConfig")


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **arguments: Any,
) -> Tensor | None:
    """A mask function of transformers' AttentionMaskInterface, with the arguments of ``sdpa_mask``. attention_mask is
    bool (B, keys seen so far), True = keep."""
    # A window at least as long as the sequence hides nothing. transformers allows a skip only where no other mask
    # function was added, and where the model itself does not look at the mask.
    window_covers = local_size is not None and kv_offset == 0 and kv_length <= local_size
    is_causal = allow_is_causal_skip and (mask_function is causal_mask_function or window_covers)
    is_bidirectional = allow_is_bidirectional_skip and (mask_function is bidirectional_mask_function or window_covers)
    whole = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        device=device,
        **arguments,
    )
    if is_added(arguments.get("config")):
        return eager_mask(**whole)
    if is_tracing() and q_length != 1 and _family(arguments.get("config")) not in READ_MASKS:
        sequence = _causal_sequences(mask_function, window_covers)
        if sequence is not None:
            return sequence.to(torch.int32)[:, None, :, None]
    if q_length == 1 or not (is_causal or is_bidirectional):
        return sdpa_mask(**whole, allow_is_causal_skip=allow_is_causal_skip)
    keep = _keep(attention_mask, kv_length, kv_offset)
    # A mask on a GPU stays: to look whether it keeps everything, every forward pass would wait for the device.
    if keep is not None and keep.is_cpu and not is_tracing(keep) and not is_batched(keep) and bool(keep.all()):
        keep = None
    if not is_causal:
        return None if keep is None else keep[:, None, None, :]
    starts_at_zero = isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    if keep is None and starts_at_zero and q_length == kv_length and not is_silent(arguments.get("config")):
        return None
    first_query = torch.arange(kv_length, device=device) + (kv_offset - q_offset)
    first_query = first_query.to(torch.int32)[None, :]
    if keep is not None:
        first_query = torch.where(keep, first_query, NEVER)
    return _causal(first_query[:, None, None, :], is_behind=isinstance(q_offset, int) and q_offset > 0)


def _causal(first_query: Tensor, is_behind: bool) -> Tensor:
    """The form for causality and padding of int32 (B, 1, 1, M)."""
    return first_query.expand(-1, -1, 2, -1) if is_behind else first_query


def is_silent(owner: object) -> bool:
    """Whether a configuration or a layer is of a family whose layers do not say that they are causal."""
    return _family(owner) in SILENT


def is_added(config: object) -> bool:
    """Whether some attention under a configuration adds the masks that are made for all of it to its scores."""
    # Informer has such attention and other.
    return type(config).__name__ in ADDED and getattr(config, "attention_type", None) != "full"


def _family(owner: object) -> str:
    """The folder of transformers that the class of a configuration or a layer is in; "" of any other."""
    folders = type(owner).__module__.split(".")
    return folders[2] if folders[:2] == ["transformers", "models"] and len(folders) > 2 else ""


def _keep(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """bool (B, kv_length), True = keep; empty slots of a cache are not kept."""
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


_AND = and_masks().__code__
_SAME_SEQUENCE = packed_sequence_mask_function(torch.empty(0)).__code__
_IN_SEQUENCE = remap_positions_for_packed_sequence(causal_mask_function, torch.empty(0)).__code__
_IN_WINDOW = sliding_window_overlay(1).__code__


def _causal_sequences(mask_function: Callable, window_covers: bool) -> Tensor | None:
    """The number of each token's sequence, (B, N), of transformers' mask function for causal attention inside packed
    sequences; None of any other mask function."""
    same_sequence = _parts(mask_function)[1:]
    if len(same_sequence) != 1 or same_sequence[0].__code__ is not _SAME_SEQUENCE:
        return None
    inside = _parts(mask_function)[0]
    if inside.__code__ is not _IN_SEQUENCE:
        return None
    inside = _captured(inside, "mask_function")
    if window_covers and len(_parts(inside)) == 2 and _parts(inside)[0].__code__ is _IN_WINDOW:
        inside = _parts(inside)[1]
    return _captured(same_sequence[0], "packed_sequence_mask") if inside is causal_mask_function else None


def _parts(mask_function: Callable) -> tuple[Callable, ...]:
    """The functions of which a mask function is the conjunction."""
    return _captured(mask_function, "mask_functions") if mask_function.__code__ is _AND else ()


def _captured(function: Callable, name: str) -> Any:
    """A variable that an inner function has from the function around it."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def compacted(mask: Tensor | None, config: object = None) -> Tensor | None:
    """The compact form of a bool (B, 1, N, M) mask that is padding, or causality and padding; any other mask unchanged,
    and so under torch.compile every mask. Other implementations make such masks, for models in which only single layers
    run this one, and so do users. A float mask is taken for a bool one if ``config`` is of a family that has them so.
    """
    if mask is None or mask.shape[1] != 1 or 1 in mask.shape[2:] or is_unreadable(mask):
        return mask
    if mask.is_floating_point() and is_added(config):
        form = once_per_mask(mask, _form_of_added)
    else:
        form = once_per_mask(mask, _compact_form) if mask.dtype == torch.bool else None
    return mask if form is None else form


def _form_of_added(mask: Tensor) -> Tensor | None:
    shown = mask == 0
    if not bool((shown | (mask <= torch.finfo(mask.dtype).min)).all()):
        return None
    form = _compact_form(shown)
    return shown if form is None else form


def _compact_form(mask: Tensor) -> Tensor | None:
    found = kept_keys_and_offset(mask)
    if found is None:
        return None
    keep, offset = found
    if offset is None:
        return keep
    first_query = torch.arange(mask.shape[3], dtype=torch.int32, device=mask.device) - offset
    return _causal(torch.where(keep, first_query, NEVER), is_behind=offset > 0)


class Visible(NamedTuple):
    """The keys that the queries of one call may see: ``dense`` alone, a mask of F.scaled_dot_product_attention, or
    arguments of :func:`scatterbrain.attention`. ``sequence``, int32 (B, N): of causal calls, tokens see each other only
    if they have the same number. ``is_behind``: it is known that the queries are behind others in a cache."""

    is_causal: bool = False
    key_padding_mask: Tensor | None = None
    query_padding_mask: Tensor | None = None
    query_offset: int | Tensor = 0
    dense: Tensor | None = None
    sequence: Tensor | None = None
    is_behind: bool = False


def is_compact(mask: Tensor | None, queries: int) -> bool:
    """Whether ``mask`` hides the same keys from all queries, apart from causality."""
    if mask is None:
        return True
    is_row = mask.shape[2] == 1 and mask.dtype in (torch.bool, torch.int32)
    return queries > 1 and mask.shape[1] == 1 and (is_row or _is_behind(mask))


def _is_behind(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and is_known(mask.shape[2] == 2)


def read_mask(mask: Tensor | None, is_causal: bool, batch: int, queries: int, keys: int, is_self: bool) -> Visible:
    """The arguments of attention that a mask stands for.

    Args:
        mask: None or 4-D, of the forms above, or a float mask that is added to the scores.
        is_causal: whether the layer is causal without a mask.
        batch, queries, keys: sizes of the call.
        is_self: queries and keys are the same tokens, so a padded key is a padded query.
    """
    if mask is None:
        return Visible(is_causal)
    if mask.dtype == torch.int32 and mask.shape[1:] == (1, queries, 1) and queries > 1:
        return Visible(True, sequence=mask[:, 0, :, 0].expand(batch, queries))
    if mask.shape[-1] != keys:
        raise ValueError(
            f"attention_mask: expected a mask of {keys} keys, got shape {tuple(mask.shape)}; pass the model a mask "
            "(batch, tokens), 1 = keep"
        )
    if not is_compact(mask, queries):
        return Visible(dense=mask)
    is_behind, mask = _is_behind(mask), mask[:, 0, 0, :].expand(batch, keys)
    if mask.dtype == torch.bool:
        padding = ~mask
        no_query = None if queries != keys or is_self else torch.zeros_like(padding)
        return Visible(key_padding_mask=padding, query_padding_mask=no_query)
    padding = mask >= queries
    if queries == keys:
        return Visible(True, padding)
    position = torch.arange(keys, dtype=torch.int32, device=mask.device)
    offset = torch.where(mask == NEVER, 0, position - mask).amax(1)  # equal for all keys that are not padded
    slots = torch.arange(queries, device=mask.device) + offset[:, None]
    return Visible(True, padding, padding.gather(1, slots.clamp(0, keys - 1)), offset, is_behind=is_behind)


def dense_mask(visible: Visible, queries: int, keys: int) -> tuple[Tensor | None, bool]:
    """(bool or float mask that F.scaled_dot_product_attention takes, is_causal)."""
    if visible.dense is not None:
        return visible.dense, False
    if visible.sequence is not None:
        same = visible.sequence[:, None, :, None] == visible.sequence[:, None, None, :]
        return same & torch.ones(queries, keys, dtype=torch.bool, device=same.device).tril(), False
    if visible.key_padding_mask is None and not isinstance(visible.query_offset, Tensor):
        return None, visible.is_causal
    keep = ~visible.key_padding_mask[:, None, None, :]
    if visible.is_causal:
        position = torch.arange(queries, device=keep.device)[:, None]
        edge = position if isinstance(visible.query_offset, int) else position + visible.query_offset[:, None, None]
        edge = edge.reshape(-1, 1, queries, 1)
        keep = keep & (torch.arange(keys, device=keep.device) <= edge)
    return keep, False
