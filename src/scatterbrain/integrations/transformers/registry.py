"""The attention implementations that a model can choose by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from scatterbrain.layer_settings import LayerSettings
from scatterbrain.nn.pairs import Pairs
from scatterbrain.nn.warn import warn
from scatterbrain.supports import Full

PREFIX = "scatterbrain"  # of every name
PER_LAYER = "scatterbrain:per_layer"  # layers are exact unless they own a ScatterbrainAttention


LAYERS = "scatterbrain_layers"  # of a configuration: pairs layer by layer, as LayerSettings.as_dict gives them

Settings = Pairs
"""What a name stands for in one layer. Pickled models know it by this name."""

SETTINGS: dict[str, Settings | LayerSettings] = {}
PUBLISHERS: list[Callable[[str], None]] = []  # called with every name that is added


def add(name: str, settings: Settings | LayerSettings) -> None:
    """Makes ``name`` stand for ``settings``, and transformers know it."""
    SETTINGS[name] = settings
    for publish in PUBLISHERS:
        publish(name)


def settings_of_layers(
    asked: Sequence[tuple[str, Any, str]], what: str = "the model", is_whole: bool = True
) -> list[Settings]:
    """What layers run with, each asked for by its name of ours, its configuration and its path. Settings layer by layer
    go into the configuration, and under the plain name come from it, then for the layers of that configuration alone:
    other parts of the model may have settings of their own. Layers that they do not name are exact.

    Args:
        asked: of all layers of a model, whose paths are found in settings together.
        what, is_whole: as :meth:`LayerSettings.in_model` says.

    Raises:
        ValueError: settings of a part of which the model has several that would fit.
    """
    groups: dict[tuple[str, int | None], tuple[Settings | LayerSettings, list[str]]] = {}  # and their layers
    keys = []
    for name, config, path in asked:
        own = getattr(config, LAYERS, None) if name == PREFIX else None
        keys.append((name, None if own is None else id(config)))
        if keys[-1] not in groups:
            groups[keys[-1]] = SETTINGS[name] if own is None else LayerSettings.from_dict(own, LAYERS), []
        groups[keys[-1]][1].append(path)
    # A part of a model that was saved has the settings of the whole in its configuration. Where these fit it several
    # ways, it can be loaded all the same.
    pairs = {
        key: found.in_model(paths, what, is_whole and key[1] is None)
        for key, (found, paths) in groups.items()
        if isinstance(found, LayerSettings)
    }
    is_saved = any(config is not None for _, config in pairs)
    if is_whole and is_saved and not any(pair for found in pairs.values() for pair in found.values()):
        warn(
            f"{what}: the settings in its configuration (scatterbrain_layers) do not say which of them are for its "
            "layers, so these run with exact attention; give layers= with settings by the paths of this model",
            4,
        )
    made = []
    for key, (_, config, path) in zip(keys, asked, strict=True):
        found, _ = groups[key]
        if isinstance(found, LayerSettings):
            setattr(config, LAYERS, found.as_dict())
            found = Pairs(*(pairs[key][path] or (Full(), None)))
        made.append(found)
    return made


def is_ours(name: str | None) -> bool:
    """Whether ``name`` is an implementation of this package."""
    return name in SETTINGS or name == PER_LAYER


def check_registered(name: str) -> None:
    """Raises ValueError for a name with our prefix that is not registered."""
    if not is_ours(name):
        raise ValueError(
            f"attn_implementation={name!r} is not registered, expected one of {', '.join(SETTINGS)}; register it with "
            "scatterbrain.integrations.transformers.register"
        )
