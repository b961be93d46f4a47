"""Which models of transformers compute attention in code of their own, read from their classes before they are built.

A file that asks transformers' AttentionInterface somewhere may hold other attention beside it: classes that compute
scores themselves, or a table of classes by the name of an implementation, in which names of this package are no keys.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from scatterbrain.integrations.transformers.layers import attention_layers, is_of_transformers, routes

_SCORES = ("softmax", "scaled_dot_product_attention")
_CALLED = ("Attention", "Attn")  # part of the names of classes that are attention


class Parts(NamedTuple):
    """The attention that a class of models is built of, apart from models with a configuration of their own.

    Args:
        routed: classes that ask for an attention function.
        own: classes that compute scores themselves.
    """

    routed: frozenset[type[nn.Module]]
    own: frozenset[type[nn.Module]]


def computes_itself(config: PreTrainedConfig) -> bool:
    """Whether all attention under a configuration of transformers is code of the model's own, which ignores the
    implementation that the configuration names, or fails to find it in a table, though transformers takes the choice.
    Of other configurations this is not known: their models may build parts by the name of a class in a file."""
    return is_of_transformers(type(config)) and _computes_itself(type(config))


@functools.cache
def _computes_itself(config_class: type[PreTrainedConfig]) -> bool:
    parts = [attention_of(model) for model in models_of(config_class) if model._can_set_attn_implementation()]
    return any(part.own for part in parts) and not any(part.routed for part in parts)


def is_built_of_own(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    """Whether it is certain before a model is built that all of its attention will be code of its own."""
    if not computes_itself(config):
        return False
    cls = type(model)  # one of a user's may share no more than the configuration with the models of transformers
    return is_of_transformers(cls) or _is_own(cls, is_of_transformers)


def ignores_choice(model: PreTrainedModel) -> bool:
    """Whether a model that is built has attention of its own and no layer that asks for an attention function."""
    return next(attention_layers(model), None) is None and _is_own(type(model))


def _is_own(model: type[PreTrainedModel], counts: Callable[[type[nn.Module]], bool] = lambda cls: True) -> bool:
    try:
        parts = attention_of(model)
    except Exception:  # code that cannot be read refuses no model
        return False
    return any(map(counts, parts.own)) and not parts.routed


def exact_name(config: PreTrainedConfig) -> str:
    """The implementation for a configuration whose attention is code of the model's own."""
    has_sdpa = any(getattr(model, "_supports_sdpa", False) for model in models_of(type(config)))
    return "sdpa" if has_sdpa else "eager"


def inner_configs(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """(path, configuration) of the parts of a model that have one."""
    for name in getattr(config, "sub_configs", None) or ():
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield path + name, inner
            yield from inner_configs(inner, f"{path}{name}.")


def models_of(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """The classes of models with this configuration, in the file beside that of the configuration's class. Files of
    others than transformers are not imported for it."""
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    file = _file(name) if is_of_transformers(config_class) else sys.modules.get(name)
    found = [] if file is None else list(vars(file).values())
    models = [c for c in found if inspect.isclass(c) and issubclass(c, PreTrainedModel)]
    return [c for c in models if c.__module__ == file.__name__ and c.config_class is config_class]


def _file(name: str) -> ModuleType | None:
    try:
        return sys.modules.get(name) or importlib.import_module(name)
    except Exception:  # there is none, or it needs packages that are not installed, or too old, or break
        return None


@functools.cache
def attention_of(model: type[PreTrainedModel]) -> Parts:
    """The attention in what ``model`` and its parts build, by the classes that their __init__ names."""
    seen: set[type[nn.Module]] = {model}
    todo = [model]
    while todo:
        for cls in _built_by(todo.pop()):
            if cls not in seen and not (issubclass(cls, PreTrainedModel) and _is_another(cls, model)):
                seen.add(cls)
                todo.append(cls)
    return Parts(frozenset(filter(routes, seen)), frozenset(filter(_computes_scores, seen)))


def _is_another(part: type[PreTrainedModel], model: type[PreTrainedModel]) -> bool:
    """Whether ``part`` takes another configuration than ``model``, which may extend that of its parts."""
    inner, outer = part.config_class, model.config_class
    return inner is not outer and not (inspect.isclass(inner) and inspect.isclass(outer) and issubclass(outer, inner))


def _built_by(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """Classes of modules that the __init__ of a class names, itself or in a table."""
    for base in _own_bases(cls):
        code = getattr(inspect.unwrap(vars(base).get("__init__")), "__code__", None)
        known = vars(sys.modules.get(base.__module__, object))
        for value in [known.get(name) for name in ([] if code is None else names_in(code))]:
            for found in value.values() if isinstance(value, dict) else (value,):
                if inspect.isclass(found) and issubclass(found, nn.Module):
                    yield found


def _own_bases(cls: type[nn.Module]) -> list[type]:
    """The classes that ``cls`` inherits from, itself among them, apart from those of torch and PreTrainedModel."""
    general = set(PreTrainedModel.__mro__)
    return [base for base in cls.__mro__ if base not in general and not base.__module__.startswith("torch.")]


def _computes_scores(cls: type[nn.Module]) -> bool:
    if routes(cls) or issubclass(cls, PreTrainedModel) or not any(part in cls.__name__ for part in _CALLED):
        return False
    return any(name in _SCORES for code in codes_of(cls) for name in names_in(code))


def codes_of(cls: type[nn.Module]) -> Iterator[CodeType]:
    """The code of a class's methods, without those of torch and PreTrainedModel."""
    methods = (inspect.unwrap(method) for base in _own_bases(cls) for method in vars(base).values() if callable(method))
    return (method.__code__ for method in methods if isinstance(getattr(method, "__code__", None), CodeType))


def names_in(code: CodeType) -> Iterator[str]:
    """Names that a piece of code uses, its inner functions and comprehensions included."""
    yield from code.co_names
    inner: list[Any] = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for each in inner:
        yield from names_in(each)
