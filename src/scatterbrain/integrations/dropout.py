"""Dropout of attention weights, which sparse + low-rank attention does not have: layers with it run exactly in
training."""

from __future__ import annotations

from torch import nn

from scatterbrain.integrations.replacer import prepare_replacers, replacer_of
from scatterbrain.nn.host_module import HostModule

# What families of models call it; of several names of a module the first counts.
_NAMES = ("attention_dropout", "attn_dropout", "attn_drop", "dropout", "dropout_p", "attention_probs_dropout_prob")


def set_attention_dropout(model: nn.Module, p: float = 0.0) -> list[str]:
    """Sets the dropout of attention weights in every attention layer of ``model``, under whatever name its family of
    models has it: nn.MultiheadAttention and layers of transformers and timm, replaced or not. Other dropout stays;
    layers of diffusers have none of attention weights.

    In training, attention with such dropout is exact and takes exact attention's time. Many models have it by default
    (BERT and nn.TransformerEncoderLayer 0.1), so before training::

        sb.replace_attention(model)
        sb.set_attention_dropout(model, 0.0)

    The configuration of a transformers model keeps its own value: a model that is saved and loaded has that dropout
    again, so call this after every load.

    Args:
        model: any module.
        p: the new probability, in [0, 1]. Default 0, without dropout.

    Returns:
        Paths of the layers that were changed.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: p outside of [0, 1].
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"set_attention_dropout: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"set_attention_dropout: p must be a probability between 0 and 1, got {p!r}")
    prepare_replacers(model)
    return [path for path, module in model.named_modules() if _is_attention(module) and _set(module, float(p))]


def _is_attention(module: nn.Module) -> bool:
    if type(module).__module__.startswith("diffusers."):  # its "dropout" is that of the output
        return False
    return isinstance(module, (nn.MultiheadAttention, HostModule)) or replacer_of(module) is not None


def _set(module: nn.Module, p: float) -> bool:
    """Whether the module has such dropout and it was another one."""
    for name in _NAMES:
        value = getattr(module, name, None)
        if isinstance(value, nn.Dropout):
            value.p, before = p, value.p
        elif isinstance(value, float):
            setattr(module, name, p)
            before = value
        else:
            continue
        return before != p
    return False
