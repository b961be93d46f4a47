"""Calls that nothing traces: attention and the projections of its coordinates as one node of the autograd graph.

The autograd that is registered with the operators (gradients.py) serves torch.compile, export, functorch and dispatch
modes. For an operator of twenty arguments it takes several times as long as one torch.autograd.Function around the
operators, and short sequences notice. Both use the same operators and give the same bits, except for gradients through
stored statistics: the operator adds them up inside, so those of bfloat16 and float16 tokens, and of queries that are
computed again in float64, are rounded once instead of twice.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scatterbrain.operators import library  # noqa: F401  (loads the operators)
from scatterbrain.operators.arguments import (
    AttentionArguments,
    CentroidArguments,
    ClusterArguments,
    ForwardResults,
    InputProjectionArguments,
    KernelInputs,
    QuadraticArguments,
    RouteArguments,
    after_clustering,
    after_projection,
    settings_of,
    tensors_of,
)

# .default skips the choice among overloads.
_ATTENTION = torch.ops.scatterbrain.attention.default
_ATTENTION_WITH_STATE = torch.ops.scatterbrain.attention_with_state.default
_ATTENTION_BACKWARD = torch.ops.scatterbrain.attention_backward.default
_QUADRATIC_ATTENTION = torch.ops.scatterbrain.quadratic_attention.default
_QUADRATIC_ATTENTION_WITH_STATE = torch.ops.scatterbrain.quadratic_attention_with_state.default
_PREPARE = torch.ops.scatterbrain.prepare.default
_PREPARE_CENTROID = torch.ops.scatterbrain.prepare_centroid.default
_DISCARD_PREPARED = torch.ops.scatterbrain.discard_prepared.default
_PREPARED_ATTENTION = torch.ops.scatterbrain.prepared_attention.default
_PREPARED_ATTENTION_WITH_STATE = torch.ops.scatterbrain.prepared_attention_with_state.default
_PREPARED_ATTENTION_BACKWARD = torch.ops.scatterbrain.prepared_attention_backward.default
_PROJECT = torch.ops.scatterbrain.project.default
_PROJECT_BACKWARD = torch.ops.scatterbrain.project_backward.default
_ROUTE = torch.ops.scatterbrain.route.default
_CLUSTER = torch.ops.scatterbrain.cluster.default
_INPUT_PROJECTION = torch.ops.scatterbrain.input_projection.default

_NARROW_HEAD = torch.ops.scatterbrain.narrow_head()  # heads of fewer dimensions are computed in float64
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


class Projection(NamedTuple):
    """Affine maps of the tokens: ``query_map = query_weight query + query_bias``, keys likewise. Weights (1 or B,
    heads, r + 1, d), biases without the last dimension."""

    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# -------------------- operators


def project_both(query: Tensor, key: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """The maps of queries and keys, outside the graph."""
    with _BelowAutograd():
        return (
            _PROJECT(query, projection.query_weight, projection.query_bias),
            _PROJECT(key, projection.key_weight, projection.key_bias),
        )


def route(arguments: RouteArguments) -> tuple[Tensor, Tensor]:
    """The routing operator, which has no gradients."""
    with _BelowAutograd():
        return _ROUTE(*arguments)


def cluster(arguments: ClusterArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The clustering operator, which has no gradients."""
    with _BelowAutograd():
        return _CLUSTER(*arguments)


def input_projection(arguments: InputProjectionArguments) -> Projection:
    """The operator of the same name, which has no gradients."""
    with _BelowAutograd():
        return Projection(*_INPUT_PROJECTION(*arguments))


def attention(a: AttentionArguments) -> tuple[Tensor, Tensor]:
    """The attention operator, differentiable."""
    tracked = a.query, a.key, a.value, a.query_map, a.key_map
    if _wants_gradient(*tracked):
        return _Attention.apply(*tracked, a)
    with _BelowAutograd():
        return _ATTENTION(*a)


def quadratic_attention(a: QuadraticArguments) -> tuple[Tensor, Tensor]:
    """The operator of the same name, differentiable."""
    tracked = a.query, a.key, a.value, a.query_weight, a.query_bias, a.key_weight, a.key_bias
    if _wants_gradient(*tracked):
        return _QuadraticAttention.apply(*tracked, a)
    with _BelowAutograd():
        return _QUADRATIC_ATTENTION(*a)


def packed_rank(projection: Projection) -> int:
    """Rank of the packed rows; 0 where coordinates are kept as maps. Float64 tokens and narrow heads are computed in
    float64, and packed rows are float32."""
    weight = projection.query_weight
    packed = weight.dtype == torch.float32 and weight.shape[3] >= _NARROW_HEAD
    return weight.shape[2] - 1 if packed else 0


# -------------------- nodes of the graph


