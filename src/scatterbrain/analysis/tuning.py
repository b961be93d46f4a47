"""The cheapest support and low-rank kernel for every layer of a model that keep its outputs within a bound."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain import presets
from scatterbrain.analysis.captured import Batch, recorded, run
from scatterbrain.analysis.comparison import medians, norms_of
from scatterbrain.analysis.configured import Pair, attention_of, fitting, pair_that_runs
from scatterbrain.analysis.exact import Exact, exact
from scatterbrain.analysis.layer_call import LayerCall
from scatterbrain.analysis.stand_in import stand_in, uncompiled
from scatterbrain.analysis.times import Times
from scatterbrain.analysis.trade import EXACT, Combination, best_of_every_step, by_head, front, hull
from scatterbrain.checks import check_pair
from scatterbrain.integrations.restrictions import NotReplaceable
from scatterbrain.layer_settings import LayerSettings
from scatterbrain.low_rank import Centroid
from scatterbrain.supports import Routed, Window
from scatterbrain.version import __version__

FEW = 4  # batches that single layers are measured on
SLACK = 1.5  # combinations are tried from this many times the bound on, as the layers' own errors predict it
NEAR = 1.2  # times the bound on a few batches, and all batches are asked
APART = 0.004  # of exact attention's time: a step of the time of combinations
PART = 1 << 20  # numbers of an output that are compared at a time
# Errors up to these are those of rounding, in sums whose order may differ from run to run.
ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-4}
# What models fill in where something cannot be, negated: the smallest first.
FILLS = *(-torch.finfo(t).min for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)), torch.inf
KEYS, CLUSTERS = (48, 64, 96, 128, 192), (32, 64, 96, 128)


def bidirectional_candidates() -> list[Pair]:
    """Windows and routed lists with the centroid kernel."""
    windows = [(Window(keys), Centroid(clusters)) for keys in (64, 128) for clusters in CLUSTERS]
    routed = [
        (Routed(keys, block_q=block_q, pools=pools), Centroid(clusters))
        for keys in KEYS
        for block_q in (16, 32)
        for pools in (1, 2)
        for clusters in CLUSTERS
    ]
    return [*windows, *routed]


def causal_candidates(head_dim: int) -> list[Pair]:
    """Windows with the first keys, and windows with routed keys, with the quadratic kernel."""
    kernel = fitting(presets.causal()[1], head_dim)
    windows = [(Window(keys, sinks=4), kernel) for keys in (32, 64, 96, 128, 192, 256)]
    mixed = [(Routed(keys + keys // 2, block_q=16, window=keys), kernel) for keys in (64, 128)]
    per_query = [(Routed(keys, block_q=1, block_k=8, window=16, pools=2), kernel) for keys in (64, 128)]
    return [*windows, *mixed, *per_query]


# -------------------- results


@dataclass(frozen=True)
class Step:
    """A point of the trade between error and time: the pairs of all layers.

    Args:
        pairs: by layer.
        seconds: of all attention in a forward pass of the first batch: the sum of what every call takes by itself.
        error: of the model's output, on the batches it was chosen on and on those held out.
        held_out: the latter alone.
    """

    pairs: dict[str, Pair]
    seconds: float
    error: float
    held_out: float


@dataclass
class Tuning:
    """What :func:`tune` found. ``print(tuning)`` shows the decisions; ``save`` writes them.

    Args:
        model: its class.
        chosen: the step that was taken.
        steps: exact attention and the combinations that were measured on all batches, the slowest first.
        uniform: the fastest single pair for all layers that keeps the bound, if one does.
        exact_seconds: of all attention, exact.
        bound: in words.
        max_error: the bound on errors; None where it is on time.
        about: facts that are saved with the settings.
        left: why modules that look like attention, or calls of them, are not tuned, by path.
    """

    model: str
    chosen: Step
    steps: list[Step]
    uniform: Step | None
    exact_seconds: float
    bound: str
    max_error: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> LayerSettings:
        """For ``sb.replace_attention(model, layers=...)``."""
        return LayerSettings(self.chosen.pairs, self.about)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes the YAML file that :func:`scatterbrain.replace_attention` takes. Needs PyYAML."""
        self.settings.save(file)

    def draw(self, file: str | os.PathLike[str]) -> None:
        """A picture of the path: error against time. Needs matplotlib."""
        from scatterbrain.analysis.pictures import draw_tuning

        draw_tuning(self, Path(file))

    def __str__(self) -> str:
        from scatterbrain.analysis.tables import tuning_table

        return tuning_table(self)


