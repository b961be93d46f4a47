"""The picture of a table: every method's metric over seconds of training, and where it ends."""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from scatterbrain.training.files import write_atomically
from scatterbrain.training.metrics import Evaluation, Metric
from scatterbrain.training.run_log import Record
from scatterbrain.training.table import Table

TITLE_LETTERS = 150  # of a line, which the picture is wide enough for
STYLES = ("-", "--", ":")  # of the first ten methods, the next ten, and so on


def draw_table(path: Path, table: Table, logs: dict[str, Sequence[Sequence[Record]]]) -> None:
    """Writes a PNG: on the left a line for every method, the mean over seeds at each validation, in a band from the
    lowest to the highest; on the right the metric after the last step, a dot for every seed and a bar at their mean.

    Args:
        path: the file; it is replaced.
        table: its rows.
        logs: the records of every complete run, by method.
    """
    figure = Figure(figsize=(12, 1.6 + 0.32 * max(8, len(table.rows))), dpi=120, layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, row in enumerate(table.rows):
        color, style = f"C{number % 10}", STYLES[number // 10 % len(STYLES)]
        seconds, means, lowest, highest = curve(logs[row.method], table.metric)
        curves.plot(seconds, means, color=color, linestyle=style, label=row.method)
        curves.fill_between(seconds, lowest, highest, color=color, alpha=0.15, linewidth=0)
        ends.plot(row.final, [number] * len(row.final), "o", color=color, markersize=5, alpha=0.6)
        ends.plot(statistics.fmean(row.final), number, "|", color=color, markersize=18, markeredgewidth=2)
    if table.baseline is not None:
        baseline = table.metric.of(table.baseline)
        curves.axhline(baseline, color="grey", linewidth=0.8, linestyle=":", label="without reading the input")
        ends.axvline(baseline, color="grey", linewidth=0.8, linestyle=":")
    curves.set(xlabel="seconds of training", ylabel=table.metric.label)
    ends.set(xlabel=f"{table.metric.label} after the last step, by seed")
    ends.set_yticks(range(len(table.rows)), [row.method for row in table.rows])
    ends.invert_yaxis()
    if table.metric.name == "perplexity":
        _logarithmic(curves, "y")
        _logarithmic(ends, "x")
    for axes in (curves, ends):
        axes.grid(alpha=0.3)
    curves.legend(fontsize="x-small", ncols=2)
    figure.suptitle(textwrap.fill(table.title, TITLE_LETTERS), fontsize="small")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_atomically(path, picture.getvalue())


def curve(logs: Sequence[Sequence[Record]], metric: Metric) -> tuple[list[float], ...]:
    """Mean seconds, and mean, lowest and highest metric over runs, at the validations that all of them have."""
    found = [{record["step"]: record for record in log if record["kind"] == "validation"} for log in logs]
    steps = sorted(set.intersection(*(set(records) for records in found)))
    seconds = [statistics.fmean(records[step]["seconds"] for records in found) for step in steps]
    values = [
        [metric.of(Evaluation(records[step]["loss"], records[step]["accuracy"])) for records in found] for step in steps
    ]
    return seconds, [statistics.fmean(at) for at in values], [min(at) for at in values], [max(at) for at in values]


def _logarithmic(axes: Axes, which: str) -> None:
    """Such an axis, with plain numbers."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
