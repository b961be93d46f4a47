"""The cheapest support and low-rank kernel for every layer of a model that keep its outputs within a bound."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain import presets
from scatterbrain.analysis.captured import Batch, LayerCall, calls_of, run, stand_in
from scatterbrain.analysis.comparison import Pair, attention_of, errors_of, medians
from scatterbrain.analysis.exact import by_torch, exact
from scatterbrain.integrations.restrictions import NotReplaceable
from scatterbrain.layer_settings import LayerSettings
from scatterbrain.low_rank import Centroid, Quadratic
from scatterbrain.supports import Full, Routed, Window
from scatterbrain.version import __version__

EXACT: Pair = (Full(), None)
FEW = 2  # batches that single layers are measured on
TRIED = 3  # of the best moves that are measured with all layers together before one is made
BEYOND = 1.5  # the path is followed up to so many times the largest error, to show where it goes
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
    kernel = Quadratic(min(presets.causal()[1].rank, head_dim))
    windows = [(Window(keys, sinks=4), kernel) for keys in (32, 64, 96, 128, 192, 256)]
    mixed = [(Routed(keys + keys // 2, block_q=16, window=keys), kernel) for keys in (64, 128)]
    per_query = [(Routed(keys, block_q=1, block_k=8, window=16), kernel) for keys in (64, 128)]
    return [*windows, *mixed, *per_query]


# -------------------- results


@dataclass(frozen=True)
class Step:
    """A point of the trade between error and time: the pairs of all layers.

    Args:
        pairs: by layer.
        seconds: of all attention, one forward pass of a tuning batch.
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
        steps: the path from exact attention towards the cheapest pairs, up to somewhat behind the bound; a looser bound
            goes further on it.
        uniform: the fastest single pair for all layers that keeps the bound, if one does.
        exact_seconds: of all attention, exact.
        bound: in words.
    """

    model: str
    chosen: Step
    steps: list[Step]
    uniform: Step | None
    exact_seconds: float
    bound: str
    about: dict[str, Any] = field(default_factory=dict)

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

    Error and time of every candidate are measured in every layer, on the first batches. Those on the lower convex hull
    of squared error over time then run in the model, one layer at a time, and from exact attention on the move with the
    most time saved per squared error added is made again and again; of the three that look best the one that is, with
    all layers together. That gives one path from exact to cheapest, whose errors are measured on all batches. The bound
    only says where on the path to stop, so a looser one never costs more.

    Args:
        model: any model that :func:`scatterbrain.replace_attention` takes. It is left as it was.
        batches: two or more, as for :func:`scatterbrain.compare`. The second half is held out for judging. Statistics
            of ``Quadratic`` are fitted on the first.
        max_error: largest ||y - y*|| / ||y*|| of the model's output against that with exact attention, the mean over
            batch rows, on the batches of either half.
        budget: largest time of all attention, as a share of exact attention's.
        output: of what the model returns, the tensor (rows, ...) that errors are of; default ``last_hidden_state``,
            ``logits`` or the tensor itself.
        candidates: pairs to choose from besides exact attention; default those of this module's docstring.
        times: JSON file of measured times, read and added to, so that the same machine decides the same again; default
            ``scatterbrain/times.json`` in the user's cache folder (XDG_CACHE_HOME, ~/.cache).
        progress: called with what is done next.

    Returns:
        :class:`Tuning`, with the settings, the path and the best single pair for comparison.

    Raises:
        TypeError, ValueError: naming the argument; no attention that is known.
    """
    for name, value in (("max_error", max_error), ("budget", budget)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(f"tune: {name} must be a positive number, got {value!r}")
    if (max_error is None) == (budget is None):
        raise ValueError("tune: give either max_error or budget, the bound to keep")
    if not isinstance(batches, Sequence) or isinstance(batches, (str, bytes)) or len(batches) < 2:
        raise ValueError("tune: batches must be a list of two or more, of which the second half judges the choice")
    half = (len(batches) + 1) // 2
    search = _Search(model, batches[:half], batches[half:], output or output_of, candidates, _Times(times), progress)
    seconds = None if budget is None else budget * search.exact_seconds
    steps = search.path(lambda step: step.error > BEYOND * max_error if seconds is None else step.seconds <= seconds)
    bound = f"error at most {max_error:g}" if budget is None else f"at most {budget:g} of exact attention's time"
    chosen = _chosen(steps, max_error, budget, search.exact_seconds)
    uniform = search.best_uniform(max_error if budget is None else chosen.error)
    about = {
        "scatterbrain": __version__,
        "model": type(model).__name__,
        "bound": bound,
        "error": float(f"{chosen.error:.3g}"),
    }
    return Tuning(type(model).__name__, chosen, steps, uniform, search.exact_seconds, bound, about)


def _chosen(steps: list[Step], max_error: float | None, budget: float | None, exact_seconds: float) -> Step:
    """The last step before the first that breaks the bound on errors; the first within the budget."""
    if budget is not None:
        return next((step for step in steps if step.seconds <= budget * exact_seconds), steps[-1])
    kept = steps[0]
    for step in steps:
        if step.error > max_error:
            break
        kept = step
    return kept


class _Search:
    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        held_out: Sequence[Batch],
        output: Callable[[Any], Tensor],
        candidates: Sequence[Pair] | None,
        times: _Times,
        progress: Callable[[str], None],
    ) -> None:
        self.model, self.output, self.times, self.progress = model, output, times, progress
        self.batches, self.held_out = list(batches), list(held_out)
        progress("exact attention")
        self.calls = [_by_path(calls_of(model, batch)) for batch in self.batches[:FEW]]
        self.fit_on = self.calls[0]
        self.layers = list(self.fit_on)
        self.exact = {id(batch): self._run({}, batch) for batch in (*self.batches, *self.held_out)}
        self.seconds: dict[str, dict[Pair, float]] = {}
        self.fronts: dict[str, list[Pair]] = {}
        self.attention_error: dict[str, dict[Pair, float]] = {}
        for path in self.layers:
            progress(f"{path}: candidates")
            self._measure(path, candidates)
        self.exact_seconds = sum(self.seconds[path][EXACT] for path in self.layers)

    # -------------------- measuring

    @torch.no_grad()
    def _measure(self, path: str, candidates: Sequence[Pair] | None) -> None:
        """Error and time of every candidate in one layer, and which of them nothing beats in both."""
        calls = [call for of_batch in self.calls for call in of_batch.get(path, ())][:FEW]
        first = calls[0]
        if candidates is None:
            candidates = causal_candidates(first.query.shape[3]) if first.is_causal else bidirectional_candidates()
        errors: dict[Pair, list[float]] = {EXACT: [0.0]}
        timed: dict[Pair, Callable[[], object]] = {EXACT: by_torch(first)}
        for call in calls:
            target = exact(call)
            valid = call.valid_queries()
            for pair in candidates:
                try:
                    of_call = attention_of(call, pair, self.fit_on[path][0])
                    found = errors_of(call, of_call.out(), target, valid)
                except (ValueError, NotReplaceable):
                    continue
                errors.setdefault(pair, []).append(float(found.mean()))
                timed.setdefault(pair, of_call.out)
        self.seconds[path] = self.times.of(first, timed)
        self.attention_error[path] = {pair: sum(some) / len(some) for pair, some in errors.items()}
        self.fronts[path] = _hull(self.seconds[path], self.attention_error[path])

    def _run(self, pairs: Mapping[str, Pair], batch: Batch) -> Tensor:
        with assigned(self.model, pairs, self.fit_on):
            out = self.output(run(self.model, batch))
        if not isinstance(out, Tensor) or out.dim() == 0:
            raise TypeError(f"tune: output must return a tensor (rows, ...), got {type(out).__name__}")
        return out.double()

    def _error(self, pairs: Mapping[str, Pair], batches: Sequence[Batch]) -> float:
        """Mean over the rows of all batches."""
        errors = []
        for batch in batches:
            target = self.exact[id(batch)]
            lost = (self._run(pairs, batch) - target).flatten(1).norm(dim=1)
            errors.append(lost / target.flatten(1).norm(dim=1).clamp(min=1e-300))
        return float(torch.cat(errors).mean())

    # -------------------- the path

    def path(self, is_far: Callable[[Step], bool]) -> list[Step]:
        """From exact attention towards the cheapest pairs, up to the first step that ``is_far``."""
        squares: dict[str, dict[Pair, float]] = {}
        for path in self.layers:
            self.progress(f"{path}: {len(self.fronts[path]) - 1} pairs in the model")
            squares[path] = {EXACT: 0.0} | {
                pair: self._error({path: pair}, self.batches[:FEW]) ** 2
                for pair in self.fronts[path]
                if pair is not EXACT
            }
        pairs = dict.fromkeys(self.layers, EXACT)
        steps = [self._step(pairs)]
        while not is_far(steps[-1]) and (moves := self._moves(pairs, squares)):
            self.progress(f"step {len(steps)}, {steps[-1].error:.4f}")
            pairs = self._best(pairs, moves[:TRIED])
            steps.append(self._step(pairs))
        return steps

    def _best(self, pairs: dict[str, Pair], moves: list[tuple[float, str, Pair]]) -> dict[str, Pair]:
        """Of some moves the one with the most time saved per squared error that it adds with all layers together: the
        errors of two layers may add up or cancel."""
        if len(moves) == 1:
            return pairs | {moves[0][1]: moves[0][2]}
        now = self._error(pairs, self.batches[:FEW]) ** 2
        rates = []
        for _, path, pair in moves:
            added = self._error(pairs | {path: pair}, self.batches[:FEW]) ** 2 - now
            rates.append((self.seconds[path][pairs[path]] - self.seconds[path][pair]) / max(added, 1e-12))
        _, path, pair = moves[rates.index(max(rates))]
        return pairs | {path: pair}

    def _moves(self, pairs: dict[str, Pair], squares: dict[str, dict[Pair, float]]) -> list[tuple[float, str, Pair]]:
        """(seconds saved per squared error that the layer adds alone, layer, pair), the best first; one of a layer."""
        best = []
        for path, now in pairs.items():
            of_layer = [
                (saved / max(square - squares[path][now], 1e-12), path, pair)
                for pair, square in squares[path].items()
                if (saved := self.seconds[path][now] - self.seconds[path][pair]) > 0
            ]
            best += [max(of_layer, key=lambda move: move[0])] if of_layer else []
        return sorted(best, key=lambda move: (-move[0], self.layers.index(move[1])))

    def _step(self, pairs: dict[str, Pair]) -> Step:
        seconds = sum(self.seconds[path][pair] for path, pair in pairs.items())
        judged, held_out = (self._error(pairs, some) for some in (self.batches, self.held_out))
        return Step(dict(pairs), seconds, max(judged, held_out), held_out)

    def best_uniform(self, max_error: float) -> Step | None:
        """The fastest pair for all layers whose error is at most that, of those that nothing beats in the time and the
        error of attention."""
        measured = [self.seconds[path] for path in self.layers]
        common = [pair for pair in measured[0] if all(pair in of_layer for of_layer in measured)]
        seconds = {pair: sum(of_layer[pair] for of_layer in measured) for pair in common}
        errors = {pair: sum(self.attention_error[path][pair] ** 2 for path in self.layers) for pair in common}
        for pair in reversed(_front(seconds, errors)):
            self.progress(f"one pair for all layers: {pair[0]}, {pair[1]}")
            step = self._step(dict.fromkeys(self.layers, pair))
            if step.error <= max_error:
                return step
        return None


