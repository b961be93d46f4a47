"""Statistics of a low-rank kernel from a call's own tokens: means of all of them, covariances of a few, and the
directions in which both vary most by subspace iteration. A decomposition of both covariances in full would take
several times as long. On the CPU one operator makes the projections of the quadratic kernel, everywhere else and for
other kernels torch's own operations do."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scatterbrain.low_rank.moments import check_finite_moments
from scatterbrain.low_rank.quadratic_coefficients import STORED_FLOOR, Statistics, on_one_thread
from scatterbrain.operators import untraced
from scatterbrain.operators.arguments import InputProjectionArguments
from scatterbrain.operators.device_constants import kept
from scatterbrain.operators.fakes import accumulation_dtype
from scatterbrain.operators.tracing import is_untraced
from scatterbrain.operators.untraced import Projection
from scatterbrain.padding import PaddingInfo

SAMPLES = 256  # tokens of a head that covariances are taken from
SUMMED = 64  # tokens whose sum is one term of the sum over all
STEPS = 3  # of subspace iteration


class SampledMoments(NamedTuple):
    """Of every batch row and key/value head, its query heads together: means of all valid tokens, of the scaled queries
    and of the keys weighted by exp(a.k), and covariances of samples of both."""

    query_mean: Tensor  # a (B, Hkv, d)
    key_mean: Tensor  # b (B, Hkv, d)
    covariances: Tensor  # (2, B, Hkv, d, d) float64, of queries and of keys


def fitted_projection(query: Tensor, key: Tensor, padding: PaddingInfo, rank: int, scale: float) -> Projection:
    """The affine maps of Quadratic(statistics="input"), per batch row and key/value head: constants of the backward
    pass."""
    if not query.is_cpu:
        return composed_projection(query, key, padding, rank, scale)
    if is_untraced():
        projection = untraced.input_projection(InputProjectionArguments(query, key, *padding, rank, scale))
    else:
        tokens = query.detach(), key.detach()
        projection = Projection(*torch.ops.scatterbrain.input_projection(*tokens, *padding, rank, scale))
    _check_finite((projection.query_bias,))  # NaN where anything is not finite
    return projection


def composed_projection(query: Tensor, key: Tensor, padding: PaddingInfo, rank: int, scale: float) -> Projection:
    """:func:`fitted_projection` of torch's own operations, for every device."""
    query, key = query.detach(), key.detach()
    with torch.no_grad():
        m = sampled_moments(query, key, scale, padding.key_mask, padding.query_mask)
        _check_finite(m)
        statistics = statistics_from_samples(m, rank, scale)
        wide = Statistics.unchecked(*(t.double() for t in statistics.tensors()), scale)
        return Projection(*(w.to(accumulation_dtype(query.dtype)) for w in wide.weights(scale)))


def _check_finite(results: tuple[Tensor, ...]) -> None:
    check_finite_moments(results, "Quadratic(statistics='input')", "use stored statistics, which let NaN through")


