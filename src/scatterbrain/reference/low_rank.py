"""Low-rank kernels: L_ij = exp(rho_i + kappa_j) K(x_i, y_j), the weight of pairs off the support.

Statistics are constants: no gradient flows into them. Learned projections are not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scatterbrain.low_rank import Favor, Features, Projections, Quadratic, Statistics
from scatterbrain.reference.inputs import Inputs

STORED_FLOOR = 1e-4  # eigenvalues of a covariance are at least this much of their mean
EMA_FLOOR = 1e-3  # the same for moving averages, which see few tokens at first
SAMPLES = 256  # tokens of a head that are looked at where all would take too long
STEPS = 3  # of the subspace iteration on samples


class Coordinates(NamedTuple):
    """What a kernel is evaluated on: x (B, Hq, N, r), rho (B, Hq, N), y (B, Hkv, M, r), kappa (B, Hkv, M), and whether
    K is (1 + x.y / 2)^2 (``is_quadratic``) or x.y. Of kernels that replace keys by others, ``at_mean``: (x, rho) of a
    scaled query for heads (b, h), and ``apart`` (B, Hkv, M): the squared distance of each key to the other."""

    x: Tensor
    rho: Tensor
    y: Tensor
    kappa: Tensor
    is_quadratic: bool
    at_mean: Callable[[int, int, Tensor], tuple[Tensor, Tensor]] | None = None
    apart: Tensor | None = None

    def log_kernel(self) -> tuple[Tensor, Tensor]:
        """(rho_i + kappa_j, K_ij), both (B, Hq, N, M)."""
        group = self.x.shape[1] // self.y.shape[1]
        y, kappa = self.y.repeat_interleave(group, 1), self.kappa.repeat_interleave(group, 1)
        inner = self.x @ y.transpose(-1, -2)
        factor = (1 + inner / 2).square() if self.is_quadratic else inner
        return self.rho[..., :, None] + kappa[..., None, :], factor


@functools.singledispatch
def log_kernel(low_rank: object, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(log scale, factor), both (B, Hq, N, M), of L = exp(log scale) factor, in the dtype of query."""
    name = type(low_rank).__name__
    raise TypeError(
        f"sb.reference knows no low-rank kernel {name}; define it with @sb.reference.log_kernel.register on a function "
        f"(low_rank: {name}, inputs: sb.reference.Inputs) that returns (log scale, factor), both (B, Hq, N, M)"
    )


@functools.singledispatch
def coordinates(low_rank: object, inputs: Inputs) -> Coordinates | None:
    """What Routed scores with. None without a kernel."""
    name = type(low_rank).__name__
    raise TypeError(
        f"sb.reference knows no coordinates of {name}, which Routed scores with; define them by "
        f"@sb.reference.coordinates.register on a function (low_rank: {name}, inputs: sb.reference.Inputs) returning "
        "sb.reference.Coordinates, or use another support"
    )


@coordinates.register
def _(low_rank: None, inputs: Inputs) -> None:
    return None


# -------------------- quadratic


