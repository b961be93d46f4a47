"""Plain eager calls: attention and the projections of its coordinates as one node of the autograd graph.

The autograd that is registered with the operators serves torch.compile, export, functorch and dispatch modes. For an
operator of twenty arguments it takes several times as long as one torch.autograd.Function around the operators, which
is what short sequences wait for. Both use the same operators and give the same bits, but for gradients through
stored statistics, which are added up inside the operator: those of bfloat16 and float16 tokens, and of queries that are
evaluated again in double, are rounded once, not twice.
"""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch import Tensor

from scatterbrain import ops  # noqa: F401  (loads the operators)

_ATTENTION = torch.ops.scatterbrain.attention.default
_ATTENTION_WITH_STATE = torch.ops.scatterbrain.attention_with_state.default
_ATTENTION_BACKWARD = torch.ops.scatterbrain.attention_backward.default
_QUADRATIC_ATTENTION = torch.ops.scatterbrain.quadratic_attention.default
_QUADRATIC_ATTENTION_WITH_STATE = torch.ops.scatterbrain.quadratic_attention_with_state.default
_PLAN = torch.ops.scatterbrain.prepare.default
_FORGET_PLAN = torch.ops.scatterbrain.discard_prepared.default
_PLANNED_ATTENTION = torch.ops.scatterbrain.prepared_attention.default
_PLANNED_ATTENTION_WITH_STATE = torch.ops.scatterbrain.prepared_attention_with_state.default
_PLANNED_ATTENTION_BACKWARD = torch.ops.scatterbrain.prepared_attention_backward.default
_PROJECT = torch.ops.scatterbrain.project.default
_PROJECT_BACKWARD = torch.ops.scatterbrain.project_backward.default
_ROUTE = torch.ops.scatterbrain.route.default

_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_WIDE_HEAD = torch.ops.scatterbrain.narrow_head()  # dimensions from which a head is not computed in float64
_QUADRATIC = 1  # low_rank of the operators

# (query weight, query bias, key weight, key bias) of ``map = weight token + bias``, each leading with a batch of 1 or B
Projection = tuple[Tensor, Tensor, Tensor, Tensor]


def is_untraced() -> bool:
    """Whether nothing traces, transforms or watches the operators: no compile, export, functorch or dispatch mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def project_both(query: Tensor, key: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """The maps of queries and keys, outside the graph."""
    with _BelowAutograd():
        return _PROJECT(query, *projection[:2]), _PROJECT(key, *projection[2:])


def route(*arguments: object) -> tuple[Tensor, Tensor]:
    """The routing operator, which has no gradients."""
    with _BelowAutograd():
        return _ROUTE(*arguments)


def attention(*arguments: object) -> tuple[Tensor, Tensor]:
    """The attention operator, differentiable."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[: _Attention.TRACKED]):
        return _Attention.apply(*arguments[: _Attention.TRACKED], arguments[_Attention.TRACKED :])
    with _BelowAutograd():
        return _ATTENTION(*arguments)


def quadratic_attention(
    query: Tensor, key: Tensor, value: Tensor, projection: Projection, settings: tuple
) -> tuple[Tensor, Tensor]:
    """The operator of the same name, differentiable. ``settings``: its arguments after the projection and before
    ``packed_rank``."""
    tracked = query, key, value, *projection
    rest = *settings, _packed_rank(projection)
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or any(t.requires_grad for t in projection)
    ):
        return _QuadraticAttention.apply(*tracked, rest)
    with _BelowAutograd():
        return _QUADRATIC_ATTENTION(*tracked, *rest)


def _packed_rank(projection: Projection) -> int:
    """Heads that narrow, and float64, are computed in double, which packed rows of float32 would have to be brought
    to."""
    weight = projection[0]
    packed = weight.dtype == torch.float32 and weight.shape[3] >= _WIDE_HEAD
    return weight.shape[2] - 1 if packed else 0


