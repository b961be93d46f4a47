"""A run compared with its first steps under exact attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from scatterbrain.training.attention import build_attention
from scatterbrain.training.config import AttentionConfig, RunConfig
from scatterbrain.training.interrupt import StopRequest
from scatterbrain.training.metrics import MetricsLog, Record, bits_per_byte
from scatterbrain.training.train_step import Batch, TrainState


def compare_with_exact(
    config: RunConfig,
    log: MetricsLog,
    training_batches: Callable[[int], list[Batch]],
    validation_batches: list[Batch],
    stop: StopRequest,
) -> str | None:
    """Repeats the first ``compare.steps`` steps of a run with exact attention and tabulates loss and time of both.

    Initial weights (except the parameters of the low-rank kernel), batches and learning rates are those of the run, so
    losses at the same step can be compared.

    Returns:
        The table, or None if the comparison was stopped.
    """
    own = log.of_kind("train")
    train_state = TrainState(config.model, config.train, partial(build_attention, AttentionConfig(support="full")))
    exact: list[Record] = []
    for record in own[: config.compare.steps]:
        if stop.signal is not None:
            return None
        result = train_state.step(training_batches(record["step"] - 1), record["learning_rate"])
        exact.append(
            {"tokens": result.tokens, "seconds": result.seconds, "attention_seconds": result.attention_seconds}
        )
    loss = train_state.evaluate(validation_batches)
    return _table(own, exact, log.of_kind("validation"), bits_per_byte(loss))


def _table(own: list[Record], exact: list[Record], validations: list[Record], exact_bits: float) -> str:
    early = {record["step"]: record["bits_per_byte"] for record in validations}
    rows = [
        ("", "scatterbrain", "exact attention"),
        ("steps", str(own[-1]["step"]), str(len(exact))),
        (f"bits per byte after {len(exact)} steps", f"{early[len(exact)]:.3f}", f"{exact_bits:.3f}"),
        (f"bits per byte after {own[-1]['step']} steps", f"{validations[-1]['bits_per_byte']:.3f}", "-"),
        ("tokens/s", *(f"{_median(records, _speed):,.0f}" for records in (own, exact))),
        ("ms per step", *(f"{1e3 * _median(records, _seconds):.0f}" for records in (own, exact))),
        ("  in attention", *(f"{1e3 * _median(records, _attention):.0f}" for records in (own, exact))),
        ("  outside", *(f"{1e3 * _median(records, _outside):.0f}" for records in (own, exact))),
    ]
    lines = [f"{name:<30}{left:>16}{right:>18}" for name, left, right in rows]
    lines.insert(1, "-" * len(lines[0]))
    note = (
        "Bits per byte are of the validation part. Exact attention was stepped from the same initial weights over the\n"
        "same batches at the same learning rates, for fewer steps than the run. Times are medians over steps."
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
