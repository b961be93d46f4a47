"""How a model's attention looks, and what configurations make of it: layer by layer, head group by head group."""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain import presets
from scatterbrain.analysis.captured import Batch, counterparts, recorded
from scatterbrain.analysis.configured import Pair, Run, attention_of, fitting
from scatterbrain.analysis.exact import Exact, by_torch, exact
from scatterbrain.analysis.layer_call import LayerCall
from scatterbrain.analysis.stand_in import uncompiled
from scatterbrain.checks import check_pair
from scatterbrain.integrations.restrictions import NotReplaceable
from scatterbrain.json_text import json_text
from scatterbrain.supports import Empty, Window
from scatterbrain.version import __version__

Configurations = Mapping[str, Pair] | Sequence[str]
"""Pairs of a support and a low-rank kernel by name, or names of methods of ``scatterbrain bench``."""

BIDIRECTIONAL: dict[str, Pair] = {
    "drop_in": presets.drop_in(),
    "quality": presets.quality(),
    "fast": presets.fast(),
    "window alone": (Window(64), None),
    "low rank alone": (Empty(), presets.drop_in()[1]),
}
CAUSAL: dict[str, Pair] = {
    "causal": presets.causal(),
    "window 64 + quadratic": (Window(64), presets.causal()[1]),
    "window alone": (presets.causal()[0], None),
    "low rank alone": (Empty(), presets.causal()[1]),
}


# -------------------- results


@dataclass(frozen=True)
class Figures:
    """Of one configuration in one layer; lists are by head group, the query heads that share a key/value head.

    Args:
        error: ||o - o*|| / ||o*|| against exact attention, mean over heads and batch rows.
        in_lists: share of the softmax weights that lies in the lists, mean over queries.
        low_rank: share of the weight of a query that the low-rank part carries, mean over queries.
        seconds: median of one forward call, with that of the first queries that the layer computes exactly.
        note: why there are no figures; "" where there are.
        ran: the pair that ran, where that is another one than asked for; "" elsewhere.
    """

    error: list[float] = field(default_factory=list)
    in_lists: list[float] = field(default_factory=list)
    low_rank: list[float] = field(default_factory=list)
    seconds: float | None = None
    note: str = ""
    ran: str = ""


@dataclass(frozen=True)
class LayerComparison:
    """One call of one layer.

    Args:
        path: of the layer in the model.
        is_causal: whether the call was causal.
        batch, queries, keys, heads, kv_heads, head_dim: sizes of the call.
        entropy: of the softmax weights in nats by head group, mean over queries; exp(entropy) keys would share the
            weight evenly.
        exact_seconds: median of torch's exact attention.
        figures: by configuration.
        is_fitted_on_itself: whether statistics were fitted on the measured tokens: without a calibration batch, or
            where this layer did not run on it.
        uniform_entropy: of weights that are all alike, mean over the same queries: the most that ``entropy`` can be.
        counted_queries, counted_keys: fewest and most of a batch row that are no padding, of the rows that have any.
    """

    path: str
    is_causal: bool
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    entropy: list[float]
    exact_seconds: float
    figures: dict[str, Figures]
    is_fitted_on_itself: bool = False
    uniform_entropy: float = 0.0
    counted_queries: tuple[int, int] = (0, 0)
    counted_keys: tuple[int, int] = (0, 0)


@dataclass
class Comparison:
    """What :func:`compare` found. ``print(comparison)`` shows tables; ``write_json`` and ``draw`` write files.

    Args:
        model: the model's class.
        fitted_on: what statistics were fitted on.
        total: calls to compare.
        layers: those that are compared, in the order of their calls.
        left: why modules that look like attention, or calls of them, are not compared, by path.
    """

    model: str
    fitted_on: str
    total: int
    layers: list[LayerComparison] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def configurations(self) -> list[str]:
        """Names, in the order given."""
        return list(dict.fromkeys(name for layer in self.layers for name in layer.figures))

    def error(self, name: str) -> float | None:
        """Mean error of a configuration over the layers that ran with it; None without any."""
        errors = [_mean(layer.figures[name].error) for layer in self._measured(name)]
        return _mean(errors) if errors else None

    def times_faster(self, name: str) -> float | None:
        """Exact attention's time over that of a configuration, over the layers that ran with it."""
        layers = self._measured(name)
        if not layers:
            return None
        return sum(layer.exact_seconds for layer in layers) / sum(layer.figures[name].seconds for layer in layers)

    def _measured(self, name: str) -> list[LayerComparison]:
        return [layer for layer in self.layers if name in layer.figures and not layer.figures[name].note]

    def facts(self) -> dict[str, object]:
        """What the figures depend on."""
        return {
            "scatterbrain": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "model": self.model,
            "statistics": self.fitted_on,
            "not_compared": self.left,
            "error": "||o - o*|| / ||o*|| of a head against exact attention, mean over heads and batch rows",
        }

    def write_json(self, file: str | os.PathLike[str]) -> None:
        """Every figure of every head group."""
        content = {"facts": self.facts(), "layers": [asdict(layer) for layer in self.layers]}
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json_text(content))

    def draw(self, file: str | os.PathLike[str]) -> None:
        """A picture: error, where the weight lies and entropy by layer. Needs matplotlib."""
        from scatterbrain.analysis.pictures import draw_comparison

        draw_comparison(self, Path(file))

    def __str__(self) -> str:
        from scatterbrain.analysis.tables import comparison_tables

        return comparison_tables(self)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -------------------- measuring


