"""sb.replace_attention for attention layers of transformers, and the Trainer callback that updates moving averages."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import nn
from transformers import TrainerCallback

from scatterbrain.integrations.restrictions import NotReplaceable
from scatterbrain.integrations.transformers.layers import (
    PARKED,
    attach,
    attention_layers,
    core_of,
    cross_note,
    detach,
    implementation,
    routes,
)
from scatterbrain.integrations.transformers.registry import PER_LAYER
from scatterbrain.low_rank import LowRank
from scatterbrain.nn.calibration import update_statistics
from scatterbrain.supports import Support


class TransformersReplacer:
    """Gives an attention layer a ScatterbrainAttention. The configuration that it shares with its model then names
    :data:`PER_LAYER`, under which layers without one run exactly, on the same masks."""

    def __init__(self) -> None:
        self._places: WeakKeyDictionary[nn.Module, tuple[int, str]] = WeakKeyDictionary()  # number and path

    def prepare(self, model: nn.Module) -> None:
        self._places.update({module: (i, path) for i, (path, module) in enumerate(attention_layers(model))})

    def matches(self, module: nn.Module) -> bool:
        return routes(type(module))

    def replace(
        self, module: nn.Module, support: Support, low_rank: LowRank, causal_support: Support | None = None
    ) -> tuple[str, Callable[[], None]]:
        config = getattr(module, "config", None)
        if config is None:
            raise NotReplaceable("it has no configuration to name its attention function in")
        if core_of(module) is not None:
            raise NotReplaceable(
                "it runs Scatterbrain already; restore() the earlier report, or set_attn_implementation('sdpa'), to "
                "change it"
            )
        parked, (seed, path) = module.__dict__.pop(PARKED, None), self._places.get(module, (0, ""))
        try:
            attach(module, support, low_rank, path=path, seed=seed, causal_support=causal_support)
        except ValueError as error:
            if parked is not None:
                module.__dict__[PARKED] = parked
            raise NotReplaceable(str(error)) from error
        before = implementation(module)
        config._attn_implementation_internal = PER_LAYER

        def undo() -> None:
            detach(module)
            if parked is not None:
                module.__dict__[PARKED] = parked
            if implementation(module) == PER_LAYER:
                config._attn_implementation_internal = before

        return cross_note(module, path, support, low_rank), undo


class UpdateStatistics(TrainerCallback):
    """Commits the moving averages of ``Quadratic(statistics="ema")`` and redraws ``Favor(redraw=n)`` after every
    optimizer step of a transformers.Trainer: ``Trainer(..., callbacks=[UpdateStatistics()])``."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        update_statistics(model)
