"""Wrappers around methods of PreTrainedModel that attach ScatterbrainAttention when a model is built, loaded, or given
another implementation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from scatterbrain.integrations.transformers import checkpoint
from scatterbrain.integrations.transformers.checkpoint import OWNED
from scatterbrain.integrations.transformers.layers import (
    attach,
    attention_layers,
    causality,
    core_of,
    implementation,
    note_causality,
    park,
)
from scatterbrain.integrations.transformers.own_attention import (
    computes_itself,
    exact_name,
    ignores_choice,
    inner_configs,
    is_built_of_own,
)
from scatterbrain.integrations.transformers.registry import (
    PER_LAYER,
    PREFIX,
    SETTINGS,
    check_registered,
    is_ours,
    settings_of_layers,
)
from scatterbrain.integrations.transformers.token_order import declare, follow_configuration
from scatterbrain.integrations.vision import exact_class_tokens
from scatterbrain.nn.attention import join_layers
from scatterbrain.nn.warn import warn


def adopt(model: nn.Module, is_whole: bool = True) -> None:
    """Gives a ScatterbrainAttention to every attention layer of ``model`` whose configuration names one of our
    implementations, takes it from every other layer, and orders image tokens accordingly.

    Raises:
        ValueError: settings of a part of which the model has several that would fit, or where ``is_whole`` is True, the
            other way about; before anything is changed.
    """
    found = [(path, module, implementation(module)) for path, module in attention_layers(model)]
    asked = [(name, module.config, path) for path, module, name in found if name in SETTINGS]
    settings_of = iter(settings_of_layers(asked, type(model).__name__, is_whole))
    for seed, (path, module, name) in enumerate(found):
        if name in SETTINGS:
            settings, is_causal = next(settings_of), causality(module, model, path)
            note_causality(module, is_causal, path)
            core = attach(module, settings, path, seed=seed, is_causal=is_causal)
            core.registered = name, SETTINGS[name]
        elif name != PER_LAYER:
            park(module)
    exact_class_tokens(model)
    join_layers(model)
    follow_configuration(model)
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel) and any(core_of(module) for _, module in attention_layers(inner)):
            # A checkpoint without our entries is that of an ordinary model, which loads without a warning.
            patterns = set(getattr(inner, "_keys_to_ignore_on_load_missing", None) or ())
            inner._keys_to_ignore_on_load_missing = patterns | {OWNED.replace(".", r"\.")}


def refuse_family(model: PreTrainedModel, config: PreTrainedConfig, name: str, is_built: bool = False) -> None:
    """Raises ValueError for a model that computes attention in its own code and would silently ignore the choice, or
    fail to find it in a table.

    Args:
        is_built: whether its layers are there to look at, which tells of models that are not of transformers.
    """
    can_set, is_own = model._can_set_attn_implementation(), is_built_of_own(model, config)
    if can_set and not is_own and not (is_built and ignores_choice(model)):
        return
    cure = "models of this family are not supported"
    others = [path for path, inner in inner_configs(config) if "." not in path and not computes_itself(inner)]
    if can_set and is_own and others:
        parts = {path: name for path in others}
        cure = f"choose it for its other parts alone, with attn_implementation={parts} or sb.replace_attention(model)"
    raise ValueError(
        f"{type(model).__name__} ({config.model_type}) computes attention in its own code and does not ask "
        f"transformers' AttentionInterface, so attn_implementation={name!r} would change nothing; {cure}"
    )


def leave_exact(model: PreTrainedModel, config: PreTrainedConfig, before: dict[int, str | None]) -> None:
    """Takes a name of ours from the configurations of those parts of a model that compute attention in their own code,
    and warns of it.

    Args:
        before: what configurations named before, by their identity.
    """
    for path, inner in inner_configs(config):
        name = inner._attn_implementation
        if is_ours(name) and computes_itself(inner):
            known = before.get(id(inner), name)
            inner._attn_implementation_internal = exact_name(inner) if known is None or is_ours(known) else known
            warn(
                f"{type(model).__name__}: its {path} ({inner.model_type}) keeps exact attention, which it computes in "
                f"its own code; attn_implementation={name!r} is for the other parts",
                4,
            )


def _init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        name = getattr(config, "_attn_implementation", None)
        if isinstance(name, str) and name.startswith(PREFIX):  # before the model looks up a class by this name
            check_registered(name)
            refuse_family(self, config, name)
        if isinstance(config, PreTrainedConfig):
            leave_exact(self, config, {})
        original(self, config, *args, **kwargs)

    return init


def _post_init(original: Callable[[PreTrainedModel], None]) -> Callable[[PreTrainedModel], None]:
    @functools.wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        original(self)
        name = getattr(self.config, "_attn_implementation", None)
        if is_ours(name) and ignores_choice(self) and _is_outermost():
            refuse_family(self, self.config, name, is_built=True)
        adopt(self, is_whole=_is_outermost())  # a model around it has the longer paths

    return post_init


def _is_outermost() -> bool:
    """Whether no more than one __init__ of a model runs at the moment: that of a model around this one, or of a class
    that extends its class, may go on with parts that ask for attention functions, and its paths are longer."""
    frame, running = inspect.currentframe(), 0
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount:
            running += isinstance(frame.f_locals.get(code.co_varnames[0]), PreTrainedModel)
        frame = frame.f_back
    return running <= 1


def _set_attn_implementation(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def set_attn_implementation(self: PreTrainedModel, attn_implementation: str | dict, *args: Any, **kwargs: Any):
        if isinstance(attn_implementation, str) and attn_implementation.startswith(PREFIX):
            check_registered(attn_implementation)
            for inner in self.modules():
                if inner is self:
                    refuse_family(self, self.config, attn_implementation, is_built=True)
                elif isinstance(inner, PreTrainedModel) and not computes_itself(inner.config):
                    refuse_family(inner, inner.config, attn_implementation)
        configs = self.config, *(inner for _, inner in inner_configs(self.config))
        before = {id(config): config._attn_implementation for config in configs}
        original(self, attn_implementation, *args, **kwargs)
        leave_exact(self, self.config, before)
        try:
            adopt(self)
        except ValueError:
            for config in configs:
                config._attn_implementation_internal = before[id(config)]
            raise

    return set_attn_implementation


def _move_missing(original: Callable[..., None]) -> Callable[..., None]:
    """While loading, transformers replaces entries that a checkpoint lacks by uninitialised memory, and initializes the
    modules that they belong to. Ours are never on the meta device and have their initial values already, so they stay,
    modules of the user's that a low-rank kernel computes with included."""

    @functools.wraps(original)
    def move_missing(self: PreTrainedModel, missing_keys: set[str], *args: Any, **kwargs: Any) -> None:
        original(self, {key for key in missing_keys if OWNED not in key}, *args, **kwargs)
        for _, module in attention_layers(self):
            for part in () if core_of(module) is None else core_of(module).modules():
                part._is_hf_initialized = True

    return move_missing


