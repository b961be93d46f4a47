"""diffusers: an attention processor for self and cross attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from scatterbrain.integrations.replacer import register_replacer
from scatterbrain.integrations.restrictions import NotReplaceable, errors_as_reasons
from scatterbrain.low_rank import LowRank
from scatterbrain.nn.host_module import HostModule, attention_unless_exact, has_weight
from scatterbrain.nn.masks import padding_of
from scatterbrain.nn.pairs import LOW_RANK, SUPPORT, Pairs
from scatterbrain.supports import Support

HIDDEN = -9000.0  # diffusers adds -10000 to scores of hidden keys, which bfloat16 rounds to -9984


class ScatterbrainAttnProcessor(HostModule, nn.Module):
    """Sparse + low-rank attention in a diffusers ``Attention`` layer, where AttnProcessor2_0 computes exact attention.

    A submodule of its layer: calibrated statistics or learned projections are in the model's state dict and move with
    it. Every layer needs a processor of its own::

        model.set_attn_processor(processors(model, support, low_rank))

    An ``attention_mask`` that only hides keys (for all queries of an image alike, as diffusers makes it from
    ``encoder_attention_mask``) is honoured; any other runs exactly, as AttnProcessor2_0 computes it, and warns once.
    Where a finite number, such as diffusers' -10000, hides every key of an image, none is hidden: AttnProcessor2_0 adds
    it to all scores there, which leaves their softmax as it was. A number as low as the dtype's lowest absorbs the
    scores: AttnProcessor2_0 then takes the mean of all values, and this still weighs them. Where bool or -inf hides
    every key, the result of attention is 0, as that of torch's.
    ``support=Full()`` is AttnProcessor2_0 itself; ``attention`` is then None and ``low_rank`` unused.

    Args:
        num_heads, head_dim: of the layer.
        support, low_rank: default those of :func:`scatterbrain.presets.drop_in`, which need no calibration.

    Raises:
        ValueError: for a low-rank kernel that does not fit the head.
    """

    _made_for: tuple[Attention, ...] = ()

    def __init__(self, num_heads: int, head_dim: int, support: Support = SUPPORT, low_rank: LowRank = LOW_RANK) -> None:
        super().__init__()
        self._attach(attention_unless_exact(num_heads, head_dim, Pairs(support, low_rank)))
        self._layer: list[Attention] = []  # in a list, so that it is no submodule

    def _is_of_original(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> bool:
        # AttnProcessor2_0 has no entries, and a submodule does not see those of its layer, which is loaded before it.
        # Without a prefix the processor is loaded by itself, where missing entries are an error.
        return prefix != "" and not has_weight(missing_keys, f"{prefix.removesuffix('processor.')}to_q")

    def _device_of(self, state_dict: dict[str, Any], prefix: str) -> torch.device:
        # A submodule is shown its own entries alone, of which an original has none. Its layer, which is loaded before
        # it, has what the checkpoint's entries were assigned to.
        layers = [*self._layer, *self._made_for]
        if layers and not any(isinstance(entry, Tensor) for entry in state_dict.values()):
            return layers[0].to_q.weight.device
        return super()._device_of(state_dict, prefix)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Called by the layer, with its own arguments."""
        self._check_layer(attn)
        arguments = (attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if self.attention is None:
            return AttnProcessor2_0()(*arguments)
        keys = _tokens(hidden_states if encoder_hidden_states is None else encoder_hidden_states)
        padding = None
        if attention_mask is not None:
            padding = _key_padding(attention_mask, hidden_states.shape[0], keys)
            if padding is None:
                self._warn_exact("attention_mask is more than the padding of keys; pass (batch, 1, keys) or none")
                return self.attention.with_zero_gradients(AttnProcessor2_0()(*arguments))
        return self._attend(attn, hidden_states, encoder_hidden_states, padding, temb)

    def _check_layer(self, attn: Attention) -> None:
        if not self._layer:
            self._layer.append(attn)
        if self._layer[0] is not attn and not getattr(attn, "_is_replica", False):
            raise ValueError(
                "ScatterbrainAttnProcessor: a processor holds the statistics of one layer, got a second layer; use "
                "model.set_attn_processor(scatterbrain.integrations.diffusers.processors(model))"
            )

    def _attend(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        padding: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor:
        # 1. Image tokens: norms; a map (batch, channels, height, width) becomes a sequence.
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape if hidden_states.dim() == 4 else None
        if shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        # 2. Queries of the image tokens; keys and values of the same or of the other sequence.
        context = encoder_hidden_states
        if context is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        projections = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projections)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        # 3. Attention. Only keys are padded: every image token is a query.
        queries = None if padding is None else padding.new_zeros(q.shape[0], q.shape[2])
        out = self.attention(q, k, v, key_padding_mask=padding, query_padding_mask=queries)
        # 4. Output projection with its dropout, and back to a map.
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2).to(q.dtype)))
        if shape is not None:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


