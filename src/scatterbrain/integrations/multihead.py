"""nn.MultiheadAttention becomes sb.MultiheadAttention."""

from __future__ import annotations

from torch import nn

from scatterbrain.integrations.replacer import ClassReplacer, register_replacer
from scatterbrain.integrations.restrictions import NotReplaceable
from scatterbrain.nn.multihead import MultiheadAttention


def _refuse_added_keys(module: nn.MultiheadAttention) -> None:
    if module.bias_k is not None or module.add_zero_attn:
        name = "add_zero_attn" if module.bias_k is None else "add_bias_kv"
        raise NotReplaceable(f"{name}=True adds a key that no support holds")


def _dropout(module: nn.MultiheadAttention) -> str:
    if module.dropout == 0:
        return ""
    return f"exact in training for its dropout={module.dropout} on weights; call sb.set_attention_dropout(model, 0.0)"


register_replacer(ClassReplacer(nn.MultiheadAttention, MultiheadAttention, _dropout, _refuse_added_keys))
