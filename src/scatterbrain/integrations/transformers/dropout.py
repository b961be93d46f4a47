"""Dropout of attention weights, which sparse + low-rank attention does not have."""

from __future__ import annotations

from torch import nn

from scatterbrain.integrations.transformers.layers import attention_layers

_NAMES = ("attention_dropout", "attn_dropout", "dropout", "dropout_p", "attention_probs_dropout_prob")


def set_attention_dropout(model: nn.Module, p: float = 0.0) -> list[str]:
    """Sets the dropout of attention weights in every attention layer of ``model``, under whatever name its family of
    models has it. Other dropout stays.

    Returns:
        Paths of the layers that were changed.
    """
    changed = []
    for path, module in attention_layers(model):
        for name in _NAMES:
            value = getattr(module, name, None)
            if isinstance(value, nn.Dropout):
                value.p, is_set = p, value.p != p
            elif isinstance(value, float):
                setattr(module, name, p)
                is_set = value != p
            else:
                continue
            changed += [path] if is_set else []
            break
    return changed