@log_kernel.register
def _(low_rank: Quadratic, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return coordinates(low_rank, inputs).log_kernel()


@coordinates.register
def _(low_rank: Quadratic, inputs: Inputs) -> Coordinates:
    """``statistics="input"`` fits every batch row to samples of itself; the others are given what they use."""
    statistics = inputs.statistics
    if low_rank.statistics == "input":
        if inputs.is_causal:
            raise ValueError("statistics='input' would leak the future in causal attention; pass stored statistics")
        if statistics is not None:
            raise ValueError("statistics= was given with statistics='input', which fits its own; pass None")
        _check_rank(low_rank.rank, inputs)
        project = functools.partial(sampled_projections, rank=low_rank.rank)
        rows = [_fit_to_samples(inputs, b, project) for b in range(inputs.query.shape[0])]
        rows = [[t.float() for t in row] for row in rows]
        statistics = Statistics(*(torch.stack(t) for t in zip(*rows)), inputs.scale)
    return _quadratic(statistics, inputs)


@functools.singledispatch
def _quadratic(statistics: object, inputs: Inputs) -> Coordinates:
    raise TypeError(
        "Quadratic needs statistics=Statistics (sb.reference.fit_statistics) or Projections, got "
        f"{type(statistics).__name__}"
    )


@_quadratic.register
def _(statistics: Statistics, inputs: Inputs) -> Coordinates:
    """x = Pq (scale q - a), rho = scale q.b, y = Pk (k - b), kappa = a.(k - b), since exp(scale q.k) =
    exp(scale q.b) exp(a.(k - b)) exp((scale q - a).(k - b)), of whose last factor K is an approximation. Per key/value
    head, shared by its query heads."""
    if not math.isclose(statistics.scale, inputs.scale, rel_tol=1e-6, abs_tol=1e-12):
        raise ValueError(
            f"statistics were fitted for scale={statistics.scale}, got scale={inputs.scale}; fit them with the same"
        )
    pq, a, pk, b = (
        t.detach().to(inputs.query)
        for t in (statistics.query_projection, statistics.query_mean, statistics.key_projection, statistics.key_mean)
    )
    centred = inputs.key - b[..., None, :]
    y, kappa = centred @ pk.transpose(-1, -2), (centred @ a[..., None]).squeeze(-1)
    pq = pq.repeat_interleave(inputs.group, -3)
    a, b = (t.repeat_interleave(inputs.group, -2) for t in (a, b))
    scaled = inputs.query * inputs.scale
    x, rho = (scaled - a[..., None, :]) @ pq.transpose(-1, -2), (scaled @ b[..., None]).squeeze(-1)
    return Coordinates(x, rho, y, kappa, is_quadratic=True)


@_quadratic.register
def _(learned: Projections, inputs: Inputs) -> Coordinates:
    """x = Pq scale q, rho = scale q.b + c, per query head; y = Pk k, kappa = a.k, per key/value head."""
    pq, b, c, pk, a = (
        t.to(inputs.query)
        for t in (
            learned.query_projection,
            learned.query_bias,
            learned.query_log_scale,
            learned.key_projection,
            learned.key_bias,
        )
    )
    scaled = inputs.query * inputs.scale
    return Coordinates(
        scaled @ pq.transpose(-1, -2),
        (scaled @ b[..., None]).squeeze(-1) + c[:, None],
        inputs.key @ pk.transpose(-1, -2),
        (inputs.key @ a[..., None]).squeeze(-1),
        is_quadratic=True,
    )


def fit_statistics(
    query: Tensor, key: Tensor, rank: int = 9, key_padding_mask: Tensor | None = None, scale: float | None = None
) -> Statistics:
    """As :func:`scatterbrain.fit_statistics`: pooled over batch rows, per key/value head, in float64, rounded to
    float32."""
    inputs = Inputs.of(query, key, None, key_padding_mask, scale=scale)
    return Statistics(*_fit(inputs, list(range(query.shape[0])), rank), inputs.scale)


def _fit(inputs: Inputs, rows: list[int], rank: int) -> list[Tensor]:
    """Pq, a, Pk, b of every key/value head, fitted to the valid tokens of some batch rows."""
    _check_rank(rank, inputs)
    d, heads = inputs.query.shape[3], []
    for head in range(inputs.key.shape[1]):
        of_head = slice(head * inputs.group, (head + 1) * inputs.group)
        queries = torch.cat([inputs.query[b, of_head, ~inputs.query_padding[b]].reshape(-1, d) for b in rows])
        keys = torch.cat([inputs.key[b, head, ~inputs.key_padding[b]] for b in rows])
        heads.append(projections(moments(queries.detach().double() * inputs.scale, keys.detach().double()), rank))
    return [torch.stack(t).float() for t in zip(*heads)]


def _check_rank(rank: int, inputs: Inputs) -> None:
    d = inputs.query.shape[3]
    if rank > d:
        raise ValueError(f"rank must be at most head_dim={d}, got {rank}")


class Moments(NamedTuple):
    """Of one key/value head, in float64. A moving average (``statistics="ema"``) blends these, (1 - momentum) old +
    momentum new, and projects with ``floor=EMA_FLOOR``."""

    query_mean: Tensor  # (d,)
    query_second: Tensor  # (d, d)
    key_mean: Tensor
    key_second: Tensor


def moments(queries: Tensor, keys: Tensor) -> Moments:
    """First and second moments of scaled queries (n, d), all alike, and of keys (m, d), weighted by exp(a.k) with a the
    queries' mean: where queries attend if each were the mean one."""
    share = torch.full_like(queries[:, 0], 1 / max(len(queries), 1))
    return _moments(queries, share, keys, torch.softmax(keys @ (share @ queries), 0))


def _moments(queries: Tensor, share: Tensor, keys: Tensor, weight: Tensor) -> Moments:
    return Moments(
        *(share @ queries, (share[:, None] * queries).T @ queries),
        *(weight @ keys, (weight[:, None] * keys).T @ keys),
    )


def projections(m: Moments, rank: int, floor: float = STORED_FLOOR) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Pq, a, Pk, b). With U S V^T = Cq^(1/2) Ck^(1/2), Pq = S^(1/2) U^T Cq^(-1/2) and Pk = S^(1/2) V^T Ck^(-1/2), the
    first ``rank`` rows of each: the directions in which q - a and k - b interact most. At full rank x.y =
    (q - a).(k - b) for tokens like those of the moments: directions in which neither queries nor keys varied, of which
    none is before another, have rows of zeros."""
    (q_root, q_inverse, q_lowest), (k_root, k_inverse, k_lowest) = (
        _roots(second, mean, floor) for second, mean in ((m.query_second, m.query_mean), (m.key_second, m.key_mean))
    )
    u, s, vt = torch.linalg.svd(q_root @ k_root)
    size = torch.where(s > (1 + 1e-6) * q_lowest * k_lowest, s, 0)[:rank, None].sqrt()
    return size * (u.T[:rank] @ q_inverse), m.query_mean, size * (vt[:rank] @ k_inverse), m.key_mean


def _roots(second: Tensor, mean: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """C^(1/2) and C^(-1/2) of the covariance C, eigenvalues below ``floor`` of their mean raised to it, and the root of
    that least one. Zeros where C is zero up to rounding (one token, or equal ones): such tokens have no direction."""
    values, vectors = torch.linalg.eigh(second - torch.outer(mean, mean))
    average = values.clamp(min=0).mean()
    if average <= 1e-13 * second.diagonal().mean():
        return torch.zeros_like(second), torch.zeros_like(second), torch.zeros_like(average)
    root = torch.maximum(values, floor * average).sqrt()
    least = (floor * average).sqrt()
    return vectors @ torch.diag(root) @ vectors.T, vectors @ torch.diag(1 / root) @ vectors.T, least


def _fit_to_samples(inputs: Inputs, row: int, project: Callable[[Moments], tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Pq, a, Pk, b of every key/value head of a batch row: a and b of all its valid tokens, and covariances of up
    to SAMPLES of the keys, which keep those weights, and of the queries of each head, spread evenly."""
    of_query, of_key, heads = ~inputs.query_padding[row], ~inputs.key_padding[row], []
    for head in range(inputs.key.shape[1]):
        of_head = slice(head * inputs.group, (head + 1) * inputs.group)
        queries = inputs.query[row, of_head, of_query].detach().double() * inputs.scale  # (group, n, d)
        keys = inputs.key[row, head, of_key].detach().double()
        means = moments(queries.flatten(0, 1), keys)
        n, m = queries.shape[1], len(keys)
        queries, keys = queries[:, spread(min(SAMPLES, n), n)].flatten(0, 1), keys[spread(min(SAMPLES, m), m)]
        share = torch.full_like(queries[:, 0], 1 / max(len(queries), 1))
        weight = torch.softmax(keys @ means.query_mean, 0)
        pq, pk = project(_moments(queries, share, keys, weight))
        heads.append((pq, means.query_mean, pk, means.key_mean))
    return [torch.stack(t) for t in zip(*heads)]


