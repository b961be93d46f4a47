"""From statistics to coordinates: the maps of queries and keys that the low-rank kernel is evaluated on."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from scatterbrain import autograd, checks
from scatterbrain.low_rank import (
    Coefficients,
    Favor,
    LowRank,
    Projections,
    Quadratic,
    Statistics,
    favor_log_features,
    favor_sizes,
    moments,
    quadratic_weights,
    random_projection,
    seeded_projection,
    statistics_from_moments,
)
from scatterbrain.padding import PaddingInfo


def coordinates(
    query: Tensor,
    key: Tensor,
    low_rank: LowRank,
    statistics: Coefficients | None,
    scale: float,
    padding: PaddingInfo,
    is_causal: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """query_map (B, Hq, N, r + 1) and key_map (B, Hkv, M, r + 1) of the low-rank kernel, float32 (float64 for float64
    inputs); None without one."""
    batch, q_heads, _, d = query.shape
    checks.check_statistics(low_rank, statistics, scale, batch, q_heads, key.shape[1], d)
    if low_rank is None:
        return None, None
    if isinstance(low_rank, Favor):
        return _favor_coordinates(query, key, low_rank, statistics, scale, padding)
    query_weight, query_bias, key_weight, key_bias = quadratic_projection(
        query, key, low_rank, statistics, scale, padding
    )
    return torch.ops.scatterbrain.project(query, query_weight, query_bias), torch.ops.scatterbrain.project(
        key, key_weight, key_bias
    )


def coordinate_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


# -------------------- quadratic


def quadratic_projection(
    query: Tensor, key: Tensor, low_rank: Quadratic, statistics: Coefficients | None, scale: float, padding: PaddingInfo
) -> autograd.Projection:
    """(query weight, query bias, key weight, key bias) of ``map = weight token + bias``, leading with a batch of 1 or
    B. Learned projections stay part of the graph."""
    dtype = coordinate_dtype(query)
    if isinstance(statistics, Projections):
        arguments = (*vars(statistics).values(), scale, dtype, query.device)
        return _LearnedWeights.apply(*arguments) if autograd.is_untraced() else _learned_weights(*arguments)
    if statistics is None:
        m = moments(query, key, scale, padding.key_mask, padding.query_mask, per_row=True)
        return _stored_weights(statistics_from_moments(m, low_rank.rank, scale), scale, dtype, query.device)
    kept = kept_weights(statistics, scale, dtype, query.device)
    return _stored_weights(statistics, scale, dtype, query.device) if kept is None else kept.weights


def _learned_weights(
    query_projection: Tensor,
    query_bias: Tensor,
    query_log_scale: Tensor,
    key_projection: Tensor,
    key_bias: Tensor,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> autograd.Projection:
    learned = Projections(query_projection, query_bias, query_log_scale, key_projection, key_bias)
    weights = quadratic_weights(learned.to(device, torch.float64), scale)
    return tuple(w.to(dtype)[None] for w in weights)


class _LearnedWeights(torch.autograd.Function):
    """:func:`_learned_weights` as one node of the graph."""

    @staticmethod
    def forward(ctx: object, *arguments: object) -> autograd.Projection:
        ctx.scale, ctx.likes = arguments[5], [(t.dtype, t.device) for t in arguments[:5]]
        weights = _learned_weights(*arguments)
        ctx.mark_non_differentiable(weights[3])
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


def _stored_weights(
    statistics: Statistics, scale: float, dtype: torch.dtype, device: torch.device
) -> autograd.Projection:
    # The products of means and projections are formed in float64: they are tiny, and they are what cancels against the
    # tokens. All are constants of the backward pass, whatever they were made from.
    weights = [w.detach().to(dtype) for w in quadratic_weights(statistics.to(device, torch.float64), scale)]
    per_row = statistics.query_projection.dim() == 4
    return tuple(w if per_row else w[None] for w in weights)


# -------------------- weights of statistics that are used again


class KeptWeights(NamedTuple):
    """Weights, and what they were made from: copies, since tensors can be changed in place behind any counter."""

    sources: list[Tensor]
    scale: float
    dtype: torch.dtype
    weights: autograd.Projection

    def are_of(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether the statistics' tensors hold what these were made from."""
        return _EQUAL_BYTES(tensors, self.sources)


_EQUAL_BYTES = torch.ops.scatterbrain.equal_bytes.default
_kept = WeakTensorKeyDictionary()  # by query_projection


def tensors_of(statistics: Statistics) -> tuple[Tensor, ...]:
    return statistics.query_projection, statistics.query_mean, statistics.key_projection, statistics.key_mean


def _is_kept(statistics: Statistics, device: torch.device) -> bool:
    """Where looking at the content waits for no device, and what was computed is worth keeping."""
    return (
        device.type == "cpu"
        and autograd.is_untraced()
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device == device for t in tensors_of(statistics))
    )


def kept_weights(statistics: Statistics, scale: float, dtype: torch.dtype, device: torch.device) -> KeptWeights | None:
    """:func:`_stored_weights`, computed again only where the statistics' content, scale or dtype has changed: some
    twenty small operations, against which comparing is cheap. None where they are not kept."""
    if not _is_kept(statistics, device):
        return None
    sources = tensors_of(statistics)
    kept = _kept.get(sources[0])
    if kept is None or kept.dtype != dtype or kept.scale != scale or not kept.are_of(sources):
        with torch.inference_mode(False), torch.no_grad():  # usable by a later call that trains
            weights = _stored_weights(statistics, scale, dtype, sources[0].device)
            kept = KeptWeights([t.detach().clone() for t in sources], scale, dtype, weights)
        _kept[sources[0]] = kept
    return kept


# -------------------- random features


def _favor_coordinates(
    query: Tensor, key: Tensor, low_rank: Favor, statistics: Coefficients | None, scale: float, padding: PaddingInfo
) -> tuple[Tensor, Tensor]:
    if statistics is not None:
        projection = statistics.projection
    elif autograd.is_untraced():
        projection = _drawn(low_rank, query.shape[3])
    else:
        projection = random_projection(
            low_rank.features, query.shape[3], low_rank.orthogonal, low_rank.hyperbolic, low_rank.seed
        )
    projection = projection.detach().to(device=query.device, dtype=coordinate_dtype(query))[None, None]
    maps = []
    for tokens, mask, size in zip((query, key), (padding.query_mask, padding.key_mask), favor_sizes(scale)):
        # A node of its own without a mask too: gradients of the features are then always added up before they join that
        # of the scores, to the same bits.
        tokens = tokens.view_as(tokens) if mask is None else tokens.masked_fill(mask[:, None, :, None], 0)
        projected = torch.ops.scatterbrain.project(tokens, projection * size, None)
        maps.append(torch.cat(favor_log_features(projected, tokens, size, low_rank.hyperbolic), -1))
    return maps[0], maps[1]


@functools.lru_cache(maxsize=32)
def _drawn(low_rank: Favor, head_dim: int) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # usable by a later call that trains
        return seeded_projection(low_rank, head_dim)
