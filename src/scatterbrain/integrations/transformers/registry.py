"""The attention implementations that a model can choose by name."""

from __future__ import annotations

from collections.abc import Callable
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


def settings_of_layer(name: str, config: Any, path: str) -> Settings:
    """What the layer at ``path`` runs with under a name. Settings layer by layer go into the configuration, and under
    the plain name come from it. Layers that they do not name are exact."""
    settings = SETTINGS[name]
    if isinstance(settings, LayerSettings):
        setattr(config, LAYERS, settings.as_dict())
    elif name == PREFIX and getattr(config, LAYERS, None) is not None:
        settings = LayerSettings.from_dict(getattr(config, LAYERS), LAYERS)
    if not isinstance(settings, LayerSettings):
        return settings
    pair = settings.pair_of(path)
    return Pairs(Full(), None) if pair is None else Pairs(*pair)


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