class StaleProjection(Exception):
    """What a projection was made from has changed since."""


_forgotten: list[int] = []  # plans that nobody holds, until the next one is made


class Planned:
    """All arguments of :func:`quadratic_attention` but the tokens, kept where the operator is, since each would take
    its time on the way there. The projections are constants."""

    def __init__(
        self, projection: Projection, settings: tuple, sources: tuple[Tensor, ...], copies: list[Tensor]
    ) -> None:
        """``sources``: what the projections were made from, ``copies`` what it held then."""
        self.projection, self.settings = projection, settings
        self.routes, self.is_wide = settings[9] > 0, projection[0].shape[3] >= _WIDE_HEAD
        with contextlib.suppress(IndexError):  # none left, or another thread was quicker
            while True:
                _FORGET_PLAN(_forgotten.pop())
        self._number = _PLAN(*projection, *settings, _packed_rank(projection), sources, copies)
        # Wherever objects are collected no operator is called: something could be tracing there.
        weakref.finalize(self, _forgotten.append, self._number).atexit = False

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention alone, differentiable in the tokens.

        Raises:
            StaleProjection: the tensors that the projections were made from hold something else now.
        """
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return _PlannedAttention.apply(query, key, value, self)
        with _BelowAutograd():
            out = _PLANNED_ATTENTION(query, key, value, self._number)
        if out.dim() != 4:
            raise StaleProjection
        return out


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


class _Node(torch.autograd.Function):
    """What both nodes do in the backward pass: nothing without a gradient, and below autograd where nothing asks for a
    graph of the backward pass or maps over it. Inputs are those of the operator that have gradients and, since torch
    takes its time over every one, a tuple of all the others."""

    TRACKED: int  # inputs that have gradients

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
            gradients = cls.gradients(ctx, below, (d_out, d_lse, out, lse), *kept)
        return *[g if wanted else None for g, wanted in zip(gradients, need)], None


class _Attention(_Node):
    """Coordinates are part of the graph."""

    TRACKED = 5  # query, key, value and two maps
    TENSORS = 9  # of the rest: lists, masks, ranges and offset

    @staticmethod
    def forward(ctx: object, *inputs: object) -> tuple[Tensor, Tensor]:
        *tracked, rest = inputs
        with _BelowAutograd():
            out, lse, *kept = _ATTENTION_WITH_STATE(*tracked, *rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *kept, *tracked, *rest[: _Attention.TENSORS])
        ctx.settings = rest[_Attention.TENSORS :]
        return out, lse

    @staticmethod
    def gradients(ctx: object, below: bool, given: tuple, state: Tensor, scores: Tensor, *tensors: Tensor) -> tuple:
        return _ATTENTION_BACKWARD(*given, *tensors, *ctx.settings, state=state, scores=scores)


class _QuadraticAttention(_Node):
    """Coordinates are projections of the tokens, inside the node."""

    TRACKED = 7  # query, key, value, two weights and two biases

    @staticmethod
    def forward(
        ctx: object,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_weight: Tensor,
        query_bias: Tensor,
        key_weight: Tensor,
        key_bias: Tensor,
        rest: tuple,
    ) -> tuple[Tensor, Tensor]:
        with _BelowAutograd():
            out, lse, *kept, index, count = _QUADRATIC_ATTENTION_WITH_STATE(
                query, key, value, query_weight, query_bias, key_weight, key_bias, *rest
            )
        ctx.set_materialize_grads(False)
        tensors, ctx.settings = _after_projection(rest, index, count)
        ctx.save_for_backward(out, lse, *kept, query, key, value, query_weight, key_weight, *tensors)
        return out, lse

    @staticmethod
    def gradients(ctx: object, below: bool, given: tuple, *kept: Tensor) -> tuple:
        return _quadratic_gradients(ctx.needs_input_grad, below, given, *kept, settings=ctx.settings)


class _PlannedAttention(torch.autograd.Function):
    """As above, of a plan: its projections are constants, and there is no log-sum-exp to differentiate."""

    @staticmethod
    def forward(ctx: object, query: Tensor, key: Tensor, value: Tensor, plan: Planned) -> Tensor:
        with _BelowAutograd():
            out, lse, *kept, index, count = _PLANNED_ATTENTION_WITH_STATE(query, key, value, plan._number)
        if out.dim() != 4:
            raise StaleProjection
        lists = (index, count) if plan.routes else ()
        ctx.save_for_backward(out, lse, *kept, query, key, value, *lists)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: object, d_out: Tensor) -> tuple[Tensor | None, ...]:
        plan, need, saved = ctx.plan, ctx.needs_input_grad, ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            gradients = _gradients_of_plan(plan, need, False, d_out, *saved)
        else:
            with _BelowAutograd():
                if plan.is_wide and not torch._C._len_torch_dispatch_stack():  # plans are unknown to what watches here
                    gradients = _PLANNED_ATTENTION_BACKWARD(d_out, *saved[:9], plan._number, *saved[9:])
                else:
                    gradients = _gradients_of_plan(plan, need, True, d_out, *saved)
        return *(g if wanted else None for g, wanted in zip(gradients, need)), None


def _gradients_of_plan(
    plan: Planned, need: tuple[bool, ...], below: bool, d_out: Tensor, out: Tensor, lse: Tensor, *kept: Tensor
) -> tuple:
    """Those of the tokens, by the operators one by one."""
    kept, lists = kept[:7], kept[7:] or (None, None)
    tensors, settings = _after_projection((*plan.settings, _packed_rank(plan.projection)), *lists)
    weights = plan.projection[0], plan.projection[2]
    need = *need[:3], *(False,) * 4
    given = d_out, None, out, lse
    return _quadratic_gradients(need, below, given, *kept, *weights, *tensors, settings=settings)[:3]


def _after_projection(rest: tuple, index: Tensor | None, count: Tensor | None) -> tuple[tuple, tuple]:
    """The attention operator's tensors after the maps, and its settings, from what follows the projections in the
    arguments of quadratic_attention and the lists that it made."""
    keys, _, *blocks = rest[9:]
    lists = rest[:4] if keys == 0 else (index, count, None, None)
    return (*lists, *rest[4:9]), (_QUADRATIC, *blocks)


def _quadratic_gradients(
    need: tuple[bool, ...],
    below: bool,
    given: tuple,
    state: Tensor,
    scores: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    *rest: Tensor,
    settings: tuple,
) -> tuple:
    """Gradients of tokens and projections. Where the projections are constants, the attention operator itself takes the
    maps' gradients on to the tokens, in the precision that it computes in."""
    fused = below and query.shape[3] >= _WIDE_HEAD  # narrower ones would be rounded once less than elsewhere
    fuse_query, fuse_key = fused and not (need[3] or need[4]), fused and not (need[5] or need[6])
    dq, dk, dv, d_query_map, d_key_map = _ATTENTION_BACKWARD(
        *given,
        query,
        key,
        value,
        query_map,
        key_map,
        *rest,
        *settings,
        state,
        scores,
        query_weight if fuse_query else None,
        key_weight if fuse_key else None,
    )
    of_query = of_key = (None, None)
    if not fuse_query and (need[0] or need[3] or need[4]):
        of_query = _to_tokens(dq, d_query_map, query, query_weight)
    if not fuse_key and (need[1] or need[5] or need[6]):
        of_key = _to_tokens(dk, d_key_map, key, key_weight)
    return dq, dk, dv, *of_query, *of_key


def _to_tokens(d_tokens: Tensor, d_map: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the tokens' gradient through their map to ``d_tokens``; the gradients of weight and bias."""
    through_map, d_weight, d_bias = _PROJECT_BACKWARD(d_map, tokens, weight)
    d_tokens.add_(through_map)
    return d_weight, d_bias
