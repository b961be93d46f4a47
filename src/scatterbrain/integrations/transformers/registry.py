"""The attention implementations that a model can choose by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from scatterbrain.layer_settings import LayerSettings
from scatterbrain.nn.pairs import Pairs
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
    go into the configuration, and under the plain name come from it. Layers that they do not name are exact.

    Args:
        asked: of all layers of a model, whose paths are found in settings together.
        what, is_whole: as :meth:`LayerSettings.in_model` says.

    Raises:
        ValueError: settings of a part of which the model has several that would fit.
    """
    settings: list[Settings | LayerSettings] = []
    alike: list[tuple[LayerSettings, list[str]]] = []  # settings, and the layers that ask for them
    for name, config, path in asked:
        found = SETTINGS[name]
        if name == PREFIX and getattr(config, LAYERS, None) is not None:
            found = LayerSettings.from_dict(getattr(config, LAYERS), LAYERS)
        if isinstance(found, LayerSettings):
            known = next((entry for entry in alike if entry[0] == found), None)
            if known is None:
                alike.append(known := (found, []))
            found = known[0]
            known[1].append(path)
        settings.append(found)
    pairs = {id(of_layers): of_layers.in_model(paths, what, is_whole) for of_layers, paths in alike}
    made = []
    for (_, config, path), found in zip(asked, settings, strict=True):
        if isinstance(found, LayerSettings):
            setattr(config, LAYERS, found.as_dict())
            found = Pairs(*(pairs[id(found)][path] or (Full(), None)))
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