def spread(count: int, length: int) -> list[int]:
    """``count`` positions from the first to the last of ``length``, evenly; halves go to the even one."""
    return [round(t * (length - 1) / max(count - 1, 1)) for t in range(count)]


def sampled_projections(m: Moments, rank: int) -> tuple[Tensor, Tensor]:
    """(Pq, Pk) without a decomposition of the covariances Cq and Ck, each over the mean of its eigenvalues and with
    STORED_FLOOR added to them. W is an orthonormal basis near the ``rank`` principal directions of Ck Cq: STEPS steps
    of subspace iteration from cos(t^2), t = 0, 1, ... along the rows of W. With W^T Cq W = R R^T, Pq = R^-1 W^T and
    Pk = R^-1 W^T Cq: x.y = (q - a).z, where z is the projection of k - b for which (q - a).(k - b - z) is least in the
    mean square over queries, of those along W. Zeros where either covariance is zero up to rounding."""
    d = len(m.query_mean)
    covariances = []
    for second, mean in ((m.query_second, m.query_mean), (m.key_second, m.key_mean)):
        covariance = second - torch.outer(mean, mean)
        average = covariance.diagonal().mean()
        if average <= 1e-13 * second.diagonal().mean():
            return second.new_zeros(rank, d), second.new_zeros(rank, d)
        covariances.append(covariance / average + STORED_FLOOR * torch.eye(d).to(second))
    cq, ck = covariances
    w = torch.arange(d * rank).to(cq).square().cos().reshape(d, rank)
    for _ in range(STEPS):
        w = torch.linalg.qr(ck @ cq @ w).Q
    root = torch.linalg.cholesky(w.T @ cq @ w)
    return torch.linalg.solve(root, w.T), torch.linalg.solve(root, w.T @ cq)


