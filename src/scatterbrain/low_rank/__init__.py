"""Low-rank kernels: positive kernels with a finite feature expansion, ``L_ij = exp(rho_i + kappa_j) K(x_i, y_j)``.

``query_map`` and ``key_map`` hold the coordinates x, y and, in their last column, the log scales rho, kappa.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Union

import torch
from torch import Tensor

from scatterbrain.supports import _check_int

STORED_FLOOR = 1e-4  # floor of the covariances' eigenvalues relative to their mean, calibrated statistics
EMA_FLOOR = 1e-3  # the same for moving averages, which see few tokens at first


@dataclass(frozen=True)
class Quadratic:
    """``(1 + x.y / 2)^2 exp(rho + kappa)``, the square of a first-order expansion of exp around the data's own means:
    deterministic, positive, calibrated.

    Args:
        rank: dimension r of the coordinates; (r + 1)(r + 2) / 2 features. 9 keeps them at 55; 16 (153 features) helps
            some tasks.
        statistics: where means and projections come from. "stored": calibrated once (:func:`scatterbrain.calibrate`, or
            ``statistics=`` of :func:`scatterbrain.attention`). "input": from the sequence itself, bidirectional only.
            "ema": a moving average over training steps, committed by :func:`scatterbrain.update_statistics`. "learned":
            projections are parameters.
    """

    rank: int = 9
    statistics: str = "stored"

    def __post_init__(self) -> None:
        _check_int("Quadratic", "rank", self.rank, 1)
        if self.statistics not in ("stored", "input", "ema", "learned"):
            raise ValueError(
                f"Quadratic: expected statistics 'stored', 'input', 'ema' or 'learned', got {self.statistics!r}"
            )


@dataclass(frozen=True)
class Favor:
    """Positive random features of FAVOR+ (Performer, Choromanski et al. 2021): ``E[L_ij] = exp(s_ij)``.

    The weight of a pair is unbiased; the normalised output is a ratio and is not.

    Args:
        features: number m of random features.
        orthogonal: rows orthogonal within blocks of head_dim, with the norms of Gaussian rows (lower variance, still
            unbiased).
        hyperbolic: pairs ``exp(w.x), exp(-w.x)``; needs an even number of features.
        centred: not in this release; must be False.
        redraw: optimizer steps between redraws of a module's projection by :func:`scatterbrain.update_statistics`;
            None: never.
        seed: seed of the projection that :func:`scatterbrain.attention` draws when it is given none, and of a module's.
    """

    features: int = 64
    orthogonal: bool = True
    hyperbolic: bool = False
    centred: bool = False
    redraw: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_int("Favor", "features", self.features, 1)
        _check_int("Favor", "seed", self.seed, 0)
        if self.redraw is not None:
            _check_int("Favor", "redraw", self.redraw, 1)
        for name in ("orthogonal", "hyperbolic", "centred"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Favor: {name} must be a bool, got {getattr(self, name)!r}")
        if self.hyperbolic and self.features % 2:
            raise ValueError(
                f"Favor: hyperbolic features come in pairs, expected an even number of features, got {self.features}"
            )
        if self.centred:
            raise ValueError("Favor: centred=True is not in this release; use Quadratic, whose coordinates are centred")


LowRank = Union[Quadratic, Favor, None]
LOW_RANK_CODE = {type(None): 0, Quadratic: 1, Favor: 2}  # of the operators' argument low_rank


@dataclass(frozen=True, eq=False)
class Statistics:
    """Means and projections of the quadratic kernel, per key/value head (shared by its query heads): x = Pq (scale q -
    a), rho = scale q.b, y = Pk (k - b), kappa = a.(k - b). Leading dimensions (Hkv,), or (B, Hkv) for statistics of
    each batch row.

    Args:
        query_projection: Pq (..., rank, head_dim).
        query_mean: a (..., head_dim), the mean of ``scale * query``.
        key_projection: Pk (..., rank, head_dim).
        key_mean: b (..., head_dim), the mean of the keys weighted by exp(a.k).
        scale: the scale they were fitted for; another one at use raises.
    """

    query_projection: Tensor
    query_mean: Tensor
    key_projection: Tensor
    key_mean: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.query_projection.shape[-2]

    def to(self, *args: object, **kwargs: object) -> Statistics:
        """The same statistics on another device or in another dtype."""
        names = ("query_projection", "query_mean", "key_projection", "key_mean")
        return replace(self, **{name: getattr(self, name).to(*args, **kwargs) for name in names})


@dataclass(frozen=True, eq=False)
class Projections:
    """Learned form of the quadratic kernel: x = Pq scale q, rho = scale q.b + c, y = Pk k, kappa = a.k.

    Args:
        query_projection: Pq (Hq, rank, head_dim).
        query_bias: b (Hq, head_dim).
        query_log_scale: c (Hq).
        key_projection: Pk (Hkv, rank, head_dim).
        key_bias: a (Hkv, head_dim).
    """

    query_projection: Tensor
    query_bias: Tensor
    query_log_scale: Tensor
    key_projection: Tensor
    key_bias: Tensor

    @property
    def rank(self) -> int:
        return self.query_projection.shape[-2]

    def to(self, *args: object, **kwargs: object) -> Projections:
        """The same projections on another device or in another dtype."""
        names = ("query_projection", "query_bias", "query_log_scale", "key_projection", "key_bias")
        return replace(self, **{name: getattr(self, name).to(*args, **kwargs) for name in names})


@dataclass(frozen=True, eq=False)
class RandomFeatures:
    """The projection W (rows, head_dim) of FAVOR+, shared by all heads."""

    projection: Tensor


Coefficients = Union[Statistics, Projections, RandomFeatures]


# -------------------- calibration


@dataclass(frozen=True, eq=False)
class Moments:
    """Token-weighted first and second moments in float64, per key/value head: the mean of scaled queries and of keys
    weighted by exp(a.k)."""

    tokens: Tensor  # (...) queries that were counted
    query_mean: Tensor  # (..., d)
    query_second: Tensor  # (..., d, d)
    key_mean: Tensor  # (..., d)
    key_second: Tensor  # (..., d, d)

    def merge(self, other: Moments) -> Moments:
        """The moments of both together, each weighted by its tokens."""
        total = self.tokens + other.tokens
        share = torch.where(total > 0, other.tokens / total.clamp(min=1), torch.zeros_like(total))
        return self.blend(other, share, total)

    def blend(self, other: Moments, share: Tensor | float, tokens: Tensor | None = None) -> Moments:
        """``(1 - share) self + share other``."""

        def mix(mine: Tensor, theirs: Tensor) -> Tensor:
            weight = (
                share.reshape(share.shape + (1,) * (mine.dim() - share.dim())) if isinstance(share, Tensor) else share
            )
            return mine + weight * (theirs - mine)

        names = ("query_mean", "query_second", "key_mean", "key_second")
        return Moments(
            other.tokens if tokens is None else tokens, *(mix(getattr(self, n), getattr(other, n)) for n in names)
        )


def moments(
    query: Tensor,
    key: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    per_row: bool = False,
) -> Moments:
    """Moments of one batch, pooled over its rows unless ``per_row``. query (B, Hq, N, d), key (B, Hkv, M, d), masks
    bool (B, tokens), True = ignore."""
    heads = key.shape[1]

    def gather(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, all_heads, n, d = tokens.shape
        valid = torch.ones(batch, n, dtype=torch.bool, device=tokens.device) if mask is None else ~mask
        tokens = torch.where(valid[:, None, :, None], tokens.detach(), 0).double()
        shared = (
            all_heads // heads * n
        )  # tokens of a key/value head; written out, since a batch of 0 leaves none to infer
        tokens = tokens.reshape(batch, heads, shared, d)
        valid = valid[:, None, None, :].expand(batch, heads, all_heads // heads, n).reshape(batch, heads, shared)
        if per_row:
            return tokens, valid
        pooled = batch * shared
        return tokens.transpose(0, 1).reshape(heads, pooled, d), valid.transpose(0, 1).reshape(heads, pooled)

    q, q_valid = gather(query, query_mask)
    k, k_valid = gather(key, key_mask)
    q = q * scale
    count = q_valid.sum(-1).double()
    weight = q_valid.double() / count.clamp(min=1)[..., None]
    a = (weight[..., None] * q).sum(-2)
    q_second = (weight[..., None] * q).transpose(-1, -2) @ q
    logits = (k @ a[..., None]).squeeze(-1).masked_fill(~k_valid, -math.inf)
    weight = torch.where(k_valid, torch.softmax(logits, -1), 0)
    b = (weight[..., None] * k).sum(-2)
    k_second = (weight[..., None] * k).transpose(-1, -2) @ k
    return Moments(count, a, q_second, b, k_second)


def _root(second: Tensor, mean: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """C^(1/2) and C^(-1/2) of the covariance C = second - mean mean^T, eigenvalues floored relative to their mean;
    zeros where C is zero up to rounding."""
    covariance = second - mean[..., :, None] * mean[..., None, :]
    values, vectors = torch.linalg.eigh((covariance + covariance.transpose(-1, -2)) / 2)
    average = values.clamp(min=0).mean(-1, keepdim=True)
    degenerate = average <= 1e-13 * torch.diagonal(second, dim1=-2, dim2=-1).mean(-1, keepdim=True)
    values = torch.maximum(values, floor * average)
    root = torch.where(degenerate, 0, values.clamp(min=0).sqrt())
    inverse = torch.where(degenerate, 0, 1 / torch.where(degenerate, 1, values).sqrt())
    rows = vectors.transpose(-1, -2)
    return vectors @ (root[..., None] * rows), vectors @ (inverse[..., None] * rows)


def statistics_from_moments(m: Moments, rank: int, scale: float, floor: float = STORED_FLOOR) -> Statistics:
    """Pq, a, Pk, b in float32 from moments (the singular vectors of Cq^(1/2) Ck^(1/2): the r directions in which q - a
    and k - b interact most)."""
    d = m.query_mean.shape[-1]
    if rank > d:
        raise ValueError(f"rank must be at most head_dim={d}, got {rank}")
    q_root, q_inverse = _root(m.query_second, m.query_mean, floor)
    k_root, k_inverse = _root(m.key_second, m.key_mean, floor)
    u, s, vt = torch.linalg.svd(q_root @ k_root)
    root = s[..., :rank].sqrt()[..., None]
    pq = root * (u.transpose(-1, -2)[..., :rank, :] @ q_inverse)
    pk = root * (vt[..., :rank, :] @ k_inverse)
    return Statistics(pq.float(), m.query_mean.float(), pk.float(), m.key_mean.float(), float(scale))


# -------------------- random features


def draw_projection(low_rank: Favor, head_dim: int, generator: torch.Generator) -> Tensor:
    """W, float32: (features, head_dim), or half the rows for hyperbolic features. Orthogonal rows carry the norms of
    Gaussian ones."""
    rows = low_rank.features // 2 if low_rank.hyperbolic else low_rank.features
    gaussian = torch.randn(rows, head_dim, generator=generator, dtype=torch.float64)
    if not low_rank.orthogonal:
        return gaussian.float()
    blocks = []
    for _ in range(0, rows, head_dim):
        q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64))
        blocks.append((q * torch.sign(torch.diagonal(r))).T)  # signs make the orthogonal matrix uniformly distributed
    return (torch.cat(blocks)[:rows] * gaussian.norm(dim=1, keepdim=True)).float()


def seeded_projection(low_rank: Favor, head_dim: int, draw: int = 0) -> Tensor:
    """The ``draw``-th projection of ``low_rank.seed``."""
    return draw_projection(low_rank, head_dim, torch.Generator().manual_seed(low_rank.seed * 1_000_003 + draw))


@torch.library.custom_op(
    "scatterbrain::random_projection",
    mutates_args=(),
    schema="(int features, int head_dim, bool orthogonal, bool hyperbolic, int seed) -> Tensor",
)
def random_projection(features: int, head_dim: int, orthogonal: bool, hyperbolic: bool, seed: int) -> Tensor:
    """:func:`seeded_projection` as an operator: a constant that compile and export leave alone, and no random operation
    in the eyes of vmap."""
    return seeded_projection(Favor(features, orthogonal, hyperbolic, seed=seed), head_dim)


@random_projection.register_fake
def _(features: int, head_dim: int, orthogonal: bool, hyperbolic: bool, seed: int) -> Tensor:
    return torch.empty(features // 2 if hyperbolic else features, head_dim, device="cpu")


# -------------------- maps


def quadratic_weights(c: Statistics | Projections, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(query weight, query offset, key weight, key offset) of ``map = weight token + offset``, coordinates first, log
    scale last."""
    if isinstance(c, Statistics):
        pq, a, pk, b = c.query_projection, c.query_mean, c.key_projection, c.key_mean
        dot = (a * b).sum(-1)
        query_weight = torch.cat([pq, b[..., None, :]], -2) * scale
        query_offset = torch.cat([-(pq @ a[..., None]).squeeze(-1), torch.zeros_like(dot)[..., None]], -1)
        key_weight = torch.cat([pk, a[..., None, :]], -2)
        key_offset = torch.cat([-(pk @ b[..., None]).squeeze(-1), -dot[..., None]], -1)
        return query_weight, query_offset, key_weight, key_offset
    query_weight = torch.cat([c.query_projection, c.query_bias[..., None, :]], -2) * scale
    query_offset = torch.cat([torch.zeros_like(c.query_projection[..., 0]), c.query_log_scale[..., None]], -1)
    key_weight = torch.cat([c.key_projection, c.key_bias[..., None, :]], -2)
    return query_weight, query_offset, key_weight, torch.zeros_like(key_weight[..., 0])


def squared_norm(tokens: Tensor) -> Tensor:
    """(..., 1). Summed along contiguous memory: the order of torch's sum, and with it the last bit, depends on the
    stride."""
    return (tokens if tokens.stride(-1) == 1 else tokens.contiguous()).square().sum(-1, keepdim=True)


def favor_log_features(projected: Tensor, tokens: Tensor, size: float, hyperbolic: bool) -> tuple[Tensor, Tensor]:
    """(features in (0, 1], log scale) from ``projected = size W t``: the row's largest exponent is its log scale, so
    nothing overflows and no epsilon is needed. The log scale is a stabiliser, a constant of the backward pass."""
    if hyperbolic:
        projected = torch.cat([projected, -projected], -1)
    half_norm = squared_norm(tokens.to(projected.dtype) * size) / 2
    exponent = projected - half_norm
    peak = exponent.detach().amax(-1, keepdim=True)
    return torch.exp(exponent - peak), peak - math.log(projected.shape[-1]) / 2


def favor_sizes(scale: float) -> tuple[float, float]:
    """Factors of q and k whose product is ``scale``: the same size for both keeps the variance lowest."""
    size = math.sqrt(abs(scale))
    return math.copysign(size, scale), size