def compare(
    model: nn.Module,
    batch: Batch,
    configurations: Configurations | None = None,
    calibration: Batch | None = None,
    repeats: int = 3,
) -> Comparison:
    """Looks at a model's attention on real inputs, and at what configurations make of it.

    The model runs with exact attention, once, and once more on ``calibration``. Then every layer's own queries, keys
    and values are put through exact attention and through every configuration: how spread the softmax weights are
    (entropy), how much of them lies in the lists, how much of a query's weight the low-rank part carries, the error,
    and the time of a forward call, taken in turn. A layer whose entropy is low needs the right keys; one whose entropy
    is high needs a good low-rank part.

    Args:
        model: any model that :func:`scatterbrain.replace_attention` takes, or has replaced. It is left as it was;
            what torch.compile made of it does not run.
        batch: a tensor (``model(batch)``), a mapping (``model(**batch)``), a tuple or list (``model(*batch)``), or a
            function of the model that runs it. Attention is measured on its tokens, so give real ones. Caches in it
            are copied, and torch's random numbers go on afterwards where they were.
        configurations: pairs (support, low-rank kernel) by name, or names of methods of ``scatterbrain bench``, such
            as "routed-64+centroid". Default the presets, a window alone and the low-rank part alone.
        calibration: another batch, to fit statistics of ``Quadratic`` on; without one they are fitted on ``batch``
            itself, which flatters them.
        repeats: timed samples of each, of which the median counts.

    Returns:
        :class:`Comparison`. The cross-attention of a decoder runs with lists of single queries and a kernel that reads
        no other query, as ``replace_attention(model, support, low_rank, causal_low_rank=presets.causal()[1])`` runs it;
        ``Figures.ran`` says with what. Other calls of queries to other tokens run with the pair as it is.

    Raises:
        TypeError, ValueError: naming the argument; a model without attention that is known: what was looked at.
    """
    comparison = None
    for comparison in comparing(model, batch, configurations, calibration, repeats):
        pass
    return comparison


def comparing(
    model: nn.Module,
    batch: Batch,
    configurations: Configurations | None = None,
    calibration: Batch | None = None,
    repeats: int = 3,
) -> Iterator[Comparison]:
    """:func:`compare` step by step: the comparison so far, once the model has run and after every layer."""
    chosen = None if configurations is None else checked_configurations(configurations)
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"compare: repeats must be an int of at least 1, got {repeats!r}")
    model = uncompiled(model)
    seen = recorded(model, batch)
    calls = seen.calls
    others = calls if calibration is None else recorded(model, calibration).calls
    fitted_on = "the measured tokens themselves: errors are flattered" if calibration is None else "another batch"
    comparison = Comparison(type(model).__name__, fitted_on, len(calls), left=seen.left)
    yield comparison
    for call, other in zip(calls, counterparts(calls, others)):
        of_call = defaults(call) if chosen is None else chosen
        layer = compare_call(call, of_call, call if other is None else other, repeats)
        comparison.layers.append(replace(layer, is_fitted_on_itself=calibration is None or other is None))
        yield comparison


def defaults(call: LayerCall) -> dict[str, Pair]:
    """What a call is compared with where a user says nothing; of narrow heads with ranks that fit."""
    pairs = CAUSAL if call.is_causal else BIDIRECTIONAL
    return {name: (support, fitting(kernel, call.query.shape[3])) for name, (support, kernel) in pairs.items()}


def checked_configurations(configurations: Configurations) -> dict[str, Pair]:
    """Pairs by name.

    Raises:
        TypeError, ValueError: neither pairs nor names of methods.
    """
    if isinstance(configurations, str) or not isinstance(configurations, (Mapping, Sequence)) or not configurations:
        raise TypeError(
            "configurations must be pairs (support, low-rank kernel) by name, or names of methods such as "
            f"'routed-64+centroid', got {configurations!r}"
        )
    if isinstance(configurations, Mapping):
        for name, pair in configurations.items():
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise TypeError(f"configurations[{name!r}] must be a pair (support, low-rank kernel), got {pair!r}")
            check_pair(*pair, is_causal=False)
        return {str(name): (pair[0], pair[1]) for name, pair in configurations.items()}
    from scatterbrain.bench.methods import parse_method

    found = {}
    for name in configurations:
        method = parse_method(name)
        if method.is_baseline:
            raise ValueError(f"configurations: expected a support and a low-rank kernel, got the baseline {name!r}")
        found[name] = method.pair()
    return found


