"""Comparisons as pictures. Needs matplotlib, whose windows and backend stay as the user has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scatterbrain.analysis.output_files import PICTURE
from scatterbrain.analysis.tables import short_labels

if TYPE_CHECKING:
    from scatterbrain.analysis.comparison import Comparison, LayerComparison
    from scatterbrain.analysis.tuning import Tuning

LEAST = 1e-4  # errors below are those of rounding


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Three panels over the layers, those of one kind beside each other: error of every configuration, how much of the
    softmax weights lies in its lists, and entropy. Bands reach from the lowest to the highest head group."""
    from matplotlib.figure import Figure

    kinds = kinds_of(comparison.layers)
    labels = [label for kind in kinds.values() for label in short_labels([layer.path for layer in kind])]
    figure = Figure(figsize=(max(7.0, 2.5 + 0.45 * len(labels)), 9), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.5))
    error, weight, entropy = axes
    begin = 0
    for number, (name, layers) in enumerate(kinds.items()):
        xs = range(begin, begin + len(layers))
        _draw_kind(axes, comparison, layers, xs)
        uniform = [layer.uniform_entropy for layer in layers]
        entropy.plot(xs, uniform, ":", color="grey", marker="_", label="all keys alike" if number == 0 else None)
        if len(kinds) > 1:
            where = begin + (len(layers) - 1) / 2, 0.02
            error.text(*where, name, transform=error.get_xaxis_transform(), ha="center", fontsize=7, rotation=8)
        if number:
            for axis in axes:
                axis.axvline(begin - 0.5, color="black", lw=0.8)
        begin += len(layers)
    title = f"{comparison.model}: mean error, and times faster than exact attention"
    error.set_title(f"{title}\nline: mean over head groups; band: lowest to highest of them", fontsize=10)
    low, high = error.get_ylim()
    error.set(yscale="log", ylabel="error against exact attention", ylim=(max(low, LEAST), high))
    weight.set(ylabel="share of the softmax\nweights in the lists", ylim=(0, 1.02))
    entropy.set(xlabel="layer", ylabel="entropy, nats", ylim=(0, None))
    entropy.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels)) > 3 else 0, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*_once(error), fontsize=8, ncols=2, loc="outside lower center")
    entropy.legend(*_once(entropy), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png", metadata=PICTURE)


def draw_tuning(tuning: Tuning, path: Path) -> None:
    """Error of the model's output over the time of its attention, of what was measured on all batches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    steps = tuning.steps[1:]
    share = [step.seconds / tuning.exact_seconds for step in steps]
    axis.plot(share, [step.error for step in steps], ".", color="C0", label="layer by layer, all that was measured")
    chosen = tuning.chosen
    if chosen.error > 0:
        axis.plot(chosen.seconds / tuning.exact_seconds, chosen.error, "o", color="C3", ms=9, label="chosen")
    if tuning.uniform is not None and tuning.uniform.error > 0:
        where = tuning.uniform.seconds / tuning.exact_seconds, tuning.uniform.error
        axis.plot(*where, "s", color="black", label="best pair for all layers")
    if tuning.max_error is not None:
        axis.axhline(tuning.max_error, color="grey", lw=0.8, ls=":", label="the bound")
    axis.set(xlabel="time of attention, share of exact attention's", ylabel="error of the output", ylim=(0, None))
    axis.set_title(f"{tuning.model}: {tuning.bound}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png", metadata=PICTURE)


def kinds_of(layers: Sequence[LayerComparison]) -> dict[str, list[LayerComparison]]:
    """Layers whose paths differ in numbers alone and that are causal or not, by the path with stars for numbers."""
    kinds: dict[str, list[LayerComparison]] = {}
    for layer in layers:
        pattern = re.sub(r"\d+", "*", layer.path)
        kinds.setdefault(f"{pattern}{', causal' if layer.is_causal else ''}", []).append(layer)
    return kinds


def _draw_kind(axes: Any, comparison: Comparison, layers: list[LayerComparison], xs: range) -> None:
    error, weight, entropy = axes
    for i, name in enumerate(comparison.configurations()):
        found = [layer.figures.get(name) for layer in layers]
        if any(figures is None or figures.note for figures in found):
            continue
        label = f"{name}: {comparison.error(name):.3f}, {comparison.times_faster(name):.1f}x"
        _band(error, xs, [figures.error for figures in found], f"C{i}", label)
        _band(weight, xs, [figures.in_lists for figures in found], f"C{i}", name, shade=False)
    _band(entropy, xs, [layer.entropy for layer in layers], "black", "softmax weights")


def _band(axis: Any, xs: range, groups: list[list[float]], colour: str, label: str, shade: bool = True) -> None:
    axis.plot(xs, [sum(v) / len(v) for v in groups], marker="o", markersize=3, color=colour, label=label)
    if shade:
        axis.fill_between(xs, [min(v) for v in groups], [max(v) for v in groups], color=colour, alpha=0.12, lw=0)


def _once(axis: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels, each label once."""
    found = {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    return list(found.values()), list(found)