def sampled_moments(
    query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None, query_mask: Tensor | None
) -> SampledMoments:
    """query (B, Hq, N, d), key (B, Hkv, M, d), masks bool (B, tokens), True = ignore."""
    query, query_mask = _valid_tokens(query, query_mask)
    key, key_mask = _valid_tokens(key, key_mask)
    (batch, q_heads, queries, d), (_, heads, keys, _) = query.shape, key.shape
    group = q_heads // heads
    # Sums over tokens go element by element, not by matrix products: their bits are the same for any number of threads.
    total = _sum(query) if group == 1 else _sum(query).unflatten(1, (heads, group)).sum(2)
    valid = max(queries, 1) if query_mask is None else (~query_mask).sum(1).clamp(min=1)[:, None, None]
    a = total * (scale / group) / valid
    if queries == 0 or keys == 0:
        covariances = torch.zeros(2, batch, heads, d, d, dtype=torch.float64, device=a.device)
        return SampledMoments(a, torch.zeros_like(a), covariances)
    logits = (key * a[:, :, None]).sum(-1)
    logits = logits if key_mask is None else logits.masked_fill(key_mask[:, None], -math.inf)
    weight = torch.exp(logits - logits.amax(-1, keepdim=True))
    weight = weight if key_mask is None else weight.masked_fill(key_mask[:, None], 0)
    b = _sum(weight[..., None] * key) / _sum(weight[..., None]).clamp(min=1)  # the largest weight is 1
    sampled_queries, is_query = _samples(query, query_mask)
    sampled_keys, is_key = _samples(key, key_mask)
    with on_one_thread(query.device):
        sampled_queries = sampled_queries.reshape(batch, heads, group * sampled_queries.shape[2], d) * scale
        if is_query is None:
            share = torch.full_like(sampled_queries[..., 0], 1 / sampled_queries.shape[2])
        else:
            is_query = is_query.repeat(1, group)[:, None]
            share = is_query.double() / is_query.sum(-1, keepdim=True).clamp(min=1)
        weight = _softmax(
            (sampled_keys @ a.double()[..., None]).squeeze(-1), None if is_key is None else is_key[:, None]
        )
        covariances = _covariance(sampled_queries, share), _covariance(sampled_keys, weight)
    return SampledMoments(a, b, torch.stack(covariances))


