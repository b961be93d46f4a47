"""What the attention layers of a model compute with, while it runs with exact attention."""

from __future__ import annotations

import copy
from collections import Counter, UserDict, UserList
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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


def recorded(model: nn.Module, batch: Batch, token_order: str | None = "auto", seed: int | None = None) -> Recorded:
    """:func:`calls_of`, and what is not among them. ``seed``: as :func:`run`."""
    calls: list[LayerCall] = []
    model = uncompiled(model)

    def attend(call: LayerCall, return_lse: bool) -> Any:
        calls.append(call)
        return call.attention(Full(), None, return_lse=return_lse)

    with stand_in(model, attend, token_order) as stage:
        try:
            run(model, batch, seed)
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


def run(model: nn.Module, batch: Batch, seed: int | None = None) -> Any:
    """``model`` on a batch, in evaluation mode and without gradients; its mode stays, and so do torch's random numbers
    and the caches of the batch, of which every run gets a copy.

    Args:
        seed: of what the model draws; None: it goes on from torch's state.

    Raises:
        TypeError: a batch of another kind.
    """
    modes = {module: module.training for module in model.modules()}
    memo = {id(part): part for part in (*modes, *model.parameters())}  # objects that hold these hold the model's own
    model.eval()
    try:
        with torch.no_grad(), _draws(model, seed):
            if isinstance(batch, Tensor):
                return model(batch)
            if isinstance(batch, Mapping):
                return model(**{name: _own(value, memo) for name, value in batch.items()})
            if isinstance(batch, (tuple, list)):
                return model(*(_own(value, memo) for value in batch))
            if callable(batch):
                return batch(model)
    finally:
        for module, mode in modes.items():
            module.training = mode
    raise TypeError(
        "batch must be a tensor, a mapping of arguments, a tuple or list of arguments, or a function of the model, got "
        f"{type(batch).__name__}"
    )


@contextmanager
def _draws(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Inside, torch's random numbers begin at ``seed``; afterwards they go on where they were."""
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield


def _own(value: Any, memo: dict[int, Any]) -> Any:
    """An argument for one run: what may keep something of a run, as caches do, is copied, and what cannot be copied
    stays as it is. ``memo``: as that of :func:`copy.deepcopy`, for all arguments of a run: what they share, copies of
    them share."""
    if id(value) in memo:
        return memo[id(value)]
    if value is None or isinstance(value, (Tensor, nn.Module, str, int, float)):
        return value
    known = len(memo)
    try:
        if isinstance(value, (UserDict, UserList)):
            return _own_container(value, memo)
        if isinstance(value, (dict, list, tuple)) and getattr(value, "__dict__", None):
            return value  # attributes may stand for its items, which a copy would part
        if isinstance(value, (dict, list)):
            return _own_container(value, memo)
        if isinstance(value, tuple):
            if type(value) is not tuple and not hasattr(value, "_make"):
                return value
            inner = [_own(part, memo) for part in value]
            if all(new is old for new, old in zip(inner, value)):
                return value
            return type(value)._make(inner) if hasattr(value, "_make") else type(value)(inner)
        if callable(value):
            return value
        with _DetachedCopies():
            return copy.deepcopy(value, memo)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # of what holds locks and files, or says no itself: it runs as it did without copies
        while len(memo) > known:  # halves of the copy that failed
            memo.popitem()
        memo[id(value)] = value
        memo.setdefault(id(memo), []).append(value)
        return value


def _own_container(value: Any, memo: dict[int, Any]) -> Any:
    memo[id(value)] = own = copy.copy(value)
    memo.setdefault(id(memo), []).append(value)  # as deepcopy does: the id of what lives is not given again
    for place in range(len(own)) if isinstance(own, (list, UserList)) else list(own):
        old = own[place]
        new = _own(old, memo)
        if new is not old:
            own[place] = new
    return own


class _DetachedCopies(TorchFunctionMode):
    """Inside, copy.deepcopy takes tensors with a history of gradients too, and copies them without it."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            return copy.deepcopy(args[0].detach(), args[1])
        return function(*args, **(kwargs or {}))
