"""A run compared with its first steps under exact attention."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

from scatterbrain.training.batch import Batch
from scatterbrain.training.interrupt import StopRequest
from scatterbrain.training.metrics import Metric
from scatterbrain.training.run_log import Record, RunLog
from scatterbrain.training.train_step import TrainState


def compare_with_exact(
    own: RunLog,
    exact: RunLog,
    steps: int,
    train_state: TrainState,
    training_batches: Callable[[int, float | None], list[Batch]],
    validation_batches: list[Batch],
    validate_every: int,
    stop: StopRequest,
) -> bool:
    """Repeats the first ``steps`` steps of a run with exact attention.

    Batches and learning rates are those of the run, so losses at the same step can be compared.

    Args:
        own: Records of the run.
        exact: Where those of exact attention go.
        train_state: A model with exact attention and the run's initial weights (but for the parameters of the low-rank
            kernel).
        training_batches: Of a step, counted from 0, when a fraction of the run is done: None for the share of steps.

    Returns:
        Whether it came to its end; it does not where ``stop`` asks for that.
    """
    seconds = 0.0
    for record in own.of_kind("train")[:steps]:
        if stop.check():
            return False
        step = record["step"]
        result = train_state.step(training_batches(step - 1, record.get("fraction")), record["learning_rate"])
        seconds += result.seconds
        exact.append(
            {"kind": "train", "step": step, "learning_rate": record["learning_rate"]} | dataclasses.asdict(result)
        )
        if step % validate_every == 0 or step == steps:
            found = train_state.evaluate(validation_batches)
            exact.append({"kind": "validation", "step": step, "seconds": seconds} | dataclasses.asdict(found))
    return True


def comparison_table(own: RunLog, exact: RunLog, metric: Metric) -> str:
    """Metric and time of a run beside the same first steps with exact attention."""
    early = dict(zip((record["step"] for record in own.of_kind("validation")), own.metric("validation", metric)))
    steps, exact_steps = (log.of_kind("train") for log in (own, exact))
    last, exact_last = steps[-1]["step"], exact_steps[-1]["step"]
    rows = [
        ("", "scatterbrain", "exact attention"),
        ("steps", str(last), str(exact_last)),
        (
            f"{metric.label} after {exact_last} steps",
            f"{early[exact_last]:{metric.format}}" if exact_last in early else "-",
            f"{exact.metric('validation', metric)[-1]:{metric.format}}",
        ),
        (f"{metric.label} after {last} steps", f"{early[last]:{metric.format}}", "-"),
        ("tokens/s", *(f"{_median(records, _speed):,.0f}" for records in (steps, exact_steps))),
        ("ms per step", *(f"{1e3 * _median(records, _seconds):.0f}" for records in (steps, exact_steps))),
        ("  in attention", *(f"{1e3 * _median(records, _attention):.0f}" for records in (steps, exact_steps))),
        ("  outside", *(f"{1e3 * _median(records, _outside):.0f}" for records in (steps, exact_steps))),
    ]
    lines = [f"{name:<30}{left:>16}{right:>18}" for name, left, right in rows]
    lines.insert(1, "-" * len(lines[0]))
    note = (
        f"{metric.label.capitalize()} is of the validation part. Exact attention was stepped from the same initial "
        "weights over the\nsame batches at the same learning rates, for the steps of its column. Times are medians "
        "over steps."
    )
    return "\n".join(["", *lines, "", note])


def _median(records: list[Record], value: Callable[[Record], float]) -> float:
    return statistics.median(value(record) for record in records)


def _seconds(record: Record) -> float:
    return record["seconds"]


def _attention(record: Record) -> float:
    return record["attention_seconds"]


def _outside(record: Record) -> float:
    return record["seconds"] - record["attention_seconds"]


def _speed(record: Record) -> float:
    return record["tokens"] / record["seconds"]