# -------------------- tuning


def tune(
    model: nn.Module,
    batches: Sequence[Batch],
    max_error: float | None = None,
    budget: float | None = None,
    output: Callable[[Any], Tensor] | None = None,
    candidates: Sequence[Pair] | None = None,
    times: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Tuning:
    """Chooses for every attention layer the cheapest of exact attention, windows and routed lists with a low-rank
    kernel, such that the model's output stays within ``max_error``, or attention within ``budget``.

    Error and time of every candidate are measured in every layer, on the first batches. Where ``Routed`` comes with
    several numbers of keys, heads get their own: more where they take more of the error. Those on the lower convex hull
    of squared error over time then run in the model, one layer at a time. Layers' squared errors of the output are
    taken to add up, which gives a list of combinations, a few that are predicted to err least for every step of time.
    From its fast end on they run in the model, and the first that keeps the bound is chosen, on the batches held out
    too, unless a single pair for all layers keeps it and is faster. The list is the same for every bound, so a looser
    one never costs more.

    Args:
        model: any model that :func:`scatterbrain.replace_attention` takes. It is left as it was; what
            torch.compile made of it does not run.
        batches: two or more, as for :func:`scatterbrain.compare`. The second half is held out for judging. Statistics
            of ``Quadratic`` are fitted on the first. What the model draws with torch's random numbers is the same in
            every run of a batch, and every run gets its own copy of caches.
        max_error: largest ||y - y*|| / ||y*|| of the model's output against that with exact attention, the mean over
            batch rows, on the batches of either half. Of outputs by token, (rows, tokens, ...), those of padding do not
            count, nor do values that the model fills in: -inf, or the least number of a type.
        budget: largest time of all attention, as a share of exact attention's. Where nothing is as fast, the fastest
            combination is returned, and its ``bound`` says so.
        output: of what the model returns, the tensor (rows, ...) that errors are of; default ``last_hidden_state``,
            ``logits`` or the tensor itself.
        candidates: pairs to choose from besides exact attention. Default windows of 64 and 128 keys and ``Routed`` with
            48 to 192 keys, each with ``Centroid`` of 32 to 128 clusters; in causal layers windows of 32 to 256 keys
            with 4 sinks, windows with routed keys, and keys per query, with ``Quadratic``. In a decoder's
            cross-attention they become lists of single queries with ``Quadratic`` before they are measured.
        times: JSON file of measured times, read and added to, so that the same machine decides the same again; default
            ``scatterbrain/times.json`` in the user's cache folder (XDG_CACHE_HOME, ~/.cache).
        progress: called with what is done next.

    Returns:
        :class:`Tuning`, with the settings, the path and the best single pair for comparison.

    Raises:
        TypeError, ValueError: naming the argument; no attention that is known; a model that does not return the same
            for the same batch.
    """
    for name, value in (("max_error", max_error), ("budget", budget)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(f"tune: {name} must be a positive number, got {value!r}")
    if (max_error is None) == (budget is None):
        raise ValueError("tune: give either max_error or budget, the bound to keep")
    if not isinstance(batches, Sequence) or isinstance(batches, (str, bytes)) or len(batches) < 2:
        is_list = isinstance(batches, Sequence) and not isinstance(batches, (str, bytes))
        raise ValueError(
            "tune: batches must be a list of two or more, of which the second half judges the choice, got "
            f"{f'a list of {len(batches)}' if is_list else type(batches).__name__}"
        )
    if candidates is not None:
        checked_pairs(candidates)
    model = uncompiled(model)
    half = (len(batches) + 1) // 2
    search = _Search(
        model, batches[:half], batches[half:], output or output_of, candidates, Times(times, medians), progress
    )
    chosen = search.within(budget) if max_error is None else search.keeping(max_error)
    uniform = search.best_uniform(max_error if budget is None else chosen.error)
    # Predictions err, and so a single pair may be better. The fastest that keeps a looser bound is no slower either.
    if uniform is not None and uniform.seconds < chosen.seconds:
        search.measured.append(chosen := uniform)
    steps = sorted([search.first, *search.measured], key=lambda step: -step.seconds)
    bound = f"error at most {max_error:g}" if budget is None else f"at most {budget:g} of exact attention's time"
    if budget is not None and chosen.seconds > budget * search.exact_seconds:
        bound += f"; nothing is, the fastest takes {chosen.seconds / search.exact_seconds:.3g} of it"
    about = {
        "scatterbrain": __version__,
        "model": type(model).__name__,
        "bound": bound,
        "error": float(f"{chosen.error:.3g}"),
    }
    name = type(model).__name__
    return Tuning(name, chosen, steps, uniform, search.exact_seconds, bound, max_error, about, search.left)


def checked_pairs(candidates: object) -> None:
    """
    Raises:
        TypeError, ValueError: anything but a list of pairs, or a pair that does not fit together.
    """
    if not isinstance(candidates, Sequence) or isinstance(candidates, (str, bytes)) or not candidates:
        raise TypeError(
            f"tune: candidates must be a list of pairs (support, low-rank kernel), got {type(candidates).__name__}"
        )
    for pair in candidates:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"tune: candidates: expected pairs (support, low-rank kernel), got {pair!r}")
        check_pair(*pair, is_causal=False)


class _Search:
    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        held_out: Sequence[Batch],
        output: Callable[[Any], Tensor],
        candidates: Sequence[Pair] | None,
        times: Times,
        progress: Callable[[str], None],
    ) -> None:
        self.model, self.output, self.times, self.progress = model, output, times, progress
        self.batches, self.held_out = list(batches), list(held_out)
        progress("exact attention")
        everything = *self.batches, *self.held_out
        # What a model draws is part of the batch: the same in every run of it.
        self.seeds = {id(batch): seed for seed, batch in enumerate(everything)}
        seen = [recorded(model, batch, seed=self.seeds[id(batch)]) for batch in self.batches[:FEW]]
        self.left = seen[0].left
        self.calls = [_by_path(of_batch.calls) for of_batch in seen]
        self.fit_on = self.calls[0]
        self.layers = list(self.fit_on)
        self.exact: dict[int, Tensor] = {}  # outputs in the model's own type: float64 ones of a vocabulary are large
        self.padded: dict[int, Tensor | None] = {}
        for batch in everything:
            masks: list[Tensor] = []
            out = self.exact[id(batch)] = self._run({}, batch, masks).clone()  # not a part of something larger
            self.padded[id(batch)] = _padded(out, masks)
            _check_numbers(out, self.padded[id(batch)])
        self._check_repeats()
        self.seconds: dict[str, dict[Pair, float]] = {}
        self.fronts: dict[str, list[Pair]] = {}
        self.attention_error: dict[str, dict[Pair, float]] = {}
        self.runs_as: dict[str, dict[Pair, Pair]] = {}  # by path: what candidates are there
        for path in self.layers:
            progress(f"{path}: candidates")
            self._measure(path, candidates)
        self.exact_seconds = sum(self.seconds[path][EXACT] for path in self.layers)
        self.first = Step(dict.fromkeys(self.layers, EXACT), self.exact_seconds, 0.0, 0.0)
        self.measured: list[Step] = []

    # -------------------- measuring

    @torch.no_grad()
    def _measure(self, path: str, candidates: Sequence[Pair] | None) -> None:
        """Error and time of every candidate in one layer, and which of them nothing beats in both."""
        calls = [call for of_batch in self.calls for call in of_batch.get(path, ())][:FEW]
        first, targets = calls[0], [exact(call) for call in calls]
        if candidates is None:
            candidates = causal_candidates(first.query.shape[3]) if first.is_causal else bidirectional_candidates()
        refusals: list[Exception] = []
        runs_as = self.runs_as[path] = {EXACT: EXACT}
        for pair in map(tuple, candidates):
            try:
                runs_as[pair] = pair_that_runs(first, pair)
            except NotReplaceable as refusal:
                refusals.append(refusal)
        squares: dict[Pair, Tensor] = {EXACT: torch.zeros(first.query.shape[1], dtype=torch.float64)}
        fit_on = self.fit_on[path][0]
        alike: dict[str, list[LayerCall]] = {}  # calls of one forward pass whose times are the same
        for call in self.calls[0][path]:
            alike.setdefault(self.times.key(call, EXACT), []).append(call)
        seconds: dict[Pair, float] = {}

        def measure(pairs: Sequence[Pair]) -> None:
            timed: dict[Pair, list[Callable[[], object]]] = {}
            for pair in pairs:
                try:
                    timed_runs = [attention_of(call, pair, fit_on).whole for call, *_ in alike.values()]
                    runs = [attention_of(call, pair, fit_on) for call in calls]
                    shares = [_squares(run.call, run.out(), target) for run, target in zip(runs, targets)]
                except (ValueError, NotReplaceable) as refusal:
                    refusals.append(refusal)
                    continue
                squares[pair], timed[pair] = sum(shares) / len(shares), timed_runs
            found = dict.fromkeys((EXACT, *timed), 0.0)
            for number, (call, *others) in enumerate(alike.values()):
                of_one = self.times.of(call, {pair: of_kinds[number] for pair, of_kinds in timed.items()})
                found = {pair: sum_ + (1 + len(others)) * of_one[pair] for pair, sum_ in found.items()}
            seconds.update(found)

        measure([pair for pair in dict.fromkeys(runs_as.values()) if pair != EXACT])
        if len(squares) == 1 and refusals:
            reasons = dict.fromkeys(" ".join(str(refusal).split()) for refusal in refusals)
            self.left[path] = f"it stays exact, since no candidate runs there: {'; '.join(reasons)}"
        measure(by_head(seconds, squares))
        self.seconds[path] = {pair: seconds[pair] for pair in squares}
        self.attention_error[path] = {pair: float(of_heads.sum()) ** 0.5 for pair, of_heads in squares.items()}
        self.fronts[path] = hull(self.seconds[path], self.attention_error[path])

    def _run(self, pairs: Mapping[str, Pair], batch: Batch, masks: list[Tensor] | None = None) -> Tensor:
        with assigned(self.model, pairs, self.fit_on, masks):
            out = self.output(run(self.model, batch, self.seeds[id(batch)]))
        if not isinstance(out, Tensor) or out.dim() == 0:
            got = "a single number, such as a loss" if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"tune: output must return a tensor (rows, ...), got {got}; give output=, which takes one")
        return out

    def _check_repeats(self) -> None:
        """Raises ValueError for a model that is no function of its batch: what approximations change cannot be told
        from what changes by itself."""
        key, again = id(self.batches[0]), self._run({}, self.batches[0])
        first = self.exact[key]
        differ = "of another shape"
        if first.shape == again.shape:
            error = max(_row_errors(again, first, self.padded[key]))
            if not error > ROUNDING.get(first.dtype, 0.01):
                return
            differ = f"that differ by {error:.3g} of their norm"
        raise ValueError(
            f"tune: expected a model that returns the same when it runs on a batch again, got outputs {differ}, with "
            "exact attention both times; something is kept from run to run, or drawn by another generator than "
            "torch's: give it as an argument (noise, a mask), or let the batch be a function of the model that resets "
            "it"
        )

    def _error(self, pairs: Mapping[str, Pair], batches: Sequence[Batch]) -> float:
        """Mean over the rows of all batches; infinite where an output is no number."""
        errors = []
        for batch in batches:
            errors += _row_errors(self._run(pairs, batch), self.exact[id(batch)], self.padded[id(batch)])
        mean = sum(errors) / len(errors)
        return float("inf") if mean != mean else mean

    # -------------------- combinations

    def keeping(self, max_error: float) -> Step:
        """The first combination from the fast end on whose output errs at most that much."""
        for number, (pairs, square) in enumerate(self.combinations()):
            if square > (SLACK * max_error) ** 2:
                continue
            error = self._error(pairs, self.batches[:FEW])
            self.progress(f"combination {number + 1}: {self._share(pairs):.3f} of the time, error {error:.4f}")
            if error <= NEAR * max_error:
                step = self._measured_step(pairs)
                if step.error <= max_error:
                    return step
        return self.first

    def within(self, budget: float) -> Step:
        """What is predicted to err least within that share of exact attention's time, or the fastest."""
        combinations = self.combinations()
        fitting = [(square, pairs) for pairs, square in combinations if self._share(pairs) <= budget]
        best = min(fitting, key=lambda found: found[0])[1] if fitting else combinations[0][0]
        return self._measured_step(best)

    def combinations(self) -> list[tuple[dict[str, Pair], float]]:
        """Pairs of all layers and their predicted squared error, from the fastest on: of every step of time some of the
        best, since predictions err, as far as nothing faster is predicted to err less by more than they do."""
        squares = self._squares()
        kept: list[Combination] = [(0.0, 0.0, ())]
        for path in self.layers:
            grown = [
                (seconds + self.seconds[path][pair], square + own, (*pairs, pair))
                for seconds, square, pairs in kept
                for pair, own in squares[path].items()
            ]
            kept = best_of_every_step(grown, APART * self.exact_seconds / len(self.layers))
        kept = best_of_every_step(kept, APART * self.exact_seconds)
        return [(dict(zip(self.layers, pairs)), square) for _, square, pairs in kept]

    def _squares(self) -> dict[str, dict[Pair, float]]:
        """Squared error of the model's output with one layer's pair alone."""
        squares: dict[str, dict[Pair, float]] = {}
        for path in self.layers:
            self.progress(f"{path}: {len(self.fronts[path]) - 1} pairs in the model")
            squares[path] = {
                pair: 0.0 if pair is EXACT else self._error({path: pair}, self.batches[:FEW]) ** 2
                for pair in self.fronts[path]
            }
        return squares

    def _share(self, pairs: Mapping[str, Pair]) -> float:
        return self._seconds_of(pairs) / self.exact_seconds

    def _measured_step(self, pairs: dict[str, Pair]) -> Step:
        self.measured.append(self._step(pairs))
        return self.measured[-1]

    def _seconds_of(self, pairs: Mapping[str, Pair]) -> float:
        return sum(self.seconds[path][pair] for path, pair in pairs.items())

    def _step(self, pairs: dict[str, Pair]) -> Step:
        seconds = self._seconds_of(pairs)
        judged, held_out = (self._error(pairs, some) for some in (self.batches, self.held_out))
        return Step(dict(pairs), seconds, max(judged, held_out), held_out)

    def best_uniform(self, max_error: float) -> Step | None:
        """The fastest pair for all layers whose error is at most that, of those that nothing beats in the time and the
        error of attention."""
        first, *others = (self._everywhere(path) for path in self.layers)
        common = {
            pair: [first[pair], *(of[pair] for of in others)] for pair in first if all(pair in of for of in others)
        }
        places = {pair: list(zip(self.layers, runs)) for pair, runs in common.items()}
        seconds = {pair: sum(self.seconds[path][run] for path, run in runs) for pair, runs in places.items()}
        errors = {
            pair: sum(self.attention_error[path][run] ** 2 for path, run in runs) for pair, runs in places.items()
        }
        for pair in reversed(front(seconds, errors)):
            self.progress(f"one pair for all layers: {pair[0]}, {pair[1]}")
            step = self._step(dict(places[pair]))
            if step.error <= max_error:
                return step
        return None

    def _everywhere(self, path: str) -> dict[Pair, Pair]:
        """What pairs run as in one layer: those that were measured themselves, and candidates that are others there."""
        measured = self.seconds[path]
        return {pair: pair for pair in measured} | {p: run for p, run in self.runs_as[path].items() if run in measured}