def _front(seconds: Mapping[Pair, float], errors: Mapping[Pair, float]) -> list[Pair]:
    """The pairs of which no other is faster and errs less, from exact attention and the slowest on."""
    kept: list[Pair] = []
    least = float("inf")
    for pair in sorted(errors, key=lambda pair: (seconds[pair], errors[pair])):
        if errors[pair] < least:
            kept.append(pair)
            least = errors[pair]
    return [EXACT, *(pair for pair in reversed(kept) if pair != EXACT)]


def _hull(seconds: Mapping[Pair, float], errors: Mapping[Pair, float]) -> list[Pair]:
    """Of the front those on the lower convex hull of squared error over time."""
    hull: list[Pair] = []

    def rate(a: Pair, b: Pair) -> float:
        return (seconds[a] - seconds[b]) / max(errors[b] ** 2 - errors[a] ** 2, 1e-30)

    for pair in _front(seconds, errors):
        if hull and seconds[pair] >= seconds[hull[-1]]:
            continue
        while len(hull) > 1 and rate(hull[-2], hull[-1]) <= rate(hull[-1], pair):
            hull.pop()
        hull.append(pair)
    return hull


def _by_path(calls: Sequence[LayerCall]) -> dict[str, list[LayerCall]]:
    found: dict[str, list[LayerCall]] = {}
    for call in calls:
        found.setdefault(call.path, []).append(call)
    return found


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
def assigned(model: nn.Module, pairs: Mapping[str, Pair], fit_on: Mapping[str, Sequence[LayerCall]]) -> Iterator[None]:
    """Inside, layers run with the pairs of their paths, the others exactly."""

    def attend(call: LayerCall, return_lse: bool) -> Any:
        pair = pairs.get(call.path, EXACT)
        if pair[0].is_full:
            return call.attention(*EXACT, return_lse=return_lse)
        out = attention_of(call, pair, fit_on[call.path][0]).out(return_lse=True)
        first = call.exact_queries
        if first:
            rows = call.first_queries(first).attention(*EXACT, return_lse=True)
            out = tuple(torch.cat([t, o[:, :, first:]], 2) for t, o in zip(rows, out))
        return out if return_lse else out[0]

    with stand_in(model, attend):
        yield


