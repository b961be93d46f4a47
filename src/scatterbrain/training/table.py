"""The table of a task: a row for every method, from the logs of its runs."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from scatterbrain.analysis.cost import Shape, cost
from scatterbrain.training.attention import build_support_and_low_rank
from scatterbrain.training.batch import Batch
from scatterbrain.training.config import RunConfig
from scatterbrain.training.metrics import Evaluation, Metric
from scatterbrain.training.run_log import Record
from scatterbrain.training.table_run import TableRun
from scatterbrain.training.tasks import Task

# The order of rows. Others follow by name: variants, which need not be at equal cost.
METHODS = (
    "full",
    "window",
    "lsh",
    "routed",
    "favor",
    "quadratic",
    "centroid",
    "window-favor",
    "lsh-favor",
    "window-quadratic",
    "routed-quadratic",
    "routed-centroid",
)
REFERENCES = ("routed-quadratic", "routed-centroid")  # equal cost is that of the cheaper one, give or take a tenth
TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Row:
    """A method's runs.

    Args:
        method: its name.
        seeds: of the complete runs.
        steps: of a run.
        final: the metric after the last step, by seed. best: the best of all validations, by seed.
        reached: seconds of training at the first validation that is as good as what was asked for, by seed; None where
            none is.
        seconds: of training, by seed. in_attention: the share of these spent in attention, by seed.
        low_rank_share: of the weight of attention, by seed, the mean over layers after the last step; empty without a
            low-rank part.
        multiply_adds: of attention, per query and head; None for parts whose cost is not registered.
    """

    method: str
    seeds: tuple[int, ...]
    steps: int
    final: tuple[float, ...]
    best: tuple[float, ...]
    reached: tuple[float | None, ...]
    seconds: tuple[float, ...]
    in_attention: tuple[float, ...]
    low_rank_share: tuple[float, ...]
    multiply_adds: float | None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows with what they are read against.

    Args:
        title: the task.
        metric: of the task.
        rows: in order.
        baseline: what an answer that reads no input gets; None without the data.
        reference: multiply-adds of a row at equal cost; None where no method is the reference.
        until: the metric whose time is a column; None for no such column.
        notes: lines below: the data, the machine, runs that failed.
    """

    title: str
    metric: Metric
    rows: tuple[Row, ...]
    baseline: Evaluation | None
    reference: float | None
    until: float | None
    notes: tuple[str, ...]


def method_order(name: str) -> tuple[int, str]:
    """The place of a method in a table."""
    return (METHODS.index(name) if name in METHODS else len(METHODS)), name


# -------------------- from runs


def row_of(runs: Sequence[TableRun], metric: Metric, multiply_adds: float | None, until: float | None) -> Row:
    """The row of a method from its complete runs, at least one."""
    logs = [run.records() for run in runs]
    validations = [[record for record in log if record["kind"] == "validation"] for log in logs]
    values = [[_value(record, metric) for record in records] for records in validations]
    steps = [[record for record in log if record["kind"] == "train"] for log in logs]
    seconds = [sum(record["seconds"] for record in log) for log in steps]
    attention = [sum(record["attention_seconds"] for record in log) for log in steps]
    shares = [records[-1].get("low_rank_shares") for records in validations]
    return Row(
        method=runs[0].method,
        seeds=tuple(run.seed for run in runs),
        steps=max(len(log) for log in steps),
        final=tuple(found[-1] for found in values),
        best=tuple(_best(found, metric) for found in values),
        reached=tuple(_reached(records, metric, until) for records in validations),
        seconds=tuple(seconds),
        in_attention=tuple(part / whole for part, whole in zip(attention, seconds)),
        low_rank_share=tuple(statistics.fmean(share) for share in shares if share),
        multiply_adds=multiply_adds,
    )


def _value(record: Record, metric: Metric) -> float:
    return metric.of(Evaluation(record["loss"], record["accuracy"]))


def _best(values: Sequence[float], metric: Metric) -> float:
    """Of those that are numbers: NaN is neither less nor more than another one, so that it would stay where it is
    first. NaN where all are."""
    numbers = [value for value in values if not math.isnan(value)]
    return (max if metric.rises else min)(numbers, default=math.nan)


def _reached(records: list[Record], metric: Metric, until: float | None) -> float | None:
    if until is None:
        return None
    good = (record for record in records if _is_as_good(_value(record, metric), until, metric))
    return next((record["seconds"] for record in good), None)


def _is_as_good(value: float, until: float, metric: Metric) -> bool:
    return value == until or metric.better(value, until)


def multiply_adds(config: RunConfig, task: Task, tokens: int) -> float | None:
    """Of attention over ``tokens``, per query and head; None for a support or a kernel without a registered cost."""
    support, low_rank = build_support_and_low_rank(config.attention, task.is_causal)
    head_dim = task.head_dim(config.model)
    try:
        return cost(support, low_rank, Shape(tokens, tokens, head_dim, head_dim)).total
    except TypeError:
        return None


