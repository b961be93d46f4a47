"""The attention core: a support, a low-rank kernel, and the state the kernel needs (calibrated statistics, moving
averages, projections)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scatterbrain import checks, functional, presets
from scatterbrain.low_rank import (
    EMA_FLOOR,
    STORED_FLOOR,
    Coefficients,
    Favor,
    LowRank,
    Moments,
    Projections,
    Quadratic,
    RandomFeatures,
    Statistics,
    draw_projection,
    seeded_projection,
    statistics_from_moments,
)
from scatterbrain.nn.distributed import MOMENTS, fill, merge_over_ranks
from scatterbrain.supports import Full, Support

EMA_MOMENTUM = 0.8  # share of the past in a moving average
EMA_EVERY = 10  # optimizer steps between commits of a moving average

_LEARNED = ("query_projection", "query_bias", "query_log_scale", "key_projection", "key_bias")
_MAPS = ("query_projection", "query_mean", "key_projection", "key_mean")


_PRESET = presets.drop_in()[1]


class ScatterbrainAttention(nn.Module):
    """:func:`scatterbrain.attention` with the state of its low-rank kernel.

    * ``Quadratic(statistics="stored")``: buffers that :func:`calibrate` fills; running before that raises.
    * ``"ema"``: moments of the forward passes in training mode, committed by :func:`update_statistics`; until the first
      commit the learned form's start is used.
    * ``"learned"``: parameters ``query_projection`` (Hq, r, d), ``query_bias`` (Hq, d), ``query_log_scale`` (Hq),
      ``key_projection`` (Hkv, r, d), ``key_bias`` (Hkv, d). Query and key projections start as the same orthonormal
      rows, the rest at zero.
    * ``Favor``: a persistent projection, redrawn only by :meth:`redraw` or, with ``Favor(redraw=n)``, at every n-th
      :func:`update_statistics`.

    ``.half()`` and ``.bfloat16()`` convert learned projections with all parameters, and no statistics; a kernel always
    computes coordinates in float32. Buffers have their final shape from the start, so a checkpoint of a calibrated
    module loads into a new one and gives the same output.

    Args:
        num_heads: query heads.
        head_dim: width d of a head.
        num_kv_heads: key/value heads; default num_heads. Must divide num_heads.
        support, low_rank: default :func:`scatterbrain.presets.drop_in`.
        exact_queries: this many first queries attend to every key exactly, in bidirectional calls. For class and
            register tokens, whose attention is spread over the whole image: the cost is that of as many rows of exact
            attention.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        support: Support | None = None,
        low_rank: LowRank = _PRESET,
        exact_queries: int = 0,
    ) -> None:
        super().__init__()
        support = presets.drop_in()[0] if support is None else support
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("num_heads", num_heads), ("head_dim", head_dim), ("num_kv_heads", num_kv_heads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"ScatterbrainAttention: {name} must be a positive int, got {value!r}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"ScatterbrainAttention: num_heads must be a multiple of num_kv_heads, got {num_heads} and "
                f"{num_kv_heads}"
            )
        if isinstance(exact_queries, bool) or not isinstance(exact_queries, int) or exact_queries < 0:
            raise ValueError(
                f"ScatterbrainAttention: exact_queries must be an int of at least 0, got {exact_queries!r}"
            )
        checks.check_pair(support, low_rank, is_causal=False)
        if isinstance(low_rank, Quadratic) and low_rank.rank > head_dim:
            raise ValueError(
                f"ScatterbrainAttention: Quadratic rank must be at most head_dim={head_dim}, got {low_rank.rank}"
            )
        self.num_heads, self.head_dim, self.num_kv_heads = num_heads, head_dim, num_kv_heads
        self.support, self.low_rank = support, low_rank
        self.exact_queries = exact_queries
        self._is_calibrated = False
        self._collecting = False
        self._gathered: Moments | None = None
        self._scale: float | None = None
        self._steps = 0
        self._draws = 0
        parameters, buffers = self._initial_state()
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def _initial_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(parameters, buffers) of a new module, each in its final shape."""
        heads, kv_heads, d = self.num_heads, self.num_kv_heads, self.head_dim
        if isinstance(self.low_rank, Favor):
            return {}, {"projection": seeded_projection(self.low_rank, d)}
        if not isinstance(self.low_rank, Quadratic) or self.low_rank.statistics == "input":
            return {}, {}
        r = self.low_rank.rank
        zeros = partial(torch.zeros, dtype=torch.float32)  # whatever the default dtype is
        # r orthonormal rows per key/value head, shared by its query heads
        rows = torch.linalg.qr(torch.randn(kv_heads, d, r, dtype=torch.float32)).Q.transpose(-1, -2).contiguous()
        if self.low_rank.statistics == "learned":
            query_rows = rows.repeat_interleave(heads // kv_heads, 0)
            return dict(zip(_LEARNED, (query_rows, zeros(heads, d), zeros(heads), rows, zeros(kv_heads, d)))), {}
        # A moving average starts as the learned form does, without means; stored statistics are nothing yet.
        start = rows if self.low_rank.statistics == "ema" else zeros(kv_heads, r, d)
        maps = (start.clone(), zeros(kv_heads, d), start.clone(), zeros(kv_heads, d))
        shapes = ((kv_heads,), (kv_heads, d), (kv_heads, d, d), (kv_heads, d), (kv_heads, d, d))
        raw = {"moment_" + name: torch.zeros(shape, dtype=torch.float64) for name, shape in zip(MOMENTS, shapes)}
        return {}, dict(zip(_MAPS, maps)) | raw

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again, in place: projections redrawn, calibration forgotten. Also fills a module created on the meta
        device and moved with ``to_empty``."""
        self._is_calibrated, self._scale, self._gathered, self._steps, self._draws = False, None, None, 0, 0
        parameters, buffers = self._initial_state()
        for name, tensor in (parameters | buffers).items():
            fill(getattr(self, name), tensor)

    # -------------------- forward

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        query_padding_mask: Tensor | None = None,
        query_offset: int | Tensor = 0,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments as :func:`scatterbrain.attention`; query (B, num_heads, N, head_dim), key and value (B,
        num_kv_heads, M, ...)."""
        self._check_heads(query, key)
        support, low_rank = self.support, self.low_rank
        if self._collecting or self._is_average_due():
            query, key, value = functional.cast_for_autocast(query, key, value)
            checks.check_tensors(query, key, value)
            self._gather(query, key, key_padding_mask, query_padding_mask, functional.default_scale(query, scale))
        if self._collecting:
            support, low_rank = Full(), None
        out = functional.attention(
            query,
            key,
            value,
            support,
            low_rank,
            key_padding_mask,
            is_causal,
            scale,
            self.coefficients() if low_rank is not None else None,
            query_padding_mask,
            query_offset,
            return_lse,
        )
        first = min(self.exact_queries, query.shape[2])
        if first == 0 or is_causal or isinstance(support, Full):
            return out
        if query_padding_mask is None and key_padding_mask is not None and query.shape[2] == key.shape[2]:
            query_padding_mask = key_padding_mask
        exact = functional.attention(
            query[:, :, :first],
            key,
            value,
            Full(),
            None,
            key_padding_mask,
            scale=scale,
            query_padding_mask=None if query_padding_mask is None else query_padding_mask[:, :first],
            return_lse=return_lse,
        )
        return tuple(map(_replace_first, out, exact)) if return_lse else _replace_first(out, exact)

    def _check_heads(self, query: Tensor, key: Tensor) -> None:
        """That queries and keys are those of this module. What else may be wrong with them, the function says."""
        if not (isinstance(query, Tensor) and isinstance(key, Tensor) and query.dim() == key.dim() == 4):
            return
        expected = (self.num_heads, self.num_kv_heads, self.head_dim)
        if (query.shape[1], key.shape[1], query.shape[3]) != expected:
            raise ValueError(
                f"expected query with {expected[0]} heads, key with {expected[1]} heads and head_dim "
                f"{expected[2]}, got {query.shape[1]}, {key.shape[1]} and {query.shape[3]}"
            )

    def coefficients(self) -> Coefficients | None:
        """What the low-rank kernel runs with now; None where it needs nothing, or has nothing yet (which then raises
        with the cure)."""
        low_rank = self.low_rank
        if isinstance(low_rank, Favor):
            return RandomFeatures(self.projection)
        if not isinstance(low_rank, Quadratic) or low_rank.statistics == "input":
            return None
        if low_rank.statistics == "learned":
            return Projections(*self._tensors(self._parameters, _LEARNED))
        maps = self._tensors(self._buffers, _MAPS)
        if self._is_calibrated:
            return Statistics(*maps, self._scale)
        if low_rank.statistics == "stored":
            return None
        repeat = self.num_heads // self.num_kv_heads
        return Projections(
            maps[0].repeat_interleave(repeat, 0),
            maps[1].repeat_interleave(repeat, 0),
            maps[1].new_zeros(self.num_heads),
            maps[2],
            maps[3],
        )

    def _tensors(self, owned: dict[str, Tensor | None], names: tuple[str, ...]) -> list[Tensor]:
        """The module's tensors of these names, past nn.Module's slow lookup where nothing has taken their place (as
        parametrizations and sharding do)."""
        return [owned[name] if name in owned else getattr(self, name) for name in names]

    # -------------------- statistics

    @property
    def is_calibrated(self) -> bool:
        """Whether statistics are in place: set by :func:`calibrate`, by the first commit of a moving average, or by
        loading a state that had them."""
        return self._is_calibrated

    def _is_average_due(self) -> bool:
        """Whether the moments of this step will be committed: the first step's, then every tenth's."""
        return self._commits_now() and self.training and torch.is_grad_enabled()

    def _commits_now(self) -> bool:
        """Whether the end of this step commits a moving average, if anything was gathered for it."""
        if not isinstance(self.low_rank, Quadratic) or self.low_rank.statistics != "ema":
            return False
        return not self._is_calibrated or (self._steps + 1) % EMA_EVERY == 0

    @torch.no_grad()
    def _gather(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        query_padding_mask: Tensor | None,
        scale: float,
    ) -> None:
        if self._scale is not None and abs(self._scale - scale) > 1e-6 * abs(scale):
            raise ValueError(
                f"ScatterbrainAttention: its statistics hold for one scale, got scale={scale:.6g} after "
                f"{self._scale:.6g}; use one scale, or reset_parameters() and start again"
            )
        padding = functional.padding_info(query, key, key_padding_mask, query_padding_mask, 0)
        moments_of = functional.checked_moments if self._collecting else functional.unchecked_moments
        gathered = moments_of(query, key, scale, padding)
        # Merging is by tokens: a forward that checkpointing runs twice changes no mean.
        self._gathered = gathered if self._gathered is None else self._gathered.merge(gathered)
        self._scale = float(scale)

    @torch.no_grad()
    def _store(self, moments: Moments, floor: float) -> None:
        statistics = statistics_from_moments(moments, self.low_rank.rank, self._scale, floor)
        for name, tensor in zip(
            _MAPS, (statistics.query_projection, statistics.query_mean, statistics.key_projection, statistics.key_mean)
        ):
            getattr(self, name).copy_(tensor)
        for name in MOMENTS:
            getattr(self, "moment_" + name).copy_(getattr(moments, name))
        self._is_calibrated = True

    def _finish_calibration(self) -> None:
        gathered, self._gathered, self._collecting = self._gathered, None, False
        if gathered is not None:
            self._store(gathered, STORED_FLOOR)

    def _update(self) -> None:
        """One optimizer step is over."""
        self._steps += 1
        low_rank = self.low_rank
        if isinstance(low_rank, Favor) and low_rank.redraw and self._steps % low_rank.redraw == 0:
            self._draws += 1
            self.projection.copy_(seeded_projection(low_rank, self.head_dim, self._draws))
        if not isinstance(low_rank, Quadratic) or low_rank.statistics != "ema" or self._gathered is None:
            return
        gathered, self._gathered = self._gathered, None
        if not bool((gathered.tokens > 0).all()):
            return  # nothing but padding: there is nothing to learn from
        if not all(bool(torch.isfinite(getattr(gathered, name)).all()) for name in MOMENTS):
            raise ValueError(
                "update_statistics: the step's queries or keys hold NaN or infinity, which would spoil the moving "
                "average; skip the update of steps whose loss is not finite"
            )
        if self._is_calibrated:
            past = Moments(*(getattr(self, "moment_" + name) for name in MOMENTS))
            gathered = past.blend(gathered, 1 - EMA_MOMENTUM)
        self._store(gathered, EMA_FLOOR)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """A new projection of FAVOR+ from ``generator`` (on the CPU)."""
        if not isinstance(self.low_rank, Favor):
            raise ValueError(f"redraw: only Favor has a random projection, this module has low_rank={self.low_rank}")
        self.projection.copy_(draw_projection(self.low_rank, self.head_dim, generator))

    # -------------------- persistence

    def get_extra_state(self) -> Tensor:
        """Calibrated, scale, rank, steps, draws: as a tensor, so that any checkpoint format can hold it."""
        rank = self.low_rank.rank if isinstance(self.low_rank, Quadratic) else 0
        return torch.tensor(
            [self._is_calibrated, math.nan if self._scale is None else self._scale, rank, self._steps, self._draws],
            dtype=torch.float64,
        )

    def set_extra_state(self, state: Tensor) -> None:
        calibrated, scale, rank, steps, draws = state.tolist()
        mine = self.low_rank.rank if isinstance(self.low_rank, Quadratic) else 0
        if int(rank) != mine:
            raise ValueError(
                f"ScatterbrainAttention: the checkpoint has statistics of rank {int(rank)}, this module rank "
                f"{mine}; create it with Quadratic(rank={int(rank)})"
            )
        self._is_calibrated, self._scale = bool(calibrated), None if math.isnan(scale) else scale
        self._steps, self._draws = int(steps), int(draws)

    def _apply(self, fn, recurse: bool = True):  # noqa: ANN001  (torch's own signature)
        """Moves buffers with the module but keeps them in the precision they were fitted in: half a mantissa would undo
        the calibration."""
        kept = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        originals = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            if self._buffers[name].dtype != dtype:
                self._buffers[name] = originals[name].to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, num_kv_heads={self.num_kv_heads}, "
            f"support={self.support}, low_rank={self.low_rank}"
        )


def _replace_first(rows: Tensor, first: Tensor) -> Tensor:
    """``rows`` (B, H, N, ...) with ``first`` in place of its first ones."""
    if rows.requires_grad or torch.is_grad_enabled():  # the backward pass of attention needs rows as they were
        return torch.cat([first, rows[:, :, first.shape[2] :]], 2)
    rows[:, :, : first.shape[2]] = first
    return rows


def _cores(model: nn.Module) -> list[ScatterbrainAttention]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    return [m for m in model.modules() if isinstance(m, ScatterbrainAttention)]


@contextmanager
def calibrate(model: nn.Module, group: dist.ProcessGroup | None = None) -> Iterator[nn.Module]:
    """Fills the calibration buffers of every :class:`ScatterbrainAttention` in ``model`` from what passes through it.

    Inside the block those layers compute exact attention and gather moments in float64, weighted by tokens over all
    batches, valid tokens only; leaving it turns the moments into statistics. ::

        with sb.calibrate(model), torch.no_grad():
            for batch in batches:
                model(batch)

    Where torch.distributed is initialised, leaving the block is a collective operation: the moments of all ranks are
    merged, so that every rank has the same statistics, of the batches of all. Every rank must enter and leave it.

    Args:
        model: any module.
        group: the ranks that share their statistics; default all. A group of this rank alone calibrates it alone.

    Raises:
        ValueError: no layer that can be calibrated, or none of them was run; NaN or infinity in a batch.
    """
    cores = [
        m for m in _cores(model) if isinstance(m.low_rank, Quadratic) and m.low_rank.statistics in ("stored", "ema")
    ]
    if not cores:
        raise ValueError(
            "calibrate: expected at least one ScatterbrainAttention with Quadratic(statistics='stored' "
            "or 'ema') in the model, found none"
        )
    before = [(m, m._scale, m._gathered) for m in cores]
    for m in cores:
        m._collecting, m._gathered, m._scale = True, None, None
    try:
        yield model
        merge_over_ranks(cores, group)
    except BaseException:
        for m, scale, gathered in before:
            m._collecting, m._scale, m._gathered = False, scale, gathered
        raise
    ran = [m for m in cores if m._gathered is not None]
    for m, scale, _ in before:
        if m._gathered is None:
            m._scale = scale
        m._finish_calibration()
    if not ran:
        raise ValueError(
            "calibrate: no ScatterbrainAttention was run inside the block; call the model on at least one batch there. "
            "sb.MultiheadAttention bypasses it where it has to be exact: call it with need_weights=False, without "
            "arbitrary masks, and in eval() mode if it has dropout"
        )


def update_statistics(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Tells every :class:`ScatterbrainAttention` that an optimizer step is over: moving averages are committed (the
    first at once, then every 10 steps, momentum 0.8, detached) and random projections redrawn where ``Favor(redraw=n)``
    asks for it. A model without such layers is left alone.

    Where torch.distributed is initialised and the model has moving averages this is a collective operation: what all
    ranks gathered is merged, as that of several forward passes of one step is, so that every rank commits the same. Every
    rank must call it after every step.

    Args:
        model: any module.
        group: the ranks that share their statistics, those of data parallelism; default all.
    """
    with torch.no_grad():
        cores = _cores(model)
        merge_over_ranks([m for m in cores if m._commits_now()], group)
        for m in cores:
            m._update()