class _Node(torch.autograd.Function):
    """The backward pass that both nodes share: no gradient, no work; below autograd unless a graph of the backward pass
    or a map over it is asked for. Inputs are the operator's differentiable tensors, then all its arguments as one
    tuple, since torch takes time over every input."""

    @classmethod
    def backward(cls, ctx: object, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        if d_out is None and d_lse is None:
            return (None,) * len(need)
        out, lse, *kept = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(out)
        below = not (torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())
        with _BelowAutograd() if below else contextlib.nullcontext():
            gradients = cls.gradients(ctx, below, ForwardResults(d_out, d_lse, out, lse), *kept)
        return *[g if wanted else None for g, wanted in zip(gradients, need)], None


class _Attention(_Node):
    """Coordinates are part of the graph."""

    @staticmethod
    def forward(ctx: object, *inputs: object) -> tuple[Tensor, Tensor]:
        *_, a = inputs
        with _BelowAutograd():
            out, lse, state, scores = _ATTENTION_WITH_STATE(*a)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, state, scores, *tensors_of(a))
        ctx.settings = settings_of(a)
        return out, lse

    @staticmethod
    def gradients(
        ctx: object, below: bool, results: ForwardResults, state: Tensor, scores: Tensor, *tensors: Tensor
    ) -> tuple:
        return _ATTENTION_BACKWARD(*results, *tensors, *ctx.settings, state=state, scores=scores)


class _QuadraticAttention(_Node):
    """Coordinates are projections of the tokens, inside the node."""

    @staticmethod
    def forward(ctx: object, *inputs: object) -> tuple[Tensor, Tensor]:
        *_, a = inputs
        with _BelowAutograd():
            out, lse, state, scores, *projected = _QUADRATIC_ATTENTION_WITH_STATE(*a)
        ctx.set_materialize_grads(False)
        b = after_projection(a, *projected)
        ctx.save_for_backward(out, lse, state, scores, a.query_weight, a.key_weight, *tensors_of(b))
        ctx.settings = settings_of(b)
        return out, lse

    @staticmethod
    def gradients(
        ctx: object,
        below: bool,
        results: ForwardResults,
        state: Tensor,
        scores: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        *tensors: Tensor,
    ) -> tuple:
        *need, _ = ctx.needs_input_grad
        arguments = AttentionArguments(*tensors, *ctx.settings)
        return _quadratic_gradients(_Needed(*need), below, results, arguments, state, scores, query_weight, key_weight)


class _Needed(NamedTuple):
    """Which gradients of ``quadratic_attention`` are asked for."""

    query: bool
    key: bool
    value: bool
    query_weight: bool = False
    query_bias: bool = False
    key_weight: bool = False
    key_bias: bool = False


def _quadratic_gradients(
    need: _Needed,
    below: bool,
    results: ForwardResults,
    a: AttentionArguments,
    state: Tensor,
    scores: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
) -> tuple:
    """Gradients of tokens and projections. Where the projections are constants, the attention operator itself takes the
    maps' gradients on to the tokens, in the precision that it computes in."""
    fused = below and a.query.shape[3] >= _NARROW_HEAD  # narrower heads would be rounded once less than elsewhere
    fuse_query = fused and not (need.query_weight or need.query_bias)
    fuse_key = fused and not (need.key_weight or need.key_bias)
    dq, dk, dv, d_query_map, d_key_map = _ATTENTION_BACKWARD(
        *results, *a, state, scores, query_weight if fuse_query else None, key_weight if fuse_key else None
    )
    of_query = of_key = (None, None)
    if not fuse_query and (need.query or need.query_weight or need.query_bias):
        of_query = _to_tokens(dq, d_query_map, a.query, query_weight)
    if not fuse_key and (need.key or need.key_weight or need.key_bias):
        of_key = _to_tokens(dk, d_key_map, a.key, key_weight)
    return dq, dk, dv, *of_query, *of_key