# -------------------- times


class _Times:
    """Measured seconds, kept in a file: times that are measured twice differ, and decisions would with them."""

    def __init__(self, file: str | os.PathLike[str] | None) -> None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = folder / "scatterbrain" / "times.json" if file is None else Path(file)
        self.known: dict[str, float] = {}
        if self.path.is_file():
            try:
                self.known = json.loads(self.path.read_text())
            except ValueError as error:
                raise ValueError(f"tune: times: {self.path} is not a file of times: {error}; remove it") from None

    def of(self, call: LayerCall, timed: Mapping[Pair, Callable[[], object]], repeats: int = 5) -> dict[Pair, float]:
        """Of every pair on tensors of this shape; what the file lacks is measured and added."""
        keys = {pair: self._key(call, pair) for pair in timed}
        missing = {str(pair): timed[pair] for pair in timed if keys[pair] not in self.known}
        if missing:
            found = medians(missing, repeats)
            self.known |= {keys[pair]: found[str(pair)] for pair in timed if str(pair) in found}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            aside.write_text(json.dumps(self.known, indent=0, sort_keys=True))
            os.replace(aside, self.path)
        return {pair: self.known[keys[pair]] for pair in timed}

    def _key(self, call: LayerCall, pair: Pair) -> str:
        tensors = call.query, call.key, call.value
        machine = platform.node(), platform.processor() or platform.machine(), torch.ops.scatterbrain.instruction_set()
        facts = (
            __version__,
            torch.__version__,
            *machine,
            torch.get_num_threads(),
            [(tuple(t.shape), str(t.dtype), str(t.device)) for t in tensors],
            call.is_causal,
            call.key_padding_mask is not None,
            repr(pair),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:24] + " " + repr(pair)
