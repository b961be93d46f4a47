"""What the attention layers of a model compute with, while it runs with exact attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain.analysis.layer_call import LayerCall
from scatterbrain.analysis.stand_in import stand_in, uncompiled
from scatterbrain.integrations.restrictions import NotExpressible
from scatterbrain.supports import Full

Batch = Tensor | Mapping[str, Any] | tuple | list | Callable[[nn.Module], Any]
"""How a model is run: ``model(tensor)``, ``model(**mapping)``, ``model(*sequence)`` or ``function(model)``."""


def calls_of(model: nn.Module, batch: Batch, token_order: str | None = "auto") -> list[LayerCall]:
    """Runs ``model`` once, with exact attention and in evaluation mode, and returns what its attention layers computed
    with, in the order of their calls.

    The layers are those that :func:`scatterbrain.replace_attention` can replace, or has replaced; afterwards the model
    is as it was. Layers that leave a call to their own code, with one token behind a cache for one, are not in it.

    Args:
        model: any model that :func:`scatterbrain.replace_attention` takes.
        batch: a tensor (``model(batch)``), a mapping (``model(**batch)``), a tuple or list (``model(*batch)``), or a
            function of the model that runs it.
        token_order: as :func:`scatterbrain.replace_attention`: the order of image patches.

    Raises:
        ValueError: no attention that is known: which modules were looked at, and what would be needed; or none of it
            ran, with the reasons, or without tokens.
    """
    return recorded(model, batch, token_order).calls


@dataclass(frozen=True)
class Recorded:
    """What was seen of one run of a model.

    Args:
        calls: of its attention layers, in their order.
        left: why modules that look like attention, or calls of them, are not in it, by path.
    """

    calls: list[LayerCall]
    left: dict[str, str]


def recorded(model: nn.Module, batch: Batch, token_order: str | None = "auto") -> Recorded:
    """:func:`calls_of`, and what is not among them."""
    calls: list[LayerCall] = []
    model = uncompiled(model)

    def attend(call: LayerCall, return_lse: bool) -> Any:
        calls.append(call)
        return call.attention(Full(), None, return_lse=return_lse)

    with stand_in(model, attend, token_order) as stage:
        try:
            run(model, batch)
        except NotExpressible as error:
            raise ValueError(
                f"expected attention that sparse + low-rank attention can stand in for, of which there is something to "
                f"compare, tune or capture: {error.what}; leave that out of the model or its inputs, or take another "
                "model"
            ) from error
        left = stage.left({call.path for call in calls})
    if not calls:
        raise ValueError(
            "expected the batch to reach the model's attention layers, but none of them computed attention with it; "
            "give a batch of whole sequences, not single tokens behind a cache, without output_attentions:\n"
            + "\n".join(f"  {path or 'the model'}: {reason}" for path, reason in left.items())
        )
    for call in calls:
        if 0 in (*call.query.shape, *call.key.shape):
            raise ValueError(
                "expected a batch with at least one row and one token, got queries "
                f"{tuple(call.query.shape)} and keys {tuple(call.key.shape)} in {call.path}"
            )
    return Recorded(calls, left)


def counterparts(calls: Sequence[LayerCall], others: Sequence[LayerCall]) -> list[LayerCall | None]:
    """For every call the one of the same layer among ``others``, the first for the first; None where there is none."""

    def places(of: Sequence[LayerCall]) -> list[tuple[str, int]]:
        seen: Counter[str] = Counter()
        found = []
        for call in of:
            found.append((call.path, seen[call.path]))
            seen[call.path] += 1
        return found

    by_place = dict(zip(places(others), others))
    return [by_place.get(place) for place in places(calls)]


def run(model: nn.Module, batch: Batch) -> Any:
    """``model`` on a batch, in evaluation mode and without gradients; its mode stays.

    Raises:
        TypeError: a batch of another kind.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(batch, Tensor):
                return model(batch)
            if isinstance(batch, Mapping):
                return model(**batch)
            if isinstance(batch, (tuple, list)):
                return model(*batch)
            if callable(batch):
                return batch(model)
    finally:
        for module, mode in modes.items():
            module.training = mode
    raise TypeError(
        "batch must be a tensor, a mapping of arguments, a tuple or list of arguments, or a function of the model, got "
        f"{type(batch).__name__}"
    )