def _load_pretrained_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_pretrained_model(
        model: PreTrainedModel, state_dict: dict[str, Any] | None, checkpoint_files: list[str] | None, *args, **kwargs
    ) -> Any:
        result = original(model, state_dict, checkpoint_files, *args, **kwargs)
        checkpoint.take_extra_states(model, result[0], state_dict, checkpoint_files)
        return result

    return load_pretrained_model


def _finalize_model_loading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def finalize_model_loading(model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
        checkpoint.settle(model, loading_info)
        return original(model, load_config, loading_info)

    return finalize_model_loading


_WRAPPERS = {
    "__init__": _init,
    "post_init": _post_init,
    "set_attn_implementation": _set_attn_implementation,
    "_load_pretrained_model": _load_pretrained_model,
    "_finalize_model_loading": _finalize_model_loading,
    "_move_missing_keys_from_meta_to_device": _move_missing,
}


def install() -> None:
    """Wraps the methods of PreTrainedModel, once."""
    declare()
    for name, wrapper in _WRAPPERS.items():
        original = getattr(PreTrainedModel, name, None)
        if original is None:
            raise ImportError(
                f"transformers {transformers.__version__} has no PreTrainedModel.{name}, which this integration builds "
                "on; install a version that pip install 'scatterbrain[transformers]' chooses"
            )
        if not getattr(original, "_scatterbrain", False):
            wrapped = wrapper(original)
            wrapped._scatterbrain = True
            is_static = isinstance(inspect.getattr_static(PreTrainedModel, name), staticmethod)
            setattr(PreTrainedModel, name, staticmethod(wrapped) if is_static else wrapped)