def compare_call(call: LayerCall, configurations: dict[str, Pair], fit_on: LayerCall, repeats: int) -> LayerComparison:
    """Figures of one call. ``fit_on``: the call that statistics are fitted on."""
    target = exact(call)
    valid = call.valid_queries() & (target.lse != -torch.inf).any(1)
    figures: dict[str, Figures] = {}
    timed: dict[str, Callable[[], object]] = {"": by_torch(call)}
    for name, pair in configurations.items():
        try:
            run = attention_of(call, pair, fit_on)
            figures[name], timed[name] = figures_of(call, run, target, valid), run.whole
            if run.pair != pair:
                figures[name] = replace(figures[name], ran=f"{run.support}, {run.low_rank or 'no low-rank part'}")
        except (ValueError, NotReplaceable, RuntimeError) as refusal:
            figures[name] = Figures(note=" ".join(str(refusal).split()))
    seconds = medians(timed, repeats)
    batch, heads, queries, head_dim = call.query.shape
    uniform = call.seen_keys().clamp(min=1).double().log()[:, None]
    counted = [some[valid.any(1)].sum(1).tolist() or [0] for some in (call.valid_queries(), call.valid_keys())]
    return LayerComparison(
        call.path,
        call.is_causal,
        batch,
        queries,
        call.key.shape[2],
        heads,
        call.key.shape[1],
        head_dim,
        by_group(call, mean_over_queries(target.entropy, valid)),
        seconds.pop(""),
        {name: replace(f, seconds=seconds.get(name)) for name, f in figures.items()},
        False,
        float(mean_over_queries(uniform, valid).mean()),
        *((min(counts), max(counts)) for counts in counted),
    )


def figures_of(call: LayerCall, run: Run, target: Exact, valid: Tensor) -> Figures:
    """All but the time."""
    out, lse = (t.to(target.out.dtype) for t in run.out(return_lse=True))
    listed = torch.full_like(lse, -torch.inf)
    if run.lists_keys():
        listed = call.attention(run.lists(), None, return_lse=True)[1].to(lse.dtype)
    if call.exact_queries:
        first = slice(call.exact_queries)
        listed[:, :, first] = lse[:, :, first] = target.lse[:, :, first]
    in_lists = mean_over_queries((listed - target.lse).exp().clamp(max=1.0), valid)
    others = torch.where(lse == -torch.inf, 0, (1 - (listed - lse).exp()).clamp(min=0.0))  # no weight, no share of it
    low_rank = mean_over_queries(others, valid)
    return Figures(*(by_group(call, t) for t in (errors_of(call, out, target, valid), in_lists, low_rank)))


def errors_of(call: LayerCall, out: Tensor, target: Exact, valid: Tensor) -> Tensor:
    """||o - o*|| / ||o*|| over the queries that count, of every head in the batch rows that have any: (rows, Hq). What
    is no number in one of these queries is none here."""
    lost, whole = norms_of(call, out, target, valid)
    return lost / whole.clamp(min=1e-30)


def norms_of(call: LayerCall, out: Tensor, target: Exact, valid: Tensor) -> tuple[Tensor, Tensor]:
    """||o - o*|| and ||o*|| likewise."""
    rows, ignored = valid.any(1), ~valid[:, None, :, None]
    lost = (out.to(target.out.dtype) - target.out).masked_fill(ignored, 0)
    lost[:, :, : call.exact_queries] = 0
    return tuple(t.flatten(2).norm(dim=-1)[rows] for t in (lost, target.out.masked_fill(ignored, 0)))


def mean_over_queries(values: Tensor, valid: Tensor) -> Tensor:
    """(rows that have a query that counts, Hq) of (B, Hq, N)."""
    rows, ignored = valid.any(1), ~valid[:, None]
    return (values.masked_fill(ignored, 0).sum(-1) / (~ignored).sum(-1).clamp(min=1))[rows]


def by_group(call: LayerCall, values: Tensor) -> list[float]:
    """Means over batch rows and the query heads of each key/value head, of (rows, Hq)."""
    return values.double().mean(0).unflatten(0, (call.key.shape[1], -1)).mean(1).tolist()


@torch.no_grad()
def medians(timed: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of a call of each, after calls that do not count, in another order every time. A sample is as many calls
    as take several ms. CPU time of one thread, wall time of several, events on a GPU."""
    from scatterbrain.bench.clock import calls_of_a_sample, clock_of

    samples: dict[str, list[float]] = {name: [] for name in timed}
    counts: dict[str, int] = {}
    for name, function in timed.items():
        clock = clock_of(function().device, torch.get_num_threads())
        counts[name] = calls_of_a_sample(clock, function)
    for repeat in range(repeats):
        for name in random.Random(repeat).sample(list(timed), len(timed)):
            samples[name].append(clock.seconds([timed[name]] * counts[name]) / counts[name])
    return {name: statistics.median(some) for name, some in samples.items()}
