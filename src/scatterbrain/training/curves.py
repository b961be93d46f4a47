"""Pictures of a run: its metric over steps and over seconds of training."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scatterbrain.training.files import write_atomically
from scatterbrain.training.metrics import Metric
from scatterbrain.training.run_log import RunLog


def draw_curves(path: Path, runs: dict[str, RunLog], metric: Metric, title: str) -> None:
    """Writes a PNG of the metric of runs, over steps and over seconds: a thin line for every training step, a thick one
    for their running mean, and dots for validation.

    Args:
        path: The file; it is replaced.
        runs: Their names and records, the run itself first.
        metric: What is drawn.
        title: Above the picture.
    """
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    for number, (name, log) in enumerate(runs.items()):
        train, validation = log.of_kind("train"), log.of_kind("validation")
        seconds = list(itertools.accumulate(record["seconds"] for record in train))
        for axes, times, dots in (
            (over_steps, [record["step"] for record in train], [record["step"] for record in validation]),
            (over_seconds, seconds, [record["seconds"] for record in validation]),
        ):
            values = log.metric("train", metric)
            axes.plot(times, values, color=f"C{number}", alpha=0.2, linewidth=0.8)
            axes.plot(times, _running_mean(values), color=f"C{number}", label=f"{name}, training")
            axes.plot(
                dots,
                log.metric("validation", metric),
                color=f"C{number}",
                linestyle="--",
                marker="o",
                markersize=3,
                label=f"{name}, validation",
            )
    over_steps.set(xlabel="step", ylabel=metric.label)
    over_seconds.set(xlabel="seconds of training")
    for axes in (over_steps, over_seconds):
        _finish(axes)
    figure.suptitle(title, fontsize="small")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_atomically(path, picture.getvalue())


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")


def _running_mean(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    means, total, normaliser = [], 0.0, 0.0
    for value in values:
        total, normaliser = weight * total + value, weight * normaliser + 1
        means.append(total / normaliser)
    return means
