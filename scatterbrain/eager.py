"""Plain eager calls: attention and the projections of its coordinates as one node of the autograd graph.

The autograd that is registered with the operators serves torch.compile, export, functorch and dispatch modes. For an
operator of twenty arguments it takes several times as long as one torch.autograd.Function around the operators, which
is what short sequences wait for. Both use the same operators and give the same bits, but for gradients of bfloat16 and
float16 tokens through stored statistics: added up inside the operator they are rounded once, not twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scatterbrain import ops  # noqa: F401  (loads the operators)

_ATTENTION = torch.ops.scatterbrain.attention.default
_ATTENTION_WITH_STATE = torch.ops.scatterbrain.attention_with_state.default
_ATTENTION_BACKWARD = torch.ops.scatterbrain.attention_backward.default
_PROJECT = torch.ops.scatterbrain.project.default
_PROJECT_PACKED = torch.ops.scatterbrain.project_packed.default
_PROJECT_BACKWARD = torch.ops.scatterbrain.project_backward.default
_ROUTE = torch.ops.scatterbrain.route.default

_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_TRACKED = 9  # query, key, value, two maps, two weights, two biases: what _Attention gives gradients to
_WIDE_HEAD = 16  # dimensions from which a head is not computed in double (kNarrowHead of csrc/params.h)
_TENSORS = 9  # lists, masks, ranges and offset, which follow them

# (query weight, query bias, key weight, key bias) of ``map = weight token + bias``, each leading with a batch of 1 or B
Projection = tuple[Tensor, Tensor, Tensor, Tensor]


def is_plain() -> bool:
    """Whether nothing traces, transforms or watches the operators: no compile, export, functorch or dispatch mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def project_both(query: Tensor, key: Tensor, projection: Projection) -> tuple[Tensor, Tensor, int]:
    """The maps of queries and keys, outside the graph (:func:`attention` carries their gradients), and their
    ``packed_rank``."""
    query_weight, query_bias, key_weight, key_bias = projection
    # Heads that narrow, and float64, are computed in double, which packed rows of float32 would have to be brought to.
    packed = query_weight.dtype == torch.float32 and query.shape[3] >= _WIDE_HEAD
    project = _PROJECT_PACKED if packed else _PROJECT
    with _BelowAutograd():
        return (
            project(query, query_weight, query_bias),
            project(key, key_weight, key_bias),
            query_weight.shape[2] - 1 if packed else 0,
        )


def route(*arguments: object) -> tuple[Tensor, Tensor]:
    """The routing operator, which has no gradients."""
    with _BelowAutograd():
        return _ROUTE(*arguments)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    projection: Projection | None,
    *arguments: object,
) -> tuple[Tensor, Tensor]:
    """The attention operator, differentiable.

    Args:
        query, key, value: as the operator takes them.
        query_map, key_map: with ``projection``, what :func:`project_both` made of it; else part of the graph.
        projection: where the maps' gradients go on to; None: to the maps.
        *arguments: the rest of the operator's arguments.
    """
    tracked = (query, key, value, query_map, key_map, *(projection or (None,) * 4))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tracked):
        return _Attention.apply(*tracked, *arguments)
    with _BelowAutograd():
        return _ATTENTION(query, key, value, query_map, key_map, *arguments)


def with_zero_gradients(out: Tensor, parameters: list[Tensor]) -> Tensor:
    """``out``, with gradients of zero to parameters that it did not need: what trains them in several processes waits
    for a gradient of every one."""
    return _Unused.apply(out, *parameters) if torch.is_grad_enabled() else out


class _Unused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, out: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(t) for t in ctx.saved_tensors)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, *inputs: object) -> tuple[Tensor, Tensor]:
        arguments = (*inputs[:5], *inputs[_TRACKED:])
        with _BelowAutograd():
            out, lse, *kept = _ATTENTION_WITH_STATE(*arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *kept, inputs[5], inputs[7], *arguments[: 5 + _TENSORS])
        ctx.settings = arguments[5 + _TENSORS :]
        return out, lse

    @staticmethod
    def backward(ctx: object, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * (_TENSORS + len(ctx.settings))
        if d_out is None and d_lse is None:
            return (None,) * _TRACKED + rest
        out, lse, state, scores, query_weight, key_weight, *tensors = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(out)
        arguments = (ctx, d_out, d_lse, out, lse, (state, scores), query_weight, key_weight, tensors)
        # With a graph of the backward pass, or a vmap over it, the operators need what is registered with them.
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            gradients = _gradients(*arguments, fused=False)
        else:
            with _BelowAutograd():
                gradients = _gradients(*arguments, fused=True)
        return (*gradients, *rest)


def _gradients(
    ctx: object,
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: tuple[Tensor, Tensor],
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    tensors: list[Tensor | None],
    fused: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of the tracked inputs of :class:`_Attention`; None where nobody asked. ``fused``: where the projections
    are constants, the attention operator itself takes the maps' gradients on to the tokens, in the precision that it
    computes in."""
    need = ctx.needs_input_grad
    fused = fused and tensors[0].shape[3] >= _WIDE_HEAD  # narrower ones would be rounded once less than elsewhere
    fuse_query = fused and query_weight is not None and not (need[5] or need[6])
    fuse_key = fused and key_weight is not None and not (need[7] or need[8])
    dq, dk, dv, *maps = _ATTENTION_BACKWARD(
        d_out,
        d_lse,
        out,
        lse,
        *tensors,
        *ctx.settings,
        *kept,
        query_weight if fuse_query else None,
        key_weight if fuse_key else None,
    )
    weights: list[Tensor | None] = [None] * 4
    if query_weight is not None and not fuse_query and (need[0] or need[5] or need[6]):
        weights[:2] = _to_tokens(dq, maps[0], tensors[0], query_weight)
    if key_weight is not None and not fuse_key and (need[1] or need[7] or need[8]):
        weights[2:] = _to_tokens(dk, maps[1], tensors[1], key_weight)
    return tuple(g if wanted else None for g, wanted in zip((dq, dk, dv, *maps, *weights), need))


def _to_tokens(d_tokens: Tensor, d_map: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the tokens' gradient through their map to ``d_tokens``; the gradients of weight and bias."""
    through_map, d_weight, d_bias = _PROJECT_BACKWARD(d_map, tokens, weight)
    d_tokens.add_(through_map)
    return d_weight, d_bias
