"""sb.replace_attention for attention layers of transformers, and the Trainer callback that updates moving averages."""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedConfig, TrainerCallback

from scatterbrain.integrations.restrictions import NotReplaceable
from scatterbrain.integrations.transformers.layers import (
    PARKED,
    attach,
    attention_layers,
    causality,
    core_of,
    cross_note,
    detach,
    implementation,
    note_causality,
    routes,
)
from scatterbrain.integrations.transformers.registry import PER_LAYER
from scatterbrain.low_rank import LowRank
from scatterbrain.nn.calibration import update_statistics
from scatterbrain.nn.pairs import Choice, Pairs
from scatterbrain.supports import Support


class TransformersReplacer:
    """Gives an attention layer a ScatterbrainAttention. The configuration that it shares with its model then names
    :data:`PER_LAYER`, under which layers without one run exactly, on the same masks."""

    def __init__(self) -> None:
        # Number, path, and whether calls are causal.
        self._places: WeakKeyDictionary[nn.Module, tuple[int, str, bool | None]] = WeakKeyDictionary()
        # What the configuration of each replaced layer named before the first of the layers that share it was replaced.
        self._before: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
        # The dictionaries serve all models of the process, and threads may replace the layers of several at once.
        self._lock = threading.RLock()

    def prepare(self, model: nn.Module) -> None:
        for i, (path, module) in enumerate(attention_layers(model)):
            is_causal = causality(module, model, path)
            note_causality(module, is_causal, path)
            with self._lock:
                self._places[module] = i, path, is_causal

    def matches(self, module: nn.Module) -> bool:
        return routes(type(module))

    def replace(
        self,
        module: nn.Module,
        support: Support,
        low_rank: LowRank,
        causal_support: Support | None = None,
        causal_low_rank: Choice = ...,
    ) -> tuple[str, Callable[[], None]]:
        config = getattr(module, "config", None)
        if config is None:
            raise NotReplaceable("it has no configuration to name its attention function in")
        if core_of(module) is not None:
            raise NotReplaceable(
                "it runs Scatterbrain already; restore() the earlier report, or set_attn_implementation('sdpa'), to "
                "change it"
            )
        parked = module.__dict__.pop(PARKED, None)
        with self._lock:
            seed, path, is_causal = self._places.get(module, (0, "", causality(module)))
        pairs = Pairs(support, low_rank, causal_support, causal_low_rank)
        try:
            core = attach(module, pairs, path, seed=seed, is_causal=is_causal)
        except ValueError as error:
            if parked is not None:
                module.__dict__[PARKED] = parked
            raise NotReplaceable(str(error)) from error
        with self._lock:
            self._before[module] = self._name_before(config)
            config._attn_implementation_internal = PER_LAYER

        def undo() -> None:
            present = core_of(module)
            # An adapter may hold the core inside of its own module.
            if present is not None and all(part is not core for part in present.modules()):
                return  # that of a later choice, which is not this report's to undo
            detach(module)
            if parked is not None:
                module.__dict__[PARKED] = parked
            with self._lock:
                was_chosen_since = module not in self._before
                before = self._before.pop(module, None)
                if implementation(module) == PER_LAYER and not was_chosen_since and not self._sharing(config):
                    config._attn_implementation_internal = before

        return cross_note(module, path, pairs), undo

    def _name_before(self, config: PreTrainedConfig) -> str | None:
        """What ``config`` names once all of its layers are restored. Another implementation that was chosen since
        earlier layers were replaced makes these part of the past."""
        name, sharing = config._attn_implementation, self._sharing(config)
        if name == PER_LAYER and sharing:
            return self._before[sharing[0]]
        for layer in sharing:
            del self._before[layer]
        return name

    def _sharing(self, config: PreTrainedConfig) -> list[nn.Module]:
        """The replaced layers of a configuration object, which several models may share."""
        return [layer for layer in self._before if getattr(layer, "config", None) is config]


class UpdateStatistics(TrainerCallback):
    """Commits the moving averages of ``Quadratic(statistics="ema")`` and redraws ``Favor(redraw=n)`` after every
    optimizer step of a transformers.Trainer: ``Trainer(..., callbacks=[UpdateStatistics()])``."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        update_statistics(model)