def _to_tokens(d_tokens: Tensor, d_map: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the tokens' gradient through their map to ``d_tokens``; the gradients of weight and bias."""
    through_map, d_weight, d_bias = _PROJECT_BACKWARD(d_map, tokens, weight)
    d_tokens.add_(through_map)
    return d_weight, d_bias


# -------------------- prepared calls


class StaleProjection(Exception):
    """The tensors that a projection was made from hold something else now."""


_discarded: list[int] = []  # prepared calls that no object holds any more, until the next one is made


class PreparedCall:
    """All arguments of attention but the tokens, kept where the operator is: passing each takes time. The operator
    projects or clusters, routes and attends.

    Args:
        arguments: of the call; its tokens are not kept. Projections are constants.
        head_dim: of the tokens.
        sources: the tensors that the projections were made from.
        copies: what the sources held then.
        fit: makes the projections of a call from its queries and keys, in place of those of ``arguments``.
    """

    def __init__(
        self,
        arguments: QuadraticArguments | CentroidArguments,
        head_dim: int,
        sources: tuple[Tensor, ...] = (),
        copies: list[Tensor] | None = None,
        fit: Callable[[Tensor, Tensor], Projection] | None = None,
    ) -> None:
        self.fit = fit
        self.routes = arguments.keys > 0
        self.is_wide = head_dim >= _NARROW_HEAD
        with contextlib.suppress(IndexError):  # the list is empty, or another thread was quicker
            while True:
                _DISCARD_PREPARED(_discarded.pop())
        if isinstance(arguments, QuadraticArguments):
            self.arguments = arguments._replace(query=None, key=None, value=None)
            _, _, _, *kept = arguments
            self.number = _PREPARE(*kept, sources, copies or [])
        else:
            self.arguments = arguments
            self.number = _PREPARE_CENTROID(*arguments)
        # The finalizer calls no operator: objects are collected anywhere, also where something traces.
        weakref.finalize(self, _discarded.append, self.number).atexit = False

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention without its log-sum-exp, differentiable in the tokens.

        Raises:
            StaleProjection: the projections were made from other statistics.
        """
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return _PreparedAttention.apply(query, key, value, self)
        fitted = () if self.fit is None else self.fit(query, key)
        with _BelowAutograd():
            out = _PREPARED_ATTENTION(query, key, value, self.number, fitted)
        if out.dim() != 4:
            raise StaleProjection
        return out


def is_batched_by_autograd(tensor: Tensor) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) maps over ``tensor``."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


class _PreparedAttention(torch.autograd.Function):
    """As the other nodes, of a prepared call: there is no log-sum-exp to differentiate."""

    @staticmethod
    def forward(ctx: object, query: Tensor, key: Tensor, value: Tensor, call: PreparedCall) -> Tensor:
        fitted = () if call.fit is None else call.fit(query, key)
        with _BelowAutograd():
            out, lse, state, scores, made, index, count = _PREPARED_ATTENTION_WITH_STATE(
                query, key, value, call.number, fitted
            )
        if out.dim() != 4:
            raise StaleProjection
        made = (*made, fitted.query_weight, fitted.key_weight) if fitted else made
        lists = (index, count) if call.routes else ()
        ctx.save_for_backward(out, lse, state, scores, query, key, value, *made, *lists)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: object, d_out: Tensor) -> tuple[Tensor | None, ...]:
        call, need = ctx.call, ctx.needs_input_grad
        out, lse, state, scores, query, key, value, *made = ctx.saved_tensors
        lists = (made.pop(-2), made.pop()) if call.routes else ()
        results, tokens = ForwardResults(d_out, None, out, lse), (query, key, value)
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            gradients = _gradients_of_prepared(call, need, False, results, tokens, state, scores, made, *lists)
        else:
            with _BelowAutograd():
                # A dispatch mode that watches does not know prepared calls, nor does a map over gradients alone
                # (is_grads_batched=True), which takes operators of tensors, not of lists of them.
                is_alone = not (torch._C._len_torch_dispatch_stack() or is_batched_by_autograd(d_out))
                if call.is_wide and is_alone:
                    gradients = _PREPARED_ATTENTION_BACKWARD(
                        d_out, out, lse, state, scores, query, key, value, made, call.number, *lists
                    )
                else:
                    gradients = _gradients_of_prepared(call, need, True, results, tokens, state, scores, made, *lists)
        return *(g if wanted else None for g, wanted in zip(gradients, need)), None


def _gradients_of_prepared(
    call: PreparedCall,
    need: tuple[bool, ...],
    below: bool,
    results: ForwardResults,
    tokens: tuple[Tensor, Tensor, Tensor],
    state: Tensor,
    scores: Tensor,
    made: list[Tensor],
    index: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple:
    """Token gradients from the separate operators; used under dispatch modes, create_graph and maps."""
    arguments = call.arguments
    if isinstance(arguments, CentroidArguments):
        inputs = KernelInputs(None, None, *made)
        composed = after_clustering(arguments, tokens, inputs, index, count)
        dq, dk, dv, *_ = _ATTENTION_BACKWARD(*results, *composed, state, scores)
        return dq, dk, dv
    query, key, value = tokens
    *of_tokens, _ = need
    query_map, key_map, *weights = made
    query_weight, key_weight = weights or (arguments.query_weight, arguments.key_weight)
    dq, dk, dv, *_ = _quadratic_gradients(
        _Needed(*of_tokens),
        below,
        results,
        after_projection(arguments._replace(query=query, key=key, value=value), query_map, key_map, index, count),
        state,
        scores,
        query_weight,
        key_weight,
    )
    return dq, dk, dv