def _squares(call: LayerCall, out: Tensor, target: Exact) -> Tensor:
    """Squared errors of the heads (Hq,), as shares of the squared norm of all of exact attention's output."""
    lost, whole = (t.double().square().sum(0) for t in norms_of(call, out, target, call.valid_queries()))
    return (lost / whole.sum().clamp(min=1e-300)).cpu()


def _by_path(calls: Sequence[LayerCall]) -> dict[str, list[LayerCall]]:
    found: dict[str, list[LayerCall]] = {}
    for call in calls:
        found.setdefault(call.path, []).append(call)
    return found


def _row_errors(out: Tensor, target: Tensor, padded: Tensor | None = None) -> list[float]:
    """||y - y*|| / ||y*|| of every row, of what counts: what a model computes where its inputs are padding is nothing
    that anybody reads, and what it fills in, such as -inf for words that cannot be, would outweigh all the rest. In
    float64, a part at a time: outputs over a vocabulary are large."""
    if out.shape != target.shape:
        raise ValueError(
            f"tune: expected outputs of one shape whatever the model's attention is, got {tuple(out.shape)} and "
            f"{tuple(target.shape)}; give output=, which takes a tensor whose shape the inputs decide"
        )
    lost, whole = (torch.zeros(len(target), dtype=torch.float64, device=target.device) for _ in range(2))
    for rows, y, want, ignored in _parts(out, target, padded):
        difference = y - want
        if ignored is not None:
            difference, want = (t.masked_fill(ignored, 0) for t in (difference, want))
        for sums, t in ((lost, difference), (whole, want)):
            sums[rows] += t.square().reshape(len(t), -1).sum(1)
    return (lost.sqrt() / whole.sqrt().clamp(min=1e-300)).tolist()


