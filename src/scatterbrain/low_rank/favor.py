"""Positive random features."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from scatterbrain.call import Call
from scatterbrain.fields import SEED_MAX, check_floats, check_int, repr_of
from scatterbrain.low_rank.base import Coefficients, Heads, LowRankKernel, State, StateOwner
from scatterbrain.low_rank.input_statistics import balanced_statistics, sampled_moments
from scatterbrain.low_rank.moments import check_finite_moments
from scatterbrain.numerics import squared_norm
from scatterbrain.operators.device_constants import kept
from scatterbrain.operators.fakes import accumulation_dtype
from scatterbrain.operators.tracing import is_untraced
from scatterbrain.operators.transformed import project

SEED_STRIDE = 1_000_003  # between the generators of a kernel's seeds: a module's redraws use those in between
_LARGEST_NORM = 1e30  # beyond, exponents would be infinite, and their differences NaN


@dataclass(frozen=True, eq=False)
class RandomFeatures(Coefficients):
    """The projection W (rows, head_dim) of FAVOR+, shared by all heads.

    Raises:
        TypeError, ValueError: anything but a floating-point matrix.
    """

    projection: Tensor

    def __post_init__(self) -> None:
        check_floats("RandomFeatures", {"projection": self.projection})
        if self.projection.dim() != 2:
            raise ValueError(
                f"RandomFeatures: projection must be (rows, head_dim), got shape {tuple(self.projection.shape)}"
            )


@dataclass(frozen=True, repr=False)
class Favor(LowRankKernel):
    """Positive random features of FAVOR+ (Performer, Choromanski et al. 2021): ``E[L_ij] = exp(s_ij)``.

    The weight of a pair is unbiased; the normalised output is a ratio and is not.

    Args:
        features: number m of random features.
        orthogonal: rows orthogonal within blocks of head_dim, with the norms of Gaussian rows (lower variance, still
            unbiased).
        hyperbolic: pairs ``exp(w.x), exp(-w.x)``; needs an even number of features.
        redraw: optimizer steps between redraws of a module's projection by :func:`scatterbrain.update_statistics`;
            None: never.
        seed: seed of the projection that :func:`scatterbrain.attention` draws when it is given none, and of a module's.
        centred: take the mean of the scaled queries and the weighted mean of the keys out of the score, exactly, and
            balance what is left: linear maps that keep every product and make the tokens as short as they can be. The
            weight stays unbiased and varies less, the less the shorter the tokens. Means and maps are those of the
            call's own tokens, per batch row and key/value head; bidirectional only.
    """

    kind: ClassVar[str] = "favor"
    takes: ClassVar[tuple[type[Coefficients], ...]] = (RandomFeatures,)

    features: int = 64
    orthogonal: bool = True
    hyperbolic: bool = False
    redraw: int | None = None
    seed: int = 0
    centred: bool = False

    def __post_init__(self) -> None:
        check_int("Favor", "features", self.features, 1)
        check_int("Favor", "seed", self.seed, 0, SEED_MAX)
        if self.redraw is not None:
            check_int("Favor", "redraw", self.redraw, 1)
        for name in ("orthogonal", "hyperbolic", "centred"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Favor: {name} must be a bool, got {getattr(self, name)!r}")
        if self.hyperbolic and self.features % 2:
            raise ValueError(
                f"Favor: hyperbolic features come in pairs, expected an even number of features, got {self.features}"
            )

    def __repr__(self) -> str:
        return repr_of(self, if_set=("centred",))

    @property
    def reads_input(self) -> bool:
        return self.centred

    @property
    def rows(self) -> int:
        """Rows of the projection."""
        return self.features // 2 if self.hyperbolic else self.features

    @property
    def counts(self) -> tuple[str, ...]:
        return "steps", "draws"

    # -------------------- a call

    def check(self, is_causal: bool) -> None:
        if is_causal and self.centred:
            raise ValueError(
                "Favor(centred=True) takes the means of the whole sequence, so causal attention would see the future; "
                "use centred=False or low_rank=Quadratic, or is_causal=False"
            )

    def check_from_scratch(self, is_causal: bool = True) -> None:
        if self.centred and is_causal:
            raise ValueError(
                "expected centred=False, got Favor(centred=True), whose means of the whole sequence would show a token "
                "what follows it"
            )

    def fitting(self, coefficients: Coefficients) -> Favor:
        if not isinstance(coefficients, RandomFeatures):
            return self
        rows = coefficients.projection.shape[0]
        return replace(self, features=2 * rows if self.hyperbolic else rows)

    def check_coefficients(self, coefficients: Coefficients | None, call: Call) -> None:
        if coefficients is None:
            return
        if not isinstance(coefficients, RandomFeatures):
            raise TypeError(
                f"low_rank=Favor takes statistics=RandomFeatures or None, got {type(coefficients).__name__}"
            )
        expected = (self.rows, call.query.shape[3])
        if tuple(coefficients.projection.shape) != expected:
            raise ValueError(
                f"the projection of Favor must be (rows, head_dim) = {expected}, got "
                f"{tuple(coefficients.projection.shape)}"
            )

    def coordinates(self, call: Call) -> tuple[Tensor, Tensor]:
        head_dim, device = call.query.shape[3], call.query.device
        if call.coefficients is not None:
            projection = call.coefficients.projection
        elif is_untraced():
            projection = kept(_projection_on, device, self, head_dim)
        else:
            settings = self.features, head_dim, self.orthogonal, self.hyperbolic, self.seed
            projection = random_projection(*settings, device)
        dtype = accumulation_dtype(call.query.dtype)
        projection = projection.detach().to(device=device, dtype=dtype)[None, None]
        if self.centred:
            # Of its own: a redraw writes into the module's, which the backward pass may still need.
            return self._centred_coordinates(call, projection.clone())
        query_size, key_size = favor_sizes(call.scale)
        return (
            self._map(call.query, call.padding.query_mask, query_size, projection),
            self._map(call.key, call.padding.key_mask, key_size, projection),
        )

    def _centred_coordinates(self, call: Call, projection: Tensor) -> tuple[Tensor, Tensor]:
        """exp(scale q.k) = exp(scale q.b) exp(a.(k - b)) exp(x.y) with x = Pq (scale q - a) and y = Pk (k - b): random
        features of x and y, beside log scales that are exact."""
        padding = call.padding
        tokens = call.query.detach(), call.key.detach()
        with torch.no_grad():
            m = sampled_moments(*tokens, call.scale, padding.key_mask, padding.query_mask)
            check_finite_moments(m, "Favor(centred=True)", "use centred=False, which lets NaN through")
            balanced = balanced_statistics(m, call.scale)
        pq, a, pk, b = balanced.tensors()
        query_weight, key_weight = torch.cat([pq, b[..., None, :]], -2), torch.cat([pk, a[..., None, :]], -2)
        group = call.query.shape[1] // call.key.shape[1]
        query = self._centred_map(
            call.query, call.scale, padding.query_mask, a.repeat_interleave(group, 1), query_weight, projection
        )
        key = self._centred_map(call.key, 1.0, padding.key_mask, b, key_weight, projection)
        shared = (
            (a * b).sum(-1).to(projection.dtype).repeat_interleave(group, 1)[..., None, None]
        )  # q.b = (q - a).b + a.b
        return torch.cat([query[..., :-1], query[..., -1:] + shared], -1), key

    def _centred_map(
        self, tokens: Tensor, size: float, mask: Tensor | None, mean: Tensor, weight: Tensor, projection: Tensor
    ) -> Tensor:
        """Features and log scales of one side. The mean is taken off before the map, whose rows for directions in which
        little varies are large: it is computed in float64."""
        dtype = projection.dtype
        tokens = tokens if mask is None else tokens.masked_fill(mask[:, None, :, None], 0)
        centred = tokens.double() * size - mean.double()[..., None, :]
        balanced = project(centred, weight.double(), None).to(dtype)
        coordinates, log_scale = balanced[..., :-1], balanced[..., -1:]
        projected = project(coordinates, projection, None)
        features, peak = favor_log_features(projected, coordinates, 1.0, self.hyperbolic)
        return torch.cat([features, peak + log_scale], -1)

    def _map(self, tokens: Tensor, mask: Tensor | None, size: float, projection: Tensor) -> Tensor:
        # A node of its own without a mask too: gradients of the features are then always added up before they join that
        # of the scores, to the same bits.
        tokens = tokens.view_as(tokens) if mask is None else tokens.masked_fill(mask[:, None, :, None], 0)
        projected = project(tokens, projection * size, None)
        return torch.cat(favor_log_features(projected, tokens, size, self.hyperbolic), -1)

    # -------------------- the state of a module

    def initial_state(self, heads: Heads) -> State:
        drawn = seeded_projection(self, heads.head_dim)  # on the CPU, so that it is the same on every device
        return State({}, {"projection": drawn.to(torch.get_default_device())})

    def coefficients(self, owner: StateOwner) -> RandomFeatures:
        return RandomFeatures.unchecked(*owner.tensors(("projection",)))

    def finish_step(self, owner: StateOwner) -> None:
        if self.redraw and owner.steps % self.redraw == 0:
            owner.draws += 1
            self._set(owner, seeded_projection(self, owner.head_dim, owner.draws))

    def redraw_projection(self, owner: StateOwner, generator: torch.Generator) -> None:
        self._set(owner, draw_projection(self, owner.head_dim, generator))

    def _set(self, owner: StateOwner, projection: Tensor) -> None:
        (own,) = owner.tensors(("projection",))
        own.copy_(projection)


def _projection_on(low_rank: Favor, head_dim: int, device: torch.device) -> Tensor:
    """The same for every device: drawn on the CPU."""
    return seeded_projection(low_rank, head_dim).to(device)


def draw_projection(low_rank: Favor, head_dim: int, generator: torch.Generator) -> Tensor:
    """W, float32: (features, head_dim), or half the rows for hyperbolic features. Orthogonal rows carry the norms of
    Gaussian ones."""
    rows = low_rank.rows
    gaussian = torch.randn(rows, head_dim, generator=generator, dtype=torch.float64, device="cpu")
    if not low_rank.orthogonal:
        return gaussian.float()
    blocks = []
    for _ in range(0, rows, head_dim):
        q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64, device="cpu"))
        blocks.append((q * torch.sign(torch.diagonal(r))).T)  # signs make the orthogonal matrix uniformly distributed
    return (torch.cat(blocks)[:rows] * gaussian.norm(dim=1, keepdim=True)).float()


def seeded_projection(low_rank: Favor, head_dim: int, draw: int = 0) -> Tensor:
    """The ``draw``-th projection of ``low_rank.seed``."""
    return draw_projection(low_rank, head_dim, torch.Generator().manual_seed(low_rank.seed * SEED_STRIDE + draw))


@torch.library.custom_op(
    "scatterbrain::random_projection",
    mutates_args=(),
    schema="(int features, int head_dim, bool orthogonal, bool hyperbolic, int seed, Device? device=None) -> Tensor",
)
def random_projection(
    features: int, head_dim: int, orthogonal: bool, hyperbolic: bool, seed: int, device: torch.device | None = None
) -> Tensor:
    """:func:`seeded_projection` as an operator, by default on the CPU: a constant that compile and export leave alone,
    and no random operation in the eyes of vmap."""
    low_rank = Favor(features, orthogonal, hyperbolic, seed=seed)
    return kept(_projection_on, device or torch.device("cpu"), low_rank, head_dim).clone()


@random_projection.register_fake
def _(
    features: int, head_dim: int, orthogonal: bool, hyperbolic: bool, seed: int, device: torch.device | None = None
) -> Tensor:
    return torch.empty(features // 2 if hyperbolic else features, head_dim, device=device or "cpu")


def favor_log_features(projected: Tensor, tokens: Tensor, size: float, hyperbolic: bool) -> tuple[Tensor, Tensor]:
    """(features in (0, 1], log scale) from ``projected = size W t``: the row's largest exponent is its log scale, so
    nothing overflows and no epsilon is needed. The log scale is a stabiliser, a constant of the backward pass."""
    if hyperbolic:
        projected = torch.cat([projected, -projected], -1)
    half_norm = (squared_norm(tokens.to(projected.dtype) * size) / 2).clamp(max=_LARGEST_NORM)
    exponent = projected - half_norm
    peak = exponent.detach().amax(-1, keepdim=True)
    return torch.exp(exponent - peak), peak - math.log(projected.shape[-1]) / 2


def favor_sizes(scale: float) -> tuple[float, float]:
    """Factors of q and k whose product is ``scale``: the same size for both keeps the variance lowest."""
    size = math.sqrt(abs(scale))
    return math.copysign(size, scale), size
