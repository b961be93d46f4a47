"""The attention core: a support, a low-rank kernel, and the state that the kernel needs (calibrated statistics, moving
averages, projections)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from scatterbrain import checks, functional, presets
from scatterbrain.fields import check_int
from scatterbrain.low_rank import Coefficients, Heads, LowRank, State
from scatterbrain.low_rank.moments import Moments, checked_moments, moments
from scatterbrain.nn.distributed import fill
from scatterbrain.nn.observed import Observed
from scatterbrain.nn.warn import warn_once
from scatterbrain.operators.unused import with_zero_gradients
from scatterbrain.padding import padding_info
from scatterbrain.supports import Full, Support

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

    Attributes:
        is_calibrated: whether statistics are in place: set by :func:`calibrate`, by the first commit of a moving
            average, or by loading a state that had them.
        is_collecting: whether the module is inside a :func:`calibrate` block.
        observed: how much it has seen there; None outside.
        bypassed: why the layer around this module last ran exact attention without it; None if it never has.

    Args:
        num_heads: query heads.
        head_dim: width d of a head.
        num_kv_heads: key/value heads; default num_heads. Must divide num_heads.
        support, low_rank: default :func:`scatterbrain.presets.drop_in`.
        exact_queries: this many first queries attend to every key exactly, in bidirectional calls. For class and
            register tokens, whose attention is spread over the whole image: the cost is that of as many rows of exact
            attention.
    """

    observed: Observed | None = None
    bypassed: str | None = None

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
            check_int("ScatterbrainAttention", name, value, 1)
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
        if low_rank is not None and head_dim < low_rank.least_head_dim:
            raise ValueError(
                f"ScatterbrainAttention: {type(low_rank).__name__} rank must be at most head_dim={head_dim}, got "
                f"{low_rank.least_head_dim}"
            )
        self.num_heads, self.head_dim, self.num_kv_heads = num_heads, head_dim, num_kv_heads
        self.support, self.low_rank = support, low_rank
        self.exact_queries = exact_queries
        self.is_collecting = False
        # Of all layers of a model together (join_layers): what was warned of, and how their paths end.
        self.said: set[str] = set()
        self.names: list[str] = []
        self._forget()
        state = self._initial_state()
        for name, tensor in state.parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in state.buffers.items():
            self.register_buffer(name, tensor)

    def _initial_state(self) -> State:
        if self.low_rank is None:
            return State({}, {})
        return self.low_rank.initial_state(Heads(self.num_heads, self.head_dim, self.num_kv_heads))

    def _forget(self) -> None:
        self.is_calibrated = False
        self.gathered: Moments | None = None
        self.scale: float | None = None
        self.steps = self.draws = 0

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again, in place: projections redrawn, calibration forgotten. Also fills a module created on the meta
        device and moved with ``to_empty``."""
        self._forget()
        state = self._initial_state()
        for name, tensor in (state.parameters | state.buffers).items():
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
        self._warn_frozen(query, key, value)
        if self.bypassed is not None and self.needs_calibration:
            raise self.uncalibrated(type(self).__name__, is_causal)
        support, low_rank = self.support, self.low_rank
        if self.is_collecting or self._is_average_due():
            query, key, value = functional.cast_for_autocast(query, key, value)
            checks.check_tensors(query, key, value)
            self._gather(query, key, key_padding_mask, query_padding_mask, functional.default_scale(query, scale))
        if self.is_collecting:
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
        if low_rank is None:
            out = tuple(map(self.with_zero_gradients, out)) if return_lse else self.with_zero_gradients(out)
        first = min(self.exact_queries, query.shape[2])
        if first == 0 or is_causal or support.is_full:
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

    def with_zero_gradients(self, out: Tensor) -> Tensor:
        """``out``, of a way that leaves the low-rank kernel out, with gradients of zero to the module's parameters:
        DistributedDataParallel waits for every parameter's gradient. For modules that run exact attention in place of
        this one."""
        return with_zero_gradients(out, self.parameters())

    def _warn_frozen(self, *tokens: Tensor) -> None:
        """Says, once, that learned projections stay as they are while something else trains: adapters freeze everything
        that they are not told of."""
        if not (self.training and self._parameters and torch.is_grad_enabled()):
            return
        if any(p.requires_grad for p in self._parameters.values()) or torch._C._are_functorch_transforms_active():
            return
        if any(isinstance(t, Tensor) and t.requires_grad for t in tokens):
            names = self.names or "[<name of the ScatterbrainAttention>]"
            warn_once(
                "the learned projections of this model's attention are frozen (requires_grad=False) while other "
                f"parameters train; to train, save and reload them with a peft adapter, give its configuration "
                f"modules_to_save={names}, or call requires_grad_(True) on those modules and save them yourself",
                self.said,
                stacklevel=4,
            )

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
        return None if self.low_rank is None else self.low_rank.coefficients(self)

    def tensors(self, names: Iterable[str]) -> list[Tensor]:
        """Parameters and buffers by name."""
        # Past nn.Module's slow lookup, unless something has taken their place, as parametrizations and sharding do.
        parameters, buffers = self._parameters, self._buffers
        return [
            parameters[name] if name in parameters else buffers[name] if name in buffers else getattr(self, name)
            for name in names
        ]

    # -------------------- statistics

    @property
    def is_exact(self) -> bool:
        """Whether the support is every key."""
        return self.support.is_full

    @property
    def needs_calibration(self) -> bool:
        """Whether running the module now would raise for want of statistics."""
        if self.support.is_full or self.low_rank is None or self.is_collecting:
            return False
        return self.low_rank.needs_calibration(self)

    def uncalibrated(self, owner: str, is_causal: bool) -> ValueError:
        """The error of ``owner``, the layer that asked, for want of statistics; with the cure."""
        train = "choose sb.presets.train(), which learns its projections ('scatterbrain:train' in transformers)"
        return ValueError(
            f"{owner} is not calibrated: run a few typical batches in `with sb.calibrate(model), torch.no_grad(): "
            f"model(**batch)`, load a checkpoint of a calibrated model, or {train}"
            + ("" if is_causal else ", or Quadratic(statistics='input')")
            + (f"; its layer last ran exact attention without it: {self.bypassed}" if self.bypassed else "")
        )

    @property
    def has_state(self) -> bool:
        """Whether a checkpoint must hold something of this module."""
        return self.low_rank is not None and self.low_rank.has_state(self)

    def commits_average(self) -> bool:
        """Whether the end of this step commits a moving average, if anything was gathered for it."""
        return self.low_rank is not None and self.low_rank.commits_average(self)

    def _is_average_due(self) -> bool:
        """Whether the moments of this step will be committed: the first step's, then every tenth's."""
        return self.commits_average() and self.training and torch.is_grad_enabled()

    @torch.no_grad()
    def _gather(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        query_padding_mask: Tensor | None,
        scale: float,
    ) -> None:
        if self.scale is not None and abs(self.scale - scale) > 1e-6 * abs(scale):
            raise ValueError(
                f"ScatterbrainAttention: its statistics hold for one scale, got scale={scale:.6g} after "
                f"{self.scale:.6g}; use one scale, or reset_parameters() and start again"
            )
        padding = padding_info(query, key, key_padding_mask, query_padding_mask, 0)
        if self.observed is not None:
            self.observed.add(query, key, padding)
        if self.is_collecting:
            gathered = checked_moments(query, key, scale, padding)
        else:
            gathered = moments(query, key, scale, padding.key_mask, padding.query_mask)
        # Merging is by tokens: a forward that checkpointing runs twice changes no mean.
        self.gathered = gathered if self.gathered is None else self.gathered.merge(gathered)
        self.scale = float(scale)

    @property
    def gathered_tokens(self) -> int:
        """Valid tokens of the queries whose moments were gathered; of all ranks once those are merged."""
        return 0 if self.gathered is None else int(self.gathered.tokens.min()) // (self.num_heads // self.num_kv_heads)

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Turns the moments gathered by :func:`calibrate`, if there are any, into statistics."""
        gathered, self.gathered, self.is_collecting = self.gathered, None, False
        if gathered is not None:
            self.low_rank.store(self, gathered)

    @torch.no_grad()
    def finish_step(self) -> None:
        """One optimizer step is over."""
        self.steps += 1
        if self.low_rank is not None:
            self.low_rank.finish_step(self)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """A new projection of FAVOR+ from ``generator`` (on the CPU)."""
        if self.low_rank is None:
            raise ValueError("redraw: only Favor has a random projection, this module has low_rank=None")
        self.low_rank.redraw_projection(self, generator)

    # -------------------- persistence

    def get_extra_state(self) -> Tensor:
        """Calibrated, scale, rank, steps, draws: as a tensor, so that any checkpoint format can hold it."""
        scale = math.nan if self.scale is None else self.scale
        return torch.tensor([self.is_calibrated, scale, self._rank, self.steps, self.draws], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        calibrated, scale, rank, steps, draws = state.tolist()
        if int(rank) != self._rank:
            raise ValueError(
                f"ScatterbrainAttention: the checkpoint has statistics of rank {int(rank)}, this module rank "
                f"{self._rank}; create it with Quadratic(rank={int(rank)})"
            )
        self.is_calibrated, self.scale = bool(calibrated), None if math.isnan(scale) else scale
        self.steps, self.draws = int(steps), int(draws)

    @property
    def _rank(self) -> int:
        return 0 if self.low_rank is None else self.low_rank.checkpoint_rank

    def _apply(self, fn, recurse: bool = True):  # noqa: ANN001  (torch's own signature)
        """Moves buffers with the module but keeps the precision in which they were fitted: half a mantissa would undo
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


def join_layers(model: nn.Module) -> None:
    """What the layers of ``model`` say once, they say once together, and they name themselves as ``model`` does: by the
    shortest end of their paths that no other module has."""
    paths = dict(model.named_modules())
    cores = {path: module for path, module in paths.items() if isinstance(module, ScatterbrainAttention)}
    others = [path for path in paths if path not in cores]
    said, names = next((core.said for core in cores.values()), set()), set()
    for path in cores:
        parts = path.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        names.add(next((end for end in ends if not any(other.endswith(end) for other in others)), path))
    for core in cores.values():
        core.said, core.names = said, sorted(names)