def _tokens(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 3 else x.shape[2] * x.shape[3]


def _key_padding(mask: Tensor, batch: int, keys: int) -> Tensor | None:
    """(batch, keys) of a mask (batch, keys) or (batch, 1, keys), which the layer repeats for its heads. A row that
    hides every key hides none by a finite number."""
    if mask.shape[0] != batch or mask.numel() != batch * keys or mask.shape[-1] != keys:
        return None
    padding = padding_of(mask.reshape(batch, 1, 1, keys), batch, keys, HIDDEN)
    if padding is None or not mask.is_floating_point():
        return padding
    return padding & ~(padding.all(-1, keepdim=True) & mask.reshape(batch, keys).isfinite())


# -------------------- whole models


def processors(model: nn.Module, support: Support = SUPPORT, low_rank: LowRank = LOW_RANK) -> dict[str, Any]:
    """Processors for ``model.set_attn_processor``: a new one for every layer that can have one, the present one for the
    others. :func:`scatterbrain.replace_attention` sets them too, and says which layers were left and why.

    Args:
        model: a model of diffusers with ``attn_processors``.
        support, low_rank: as :class:`ScatterbrainAttnProcessor`.
    """
    found = dict(model.attn_processors)
    for name, layer in model.named_modules():
        if f"{name}.processor" in found and type(layer) is Attention and _obstacle(layer) is None:
            found[f"{name}.processor"] = _processor_for(layer, support, low_rank)
    return found


def _processor_for(layer: Attention, support: Support, low_rank: LowRank) -> ScatterbrainAttnProcessor:
    processor = ScatterbrainAttnProcessor(layer.heads, layer.inner_dim // layer.heads, support, low_rank)
    processor._made_for = (layer,)  # in a tuple, as above
    return processor.to(layer.to_q.weight.device).train(layer.training)


def _obstacle(layer: Attention) -> str | None:
    """Why a layer cannot have the processor; None if it can."""
    processor = type(layer.processor).__name__
    if type(layer.processor) is not AttnProcessor2_0:
        joint = ": it attends over two joined streams of tokens" if "Joint" in processor or "Flux" in processor else ""
        return f"its processor is {processor}, not AttnProcessor2_0{joint}"
    if layer.fused_projections:
        return "its projections are fused; call unfuse_qkv_projections() first"
    if layer.add_k_proj is not None or layer.to_k is None:
        return "it has added key and value projections"
    if layer.inner_kv_dim != layer.inner_dim:
        return "its keys have fewer heads than its queries, which AttnProcessor2_0 does not support either"
    return None


# -------------------- replacers


class AttentionReplacer:
    """diffusers' Attention with its standard processor gets a :class:`ScatterbrainAttnProcessor`."""

    def matches(self, module: nn.Module) -> bool:
        return type(module) is Attention

    def replace(self, module: Attention, support: Support, low_rank: LowRank) -> tuple[str, Callable[[], None]]:
        obstacle = _obstacle(module)
        if obstacle is not None:
            raise NotReplaceable(obstacle)
        with errors_as_reasons():
            processor = _processor_for(module, support, low_rank)
        before = module.processor
        module.set_processor(processor)

        def undo() -> None:
            module._modules.pop("processor", None)
            module.processor = before

        note = ""
        if module.is_cross_attention and not support.is_full:
            note = "cross attention: with few keys exact attention is faster; where= leaves it out"
        return note, undo


class UnsupportedAttention:
    """Attention classes of diffusers with processors of their own: left alone, with the reason."""

    def matches(self, module: nn.Module) -> bool:
        cls = type(module)
        own = cls.__module__.startswith("diffusers.") and cls is not Attention and not is_parametrized(module)
        return own and hasattr(module, "processor") and next(module.parameters(), None) is not None

    def replace(self, module: nn.Module, support: Support, low_rank: LowRank) -> tuple[str, Callable[[], None]]:
        raise NotReplaceable(
            f"{type(module).__name__} runs {type(module.processor).__name__}; only diffusers' Attention with "
            "AttnProcessor2_0 is handled"
        )


register_replacer(UnsupportedAttention())
register_replacer(AttentionReplacer())