def _parts(out: Tensor, target: Tensor, padded: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Rows together or a part of one, at most PART numbers at a time where one token has no more: which rows, both in
    float64, and what of them does not count."""
    length = target.shape[1] if target.dim() > 1 else 1
    of_row = max(target.numel() // max(len(target), 1), 1)
    count, tokens = max(1, PART // of_row), max(1, PART * length // of_row)
    for rows in (slice(i, i + count) for i in range(0, len(target), count)):
        for i in range(0, length, tokens):
            place = (rows, slice(i, i + tokens)) if target.dim() > 1 else rows
            y, want = (t[place].to(target.device).double() for t in (out, target))
            ignored = None if padded is None else padded[place].to(target.device)
            if (want <= -FILLS[0]).any():  # also beside NaN, which padding may be
                filled = sum((want == -fill for fill in FILLS), torch.zeros_like(want, dtype=torch.bool))
                ignored = filled if ignored is None else filled | ignored
            yield rows, y, want, ignored


def _check_numbers(out: Tensor, padded: Tensor | None) -> None:
    """Raises ValueError for an exact output of which nothing counts, or something is no number."""
    counts = False
    for _, _, values, ignored in _parts(out, out, padded):
        values = values if ignored is None else values[~ignored.expand(values.shape)]
        counts = counts or values.numel() > 0
        if not values.isfinite().all():
            raise ValueError(
                "tune: expected outputs that are numbers with exact attention, got NaN or infinity; mend the "
                "inputs, or give output=, which takes a tensor without them"
            )
    if not counts:
        raise ValueError(
            "tune: expected outputs with numbers that count, got padding and filled-in values alone (-inf, or the "
            "least number of a type); give output=, which takes a tensor that has some"
        )


def _padded(out: Tensor, masks: Sequence[Tensor]) -> Tensor | None:
    """Where a model's output (B, N, ...) is that of padding, (B, N, 1, ...): by the last layer with as many tokens.
    None where none is, or the output is not by token."""
    if out.dim() < 3:
        return None
    mask = next((~mask for mask in reversed(masks) if mask.shape == out.shape[:2]), None)
    return None if mask is None or not mask.any() else mask[(..., *[None] * (out.dim() - 2))]


def output_of(returned: Any) -> Tensor:
    """What a model computes: ``last_hidden_state``, ``logits``, the first of a sequence, or the tensor itself."""
    for name in ("last_hidden_state", "logits"):
        if isinstance(getattr(returned, name, None), Tensor):
            return getattr(returned, name)
    if isinstance(returned, (tuple, list)) and returned and isinstance(returned[0], Tensor):
        return returned[0]
    if isinstance(returned, Tensor):
        return returned
    raise TypeError(
        f"tune: expected the model to return a tensor, last_hidden_state or logits, got {type(returned).__name__}; "
        "give output=, a function that takes the tensor out of it"
    )


@contextmanager
def assigned(
    model: nn.Module,
    pairs: Mapping[str, Pair],
    fit_on: Mapping[str, Sequence[LayerCall]],
    masks: list[Tensor] | None = None,
) -> Iterator[None]:
    """Inside, layers run with the pairs of their paths, the others exactly. ``masks`` gets which tokens count in their
    calls, (B, N); not of a decoder's cross-attention, which is not told of padded queries."""

    def attend(call: LayerCall, return_lse: bool) -> Any:
        if masks is not None and not call.is_query_by_query:
            masks.append(call.valid_queries())
        pair = pairs.get(call.path, EXACT)
        if pair[0].is_full:
            return call.attention(*EXACT, return_lse=return_lse)
        return attention_of(call, pair, fit_on[call.path][0]).whole(return_lse=return_lse)

    with stand_in(model, attend):
        yield