def balanced_projections(m: Moments) -> tuple[Tensor, Tensor]:
    """(Pq, Pk) = (U S^(1/2) U^T Cq^(-1/2), U S^(1/2) V^T Ck^(-1/2)) with U S V^T = Cq^(1/2) Ck^(1/2): Pq^T Pk is the
    identity for any tokens, so their products stay what they are. Of all such projections these make the mean of |x|^2
    + |y|^2 least; U in front of both makes them functions of the covariances alone, whichever singular vectors stand
    for equal singular values. Covariances have STORED_FLOOR times the mean of their eigenvalues added to all of them;
    the identity stands for one that is zero up to rounding, since tokens that are no samples may vary."""
    halves = []
    for second, mean in ((m.query_second, m.query_mean), (m.key_second, m.key_mean)):
        covariance, identity = second - torch.outer(mean, mean), torch.eye(len(mean)).to(second)
        average = covariance.diagonal().mean()
        varies = average > 1e-13 * second.diagonal().mean()
        values, vectors = torch.linalg.eigh(covariance + STORED_FLOOR * average * identity if varies else identity)
        halves.append([vectors @ torch.diag(values**power) @ vectors.T for power in (0.5, -0.5)])
    (q_root, q_inverse), (k_root, k_inverse) = halves
    u, s, vt = torch.linalg.svd(q_root @ k_root)
    turned = u @ torch.diag(s.sqrt())
    return turned @ u.T @ q_inverse, turned @ vt @ k_inverse


# -------------------- FAVOR+


@log_kernel.register
def _(low_rank: Favor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return coordinates(low_rank, inputs).log_kernel()


@coordinates.register
def _(low_rank: Favor, inputs: Inputs) -> Coordinates:
    """phi(t) = exp(W t - |t|^2 / 2) / sqrt(features), of t = sqrt(scale) q and t = sqrt(scale) k (a negative scale goes
    to q as its sign); hyperbolic features take exp(-W t - |t|^2 / 2) too. A token's log scale is its largest exponent,
    so that features lie in (0, 1]; it is a constant of the backward pass.

    Centred: t = Pq (scale q - a) and t = Pk (k - b) with the balanced projections of every batch row and key/value
    head, and log scales scale q.b and a.(k - b) besides: exp(scale q.k) is their exponential times exp(t.t')."""
    statistics, d = inputs.statistics, inputs.query.shape[3]
    projection = drawn_projection(low_rank, d) if statistics is None else statistics.projection
    rows = low_rank.features // 2 if low_rank.hyperbolic else low_rank.features
    if projection.shape != (rows, d):
        raise ValueError(f"Favor: expected a projection of shape {(rows, d)}, got {tuple(projection.shape)}")
    projection, size = projection.detach().to(inputs.query), math.sqrt(abs(inputs.scale))

    def features(tokens: Tensor) -> tuple[Tensor, Tensor]:
        exponent = tokens @ projection.T
        if low_rank.hyperbolic:
            exponent = torch.cat([exponent, -exponent], -1)
        exponent = exponent - tokens.square().sum(-1, keepdim=True) / 2
        peak = exponent.detach().amax(-1)
        return torch.exp(exponent - peak[..., None]), peak - math.log(low_rank.features) / 2

    if not low_rank.centred:
        query, key = features(inputs.query * math.copysign(size, inputs.scale)), features(inputs.key * size)
        return Coordinates(*query, *key, is_quadratic=False)
    if inputs.is_causal:
        raise ValueError("Favor(centred=True) would leak the future in causal attention; use centred=False")
    rows = [_fit_to_samples(inputs, b, balanced_projections) for b in range(inputs.query.shape[0])]
    pq, a, pk, b = (torch.stack(t).to(inputs.query) for t in zip(*rows))
    centred = inputs.key - b[..., None, :]
    y, kappa = features(centred @ pk.transpose(-1, -2))
    pq, of_queries, b = (t.repeat_interleave(inputs.group, 1) for t in (pq, a, b))
    scaled = inputs.query * inputs.scale
    x, rho = features((scaled - of_queries[..., None, :]) @ pq.transpose(-1, -2))
    return Coordinates(
        x,
        rho + (scaled @ b[..., None]).squeeze(-1),
        y,
        kappa + (centred @ a[..., None]).squeeze(-1),
        is_quadratic=False,
    )


def drawn_projection(low_rank: Favor, head_dim: int, draw: int = 0) -> Tensor:
    """W, float32 (rows, head_dim), the ``draw``-th of the kernel's seed; rows = features, half of them for hyperbolic
    ones.

    The recipe, in float64 from torch's CPU generator, seeded with seed * 1,000,003 + draw: normal numbers (rows,
    head_dim). Orthogonal rows instead: for each block of head_dim rows the transposed Q of the QR decomposition of
    normal numbers (head_dim, head_dim), Q's columns times the signs of R's diagonal, which makes Q uniform; the last
    block is cut; each row times the norm of the row that was drawn first in its place.
    """
    generator = torch.Generator().manual_seed(low_rank.seed * 1_000_003 + draw)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, head_dim, generator=generator, dtype=torch.float64)

    rows = low_rank.features // 2 if low_rank.hyperbolic else low_rank.features
    gaussian = normal(rows)
    if low_rank.orthogonal:
        pieces = []
        while len(pieces) * head_dim < rows:
            q, r = torch.linalg.qr(normal(head_dim))
            pieces.append((q * r.diagonal().sign()).T)
        gaussian = torch.cat(pieces)[:rows] * gaussian.norm(dim=1, keepdim=True)
    return gaussian.float()


