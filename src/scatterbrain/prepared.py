"""Calls of :func:`scatterbrain.attention` that were checked before.

A model calls attention with the same shapes, support and statistics again and again. What the checks found out is kept
here: on a few hundred tokens the checks take as long as a tenth of a call, and more where other work has pushed the
interpreter out of the caches. Only the common case is kept: untraced calls on the CPU, without masks or offset.
"""

from __future__ import annotations

import random
import threading
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from scatterbrain.operators.tracing import is_untraced
from scatterbrain.operators.untraced import PreparedCall

_MOST = 256  # kept calls; a program with more kinds of calls than this checks some of them anew


class Prepared(NamedTuple):
    """What was found out about a call.

    Args:
        tensors: of the statistics, held so that no others get their ids.
        call: the operator's arguments; None where the support covers every key and torch's own kernel computes it.
        scale: factor of q.k.
    """

    tensors: tuple[Tensor, ...]
    call: PreparedCall | None
    scale: float


_prepared: dict[tuple, Prepared] = {}
_random = random.Random(0)  # of its own: nobody's random numbers depend on calls of attention
_lock = threading.Lock()  # of changes; looking up needs none


def key_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    support: object,
    low_rank: object,
    is_causal: bool,
    scale: float | None,
    statistics: object,
) -> tuple | None:
    """Everything that the checks look at; None where a call is not of the kind that is kept. Types are compared
    exactly: a value that only equals a number, or an object of a derived class, goes through the checks."""
    if not is_untraced():
        return None
    if not (
        type(query) is type(key) is type(value) is Tensor
        and (statistics is None or type(statistics).__dict__.get("can_be_prepared", False))
        and type(support).__dict__.get("can_be_prepared", False)
        and type(low_rank).__dict__.get("can_be_prepared", False)
        and type(is_causal) is bool
        and (scale is None or type(scale) is float)
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and not (query.is_nested or key.is_nested or value.is_nested)
    ):
        return None
    return (
        # A module makes the object around its tensors anew for every call.
        *(() if statistics is None else (*map(id, statistics.tensors()), statistics.scale)),
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        key.dtype,
        value.dtype,
        support,
        low_rank,
        is_causal,
        scale,
    )


def find(key: tuple | None) -> Prepared | None:
    """What is kept of a call with this key; None where it has to be checked. The statistics may have changed in place
    since."""
    found = _prepared.get(key) if key else None
    if found is None:
        return None
    if torch._C._is_any_autocast_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return None
    return found


def keep(key: tuple, tensors: tuple[Tensor, ...], call: PreparedCall | None, scale: float) -> None:
    """Keeps a call that has passed every check, where there are too many in place of one of the older half. Which one
    is drawn: a model of a few more layers than calls are kept, which calls them in turn, would always have lost the
    oldest one just before it is needed."""
    with _lock:
        if key not in _prepared and len(_prepared) >= _MOST:
            del _prepared[next(islice(_prepared, _random.randrange(_MOST // 2), None))]
        _prepared[key] = Prepared(tensors, call, scale)
