"""The records of a run: a file with one JSON object per line."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

from scatterbrain.training.board import Board, flat
from scatterbrain.training.files import UnusableRun, sync, write_atomically
from scatterbrain.training.metrics import Evaluation, Metric
from scatterbrain.training.train_step import StepResult

Record = dict[str, Any]


class RunLog:
    """Records of a run, on disk and in memory.

    Args:
        path: The file; it is replaced. None for a process that keeps records and writes none.
        records: Initial records, such as those before the step that a run continues from.
        board: Where new records go as well.
    """

    def __init__(self, path: Path | None, records: list[Record], board: Board | None = None) -> None:
        self._path, self.records, self._board = path, list(records), board
        if path is None:
            return
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())

    def append(self, record: Record) -> None:
        self.records.append(record)
        if self._path is None:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is not None:
            self._board.add(record)

    def sync(self) -> None:
        """Makes the records survive a power cut. Before a checkpoint is replaced: one that knows more steps than the
        log leaves a gap that nothing fills.

        Raises:
            OSError: if they cannot be written.
        """
        if self._path is not None:
            sync(self._path)

    def table(self) -> str:
        """All records as CSV, a line for each, with a column for every number of either kind."""
        rows = [flat(record) for record in self.records]
        columns = list(dict.fromkeys(name for row in rows for name in row)) or ["kind", "step"]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def metric(self, kind: str, metric: Metric) -> list[float]:
        """The metric of every record of a kind."""
        return [metric.of(Evaluation(record["loss"], record["accuracy"])) for record in self.of_kind(kind)]

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]


NUMBERS = {
    "train": ("learning_rate", *(field.name for field in dataclasses.fields(StepResult))),
    "validation": ("loss", "accuracy", "seconds"),
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