# -------------------- the caller's own


@log_kernel.register
def _(low_rank: Features, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return coordinates(low_rank, inputs).log_kernel()


@coordinates.register
def _(low_rank: Features, inputs: Inputs) -> Coordinates:
    """What the functions make of t = sqrt(scale) q and of t = sqrt(scale) k, where a negative scale goes to q as its
    sign: features, or features and log scales. A token's largest feature goes into its log scale, so that the features
    lie in [0, 1]; it is a constant of the backward pass."""

    def made(function: Callable, tokens: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        for row, padded in enumerate(padding.tolist()):  # its functions see valid tokens only
            if any(padded):
                valid = tokens[row, :, padded.index(False)].detach() if not all(padded) else tokens.new_ones(())
                filled = torch.where(padding[row][:, None], valid[..., None, :] if valid.dim() else valid, tokens[row])
                tokens = torch.cat([tokens[:row], filled[None], tokens[row + 1 :]])
        features = function(tokens)
        features, log_scale = features if isinstance(features, tuple) else (features, None)
        if bool((features < 0).any()):
            raise ValueError(f"Features: features must be non-negative, got {float(features.min()):.4g}")
        peak = features.detach().amax(-1)
        peak = torch.where(peak > 0, peak, 1)
        return features / peak[..., None], torch.log(peak) + (0 if log_scale is None else log_scale)

    of_keys = low_rank.query_features if low_rank.key_features is None else low_rank.key_features
    query, key = _halves(inputs)
    return Coordinates(
        *made(low_rank.query_features, query, inputs.query_padding),
        *made(of_keys, key, inputs.key_padding),
        is_quadratic=False,
    )


@log_kernel.register(Callable)
def _(low_rank: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """A dense kernel: L (B, Hq, N, M) as a function of t = sqrt(scale) q (B, Hq, N, d) and t = sqrt(scale) k (B, Hq, M,
    d), the keys of every query head."""
    if isinstance(low_rank, type):
        raise TypeError(f"low_rank must be a low-rank kernel, got the class {low_rank.__name__}; make one of it")
    query, key = _halves(inputs)
    weights = low_rank(query, key.repeat_interleave(inputs.group, 1))
    expected = (*query.shape[:3], key.shape[2])
    if not isinstance(weights, Tensor) or tuple(weights.shape) != expected:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"low_rank(q, k) must be a tensor of weights (B, Hq, N, M) = {expected}, got {got}")
    if bool((weights < 0).any()):
        raise ValueError(f"low_rank(q, k) must be non-negative, got {float(weights.min()):.4g}; take its exp or square")
    return torch.zeros_like(weights), weights


@coordinates.register(Callable)
def _(low_rank: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Coordinates:
    raise TypeError(
        "a dense function has no coordinates, which Routed scores with; pass sb.Features of functions that make "
        "features, or use another support"
    )


def _halves(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """sqrt(scale) q and sqrt(scale) k."""
    size = math.sqrt(abs(inputs.scale))
    return inputs.query * math.copysign(size, inputs.scale), inputs.key * size
