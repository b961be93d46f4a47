"""The attention function that transformers calls: approximated where it can be, exact or refused where it cannot."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scatterbrain.functional import cast_for_autocast
from scatterbrain.integrations.restrictions import NotExpressible
from scatterbrain.integrations.transformers import layers
from scatterbrain.integrations.transformers.masks import Visible, compacted, dense_mask, is_compact, read_mask
from scatterbrain.integrations.transformers.registry import PER_LAYER, SETTINGS, settings_of_layers
from scatterbrain.low_rank import Heads
from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.nn.warn import warn
from scatterbrain.operators.packed import exact_if_packed
from scatterbrain.operators.tracing import is_known, is_readable

# Arguments that change the scores beyond q.k and a mask. This package has no exact attention for them either.
REFUSED = {
    "softcap": "caps the scores (softcap)",
    "s_aux": "adds attention sinks (s_aux)",
    "sinks": "adds attention sinks (sinks)",
    "position_bias": "adds a bias to the scores (position_bias)",
    "head_mask": "masks heads (head_mask)",
    "indices": "chooses keys itself (indices)",
    "block_indices": "chooses keys itself (block_indices)",
}
# Queries behind a cache up to which exact attention is run: it costs less than states of all keys that came before, and
# the tokens that speculative decoding verifies are then those that decoding one by one would write.
FEW_QUERIES = 16
# Arguments that mark sequences packed into one row. Without a mask that separates them they would attend to each other.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "block_table")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    name: str,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, with the arguments of transformers' AttentionInterface.

    Args:
        module: the layer; it owns the ScatterbrainAttention to use.
        query: (B, Hq, N, d); key: (B, Hkv, M, d); value: (B, Hkv, M, dv).
        attention_mask: a result of :func:`compact_mask`, or any mask of F.scaled_dot_product_attention.
        dropout: of attention weights; with it attention runs exactly.
        scaling: factor of q.k; default 1/sqrt(d).
        is_causal: for calls without a mask; default what was decided of the layer, else its attribute.
        name: of the implementation.

    Returns:
        (output (B, N, Hq, dv), None in place of attention weights).
    """
    _check_mask(module, attention_mask)
    _refuse(module, attention_mask, query.shape[2], key.shape[2], arguments)
    attention_mask = compacted(attention_mask, getattr(module, "config", None))
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:  # learned queries shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    core = layers.core_of(module)
    if core is None and name != PER_LAYER:
        core = _attach(module, name, query, key)
    causal = layers.is_causal_alone(module) if is_causal is None else is_causal
    causal = True if causal and query.shape[2] > 1 else False  # of symbols bool() may stay a symbol
    if attention_mask is None and causal and key.shape[2] > query.shape[2]:
        # The prompt in a static cache: the slots behind it are still empty.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    is_self = core is None or getattr(core, "is_self", True)
    visible = read_mask(attention_mask, causal, query.shape[0], query.shape[2], key.shape[2], is_self)
    if core is None or _is_exact(module, core, query, key.shape[2], visible, dropout, arguments):
        out = _exact(query, key, value, visible, dropout, scaling)
        out = out if core is None else core.with_zero_gradients(out)
    else:
        out = _approximate(module, core, query, key, value, visible, scaling)
        if visible.sequence is not None:
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            out = exact_if_packed(out, *cast_for_autocast(query, key, value), visible.sequence, scale)
    return out.transpose(1, 2).contiguous(), None


