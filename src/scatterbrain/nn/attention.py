"""The attention core: supports and low-rank kernels, which of them a call runs with, and what is gathered for the
statistics of a kernel. Its state is in kernel_state.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain import checks, functional
from scatterbrain.fields import check_int
from scatterbrain.low_rank import Coefficients, LowRank, Quadratic
from scatterbrain.low_rank.moments import checked_moments, moments
from scatterbrain.nn.kernel_state import RECORD, KernelState
from scatterbrain.nn.observed import Observed
from scatterbrain.nn.pairs import CAUSAL_LOW_RANK, Choice, Pairs
from scatterbrain.nn.warn import warn_once
from scatterbrain.operators.tracing import NOT_IN_TORCHSCRIPT, is_known, is_transformed
from scatterbrain.operators.unused import with_zero_gradients
from scatterbrain.padding import padding_info
from scatterbrain.supports import Full, Support


class ScatterbrainAttention(KernelState):
    """:func:`scatterbrain.attention` with the state of its low-rank kernel.

    Bidirectional and causal calls may run with two supports and two kernels, of which one has state. By default they
    do: bidirectional calls run with :func:`scatterbrain.presets.drop_in` from the start, since ``Centroid`` remembers
    nothing, causal ones with :func:`scatterbrain.presets.causal`, once they are calibrated.

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

    All that a module remembers is in parameters and plain persistent buffers, of the same names, shapes and dtypes
    from the start: beside its statistics a module has ``calibration``, the record of what they are, and a kernel
    that counts steps or draws has ``step_count`` and ``draw_count``. So a checkpoint of a calibrated module loads
    into a new one by whatever fills buffers, and gives the same output. Statistics that do not agree with their
    record, since an entry was missing or something else was written into it, count as not calibrated, and running
    raises ValueError. With ``support=Full()`` or without a low-rank kernel there is nothing to remember, and the
    state dict is empty.

    Attributes:
        low_rank, causal_low_rank: the kernels of bidirectional and of causal calls.
        kernel_of_state: the one of them whose state the module has.
        is_calibrated: whether statistics are in place, by :func:`calibrate`, by the first commit of a moving average,
            or by loading. Setting it makes the record anew from what the buffers hold.
        is_collecting: whether the module is inside a :func:`calibrate` block.
        observed: how much it has seen there; None outside.
        bypassed: why the layer around this module last ran exact attention without it; None if it never has.
        is_query_by_query: whether this is the cross-attention of a decoder, where neither later queries nor their
            number may choose a query's keys. Who replaces attention sets it, having chosen such a support and kernel;
            calls do not look at it.

    Args:
        num_heads: query heads.
        head_dim: width d of a head.
        num_kv_heads: key/value heads; default num_heads. Must divide num_heads.
        support, low_rank: default :func:`scatterbrain.presets.drop_in`. What is given serves causal calls too.
        causal_support: the support of calls with ``is_causal=True``. Default ``support``; without either that of
            :func:`scatterbrain.presets.causal`, since causal models read other keys than bidirectional ones. Supports
            own no state, so statistics and checkpoints are the same with any.
        causal_low_rank: the kernel of calls with ``is_causal=True``. Default ``low_rank``; without either that of
            :func:`scatterbrain.presets.causal` (of rank ``head_dim`` in narrower heads than that). Two different
            kernels may not both have state.
        exact_queries: this many first queries attend to every key exactly, in bidirectional calls. For class and
            register tokens, whose attention is spread over the whole image: the cost is that of as many rows of exact
            attention.
        exact_below: bidirectional calls with fewer keys than this, padding included, run exact attention by torch's
            kernel, which nothing beats on few tokens. Default 0, never: from there on results are another function of
            the tokens, and a row's depend on how far its batch was padded. Causal calls never do, since results of the
            first tokens would depend on how many follow; nor do lengths that a trace leaves open.

    Raises:
        TypeError, ValueError: naming the argument; a support that does not fit the kernel, or causal calls.
    """

    observed: Observed | None = None
    bypassed: str | None = None
    is_query_by_query: bool = False
    # Of modules that were pickled without them: as for bidirectional calls.
    causal_support: Support | None = None
    _causal_low_rank: Choice = ...
    exact_below: int = 0

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        support: Support | None = None,
        low_rank: Choice = ...,
        exact_queries: int = 0,
        causal_support: Support | None = None,
        causal_low_rank: Choice = ...,
        exact_below: int = 0,
    ) -> None:
        super().__init__()
        pairs = Pairs.chosen(support, low_rank, causal_support, causal_low_rank)
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
        check_count("ScatterbrainAttention: exact_queries", exact_queries)
        check_count("ScatterbrainAttention: exact_below", exact_below)
        pairs.check()
        if pairs.causal_low_rank is CAUSAL_LOW_RANK and pairs.low_rank != CAUSAL_LOW_RANK:
            pairs = pairs._replace(causal_low_rank=Quadratic(min(CAUSAL_LOW_RANK.rank, head_dim)))
        pairs = pairs.needed()
        for support_of_calls in (pairs.support, pairs.support_of(True)):
            support_of_calls.check_heads(num_heads)
        for kernel in (pairs.low_rank, pairs.low_rank_of(True)):
            if kernel is not None and head_dim < kernel.least_head_dim:
                raise ValueError(
                    f"ScatterbrainAttention: {type(kernel).__name__} rank must be at most head_dim={head_dim}, got "
                    f"{kernel.least_head_dim}"
                )
        self.num_heads, self.head_dim, self.num_kv_heads = num_heads, head_dim, num_kv_heads
        self.pairs = pairs
        self.exact_queries, self.exact_below = exact_queries, exact_below
        self.is_collecting = False
        # Of all layers of a model together (join_layers): what was warned of, and how their paths end.
        self.said: set[str] = set()
        self.names: list[str] = []
        self._register_state()

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
        self._check_heads(query, key, value)
        self._warn_frozen(query, key, value)
        if self.lacks_statistics(is_causal) and self.bypassed is not None:  # in this order: graphs know nothing of
            raise self.uncalibrated(type(self).__name__, is_causal)  # earlier calls
        support, low_rank = self.support_of(is_causal), self.kernel_that_runs(is_causal)
        runs_with_state, collects = self._runs_with_state(is_causal), self.collects(is_causal)
        if collects or (runs_with_state and self._gathers_average()):
            query, key, value = functional.cast_for_autocast(query, key, value)
            checks.check_tensors(query, key, value)
            self._gather(query, key, key_padding_mask, query_padding_mask, functional.default_scale(query, scale))
        if collects or (not is_causal and is_known(key.shape[2] < self.exact_below)):
            support, low_rank = Full(), None
        elif self.is_collecting:
            self.observed.add_other_call()
        out = functional.attention(
            query,
            key,
            value,
            support,
            low_rank,
            key_padding_mask,
            is_causal,
            scale,
            None if low_rank is None else low_rank.coefficients(self),
            query_padding_mask,
            query_offset,
            return_lse,
        )
        if low_rank is None or not runs_with_state:
            out = tuple(map(self.with_zero_gradients, out)) if return_lse else self.with_zero_gradients(out)
        first = min(self.exact_queries, query.shape[2])
        if first == 0 or is_causal or support.is_full:
            return out
        if query_padding_mask is None and key_padding_mask is not None:
            if query.shape[2] == key.shape[2]:
                query_padding_mask = key_padding_mask
            elif first == key.shape[2]:  # without a mask these queries would be taken for the keys' tokens
                query_padding_mask = torch.zeros_like(key_padding_mask)
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

    def _check_heads(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """That queries and keys are tensors with the heads of this module. What else may be wrong with them, the
        function says."""
        if not (isinstance(query, Tensor) and isinstance(key, Tensor) and query.dim() == key.dim() == 4):
            checks.check_not_nested(query, key, value)
            checks.check_tensors(query, key, value)
        if query.is_nested or key.is_nested:  # without sizes
            checks.check_not_nested(query, key)
        expected = (self.num_heads, self.num_kv_heads, self.head_dim)
        if (query.shape[1], key.shape[1], query.shape[3]) != expected:
            raise ValueError(
                f"expected query with {expected[0]} heads, key with {expected[1]} heads and head_dim "
                f"{expected[2]}, got {query.shape[1]}, {key.shape[1]} and {query.shape[3]}"
            )

    # -------------------- what a call runs with

    @property
    def pairs(self) -> Pairs:
        """The supports and kernels of both kinds of calls."""
        return Pairs(self.support, self.low_rank, self.causal_support, self._causal_low_rank)

    @pairs.setter
    def pairs(self, pairs: Pairs) -> None:
        """For pairs with the same ``kernel_of_state``, once there is state."""
        self.support, self.low_rank, self.causal_support, causal_low_rank = pairs
        self._causal_low_rank = ... if causal_low_rank == pairs.low_rank else causal_low_rank
        self.kernel_of_state = pairs.kernel_of_state()
        self._register_modules()

    @property
    def causal_low_rank(self) -> LowRank:
        return self.low_rank if self._causal_low_rank is ... else self._causal_low_rank

    def support_of(self, is_causal: bool) -> Support:
        """The support of causal or of bidirectional calls."""
        return self.causal_support if is_causal and self.causal_support is not None else self.support

    def low_rank_of(self, is_causal: bool) -> LowRank:
        """The low-rank kernel of causal or of bidirectional calls."""
        return self.causal_low_rank if is_causal else self.low_rank

    def coefficients(self, is_causal: bool = False) -> Coefficients | None:
        """What the low-rank kernel of such calls runs with now; None where it needs nothing, or has nothing yet (which
        then raises with the cure)."""
        low_rank = self.low_rank_of(is_causal)
        return None if low_rank is None else low_rank.coefficients(self)

    def _runs_with_state(self, is_causal: bool) -> bool:
        """Whether such calls run with the kernel whose state the module has."""
        low_rank, kernel = self.low_rank_of(is_causal), self.kernel_of_state
        return low_rank is kernel or low_rank == kernel

    def collects(self, is_causal: bool) -> bool:
        """Whether such a call would gather what :func:`calibrate` makes statistics of, and run exact attention."""
        return self.is_collecting and self._runs_with_state(is_causal)

    @property
    def is_exact(self) -> bool:
        """Whether the support of every call is every key."""
        return self.support.is_full and self.support_of(True).is_full

    @property
    def needs_calibration(self) -> bool:
        """Whether no call could be approximated now for want of statistics. :meth:`lacks_statistics` tells
        bidirectional from causal calls."""
        kinds = [is_causal for is_causal in (False, True) if not self.support_of(is_causal).is_full]
        return bool(kinds) and all(map(self.lacks_statistics, kinds))

    def lacks_statistics(self, is_causal: bool) -> bool:
        """Whether a causal or a bidirectional call would raise now for want of statistics."""
        kernel = self.kernel_of_state
        if kernel is None or self.is_exact or self.is_collecting or not self._runs_with_state(is_causal):
            return False
        if any(buffer.is_meta for buffer in self._buffers.values()):
            return False  # offloaded: forward will have them
        return kernel.needs_calibration(self)

    def uncalibrated(self, owner: str, is_causal: bool) -> ValueError:
        """The error of ``owner``, the layer that asked, for want of statistics; with the cure."""
        problem = self.calibration_problem
        train = "choose sb.presets.train(), which learns its projections ('scatterbrain:train' in transformers)"
        which = " for causal calls" if is_causal and self.low_rank != self.causal_low_rank else ""
        return ValueError(
            f"{owner} is not calibrated{which}{', since ' * bool(problem)}{problem}: run a few typical batches in "
            "`with sb.calibrate(model), torch.no_grad(): model(**batch)`, load a checkpoint of a calibrated model, or "
            + train
            + ("" if is_causal else ", or sb.presets.drop_in(), which needs no calibration")
            + (f"; its layer last ran exact attention without it: {self.bypassed}" if self.bypassed else "")
        )

    # -------------------- statistics

    def _gathers_average(self) -> bool:
        """Whether a forward pass gathers moments of its own accord. Functions that torch.func transforms must not write
        to a module."""
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
        if getattr(self, "_is_replica", False):  # what it gathers is gone with it
            raise RuntimeError(
                "ScatterbrainAttention: nn.DataParallel runs copies of the model that last for one call, so nothing "
                "remembers the statistics of the tokens; run model.module itself, or DistributedDataParallel, whose "
                "processes merge their statistics"
            )
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
            if self.gathered is not None:  # NaN is left of a step that was skipped for its loss
                self.gathered = self.gathered.if_finite()
        # Merging is by tokens: a forward that checkpointing runs twice changes no mean.
        self.gathered = gathered if self.gathered is None else self.gathered.merge(gathered)
        self.gathered_scale = float(scale)

    @property
    def gathered_tokens(self) -> int:
        """Valid tokens of the queries whose moments were gathered; of all ranks once those are merged."""
        return 0 if self.gathered is None else int(self.gathered.tokens.min()) // (self.num_heads // self.num_kv_heads)

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Turns the moments gathered by :func:`calibrate` into statistics."""
        gathered, self.gathered = self.gathered, None
        self.kernel_of_state.store(self, gathered)
        self.is_collecting = False

    def check_step(self) -> None:
        """Raises ValueError for gathered moments that cannot be committed."""
        if self.kernel_of_state is not None:
            self.kernel_of_state.check_step(self)

    def forget_step(self) -> None:
        """Drops the moments that were gathered since the last commit."""
        self.gathered = self.gathered_scale = None

    @torch.no_grad()
    def finish_step(self) -> None:
        """One optimizer step is over, whose moments :meth:`check_step` has passed."""
        self.steps += 1
        if self.kernel_of_state is not None:
            if self.gathered is not None:
                self._look(RECORD)
            self.kernel_of_state.finish_step(self)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """A new projection of FAVOR+ from ``generator`` (on the CPU)."""
        if self.kernel_of_state is None:
            raise ValueError("redraw: only Favor has a random projection, this module has low_rank=None")
        self.kernel_of_state.redraw_projection(self, generator)

    # -------------------- as a module of torch

    def _tell_of_unused(self) -> None:
        warn_once(
            f"the checkpoint's entries of ScatterbrainAttention are {unused_entries(self.low_rank)}", self.said, 3
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "said" not in state:  # pickled by an earlier release
            self.said, self.names = set(), []

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script asks here, before it compiles this module or one that holds it."""
        raise RuntimeError(NOT_IN_TORCHSCRIPT)

    def extra_repr(self) -> str:
        causal = "" if self.causal_support is None else f"causal_support={self.causal_support}, "
        kernel = "" if self.causal_low_rank == self.low_rank else f", causal_low_rank={self.causal_low_rank}"
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, num_kv_heads={self.num_kv_heads}, "
            f"support={self.support}, {causal}low_rank={self.low_rank}{kernel}"
        )


def check_count(name: str, value: object) -> None:
    """Raises ValueError, with ``name``, for anything but an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an int of at least 0, got {value!r}")


def _replace_first(rows: Tensor, first: Tensor) -> Tensor:
    """``rows`` (B, H, N, ...) with ``first`` in place of its first ones."""
    if rows.requires_grad or torch.is_grad_enabled():  # the backward pass of attention needs rows as they were
        return torch.cat([first, rows[:, :, first.shape[2] :]], 2)
    rows[:, :, : first.shape[2]] = first
    return rows


def unused_entries(low_rank: LowRank) -> str:
    """What to say of a checkpoint's entries for layers that run with ``low_rank`` and remember nothing."""
    return (
        f"not used: {low_rank} takes what it needs from the tokens of each call. To run as the model that was saved, "
        "choose its support and kernel; those of earlier defaults are sb.presets.quadratic() with "
        "causal_support=sb.presets.causal()[0], 'scatterbrain:quadratic' in transformers"
    )


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
