"""The quadratic kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from scatterbrain.call import Call
from scatterbrain.fields import check_int, check_str
from scatterbrain.low_rank.base import Coefficients, Heads, LowRankKernel, State, StateOwner
from scatterbrain.low_rank.input_statistics import fitted_projection
from scatterbrain.low_rank.moments import MOMENTS, Moments, moment_shapes
from scatterbrain.low_rank.quadratic_coefficients import (
    EMA_FLOOR,
    STORED_FLOOR,
    Projections,
    Statistics,
    statistics_from_moments,
)
from scatterbrain.low_rank.quadratic_projection import (
    ConstantProjection,
    constant_projection,
    learned_projection,
    stored_projection,
)
from scatterbrain.operators.arguments import QUADRATIC
from scatterbrain.operators.fakes import accumulation_dtype
from scatterbrain.operators.transformed import project
from scatterbrain.operators.untraced import Projection
from scatterbrain.padding import EVERYTHING

EMA_MOMENTUM = 0.8  # share of the past in a moving average
EMA_EVERY = 10  # optimizer steps between commits of a moving average

# Names of the tensors that a module holds.
LEARNED = ("query_projection", "query_bias", "query_log_scale", "key_projection", "key_bias")
MAPS = ("query_projection", "query_mean", "key_projection", "key_mean")
GATHERED = tuple(f"moment_{name}" for name in MOMENTS)


@dataclass(frozen=True)
class Quadratic(LowRankKernel):
    """``(1 + x.y / 2)^2 exp(rho + kappa)``, the square of a first-order expansion of exp around the data's own means:
    deterministic, positive, calibrated.

    Args:
        rank: dimension r of the coordinates; (r + 1)(r + 2) / 2 features. 9 keeps them at 55; 16 (153 features) helps
            some tasks.
        statistics: where means and projections come from. "stored": calibrated once (:func:`scatterbrain.calibrate`, or
            ``statistics=`` of :func:`scatterbrain.attention`). "input": from the sequence itself, bidirectional only:
            its means, and covariances of up to 256 tokens of each head. "ema": a moving average over training steps,
            committed by :func:`scatterbrain.update_statistics`. "learned": projections are parameters.
    """

    kind: ClassVar[str] = "quadratic"
    takes: ClassVar[tuple[type[Coefficients], ...]] = (Statistics, Projections)
    code: ClassVar[int] = QUADRATIC
    can_be_prepared: ClassVar[bool] = True
    training_defaults: ClassVar[dict[str, Any]] = {"statistics": "learned"}

    rank: int = 9
    statistics: str = "stored"

    def __post_init__(self) -> None:
        check_int("Quadratic", "rank", self.rank, 1)
        check_str("Quadratic", "statistics", self.statistics)
        if self.statistics not in ("stored", "input", "ema", "learned"):
            raise ValueError(
                f"Quadratic: expected statistics 'stored', 'input', 'ema' or 'learned', got {self.statistics!r}"
            )

    @property
    def reads_input(self) -> bool:
        return self.statistics == "input"

    @property
    def adds_parameters(self) -> bool:
        return self.statistics == "learned"

    @property
    def is_calibrated_from_data(self) -> bool:
        return self.statistics in ("stored", "ema")

    @property
    def least_head_dim(self) -> int:
        return self.rank

    @property
    def runs_with(self) -> tuple[str, ...]:
        return MAPS if self.is_calibrated_from_data else ()

    @property
    def counts(self) -> tuple[str, ...]:
        return (
            ("steps",) if self.is_calibrated_from_data else ()
        )  # alike, so that moving averages can be kept as stored

    @property
    def average_every(self) -> int:
        return EMA_EVERY if self.statistics == "ema" else 0

    # -------------------- a call

    def check(self, is_causal: bool) -> None:
        if is_causal and self.reads_input:
            raise ValueError(
                "statistics='input' would leak the future in causal attention; pass statistics= from "
                "sb.fit_statistics with Quadratic(statistics='stored'), or use a calibrated module"
            )

    def check_from_scratch(self, is_causal: bool = True) -> None:
        if self.statistics == "input" and not is_causal:
            return
        if self.statistics not in ("learned", "ema"):
            raise ValueError(
                f"expected learned or ema, got {self.statistics!r}; stored statistics come from a trained model, and "
                "those of the input would show a token what follows it"
            )

    def check_coefficients(self, coefficients: Coefficients | None, call: Call) -> None:
        head_dim = call.query.shape[3]
        is_own = isinstance(coefficients, (Statistics, Projections))
        if is_own and not self.reads_input and self.rank <= head_dim and coefficients.fits(self.rank, call):
            return
        self.check_head_dim(head_dim)
        if self.reads_input:
            if coefficients is not None:
                raise ValueError(
                    "statistics= was given with Quadratic(statistics='input'), which fits its own; use "
                    "statistics='stored'"
                )
            return
        if coefficients is None:
            raise ValueError(
                "Quadratic(statistics='learned') needs its projections: pass statistics=sb.Projections(...), or use "
                "sb.ScatterbrainAttention, which owns them"
                if self.statistics == "learned"
                else f"Quadratic(statistics={self.statistics!r}) is not calibrated: pass statistics= from "
                f"sb.fit_statistics(query, key, rank={self.rank}), use a calibrated "
                "sb.ScatterbrainAttention (sb.calibrate), or, to train from scratch, sb.presets.train()"
                + ("" if call.is_causal else ", or Quadratic(statistics='input'), or Centroid(), which needs none")
            )
        if not is_own:
            raise TypeError(
                "low_rank=Quadratic takes statistics=Statistics (sb.fit_statistics) or Projections, got "
                f"{type(coefficients).__name__}"
            )
        if coefficients.rank != self.rank:
            raise ValueError(
                f"statistics have rank {coefficients.rank}, low_rank asks for {self.rank}; fit them with "
                f"rank={self.rank}"
            )
        if coefficients.query_projection.shape[-1] != head_dim:
            raise ValueError(
                f"statistics are for head_dim {coefficients.query_projection.shape[-1]}, query has {head_dim}"
            )
        coefficients.check_geometry(call)

    def can_run(self, coefficients: Coefficients | None) -> bool:
        return self.reads_input or coefficients is not None

    def fitting(self, coefficients: Coefficients) -> Quadratic:
        return replace(self, rank=coefficients.rank) if isinstance(coefficients, (Statistics, Projections)) else self

    def coordinates(self, call: Call) -> tuple[Tensor, Tensor]:
        p = self.projection(call)
        return project(call.query, p.query_weight, p.query_bias), project(call.key, p.key_weight, p.key_bias)

    def projection(self, call: Call) -> Projection:
        coefficients, scale, device = call.coefficients, call.scale, call.query.device
        dtype = accumulation_dtype(call.query.dtype)
        if isinstance(coefficients, Projections):
            return learned_projection(coefficients, scale, dtype, device)
        if coefficients is None:
            return fitted_projection(call.query, call.key, call.padding, self.rank, scale)
        return stored_projection(coefficients, scale, dtype, device)

    def own_projection(self, call: Call) -> Callable[[Tensor, Tensor], Projection] | None:
        if not self.reads_input:
            return None
        return partial(fitted_projection, padding=EVERYTHING, rank=self.rank, scale=call.scale)

    def constant_projection(self, call: Call) -> ConstantProjection | None:
        if call.coefficients is None:  # those of the input
            return None
        dtype = accumulation_dtype(call.query.dtype)
        return constant_projection(call.coefficients, call.scale, dtype, call.query.device)

    # -------------------- the state of a module

    def initial_state(self, heads: Heads) -> State:
        if self.reads_input:
            return State({}, {})
        num_heads, d, kv_heads = heads
        r = self.rank
        zeros = partial(torch.zeros, dtype=torch.float32)  # whatever the default dtype is
        # r orthonormal rows per key/value head, shared by its query heads
        rows = torch.linalg.qr(torch.randn(kv_heads, d, r, dtype=torch.float32)).Q.transpose(-1, -2).contiguous()
        if self.statistics == "learned":
            query_rows = rows.repeat_interleave(num_heads // kv_heads, 0)
            tensors = (query_rows, zeros(num_heads, d), zeros(num_heads), rows, zeros(kv_heads, d))
            return State(dict(zip(LEARNED, tensors)), {})
        # A moving average starts as the learned form does, without means; stored statistics are nothing yet.
        start = rows if self.statistics == "ema" else zeros(kv_heads, r, d)
        maps = (start.clone(), zeros(kv_heads, d), start.clone(), zeros(kv_heads, d))
        raw = (torch.zeros(shape, dtype=torch.float64) for shape in moment_shapes(kv_heads, d))
        return State({}, dict(zip((*MAPS, *GATHERED), (*maps, *raw))))

    def coefficients(self, owner: StateOwner) -> Coefficients | None:
        if self.reads_input:
            return None
        if self.statistics == "learned":
            return Projections.unchecked(*owner.tensors(LEARNED))
        scale = owner.calibrated_scale
        if scale is None and self.statistics == "stored":
            return None
        pq, a, pk, b = owner.tensors(MAPS)
        if scale is not None:
            return Statistics.unchecked(pq, a, pk, b, scale)
        group = owner.num_heads // owner.num_kv_heads
        query_side = pq.repeat_interleave(group, 0), a.repeat_interleave(group, 0), a.new_zeros(owner.num_heads)
        return Projections.unchecked(*query_side, pk, b)

    def misfit(self, shapes: dict[str, tuple[int, ...]]) -> str:
        *_, rank, _ = shapes.get("query_projection", (self.rank, 0))
        if rank == self.rank:
            return ""
        return (
            f"the checkpoint has statistics of rank {rank}, this module rank {self.rank}; create it with "
            f"Quadratic(rank={rank})"
        )

    def needs_calibration(self, owner: StateOwner) -> bool:
        return self.statistics == "stored" and not owner.is_calibrated

    def store(self, owner: StateOwner, moments: Moments, is_average: bool = False) -> None:
        floor = EMA_FLOOR if is_average else STORED_FLOOR
        statistics = statistics_from_moments(moments, self.rank, owner.scale, floor)
        _copy(owner.tensors(MAPS), statistics.tensors())
        _copy(owner.tensors(GATHERED), (getattr(moments, name) for name in MOMENTS))
        owner.is_calibrated = True

    def check_step(self, owner: StateOwner) -> None:
        gathered = owner.gathered
        if self.statistics != "ema" or gathered is None or not bool((gathered.tokens > 0).all()):
            return
        if not all(bool(torch.isfinite(getattr(gathered, name)).all()) for name in MOMENTS):
            raise ValueError(
                "update_statistics: the step's queries or keys hold NaN or infinity, which would spoil the moving "
                "average; skip the update of steps whose loss is not finite"
            )

    def finish_step(self, owner: StateOwner) -> None:
        if self.statistics != "ema" or owner.gathered is None:
            return
        gathered, owner.gathered = owner.gathered, None
        if not bool((gathered.tokens > 0).all()):
            return  # nothing but padding: there is nothing to learn from
        if owner.is_calibrated:
            gathered = Moments(*owner.tensors(GATHERED)).blend(gathered, 1 - EMA_MOMENTUM)
        self.store(owner, gathered, is_average=True)


def _copy(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