def _attach(module: nn.Module, name: str, query: Tensor, key: Tensor) -> ScatterbrainAttention:
    """For an implementation that was written into a layer's configuration without set_attn_implementation."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{type(module).__name__} was compiled before it owned a ScatterbrainAttention; choose the implementation "
            f"with model.set_attn_implementation({name!r}) before torch.compile"
        )
    heads = Heads(query.shape[1], query.shape[3], key.shape[1])
    (settings,) = settings_of_layers([(name, module.config, "")], is_whole=False)
    is_causal = layers.causality(module)
    layers.note_causality(module, is_causal)
    core = layers.attach(module, settings, heads=heads, is_causal=is_causal)
    core.registered = name, SETTINGS[name]
    return core


# -------------------- what is possible


def _check_mask(module: nn.Module, mask: Tensor | None) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
        kind = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{type(module).__name__} got an attention mask of {kind}, expected None or a 4-D tensor of "
            "AttentionMaskInterface; use attn_implementation='sdpa' for this model"
        )


def _refuse(module: nn.Module, mask: Tensor | None, queries: int, keys: int, arguments: dict[str, Any]) -> None:
    """Raises NotExpressible or another ValueError, with layer and cure, for arguments that sparse + low-rank attention
    cannot express."""
    layer = type(module).__name__
    for argument, what in REFUSED.items():
        if arguments.get(argument) is not None:
            raise NotExpressible(
                f"{layer} {what}, which sparse + low-rank attention does not have",
                "use attn_implementation='eager' for the whole model",
            )
    compact = is_compact(mask, queries)
    if compact and any(arguments.get(argument) is not None for argument in PACKED):
        raise ValueError(
            f"{layer} got sequences packed into one row (cu_seq_lens) and no mask that separates them; pad them into a "
            "batch instead"
        )
    window = arguments.get("sliding_window")
    if compact and window is not None and queries > 1 and keys > window:
        raise ValueError(
            f"{layer} has a sliding window of {window} keys, and its mask of {keys} keys says nothing of it; choose "
            "the implementation for the whole model (set_attn_implementation), so that it makes the masks too"
        )
    if arguments.get("output_attentions"):
        warn(f"{layer} returns no attention weights (output_attentions); use attn_implementation='eager' for them", 3)


def _is_exact(
    module: nn.Module,
    core: ScatterbrainAttention,
    query: Tensor,
    keys: int,
    visible: Visible,
    dropout: float,
    arguments: dict[str, Any],
) -> bool:
    """Whether this call runs exact attention; warns of it unless exact attention was chosen or there are few queries
    behind a cache."""
    if core.collects(visible.is_causal) and visible.dense is None:
        return False
    if core.support_of(visible.is_causal).is_full or query.shape[2] == 1 or _are_few(core, query, keys, visible):
        return True
    reason, low_rank = None, core.low_rank_of(visible.is_causal)
    # A layer that is causal by itself raises with the cure: it was given a kernel that serves none of its calls.
    module_is_causal = layers.is_causal_alone(module)
    window = arguments.get("sliding_window")
    if visible.dense is not None and window is not None and visible.dense.shape[-1] > window:
        reason = (
            f"it has a sliding window, {window} tokens wide, which is its own choice of keys; pass sequences of at "
            f"most {window} tokens, load the model with sliding_window=None (and layer_types of 'full_attention' "
            "alone, if it has them) to approximate attention to all tokens, or keep such layers exact with "
            "attn_implementation='sdpa' or sb.replace_attention(model, where=...)"
        )
    elif visible.dense is not None and visible.dense.is_floating_point():
        reason = (
            "its mask is added to the scores; pass an attention_mask (batch, tokens), 1 = keep, if that says the same"
        )
    elif visible.dense is not None:
        reason = (
            "its mask differs from query to query (packed sequences, a 4-D attention_mask, or masks of another "
            "implementation than this layer's); pass an attention_mask (batch, tokens), 1 = keep, if that says the "
            "same, and choose single layers with sb.replace_attention(model, where=...)"
        )
    elif visible.is_causal and not module_is_causal and low_rank is not None and low_rank.reads_input:
        reason = (
            f"its mask is causal, and {low_rank} reads the whole sequence; for causal calls choose another kernel, "
            "such as that of attn_implementation='scatterbrain:quadratic', and calibrate"
        )
    elif dropout > 0:
        reason = (
            f"dropout={dropout} acts on attention weights in training; call "
            "sb.set_attention_dropout(model, 0.0) before training"
        )
    if reason is not None:
        if not torch.compiler.is_compiling():
            core.bypassed = reason
        warn(f"{type(module).__name__} runs exact attention, without approximation: {reason}", 3)
    return reason is not None


def _are_few(core: ScatterbrainAttention, query: Tensor, keys: int, visible: Visible) -> bool:
    """Whether it is known that these are a few tokens behind a cache, of any lengths that a graph serves. The prompt in
    a static cache has empty slots behind it, and none before; what tells it from later tokens is the content of a
    tensor, which a graph does not have and a GPU is not asked for."""
    is_causal = visible.is_causal and visible.dense is None and getattr(core, "is_self", True)
    if not (is_causal and is_known(query.shape[2] <= FEW_QUERIES) and is_known(keys > query.shape[2])):
        return False
    offset = visible.query_offset
    return visible.is_behind or (isinstance(offset, Tensor) and is_readable(offset) and bool((offset > 0).any()))


# -------------------- compute


def _exact(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: float, scaling: float | None
) -> Tensor:
    mask, is_causal = dense_mask(visible, query.shape[2], key.shape[2])
    # bool: sizes are tensors under torch.jit.trace
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=bool(is_causal),
        scale=scaling,
        enable_gqa=bool(query.shape[1] != key.shape[1]),
    )


def _approximate(
    module: nn.Module,
    core: ScatterbrainAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible,
    scaling: float | None,
) -> Tensor:
    if not torch.compiler.is_compiling():
        layers.fit_to(module, core, query, key)
    if core.lacks_statistics(visible.is_causal):
        raise core.uncalibrated(type(module).__name__, visible.is_causal)
    return core(
        query,
        key,
        value,
        key_padding_mask=visible.key_padding_mask,
        is_causal=visible.is_causal,
        scale=scaling,
        query_padding_mask=visible.query_padding_mask,
        query_offset=visible.query_offset,
    )
