"""Registering attention implementations: "scatterbrain", its presets, and configurations of the user's own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from scatterbrain import presets
from scatterbrain.integrations.transformers.attention import attention_forward
from scatterbrain.integrations.transformers.masks import compact_mask
from scatterbrain.integrations.transformers.registry import PER_LAYER, PUBLISHERS, add
from scatterbrain.layer_settings import LayerSettings
from scatterbrain.nn.pairs import CAUSAL_SUPPORT, Choice, Pairs
from scatterbrain.supports import Full, Support

NAME = re.compile(r"scatterbrain(:[A-Za-z0-9._-]+)?")
# transformers takes a name that contains one of these for its own implementation and checks that one's requirements.
TAKEN = ("flash", "sdpa", "flex_attention")
# In causal layers those whose kernel reads the whole sequence have the pair of presets.causal.
_BUILT_IN: dict[str, Pairs] = {
    "scatterbrain": Pairs.chosen(),
    "scatterbrain:drop_in": Pairs.chosen(),
    "scatterbrain:quality": Pairs(*presets.quality(), *presets.causal()),
    "scatterbrain:fast": Pairs(*presets.fast(), *presets.causal()),
    "scatterbrain:quadratic": Pairs(*presets.quadratic(), CAUSAL_SUPPORT),
    "scatterbrain:causal": Pairs(*presets.causal()),
    "scatterbrain:train": Pairs(*presets.train()),
    "scatterbrain:paper": Pairs(*presets.paper()),
    "scatterbrain:full": Pairs(Full(), None),
}


def register(
    name: str,
    support: Support | None = None,
    low_rank: Choice = ...,
    causal_support: Support | None = None,
    causal_low_rank: Choice = ...,
    layers: LayerSettings | Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> str:
    """Makes ``name`` a value of ``attn_implementation=`` and ``set_attn_implementation``.

    ::

        register("scatterbrain:wide", sb.Routed(128), sb.Quadratic(9))
        model = AutoModel.from_pretrained(path, attn_implementation="scatterbrain:wide")

    A name is known to this process alone: register it before loading a model that was saved under it; a pickled model
    brings it along. Registering a name again affects models that choose it afterwards.

    Args:
        name: "scatterbrain:" and letters, digits, ".", "_" or "-".
        support: which keys are exact; default that of :func:`scatterbrain.presets.drop_in`, in causal calls that of
            :func:`scatterbrain.presets.causal`.
        low_rank: the kernel of the rest, None for none; default that of :func:`scatterbrain.presets.drop_in`, in causal
            calls that of :func:`scatterbrain.presets.causal`.
        causal_support: the support of causal calls, a decoder's self-attention; default ``support`` where that is
            given.
        causal_low_rank: their kernel, and that of a decoder's cross-attention where ``low_rank`` would read all target
            tokens; default ``low_rank`` where that is given.
        layers: a pair for every layer in place of one for all, as :func:`scatterbrain.replace_attention`; layers that
            it does not name are exact. Saving a model that runs under such a name writes them into its configuration
            (``scatterbrain_layers``), and "scatterbrain" runs a model with them wherever they are there.

    Returns:
        The name.

    Raises:
        ValueError: a name of another form, a built-in one, or one that transformers takes for another implementation;
            two different kernels with state.
        TypeError: a support or low-rank kernel of a wrong type.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"register: expected a name such as 'scatterbrain:mine' (letters, digits, '.', '_', '-'), got {name!r}"
        )
    if name in _BUILT_IN or name == PER_LAYER:
        raise ValueError(f"register: {name!r} is built in; choose another name")
    for word in TAKEN:
        if word in name:
            raise ValueError(f"register: transformers takes a name with {word!r} for its own, got {name!r}; rename it")
    if layers is not None:
        if (support, low_rank, causal_support, causal_low_rank) != (None, ..., None, ...):
            raise ValueError("register: layers has a support and a kernel for every layer; give no others")
        add(name, LayerSettings.of(layers))
        return name
    pairs = Pairs.chosen(support, low_rank, causal_support, causal_low_rank)
    pairs.check()
    add(name, pairs)
    return name


def _publish(name: str) -> None:
    """Registers attention and mask function; without the second transformers silently drops padding."""

    def attention(module, query, key, value, attention_mask, **arguments):
        return attention_forward(module, query, key, value, attention_mask, name=name, **arguments)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, compact_mask)


PUBLISHERS.append(_publish)


def register_built_in() -> None:
    """ "scatterbrain" and the presets, each with its default budget."""
    for name, pairs in _BUILT_IN.items():
        add(name, pairs)
    _publish(PER_LAYER)
