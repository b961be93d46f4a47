"""The attention implementations that a model can choose by name."""

from __future__ import annotations

from collections.abc import Callable

from scatterbrain.nn.pairs import Pairs

PREFIX = "scatterbrain"  # of every name
PER_LAYER = "scatterbrain:per_layer"  # layers are exact unless they own a ScatterbrainAttention


Settings = Pairs
"""What a name stands for. Pickled models know it by this name."""

SETTINGS: dict[str, Settings] = {}
PUBLISHERS: list[Callable[[str], None]] = []  # called with every name that is added


def add(name: str, settings: Settings) -> None:
    """Makes ``name`` stand for ``settings``, and transformers know it."""
    SETTINGS[name] = settings
    for publish in PUBLISHERS:
        publish(name)


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
