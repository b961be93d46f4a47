"""The arguments of the operators: one named tuple per schema, made from the schema.

csrc/arguments.h is the one list of arguments; nothing in Python counts their positions. The fields of BlockLists and
PaddingInfo carry the names of the arguments that they become.

Shapes and dtypes. B batch rows, Hq query heads, Hkv key/value heads, N queries, M keys, d and dv head dimensions:

    query (B, Hq, N, d), key (B, Hkv, M, d),
      value (B, Hkv, M, dv)                   float32, bfloat16, float16 or float64, any strides
    query_map (B, Hq, N, r + 1),
      key_map (B, Hkv, M, r + 1)              coordinates, then log scales; float32 (float64 for float64 inputs)
    cluster_index (B, Hkv, M),
      representatives (B, Hkv, C, d),
      log_mass (B, Hkv, M),
      query_mean (B, Hkv, d)                  as scatterbrain.Clusters, in place of maps. Representatives and log masses
                                              are functions of the keys: the gradient of key holds what reaches them
    index, count, query_order                 as scatterbrain.Blocks
    span (1 or B, blocks, 2)                  int32, a window [lo, hi) per query block, at most ``span_keys`` long
    span_sinks                                so many first keys of the row are listed besides the span
    query_mask (B, N), key_mask (B, M)        bool, True = ignore
    query_range, key_range (B, 2)             int32, [first, last + 1) of the tokens that are not ignored
    query_offset (B,)                         int32, position of query 0 among the keys, for causal attention
    query_weight, key_weight (1 or B, heads,
      r + 1, d), biases without the last      projections ``map = weight token + bias``
    low_rank                                  0 none, 1 quadratic, 2 general features, 3 centroid
    clusters                                  of Centroid
    rank                                      r of Quadratic(statistics="input")
    keys, window, sinks, pools                of Routed; keys = 0: the operator does not route
    head_keys (1, Hq)                         int32, at most ``keys``, where heads have their own
    packed_rank                               r > 0: the maps are rows of ``project_packed``, which kernels read in
                                              place
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scatterbrain.operators import library  # noqa: F401  (loads the operators)

QUADRATIC, CENTROID = 1, 3  # ``low_rank`` of these kernels
TENSORS: dict[type[NamedTuple], int] = {}  # how many leading arguments are tensors; no tensor comes after them


def _arguments(name: str, operator: str) -> type[NamedTuple]:
    """A named tuple of an operator's arguments, with the defaults of its schema."""
    arguments = getattr(torch.ops.scatterbrain, operator).default._schema.arguments
    defaults = [a.default_value for a in arguments if a.has_default_value()]
    kind = namedtuple(name, [a.name for a in arguments], defaults=defaults, module=__name__)
    TENSORS[kind] = sum("Tensor" in str(a.type) for a in arguments)
    return kind


AttentionArguments = _arguments("AttentionArguments", "attention")  # and attention_with_state
QuadraticArguments = _arguments("QuadraticArguments", "quadratic_attention")  # and .._with_state, prepare
RouteArguments = _arguments("RouteArguments", "route")
ClusterArguments = _arguments("ClusterArguments", "cluster")
CentroidArguments = _arguments("CentroidArguments", "prepare_centroid")
InputProjectionArguments = _arguments("InputProjectionArguments", "input_projection")


class KernelInputs(NamedTuple):
    """What the operator evaluates a low-rank kernel with: maps, or clusters."""

    query_map: Tensor | None = None
    key_map: Tensor | None = None
    cluster_index: Tensor | None = None
    representatives: Tensor | None = None
    log_mass: Tensor | None = None
    query_mean: Tensor | None = None

    def for_routing(self) -> dict[str, Tensor | None]:
        """Those that ``route`` takes too, by name."""
        return {name: value for name, value in zip(self._fields, self) if name in RouteArguments._fields}


class ForwardResults(NamedTuple):
    """The leading arguments of ``attention_backward``, before those of ``attention``: results of the forward pass and
    their gradients."""

    d_out: Tensor
    d_lse: Tensor | None
    out: Tensor
    lse: Tensor


class KeptResults(NamedTuple):
    """The trailing arguments of ``attention_backward``. ``state`` and ``scores`` are what ``attention_with_state``
    returned. With ``query_weight`` and ``key_weight``, the projections that made the maps, the maps' gradients are
    added to those of query and key, and are not results of their own."""

    state: Tensor | None = None
    scores: Tensor | None = None
    query_weight: Tensor | None = None
    key_weight: Tensor | None = None


def tensors_of(arguments: NamedTuple) -> tuple[Tensor | None, ...]:
    """The tensors of an argument tuple, for autograd to save."""
    return arguments[: TENSORS[type(arguments)]]


def settings_of(arguments: NamedTuple) -> tuple[Any, ...]:
    """What :func:`tensors_of` leaves out."""
    return arguments[TENSORS[type(arguments)] :]


def taken_from(source: type[NamedTuple], target: type[NamedTuple]) -> Callable[[NamedTuple], dict[str, Any]]:
    """A function that reads the fields of ``target`` that ``source`` has too, by name."""
    names = [name for name in target._fields if name in source._fields]
    values = attrgetter(*names)
    return lambda arguments: dict(zip(names, values(arguments)))


_for_attention = taken_from(QuadraticArguments, AttentionArguments)
_for_centroid_attention = taken_from(CentroidArguments, AttentionArguments)
_for_routing = taken_from(QuadraticArguments, RouteArguments)


def after_projection(
    arguments: QuadraticArguments,
    query_map: Tensor | None,
    key_map: Tensor | None,
    index: Tensor | None,
    count: Tensor | None,
) -> AttentionArguments:
    """The arguments of ``attention`` that ``quadratic_attention`` comes to: the tokens are projected and, if the
    operator routes, the lists are made."""
    fields = _for_attention(arguments)
    if arguments.keys > 0:
        fields["index"], fields["count"] = index, count
    return AttentionArguments(**fields, **KernelInputs(query_map, key_map)._asdict(), low_rank=QUADRATIC)


def after_clustering(
    arguments: CentroidArguments,
    tokens: tuple[Tensor, Tensor, Tensor],
    inputs: KernelInputs,
    index: Tensor | None,
    count: Tensor | None,
) -> AttentionArguments:
    """The arguments of ``attention`` that a prepared call with the centroid kernel comes to."""
    fields = _for_centroid_attention(arguments)
    if arguments.keys > 0:
        fields["index"], fields["count"] = index, count
    query, key, value = tokens
    fields.update(query=query, key=key, value=value, **inputs._asdict())
    return AttentionArguments(**fields, low_rank=CENTROID)


def for_routing(arguments: QuadraticArguments, query_map: Tensor, key_map: Tensor) -> RouteArguments:
    """The arguments of ``route`` inside ``quadratic_attention``."""
    inputs = KernelInputs(query_map, key_map).for_routing()
    return RouteArguments(**_for_routing(arguments), **inputs, low_rank=QUADRATIC)


def backward_arguments(arguments: tuple) -> tuple[ForwardResults, AttentionArguments, KeptResults]:
    """The arguments of ``attention_backward`` in its three groups."""
    first, last = len(ForwardResults._fields), len(ForwardResults._fields) + len(AttentionArguments._fields)
    return (
        ForwardResults(*arguments[:first]),
        AttentionArguments(*arguments[first:last]),
        KeptResults(*arguments[last:]),
    )
