"""The order of image tokens in models that choose the implementation by name: what the attribute
``scatterbrain_token_order`` of their configuration asks for."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig

from scatterbrain.integrations.token_order import FAMILIES, order_tokens, restore_order
from scatterbrain.integrations.transformers.layers import attention_layers, core_of
from scatterbrain.integrations.vision import (
    CONFIGURED,
    apply_order,
    check_token_order,
    family_of,
    gaining_cores,
    obstacle,
)


def declare() -> None:
    """Gives every configuration the attribute, so that from_pretrained takes it as a keyword and files without it mean
    "auto"."""
    setattr(PreTrainedConfig, CONFIGURED, "auto")


def follow_configuration(model: nn.Module) -> None:
    """Orders the tokens of every vision transformer inside ``model`` as its configuration wants, or that of the model
    around it, and puts them back where no layer is left that computes our attention.

    Raises:
        ValueError: a value that is none of token_order's; "hilbert" where no vision transformer can be ordered.
    """
    for path, module in list(model.named_modules()):
        name = family_of(module)
        if name is None:
            continue
        choice, order = _choice(model, path), getattr(module, "_token_order", None)
        gains = choice == "hilbert" or (choice == "auto" and bool(gaining_cores(module)))
        asked = order is not None and order.is_strict and choice == "auto"  # by replace_attention
        if order is not None and not (_has_core(module) and (gains or asked)):
            restore_order(module)
        elif order is not None:
            order.is_strict = order.is_strict or choice == "hilbert"
        elif gains and _has_core(module) and obstacle(module, FAMILIES[name]) is None:
            order_tokens(module, name, FAMILIES[name], is_strict=choice == "hilbert")
    if _choice(model, "") != "hilbert" or not _has_core(model) or _is_part(model):
        return
    if not any(hasattr(module, "_token_order") for module in model.modules()):
        apply_order(model, CONFIGURED)  # raises, with the reasons


def _choice(model: nn.Module, path: str) -> Any:
    """What the configuration of the module at ``path`` says, else that of the nearest model around it that says
    something, else "auto"."""
    names = path.split(".") if path else []
    for length in range(len(names), -1, -1):
        config = getattr(model.get_submodule(".".join(names[:length])), "config", None)
        if isinstance(config, PreTrainedConfig) and CONFIGURED in vars(config):
            choice = getattr(config, CONFIGURED)
            check_token_order(choice, CONFIGURED)
            return choice
    return "auto"


def _is_part(model: nn.Module) -> bool:
    """Whether this is a class that transformers builds inside its models alone, such as an encoder: it shares the
    configuration of the model around it."""
    cls = type(model)
    return cls.__module__.startswith("transformers.") and not hasattr(transformers, cls.__name__)


def _has_core(model: nn.Module) -> bool:
    return any(core_of(module) is not None for _, module in attention_layers(model))