def _valid_tokens(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tokens from each row's first valid one on, zeros for those that are ignored, and their mask. In the dtype
    that sums are formed in; contiguous, since sums over memory of another layout would round in another order."""
    length = tokens.shape[2]
    if mask is not None and length > 0:
        place = (~mask).to(torch.int8).argmax(1, keepdim=True) + torch.arange(length, device=mask.device)
        is_past, place = place >= length, place.clamp(max=length - 1)
        mask = mask.gather(1, place) | is_past
        tokens = tokens.gather(2, place[:, None, :, None].expand_as(tokens)).masked_fill(mask[:, None, :, None], 0)
    return tokens.to(accumulation_dtype(tokens.dtype)).contiguous(), mask


def _sum(tokens: Tensor) -> Tensor:
    """Over the tokens (B, heads, tokens, width), block after block: zeros behind the last token change no bit, however
    many they are."""
    if tokens.shape[2] == 0:
        return tokens.sum(2)
    tokens = F.pad(tokens, (0, 0, 0, -tokens.shape[2] % SUMMED))
    return tokens.unflatten(2, (-1, SUMMED)).sum(3).cumsum(2)[:, :, -1]


def _softmax(logits: Tensor, takes_part: Tensor | None) -> Tensor:
    """Over those that take part, None for all; zeros for the others, also where there are no others."""
    if takes_part is None:
        return torch.softmax(logits, -1)
    return torch.softmax(logits.masked_fill(~takes_part, -math.inf), -1).masked_fill(~takes_part, 0)


def _samples(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(B, heads, samples, d) float64, up to SAMPLES of the valid tokens of each row, spread evenly from the first to
    the last, and bool (B, samples): which of them the row has; None for all."""
    length, device = tokens.shape[2], tokens.device
    if mask is None and is_untraced() and length >= SAMPLES:
        return tokens.index_select(2, kept(_spread, device, length)).double(), None
    # A graph serves any length, so its number of samples does not depend on it.
    slot = torch.arange(SAMPLES, device=device)
    valid = torch.ones_like(tokens[:, 0, :, 0], dtype=torch.bool) if mask is None else ~mask
    tokens_of_row = valid.sum(1, keepdim=True)
    samples_of_row = tokens_of_row.clamp(max=SAMPLES)
    place = torch.round(slot * (tokens_of_row - 1).double() / (samples_of_row - 1).clamp(min=1)).long()
    index = torch.searchsorted(valid.cumsum(1), place + 1).clamp(max=length - 1)
    index = index[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
    return tokens.gather(2, index).double(), slot < samples_of_row


def _spread(length: int, device: torch.device) -> Tensor:
    count = min(SAMPLES, length)
    slot = torch.arange(count, device=device, dtype=torch.float64)
    return torch.round(slot * (length - 1) / max(count - 1, 1)).long()


def _covariance(samples: Tensor, share: Tensor) -> Tensor:
    """Of samples (B, heads, n, d) that count by their share (B, heads or 1, n)."""
    share = share[..., None]
    centred = samples - (share * samples).sum(2, keepdim=True)
    return (share * centred).transpose(-1, -2) @ centred


def statistics_from_samples(m: SampledMoments, rank: int, scale: float) -> Statistics:
    """Pq, a, Pk, b in float32: W, a basis of the ``rank`` directions of largest Ck Cq, and the products along it,
    x.y = (q - a).W (W^T Cq W)^-1 W^T Cq (k - b), which of all functions of W^T (q - a) is the nearest to
    (q - a).(k - b)."""
    with on_one_thread(m.covariances.device):
        (cq, ck), varies = _floored(m)
        make = kept if is_untraced() else lambda make, device, *sizes: make(*sizes, device)
        w = make(_start, cq.device, cq.shape[-1], rank)
        for _ in range(STEPS):
            w = torch.linalg.qr(ck @ (cq @ w)).Q
        v = cq @ w
        root = torch.linalg.cholesky_ex(w.transpose(-1, -2) @ v).L
        both = torch.linalg.solve_triangular(root, torch.cat([w, v], -2).transpose(-1, -2), upper=False)
        pq, pk = both.where(varies[..., None, None], 0).float().split(cq.shape[-1], -1)
    return Statistics.unchecked(pq, m.query_mean.float(), pk, m.key_mean.float(), float(scale))


def balanced_statistics(m: SampledMoments, scale: float) -> Statistics:
    """Pq, a, Pk, b at full rank, with Pq^T Pk = I whatever the tokens are, so that x.y = (scale q - a).(k - b): of all
    such pairs one with the least mean |x|^2 + |y|^2 over the samples, turned so that it does not depend on which
    singular vectors stand for directions that are alike. The identity stands for the covariance of samples that do not
    vary, since the other tokens may."""
    with on_one_thread(m.covariances.device):
        average, varies = _sizes(m)
        identity = torch.eye(m.covariances.shape[-1], dtype=torch.float64, device=average.device)
        average, varies = average[..., None, None], varies[..., None, None]
        floored = torch.where(varies, m.covariances + STORED_FLOOR * average * identity, identity)
        values, vectors = torch.linalg.eigh(floored)
        root = values.sqrt()[..., None]
        rows = vectors.transpose(-1, -2)
        (q_root, k_root), (q_inverse, k_inverse) = vectors @ (root * rows), vectors @ (rows / root)
        u, s, vt = torch.linalg.svd(q_root @ k_root)
        turned = u * s.sqrt()[..., None, :]
        pq, pk = turned @ (u.transpose(-1, -2) @ q_inverse), turned @ (vt @ k_inverse)
    return Statistics.unchecked(pq, m.query_mean, pk, m.key_mean, float(scale))


def _sizes(m: SampledMoments) -> tuple[Tensor, Tensor]:
    """Means of the covariances' eigenvalues (2, B, Hkv), and whether they are more than rounding: one token, or equal
    ones, have no direction."""
    average = m.covariances.diagonal(dim1=-2, dim2=-1).mean(-1)
    means = torch.stack([m.query_mean, m.key_mean]).double()
    return average, average > 1e-13 * (average + means.square().mean(-1))


def _floored(m: SampledMoments) -> tuple[Tensor, Tensor]:
    """Covariances over the mean of their eigenvalues, with the floor added to all of them: what follows is then well
    conditioned. And whether both vary."""
    average, varies = _sizes(m)
    scaled = m.covariances / torch.where(varies, average, 1)[..., None, None]
    floor = STORED_FLOOR * torch.eye(scaled.shape[-1], dtype=torch.float64, device=scaled.device)
    return scaled + floor, varies.all(0)


def _start(head_dim: int, rank: int, device: torch.device) -> Tensor:
    """Where subspace iteration starts: numbers without a pattern."""
    return torch.arange(head_dim * rank, dtype=torch.float64, device=device).square().cos().reshape(head_dim, rank)
