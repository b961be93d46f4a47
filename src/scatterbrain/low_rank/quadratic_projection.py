"""Statistics and learned projections as affine maps of the tokens, whose results are the coordinates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from scatterbrain.low_rank.quadratic_coefficients import Projections, Statistics
from scatterbrain.operators.tracing import is_untraced
from scatterbrain.operators.untraced import Projection

_EQUAL_BYTES = torch.ops.scatterbrain.equal_bytes.default

# -------------------- learned


def learned_projection(learned: Projections, scale: float, dtype: torch.dtype, device: torch.device) -> Projection:
    """The maps of learned projections, part of the graph."""
    arguments = (*learned.tensors(), scale, dtype, device)
    return Projection(*(_LearnedProjection.apply(*arguments) if is_untraced() else _learned(*arguments)))


def _learned(
    query_projection: Tensor,
    query_bias: Tensor,
    query_log_scale: Tensor,
    key_projection: Tensor,
    key_bias: Tensor,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, ...]:
    learned = Projections.unchecked(query_projection, query_bias, query_log_scale, key_projection, key_bias)
    return tuple(w.to(dtype)[None] for w in learned.to(device, torch.float64).weights(scale))


class _LearnedProjection(torch.autograd.Function):
    """:func:`_learned` as one node of the graph."""

    @staticmethod
    def forward(ctx: object, *arguments: object) -> tuple[Tensor, ...]:
        *tensors, ctx.scale, _, _ = arguments
        ctx.likes = [(t.dtype, t.device) for t in tensors]
        weights = _learned(*arguments)
        *_, key_bias = weights  # zeros
        ctx.mark_non_differentiable(key_bias)
        ctx.set_materialize_grads(False)
        return weights

    @staticmethod
    def backward(
        ctx: object, query_weight: Tensor | None, query_bias: Tensor | None, key_weight: Tensor | None, _: object
    ) -> tuple[Tensor | None, ...]:
        # The coordinates' rows come first, the log scale's row is the last.
        scaled = None if query_weight is None else query_weight[0].double() * ctx.scale
        gradients = (
            None if scaled is None else scaled[:, :-1],
            None if scaled is None else scaled[:, -1],
            None if query_bias is None else query_bias[0, :, -1],
            None if key_weight is None else key_weight[0, :, :-1],
            None if key_weight is None else key_weight[0, :, -1],
        )
        cast = (None if g is None else g.to(device=like[1], dtype=like[0]) for g, like in zip(gradients, ctx.likes))
        return (*cast, None, None, None)


# -------------------- stored


class ConstantProjection(NamedTuple):
    """The maps of statistics, and copies of the tensors that they were made from: tensors can be changed in place
    behind any version counter."""

    projection: Projection
    copies: list[Tensor]
    scale: float
    dtype: torch.dtype

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether the statistics' tensors hold what the maps were made from."""
        return _EQUAL_BYTES(sources, self.copies)


_cached = WeakTensorKeyDictionary()  # by query_projection


def stored_projection(statistics: Statistics, scale: float, dtype: torch.dtype, device: torch.device) -> Projection:
    """The maps of fitted statistics, constants of the backward pass."""
    kept = constant_projection(statistics, scale, dtype, device)
    return _stored(statistics, scale, dtype, device) if kept is None else kept.projection


def _stored(statistics: Statistics, scale: float, dtype: torch.dtype, device: torch.device) -> Projection:
    # The products of means and projections are formed in float64: they are tiny, and they are what cancels against the
    # tokens. All are constants of the backward pass, whatever they were made from.
    weights = [w.detach().to(dtype) for w in statistics.to(device, torch.float64).weights(scale)]
    per_row = statistics.query_projection.dim() == 4
    return Projection(*(w if per_row else w[None] for w in weights))


def constant_projection(
    statistics: Statistics, scale: float, dtype: torch.dtype, device: torch.device
) -> ConstantProjection | None:
    """:func:`stored_projection`, computed again only where the statistics' content, scale or dtype has changed: it
    takes some twenty small operations, and comparing is cheap. None where reading the content would wait for a device
    or a trace."""
    sources = statistics.tensors()
    is_cheap_to_compare = (
        device.type == "cpu"
        and is_untraced()
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device == device for t in sources)
    )
    if not is_cheap_to_compare:
        return None
    key = statistics.query_projection
    kept = _cached.get(key)
    if kept is None or kept.dtype != dtype or kept.scale != scale or not kept.is_of(sources):
        with torch.inference_mode(False), torch.no_grad():  # a later call may train with it
            projection = _stored(statistics, scale, dtype, device)
            kept = ConstantProjection(projection, [t.detach().clone() for t in sources], scale, dtype)
        _cached[key] = kept
    return kept
