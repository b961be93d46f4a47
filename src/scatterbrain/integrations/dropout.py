"""Dropout of attention weights, which sparse + low-rank attention does not have: layers with it run exactly in
training."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterable, Iterator
from itertools import pairwise
from types import CodeType
from typing import NamedTuple

from torch import nn

from scatterbrain.integrations.replacer import prepare_replacers, replacer_of
from scatterbrain.nn.host_module import HostModule

# What families of models call it; of several names that a module's methods read the first counts.
_NAMES = (
    "attention_dropout",
    "attn_dropout",
    "attn_drop",
    "dropout_prob",
    "dropout",
    "dropout_p",
    "attention_probs_dropout_prob",
)


def set_attention_dropout(model: nn.Module, p: float = 0.0) -> list[str]:
    """Sets the dropout of attention weights in every attention layer of ``model``, under whatever name its family of
    models has it: nn.MultiheadAttention and layers of transformers and timm, replaced or not. Other dropout stays;
    layers of diffusers have none of attention weights.

    In training, attention with such dropout is exact and takes exact attention's time. Many models have it by default
    (BERT and nn.TransformerEncoderLayer 0.1), so before training::

        sb.replace_attention(model)
        sb.set_attention_dropout(model, 0.0)

    The configuration of a transformers model keeps its own value, unless layers read it there in every call (those of
    Persimmon): a model that is saved and loaded has that dropout again, so call this after every load.

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
    found = {path: _dropout_of(module) for path, module in model.named_modules() if _is_attention(module)}
    changed = [path for path, dropout in found.items() if dropout is not None and dropout.p != p]
    for path in changed:
        found[path].set(float(p))
    return changed


def _is_attention(module: nn.Module) -> bool:
    if type(module).__module__.startswith("diffusers."):  # its "dropout" is that of the output
        return False
    return isinstance(module, (nn.MultiheadAttention, HostModule)) or replacer_of(module) is not None


class Dropout(NamedTuple):
    """Where a layer has its probability: an attribute of itself or of its configuration, a number or an nn.Dropout."""

    owner: object
    name: str

    @property
    def p(self) -> float | None:
        """The probability; None where there is none of that name."""
        value = getattr(self.owner, self.name, None)
        value = value.p if isinstance(value, nn.Dropout) else value
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def set(self, p: float) -> None:
        value = getattr(self.owner, self.name)
        if isinstance(value, nn.Dropout):
            value.p = p
        else:
            setattr(self.owner, self.name, p)


def _dropout_of(module: nn.Module) -> Dropout | None:
    """None where the module has no such dropout."""
    places = (
        Dropout(module.config if in_config else module, name) for in_config, name in _places_of_class(type(module))
    )
    return next((place for place in places if place.p is not None), None)


@functools.cache
def _places_of_class(cls: type[nn.Module]) -> list[tuple[bool, str]]:
    methods = (
        inspect.unwrap(method)
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]
        for name, method in vars(base).items()
        if callable(method) and name != "__init__"
    )
    return places_read([method.__code__ for method in methods if hasattr(method, "__code__")])


def places_read(methods: Iterable[CodeType]) -> list[tuple[bool, str]]:
    """The names of such dropout that methods of a layer read, the one that counts first, each with whether they read it
    from the layer's configuration. Some layers have dropout of these names that they do not use."""
    found = {place for code in methods for place in _reads(code)}
    return sorted(found, key=lambda place: (_NAMES.index(place[1]), place[0]))


def _reads(code: CodeType) -> Iterator[tuple[bool, str]]:
    for before, instruction in pairwise(dis.get_instructions(code)):
        is_name = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and instruction.argval in _NAMES
        if is_name and before.argval not in ("functional", "F"):  # of torch.nn
            yield before.opname == "LOAD_ATTR" and before.argval == "config", instruction.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _reads(inner)
