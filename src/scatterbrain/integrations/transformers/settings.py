"""Registering attention implementations: "scatterbrain", its presets, and configurations of the user's own."""

from __future__ import annotations

import re

from transformers import AttentionInterface, AttentionMaskInterface

from scatterbrain import presets
from scatterbrain.checks import check_causal_support, check_pair
from scatterbrain.integrations.transformers.attention import attention_forward
from scatterbrain.integrations.transformers.masks import compact_mask
from scatterbrain.integrations.transformers.registry import PER_LAYER, PUBLISHERS, Settings, add
from scatterbrain.low_rank import LowRank
from scatterbrain.nn.host_module import CAUSAL_SUPPORT, LOW_RANK, SUPPORT, with_defaults
from scatterbrain.supports import Full, Support

NAME = re.compile(r"scatterbrain(:[A-Za-z0-9._-]+)?")
# transformers takes a name that contains one of these for its own implementation and checks that one's requirements.
TAKEN = ("flash", "sdpa", "flex_attention")
_BUILT_IN = ("scatterbrain", "scatterbrain:drop_in", "scatterbrain:train", "scatterbrain:paper", "scatterbrain:full")


def register(
    name: str,
    support: Support | None = None,
    low_rank: LowRank | object = ...,
    causal_support: Support | None = None,
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
        low_rank: the kernel of the rest, None for none; default that of :func:`scatterbrain.presets.drop_in`.
        causal_support: the support of causal calls, a decoder's self-attention; default ``support`` where that is
            given.

    Returns:
        The name.

    Raises:
        ValueError: a name of another form, a built-in one, or one that transformers takes for another implementation.
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
    support, causal_support = with_defaults(support, causal_support)
    return _register(name, support, LOW_RANK if low_rank is ... else low_rank, causal_support)


def _register(name: str, support: Support, low_rank: LowRank, causal_support: Support | None = None) -> str:
    check_pair(support, low_rank, is_causal=False)
    if causal_support is not None:
        check_causal_support(causal_support)
    add(name, Settings(support, low_rank, causal_support))
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
    drop_in = (SUPPORT, LOW_RANK, CAUSAL_SUPPORT)
    for name, settings in zip(_BUILT_IN, (drop_in, drop_in, presets.train(), presets.paper())):
        _register(name, *settings)
    _register("scatterbrain:full", Full(), None)
    _publish(PER_LAYER)
