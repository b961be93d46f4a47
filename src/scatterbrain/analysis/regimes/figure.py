"""The picture: error against temperature and against entropy, with the regimes in the background."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from scatterbrain.analysis.regimes.measure import Row
from scatterbrain.analysis.regimes.table import (
    NAMES,
    Point,
    points,
    points_by_entropy,
    settings_of,
    with_finite_errors,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {
    "sparse": {"color": "#1f77b4", "linewidth": 2.2},
    "low-rank": {"color": "#e6550d", "linewidth": 2.2},
    "combined": {"color": "#1a8a2f", "linewidth": 3.6},
    "oracle": {"color": "#222222", "linewidth": 1.4, "linestyle": "--"},
}
BANDS = {
    "sparse": ("sparse alone\nis enough", "#1f77b4"),
    "low-rank": ("low-rank alone\nis enough", "#e6550d"),
    "neither": ("neither alone\nis enough", "#555555"),
    "either": ("either alone\nis enough", "#1a8a2f"),
}
Scale = tuple[Callable[[float], float], Callable[[float], float]]  # to places along an axis, and back
LOGARITHMIC: Scale = (math.log, math.exp)
LINEAR: Scale = (float, float)
HIGHEST = 1.12  # an error of 1 is that of a matrix of zeros


def draw(path: Path, rows: Sequence[Row], kind: str, enough: float) -> None:
    """Means over heads, left by temperature and right by entropy; there every head at every temperature is a dot.
    Heads whose errors are no finite numbers are left out; there must be others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.8))
    left, right = figure.subplots(1, 2, sharey=True)
    captions = settings_of(rows)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.92, bottom=0.12 + 0.034 * len(captions), wspace=0.04)
    by_temperature, by_entropy = (
        [p for p in some if {"sparse", "low-rank", "combined"} <= set(p.errors)]
        for some in (points(rows, kind), points_by_entropy(rows, kind))
    )
    for axis, some, x, scale in (
        (left, by_temperature, [p.temperature for p in by_temperature], LOGARITHMIC),
        (right, by_entropy, [p.entropy for p in by_entropy], LINEAR),
    ):
        _shade(axis, x, [regime(p, enough) for p in some], scale)
        for name, style in STYLES.items():
            curve = [(where, p.errors[name]) for where, p in zip(x, some) if name in p.errors]
            if curve:
                axis.plot(*zip(*curve), marker="o", markersize=4, label=NAMES[name], zorder=3, **style)
        axis.axhline(enough, color="#555555", linewidth=0.9, linestyle=":", zorder=1)
        axis.grid(alpha=0.25)
    for name in ("sparse", "low-rank", "combined"):
        dots = [(row.entropy, row.error(kind)) for row in with_finite_errors(rows, kind) if row.method == name]
        right.plot(*zip(*dots), ".", color=STYLES[name]["color"], markersize=3, alpha=0.3, zorder=2)
    left.set(xscale="log", ylim=(-0.02, HIGHEST), xlabel="softmax temperature, which scores are divided by")
    left.set_ylabel("error of the " + ("attention matrix" if kind == "matrix" else "output"))
    left.set_xticks(*_ticks([p.temperature for p in by_temperature]))
    left.minorticks_off()
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", bbox_to_anchor=(0.99, 0.01), fontsize=10)
    right.set_xlabel("entropy of a row of exact attention, in nats")
    sources = sorted({row.inputs for row in rows})
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    figure.suptitle(f"Sparse, low-rank and both at equal cost: {sources[0]}{more}", fontsize=12)
    figure.text(0.065, 0.015, "\n".join(captions), fontsize=9, va="bottom", linespacing=1.45)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, format="png")


def regime(point: Point, enough: float) -> str:
    """Which part alone errs by at most ``enough``: sparse, low-rank, either or neither."""
    alone = [name for name in ("sparse", "low-rank") if point.errors[name] <= enough]
    return "either" if len(alone) == 2 else alone[0] if alone else "neither"


def _shade(axis: Axes, x: Sequence[float], kinds: Sequence[str], scale: Scale) -> None:
    """A band for each run of points of one regime, from halfway before it to halfway after it."""
    place, back = scale
    at = list(map(place, x))
    for kind, first, last in _runs(kinds):
        begin = at[first] if first == 0 else (at[first - 1] + at[first]) / 2
        end = at[last] if last == len(at) - 1 else (at[last] + at[last + 1]) / 2
        text, colour = BANDS[kind]
        axis.axvspan(back(begin), back(end), color=colour, alpha=0.11, linewidth=0, zorder=0)
        axis.text(
            back((begin + end) / 2),
            HIGHEST - 0.02,
            text,
            color=colour,
            rotation=90 if end - begin < 0.14 * (at[-1] - at[0]) else 0,
            ha="center",
            va="top",
            fontsize=9.5,
            fontweight="bold",
            zorder=4,
        )


def _runs(kinds: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    at = 0
    for kind, some in groupby(kinds):
        length = len(list(some))
        yield kind, at, at + length - 1
        at += length


def _ticks(values: Sequence[float]) -> tuple[list[float], list[str]]:
    """Every second where there are many."""
    chosen = values[:: 1 + len(values) // 12]
    return list(chosen), [f"{value:g}" for value in chosen]
