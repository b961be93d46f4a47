"""The metrics of a run: a file with one JSON object per line, and the loss curve."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scatterbrain.training.files import UnusableRun, write_atomically
from scatterbrain.training.train_step import StepResult

Record = dict[str, Any]


def bits_per_byte(loss: float) -> float:
    """A loss in nats per byte, in bits."""
    return loss / math.log(2)


class MetricsLog:
    """Records of a run, on disk and in memory.

    Args:
        path: The file; it is replaced.
        records: Initial records, such as those before the step that a run continues from.
    """

    def __init__(self, path: Path, records: list[Record]) -> None:
        self._path, self.records = path, list(records)
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())

    def append(self, record: Record) -> None:
        self.records.append(record)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]


NUMBERS = {
    "train": ("loss", "bits_per_byte", "learning_rate", *(field.name for field in dataclasses.fields(StepResult))),
    "validation": ("loss", "bits_per_byte"),
}  # of a record, by its kind, besides the step


def read_records(path: Path, last_step: int) -> list[Record]:
    """The records up to ``last_step``, without a last line that was cut short.

    Raises:
        UnusableRun: for a line that is no record of a run, or does not follow those of its kind.
    """
    records, last = [], dict.fromkeys(NUMBERS, 0)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableRun(f"{path}: expected a text file, got one that cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break  # the process was killed while it wrote
            record = None
        if not _is_record(record):
            raise UnusableRun(
                f"{path}, line {number}: expected a record with kind (train or validation), step and its numbers, got "
                f"{line[:60]!r}; remove the line, or start anew in another folder with --output"
            )
        if record["step"] <= last[record["kind"]]:
            raise UnusableRun(
                f"{path}, line {number}: expected a {record['kind']} record of a step after {last[record['kind']]}, "
                f"got one of step {record['step']}; remove the line, or start anew in another folder with --output"
            )
        last[record["kind"]] = record["step"]
        records.append(record)
    return [record for record in records if record["step"] <= last_step]


def _is_record(record: object) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or record["kind"] not in NUMBERS:
        return False
    numbers = [record.get(name) for name in NUMBERS[record["kind"]]]
    is_step = type(record.get("step")) is int and record["step"] >= 1
    return is_step and all(type(number) in (int, float) for number in numbers)


def draw_loss_curve(path: Path, log: MetricsLog, title: str) -> None:
    """Writes a PNG of training loss (each step, and their running mean) and validation loss, in bits per byte."""
    train, validation = log.of_kind("train"), log.of_kind("validation")
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps = [record["step"] for record in train]
    values = [record["bits_per_byte"] for record in train]
    axes.plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _running_mean(values), color="C0", label="training")
    axes.plot(
        [record["step"] for record in validation],
        [record["bits_per_byte"] for record in validation],
        color="C1",
        marker="o",
        markersize=3,
        label="validation",
    )
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_atomically(path, picture.getvalue())


def _running_mean(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    means, total, normaliser = [], 0.0, 0.0
    for value in values:
        total, normaliser = weight * total + value, weight * normaliser + 1
        means.append(total / normaliser)
    return means
