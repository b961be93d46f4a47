"""The attention core: a support, a low-rank kernel, and the state that the kernel needs (calibrated statistics, moving
averages, projections)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain import checks, functional, presets
from scatterbrain.fields import check_int
from scatterbrain.low_rank import Coefficients, Heads, LowRank, State
from scatterbrain.low_rank.moments import Moments, checked_moments, moments
from scatterbrain.nn.distributed import fill
from scatterbrain.nn.observed import Observed
from scatterbrain.nn.record import NOTHING, Record, read_record, size_of_record, written_record
from scatterbrain.nn.warn import warn_once
from scatterbrain.operators.tracing import NOT_IN_TORCHSCRIPT, is_transformed
from scatterbrain.operators.unused import with_zero_gradients
from scatterbrain.padding import padding_info
from scatterbrain.supports import Full, Support

_PRESET = presets.drop_in()[1]
RECORD = "calibration"  # buffer with the record of the statistics (scatterbrain.nn.record)
COUNTS = {"steps": "step_count", "draws": "draw_count"}  # buffers with the counts that a kernel names


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
    computes coordinates in float32.

    All that a module remembers is in parameters and plain persistent buffers, of the same names, shapes and dtypes from
    the start: beside its statistics a module has ``calibration``, the record of what they are, and a kernel that counts
    steps or draws has ``step_count`` and ``draw_count``. So a checkpoint of a calibrated module loads into a new one by
    whatever fills buffers, and gives the same output. Statistics that do not agree with their record, since an entry was
    missing or something else was written into it, count as not calibrated, and running raises ValueError. With
    ``support=Full()`` or without a low-rank kernel there is nothing to remember, and the state dict is empty.

    Attributes:
        is_calibrated: whether statistics are in place, by :func:`calibrate`, by the first commit of a moving average,
            or by loading. Setting it makes the record anew from what the buffers hold.
        is_collecting: whether the module is inside a :func:`calibrate` block.
        observed: how much it has seen there; None outside.
        bypassed: why the layer around this module last ran exact attention without it; None if it never has.

    Args:
        num_heads: query heads.
        head_dim: width d of a head.
        num_kv_heads: key/value heads; default num_heads. Must divide num_heads.
        support, low_rank: default :func:`scatterbrain.presets.drop_in`.
        causal_support: the support of calls with ``is_causal=True``. Default ``support``; without either that of
            :func:`scatterbrain.presets.causal`, since causal models read other keys than bidirectional ones. Supports
            own no state, so statistics and checkpoints are the same with any.
        exact_queries: this many first queries attend to every key exactly, in bidirectional calls. For class and
            register tokens, whose attention is spread over the whole image: the cost is that of as many rows of exact
            attention.

    Raises:
        TypeError, ValueError: naming the argument; a support that does not fit the kernel, or causal calls.
    """

    observed: Observed | None = None
    bypassed: str | None = None
    causal_support: Support | None = None  # of modules that were pickled without one

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        support: Support | None = None,
        low_rank: LowRank = _PRESET,
        exact_queries: int = 0,
        causal_support: Support | None = None,
    ) -> None:
        super().__init__()
        if support is None:
            support, causal_support = presets.drop_in()[0], causal_support or presets.causal()[0]
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
        if causal_support is not None:
            checks.check_causal_support(causal_support)
        if low_rank is not None and head_dim < low_rank.least_head_dim:
            raise ValueError(
                f"ScatterbrainAttention: {type(low_rank).__name__} rank must be at most head_dim={head_dim}, got "
                f"{low_rank.least_head_dim}"
            )
        self.num_heads, self.head_dim, self.num_kv_heads = num_heads, head_dim, num_kv_heads
        self.support, self.causal_support = support, causal_support
        self.low_rank = None if self.is_exact else low_rank
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
        parameters, buffers = self.low_rank.initial_state(Heads(self.num_heads, self.head_dim, self.num_kv_heads))
        buffers = dict(buffers)
        if self.low_rank.is_calibrated_from_data and buffers:
            buffers[RECORD] = _record_of(None, list(buffers.values()))
        counts = {COUNTS[name]: torch.zeros((), dtype=torch.int64) for name in self.low_rank.counts}
        return State(parameters, buffers | counts)

    def _forget(self) -> None:
        self.gathered: Moments | None = None
        self.gathered_scale: float | None = None
        self._known: dict[str, Any] = {RECORD: NOTHING} | dict.fromkeys(COUNTS, 0)
        self._seen: dict[str, Callable[[dict[str, Tensor]], bool]] = {}  # what was read, and whether that still holds

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
        if self.needs_calibration and self.bypassed is not None:  # in this order: graphs know nothing of earlier calls
            raise self.uncalibrated(type(self).__name__, is_causal)
        support, low_rank = self.support_of(is_causal), self.low_rank
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
        if query.is_nested or key.is_nested:  # without sizes
            checks.check_not_nested(query, key)
        expected = (self.num_heads, self.num_kv_heads, self.head_dim)
        if (query.shape[1], key.shape[1], query.shape[3]) != expected:
            raise ValueError(
                f"expected query with {expected[0]} heads, key with {expected[1]} heads and head_dim "
                f"{expected[2]}, got {query.shape[1]}, {key.shape[1]} and {query.shape[3]}"
            )

    def support_of(self, is_causal: bool) -> Support:
        """The support of causal or of bidirectional calls."""
        return self.causal_support if is_causal and self.causal_support is not None else self.support

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
        """Whether the support of every call is every key."""
        return self.support.is_full and self.support_of(True).is_full

    @property
    def needs_calibration(self) -> bool:
        """Whether running the module now would raise for want of statistics."""
        if self.is_exact or self.low_rank is None or self.is_collecting:
            return False
        if any(buffer.is_meta for buffer in self._buffers.values()):
            return False  # offloaded: forward will have them
        return self.low_rank.needs_calibration(self)

    def uncalibrated(self, owner: str, is_causal: bool) -> ValueError:
        """The error of ``owner``, the layer that asked, for want of statistics; with the cure."""
        problem = self.calibration_problem
        train = "choose sb.presets.train(), which learns its projections ('scatterbrain:train' in transformers)"
        return ValueError(
            f"{owner} is not calibrated{', since ' * bool(problem)}{problem}: run a few typical batches in `with sb.calibrate(model), torch.no_grad(): "
            f"model(**batch)`, load a checkpoint of a calibrated model, or {train}"
            + ("" if is_causal else ", or Quadratic(statistics='input')")
            + (f"; its layer last ran exact attention without it: {self.bypassed}" if self.bypassed else "")
        )

    def commits_average(self) -> bool:
        """Whether the end of this step commits a moving average, if anything was gathered for it."""
        return self.low_rank is not None and self.low_rank.commits_average(self)

    def _is_average_due(self) -> bool:
        """Whether the moments of this step will be committed: the first step's, then every tenth's. Functions that
        torch.func transforms must not write to a module."""
        return self.commits_average() and self.training and torch.is_grad_enabled() and not is_transformed()

    @torch.no_grad()
    def _gather(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        query_padding_mask: Tensor | None,
        scale: float,
    ) -> None:
        before = self.gathered_scale if self.is_collecting else self.scale  # a calibration starts anew
        if before is not None and abs(before - scale) > 1e-6 * abs(scale):
            raise ValueError(
                f"ScatterbrainAttention: its statistics hold for one scale, got scale={scale:.6g} after "
                f"{before:.6g}; use one scale, or reset_parameters() and start again"
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
        self.gathered_scale = float(scale)

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
            if self.gathered is not None:
                self._look(RECORD)
            self.low_rank.finish_step(self)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """A new projection of FAVOR+ from ``generator`` (on the CPU)."""
        if self.low_rank is None:
            raise ValueError("redraw: only Favor has a random projection, this module has low_rank=None")
        self.low_rank.redraw_projection(self, generator)

    # -------------------- what the buffers say

    @property
    def is_calibrated(self) -> bool:
        return self._value(RECORD).is_good

    @is_calibrated.setter
    def is_calibrated(self, value: bool) -> None:
        if value and self.scale is None:
            raise ValueError(
                "ScatterbrainAttention: is_calibrated = True needs the scale of q.k that the statistics hold for, and "
                "none is known; calibrate (sb.calibrate), or set gathered_scale first"
            )
        self._known[RECORD] = Record(self.scale, "") if value else NOTHING
        statistics = self.tensors(self._statistics())
        if statistics:
            fill(self._buffers[RECORD], _record_of(self._known[RECORD].scale, statistics))
            self._look(RECORD)
        if self.gathered is None:
            self.gathered_scale = None

    @property
    def calibrated_scale(self) -> float | None:
        """Factor of q.k that the statistics hold for; None before there are any.

        Raises:
            ValueError: the buffers hold statistics that are not to be used.
        """
        record = self._value(RECORD)
        if record.problem:
            raise ValueError(
                f"ScatterbrainAttention is not calibrated: {record.problem}; load a whole checkpoint, calibrate again "
                "(sb.calibrate), call reset_parameters(), or set is_calibrated = True for statistics of your own"
            )
        return record.scale

    @property
    def calibration_problem(self) -> str:
        """Why the statistics in the buffers cannot be used although there are some; "" otherwise."""
        return self._value(RECORD).problem

    @property
    def scale(self) -> float | None:
        """Factor of q.k of the moments that were gathered, or else of the statistics; None without either."""
        return self._value(RECORD).scale if self.gathered_scale is None else self.gathered_scale

    @property
    def steps(self) -> int:
        """Optimizer steps that are over."""
        return self._value("steps")

    @steps.setter
    def steps(self, value: int) -> None:
        self._count("steps", value)

    @property
    def draws(self) -> int:
        """Projections drawn since the first."""
        return self._value("draws")

    @draws.setter
    def draws(self, value: int) -> None:
        self._count("draws", value)

    def _statistics(self) -> list[str]:
        """Names of the buffers that the record is about."""
        return [name for name in self._buffers if name not in _OWN] if RECORD in self._buffers else []

    def _value(self, what: str) -> Any:
        if torch.compiler.is_compiling():
            self._look_while_tracing()
        else:
            seen = self._seen.get(what)
            if seen is None or not seen(self._buffers):
                self._look(what)
        return self._known[what]

    @torch.compiler.assume_constant_result
    def _look_while_tracing(self) -> bool:
        """For the compiler, which cannot trace the reading: its result is part of the graph, and another value that the
        module comes to know makes another graph."""
        for what in self._known:
            self._look(what)
        return True

    def _look(self, what: str) -> None:
        """Reads buffers: they may be filled by anything, at any time. Where they cannot be read, on the meta device or
        under a transform, what is known stays."""
        buffers, own = self._buffers, RECORD if what == RECORD else COUNTS[what]
        names = self._statistics() if what == RECORD else []
        if own not in buffers or not _are_readable([buffers[name] for name in (own, *names)]):
            return
        # What a call does not run with is looked at here alone, and not in every call.
        watched = [own, *(name for name in names if name in (self.low_rank.runs_with or names))]
        copy = None
        if what == RECORD:
            value = read_record(buffers[own], names, [buffers[name] for name in names])
            if value == NOTHING and _is_without_buffers(self) and not any(bool(buffers[n].any()) for n in names):
                value = Record(None, "accelerate loads the buffers of offloaded layers only with offload_buffers=True")
            # What says that nothing is there yet is compared, since collectives write behind the version counters.
            copy = None if value.is_good else buffers[own].detach().clone()
        else:
            value = int(buffers[own])
        if value != self._known[what]:
            self._known[what] = value
        self._seen.pop(what, None)
        # Tensors of inference mode count no versions, and are read every time.
        if not any(buffers[name].is_inference() for name in watched) and not (what == RECORD and value.problem):
            self._seen[what] = _unchanged(buffers, watched, copy)

    @torch.no_grad()
    def _count(self, name: str, value: int) -> None:
        buffer = self._buffers.get(COUNTS[name])
        if buffer is None:
            self._known[name] = value
        else:
            fill(buffer, torch.tensor(value, dtype=buffer.dtype))
            self._look(name)

    # -------------------- persistence

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.is_exact:  # exact attention needs nothing that an approximation saved
            for name in [name for name in state_dict if name.startswith(prefix)]:
                del state_dict[name]
        self._translate(state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for what in self._known:
            self._look(what)

    def _translate(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
        """Checkpoints of earlier releases have an entry ``_extra_state`` in place of the record and the counts."""
        own = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        if self.low_rank is not None:
            misfit = self.low_rank.misfit({name: tuple(tensor.shape) for name, tensor in own.items()})
            if misfit:
                error_msgs.append(f"ScatterbrainAttention: {misfit}")
        extra = state_dict.pop(f"{prefix}_extra_state", None)
        if extra is not None and not extra.is_meta:
            statistics = [own[name] for name in self._statistics() if name in own]
            if len(statistics) < len(self._statistics()):
                statistics = []
            for name, tensor in self._from_extra_state(extra, statistics).items():
                state_dict.setdefault(prefix + name, tensor)

    @property
    def made_from_extra_state(self) -> list[str]:
        """Entries of a state dict that checkpoints of earlier releases have in their ``_extra_state``."""
        return [name for name in self._buffers if name in _OWN]

    def load_extra_state(self, extra: Tensor) -> None:
        """Fills record and counts from the entry ``_extra_state`` of a checkpoint of an earlier release, whose other
        entries are in place; for loaders that go around :meth:`load_state_dict`."""
        statistics = self.tensors(self._statistics())
        for name, tensor in self._from_extra_state(extra, statistics).items():
            fill(self._buffers[name], tensor)

    def _from_extra_state(self, extra: Tensor, statistics: list[Tensor]) -> dict[str, Tensor]:
        """Record and counts, by the names of their buffers, from what earlier releases kept of a module with these
        statistics: calibrated, scale or NaN, rank, steps, draws."""
        calibrated, scale, _, *counts = extra.tolist()
        found = dict(zip(COUNTS.values(), (torch.tensor(int(n), dtype=torch.int64) for n in counts)))
        found = {name: tensor for name, tensor in found.items() if name in self._buffers}
        if statistics and _are_readable(statistics):
            found[RECORD] = written_record(scale if calibrated else None, statistics)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": {}}  # holds nothing but what can be read again

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_known" in state:
            return
        # A module pickled by an earlier release.
        self.said, self.names = set(), []
        before = {name: self.__dict__.pop(name) for name in ("is_calibrated", "scale", "steps", "draws")}
        gathered = self.gathered
        self._forget()
        if self.support.is_full:
            self.low_rank = None
            self._parameters.clear()
            self._buffers.clear()
        for name, tensor in self._initial_state().buffers.items():
            if name in _OWN:
                self.register_buffer(name, tensor)
        self.gathered, self.gathered_scale = gathered, before["scale"]
        self.is_calibrated = before["is_calibrated"]
        self.steps, self.draws = before["steps"], before["draws"]

    def _apply(self, fn, recurse: bool = True):  # noqa: ANN001  (torch's own signature)
        """Moves buffers with the module but keeps the precision in which they were fitted: half a mantissa would undo
        the calibration."""
        self._seen.clear()  # or it would keep the memory that the buffers leave
        kept = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        originals = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            if self._buffers[name].dtype != dtype:
                self._buffers[name] = originals[name].to(self._buffers[name].device)
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script asks here, before it compiles this module or one that holds it."""
        raise RuntimeError(NOT_IN_TORCHSCRIPT)

    def extra_repr(self) -> str:
        causal = "" if self.causal_support is None else f"causal_support={self.causal_support}, "
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, num_kv_heads={self.num_kv_heads}, "
            f"support={self.support}, {causal}low_rank={self.low_rank}"
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


_OWN = (RECORD, *COUNTS.values())  # buffers that no kernel makes


def _unchanged(
    buffers: dict[str, Tensor], names: list[str], copy: Tensor | None
) -> Callable[[dict[str, Tensor]], bool]:
    """A function that says whether buffers of these names are still those in ``buffers`` and unchanged since, and, where
    there is a ``copy`` of the first, equal to it. Every call of a module asks it, so it is as plain as can be."""
    select = itemgetter(*(names if len(names) > 1 else names * 2))  # of two or more names it gives a tuple
    kept = select(buffers)
    versions = [t._version for t in kept]

    def is_current(buffers: dict[str, Tensor]) -> bool:
        tensors = select(buffers)
        if not all(map(is_, tensors, kept)) or [t._version for t in tensors] != versions:
            return False
        return copy is None or torch.equal(copy, tensors[0])

    return is_current


def _are_readable(tensors: Sequence[Tensor]) -> bool:
    """Whether these are numbers in memory, and nothing watches or transforms what is done with them."""
    return not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()) and all(
        type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in tensors
    )


def _is_without_buffers(module: nn.Module) -> bool:
    """Whether accelerate has offloaded the module, and its buffers with it to nowhere."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "offload", False) and not getattr(hook, "offload_buffers", True)


def _record_of(scale: float | None, statistics: list[Tensor]) -> Tensor:
    """Their record, without content where they have none to be read."""
    if _are_readable(statistics):
        return written_record(scale, statistics)
    return torch.zeros(size_of_record(len(statistics)), dtype=torch.float64, device=statistics[0].device)
