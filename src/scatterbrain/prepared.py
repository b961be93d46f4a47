"""Calls of :func:`scatterbrain.attention` that were checked before.

A model calls attention with the same shapes, support and statistics again and again. What the checks found out is kept
here, since on few hundred tokens they take as long as a tenth of a call, and more where other work has pushed the
interpreter out of the caches. Only the common case is kept: plain eager calls on the CPU, without masks or offset.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from scatterbrain import autograd
from scatterbrain.coordinates import kept_weights, tensors_of
from scatterbrain.low_rank import LowRank, Quadratic, Statistics
from scatterbrain.supports import Routed, Support, Window

_MOST = 64  # plans; a program with more kinds of calls than this checks some of them anew


class Plan(NamedTuple):
    """What was found out about a call: the statistics' tensors, so that no others have their ids; the operator's
    arguments, None where the support covers every key and torch's own kernel does it; the scale."""

    tensors: tuple[Tensor, ...]
    planned: autograd.Planned | None
    scale: float


_plans: dict[tuple, Plan] = {}
_lock = threading.Lock()  # of changes; looking up needs none


def key_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    support: Support,
    low_rank: LowRank,
    is_causal: bool,
    scale: float | None,
    statistics: object,
) -> tuple | None:
    """All that the checks look at; None where a call is not of the kind that is kept. Types are compared, not instances:
    what only equals a number or is a tensor of another kind goes through the checks."""
    if not autograd.is_untraced():
        return None
    if not (
        type(query) is type(key) is type(value) is Tensor
        and type(statistics) is Statistics
        and type(support) in (Window, Routed)
        and type(low_rank) is Quadratic
        and type(is_causal) is bool
        and (scale is None or type(scale) is float)
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
    ):
        return None
    return (
        *map(id, tensors_of(statistics)),  # a module makes the object around them anew for every call
        statistics.scale,
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


def find(key: tuple | None) -> Plan | None:
    """The plan of a call with this key; None where it has to be checked. The statistics may have changed in place
    since."""
    plan = _plans.get(key) if key else None
    if plan is None:
        return None
    if torch._C._is_any_autocast_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return None
    return plan


def keep(
    key: tuple | None, statistics: object, scale: float, dtype: torch.dtype, settings: tuple | None
) -> Plan | None:
    """Keeps, where it can be, what a call with this key comes to, which has passed every check. ``dtype``: of its
    coordinates. ``settings``: None where it is exact."""
    if key is None:
        return None
    tensors, planned = tensors_of(statistics), None
    if settings is not None:
        weights = kept_weights(statistics, scale, dtype, torch.device("cpu"))
        if weights is None:
            return None
        planned = autograd.Planned(weights.weights, settings, tensors, weights.sources)
    with _lock:
        if len(_plans) >= _MOST:
            del _plans[next(iter(_plans))]
        plan = _plans[key] = Plan(tensors, planned, scale)
    return plan