def equal_cost(costs: dict[str, float | None]) -> float | None:
    """Multiply-adds of a row at equal cost, from those of all methods by name."""
    return min((costs[name] for name in REFERENCES if costs.get(name) is not None), default=None)


def baseline_of(batches: Sequence[Batch]) -> Evaluation:
    """An answer that reads no input: the frequencies of the scored targets as probabilities, and the most frequent."""
    counts: Counter[int] = Counter()
    for batch in batches:
        values, times = torch.unique(batch.targets[batch.targets != -100], return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist())))
    shares = [count / counts.total() for count in counts.values()]
    return Evaluation(-sum(share * math.log(share) for share in shares), max(shares))


# -------------------- as text


def markdown(table: Table) -> str:
    """The table with a title above and notes below; columns are padded, so that it reads well in a terminal too."""
    columns = _columns(table)
    rows = [[heading for heading, _ in columns]]
    rows += [[cell(row) for _, cell in columns] for row in table.rows]
    if table.baseline is not None:
        rows.append(_baseline(table, table.baseline, len(columns)))
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]
    padded.insert(1, ["-" * width for width in widths])
    lines = [f"| {' | '.join(cells)} |" for cells in padded]
    notes = list(table.notes)
    if any(_marked(table, row) for row in table.rows):
        notes.insert(
            0, f"* not at equal cost: {table.reference:,.0f} multiply-adds per query and head, give or take a tenth"
        )
    return "\n".join([f"# {table.title}", "", *lines, "", *(f"{note}  " for note in notes), ""])


def _columns(table: Table) -> list[tuple[str, Callable[[Row], str]]]:
    label, form = table.metric.label, table.metric.format
    columns = [
        ("method", lambda row: row.method + " *" * _marked(table, row)),
        (f"{label}, last", lambda row: spread(row.final, form)),
        (f"{label}, best", lambda row: spread(row.best, form)),
        ("multiply-adds per query and head", lambda row: _count(row.multiply_adds)),
        ("seconds of training", lambda row: spread(row.seconds, ".0f")),
        ("in attention", lambda row: f"{statistics.fmean(row.in_attention):.0%}"),
        ("low-rank share of weight", lambda row: spread(row.low_rank_share, ".2f")),
        ("steps", lambda row: str(row.steps)),
        ("seeds", lambda row: " ".join(map(str, row.seeds))),
    ]
    if table.until is not None:
        columns.insert(3, (f"seconds to {label} {table.until:g}", lambda row: _until(row.reached)))
    return columns


def _baseline(table: Table, baseline: Evaluation, columns: int) -> list[str]:
    name = "most frequent target" if table.metric.rises else "frequencies of the targets"
    return [name, f"{table.metric.of(baseline):{table.metric.format}}", *["-"] * (columns - 2)]


def _marked(table: Table, row: Row) -> bool:
    """Whether a row's cost is not the equal one. Exact attention's never is, and is no method."""
    if table.reference is None or row.multiply_adds is None or row.method == "full":
        return False
    return abs(row.multiply_adds / table.reference - 1) > TOLERANCE


def _at_equal_cost(table: Table, row: Row) -> bool | str:
    """Empty where it is not known."""
    if row.method == "full":
        return False
    return "" if table.reference is None or row.multiply_adds is None else not _marked(table, row)


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {_deviation(values):{form}}"


def _deviation(values: Sequence[float]) -> float:
    """The standard deviation; NaN where a value is infinite, as the perplexity of a run that broke is."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _until(reached: Sequence[float | None]) -> str:
    times = [time for time in reached if time is not None]
    if not times:
        return "never"
    return spread(times, ".0f") + (f", {len(times)} of {len(reached)} seeds" if len(times) < len(reached) else "")


def as_csv(table: Table) -> str:
    """A line for every method, numbers in full; figures by seed are joined by spaces."""
    name = table.metric.name
    lines: list[dict[str, object]] = [
        {
            "method": row.method,
            f"{name}_mean": statistics.fmean(row.final),
            f"{name}_deviation": _deviation(row.final) if len(row.final) > 1 else "",
            f"best_{name}_mean": statistics.fmean(row.best),
            f"{name}_by_seed": " ".join(map(repr, row.final)),
            "seconds_to_until_by_seed": " ".join("-" if time is None else repr(time) for time in row.reached),
            "multiply_adds": "" if row.multiply_adds is None else row.multiply_adds,
            "at_equal_cost": _at_equal_cost(table, row),
            "seconds_mean": statistics.fmean(row.seconds),
            "in_attention_mean": statistics.fmean(row.in_attention),
            "low_rank_share_mean": statistics.fmean(row.low_rank_share) if row.low_rank_share else "",
            "steps": row.steps,
            "seeds": " ".join(map(str, row.seeds)),
        }
        for row in table.rows
    ]
    if table.baseline is not None:
        lines.append({"method": "baseline", f"{name}_mean": table.metric.of(table.baseline)})
    fields = list(dict.fromkeys(key for line in lines for key in line))
    file = io.StringIO()
    writer = csv.DictWriter(file, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
