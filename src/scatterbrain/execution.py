"""The one place that decides how a checked call runs.

1. The support covers every key, without masks or offset, of heads that are not too narrow: torch's own kernel, which
   nothing beats on few tokens.
2. Untraced, without masks or offset, with affine coordinates that are constant or fitted to the tokens, or clusters of
   its own keys: a prepared call, whose arguments but the tokens stay with the operator, now and for all later calls of
   its kind.
3. Untraced, with affine coordinates: one operator that projects, routes and attends.
4. Everything else: coordinates, lists, then the attention operator; under a trace with the registered autograd.

All give the same bits, but for rounding in the first.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from scatterbrain import prepared
from scatterbrain.call import Call
from scatterbrain.operators import transformed, untraced
from scatterbrain.operators.arguments import AttentionArguments, CentroidArguments, KernelInputs, QuadraticArguments
from scatterbrain.operators.devices import check_device
from scatterbrain.operators.tracing import is_known, is_transformed, is_untraced
from scatterbrain.operators.unused import with_zero_gradients
from scatterbrain.supports import BlockLists, Support
from scatterbrain.supports.base import OperatorRouting

# torch's CPU kernel approximates exponentials where the machine has AVX-512, and rows of fewer elements do not average
# that out. The operators here compute such heads in float64.
NARROWEST_OF_TORCH = 8
NO_ROUTING = OperatorRouting(keys=0, window=0, block_q=0, block_k=0)


def run(call: Call, return_lse: bool, kept_as: tuple | None) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of a checked call; lse may be None unless ``return_lse``. ``kept_as``: under which it may be kept
    (:func:`scatterbrain.prepared.key_of`), or None."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if (
        not return_lse
        and is_known(call.query.shape[3] >= NARROWEST_OF_TORCH)
        and call.padding.is_everything()
        and covers_every_key(call.support, queries, keys, call.is_causal)
    ):
        out = _by_torch(call, kept_as)
        if out is not None:
            return out, None
    check_device(call.query, call.value)
    if kept_as is not None:
        out = _prepare_and_run(call, kept_as)
        if out is not None:
            return out, None
    if not is_untraced():
        return transformed.attention(_attention_arguments(call))
    projection = None if call.low_rank is None else call.low_rank.projection(call)
    if projection is not None:
        return untraced.quadratic_attention(_quadratic_arguments(call, projection))
    return untraced.attention(_attention_arguments(call))


def run_prepared(found: prepared.Prepared, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor | None:
    """The output of a call that was checked before; None where its statistics have changed since."""
    if found.call is None:
        return exact(query, key, value, is_causal, found.scale)
    try:
        return found.call.attention(query, key, value)
    except untraced.StaleProjection:
        return None


# -------------------- torch's own kernel


def covers_every_key(support: Support, queries: int, keys: int, is_causal: bool) -> bool:
    """Whether every query's support holds all keys that it may see, without padding or offset, and there are any of
    both. Lengths of a graph for any length count as unknown: never a condition on them."""
    return is_known(queries > 0) and is_known(keys > 0) and support.covers_every_key(queries, keys, is_causal)


def exact(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
    """Exact attention without masks."""
    if query.shape[1] == key.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, None, 0.0, is_causal, scale=scale)
    return F.scaled_dot_product_attention(query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=True)


def _by_torch(call: Call, kept_as: tuple | None) -> Tensor | None:
    """The output of torch's kernel; None where it would not do what was asked: it multiplies masked scores by the
    scale, which makes NaN of -inf where the scale is not positive, and under vmap it is a loop."""
    if call.is_causal and not call.scale > 0:
        return None
    if is_transformed():
        return None
    if kept_as is not None:
        prepared.keep(kept_as, () if call.coefficients is None else call.coefficients.tensors(), None, call.scale)
    out = exact(call.query, call.key, call.value, call.is_causal, call.scale)
    return out if call.coefficients is None else with_zero_gradients(out, call.coefficients.parameters())


# -------------------- prepared calls


def _prepare_and_run(call: Call, kept_as: tuple) -> Tensor | None:
    """Keeps the call and runs it as all later ones: checkpointing wants every call to save the same. None where it
    cannot be kept."""
    if call.support.operator_routing(call) is None and call.support.depends_on_content:
        return None
    head_dim, sources = call.query.shape[3], ()
    if call.low_rank.own_clusters(call) > 0:
        kept = untraced.PreparedCall(_centroid_arguments(call), head_dim)
    elif (constant := call.low_rank.constant_projection(call)) is not None:
        sources = call.coefficients.tensors()
        arguments = _quadratic_arguments(call, constant.projection)
        kept = untraced.PreparedCall(arguments, head_dim, sources, constant.copies)
    elif (fit := call.low_rank.own_projection(call)) is not None:
        arguments = _quadratic_arguments(call, fit(call.query, call.key))
        kept = untraced.PreparedCall(arguments, head_dim, fit=fit)
    else:
        return None
    prepared.keep(kept_as, sources, kept, call.scale)
    with contextlib.suppress(untraced.StaleProjection):
        return kept.attention(call.query, call.key, call.value)
    return None


# -------------------- the operators' arguments


def _quadratic_arguments(call: Call, projection: untraced.Projection) -> QuadraticArguments:
    maps = (None, None)
    if call.support.reads_coordinates and call.support.operator_routing(call) is None:
        maps = untraced.project_both(call.query, call.key, projection)
    return QuadraticArguments(
        call.query,
        call.key,
        call.value,
        *projection,
        **_lists_and_settings(call, *maps),
        packed_rank=untraced.packed_rank(projection),
    )


def _centroid_arguments(call: Call) -> CentroidArguments:
    return CentroidArguments(**_lists_and_settings(call), clusters=call.low_rank.own_clusters(call), packed_rank=0)


def _lists_and_settings(call: Call, query_map: Tensor | None = None, key_map: Tensor | None = None) -> dict[str, Any]:
    """What operators that attend in one call share. They route by themselves where they can."""
    routing = call.support.operator_routing(call)
    if routing is None:
        lists, budget = call.support.lists(call, query_map, key_map), NO_ROUTING
    else:
        lists, budget = BlockLists(block_q=routing.block_q, block_k=routing.block_k), routing
    return dict(
        **call.padding._asdict(),
        **lists._asdict(),
        head_keys=budget.head_keys,
        keys=budget.keys,
        window=budget.window,
        sinks=budget.sinks,
        pools=budget.pools,
        is_causal=call.is_causal,
        scale=call.scale,
    )


def kernel_inputs(call: Call) -> tuple[Call, KernelInputs, tuple[Tensor | None, Tensor | None]]:
    """The call with all coefficients, what the attention operator evaluates its low-rank kernel with, and the maps that
    its support reads."""
    if call.low_rank is None:
        return call, KernelInputs(), (None, None)
    call = call.low_rank.with_coefficients(call)
    inputs = call.low_rank.inputs(call)
    maps = inputs.query_map, inputs.key_map
    if inputs.query_map is None and call.support.reads_coordinates and not call.support.evaluates_kernel:
        maps = call.low_rank.coordinates(call)
    return call, inputs, maps


def _attention_arguments(call: Call) -> AttentionArguments:
    call, inputs, maps = kernel_inputs(call)
    return AttentionArguments(
        call.query,
        call.key,
        call.value,
        *inputs,
        **call.support.lists(call, *maps)._asdict(),
        **call.padding._asdict(),
        low_rank=0 if call.low_rank is None else call.low_rank.code,
        is_causal=call.is_causal,
        scale=call.scale,
    )
