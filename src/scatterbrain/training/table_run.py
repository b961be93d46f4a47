"""A run of a table: its folder, and whether what is there is that run, complete."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from scatterbrain.training import initial_weights, same_run
from scatterbrain.training.checkpoint import read_progress
from scatterbrain.training.config import RunConfig
from scatterbrain.training.files import RunFolder, UnusableRun
from scatterbrain.training.initial_weights import initial_fingerprint
from scatterbrain.training.run_log import Record, read_records
from scatterbrain.training.tasks import TaskData, build_task, described_task, open_data

# Settings of a run that do not change its row; every other one of these sections does.
SECTIONS = ("task", "data", "model", "attention", "train")
FREE_TRAIN_KEYS = tuple(
    key for key in same_run.FREE_TRAIN_KEYS if key not in ("steps", "minutes", "validate_every", "validation_batches")
)


@dataclasses.dataclass(frozen=True)
class TableRun:
    """One run of a table.

    Args:
        method: the name of its file.
        seed: of its weights and data.
        config: its settings, with the output folder.
    """

    method: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{self.method}-{self.seed}"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.output))

    @property
    def output(self) -> Path:
        """What it prints, if it is done in a process of its own."""
        return Path(f"{self.config.output}.txt")

    @property
    def failure(self) -> Path:
        """Why its last start failed, if it did."""
        return Path(f"{self.config.output}.failure.txt")

    @property
    def ended(self) -> Path:
        """That it came to its end, and after how many steps."""
        return Path(f"{self.config.output}.ended.txt")

    @property
    def machine(self) -> Path:
        """What it ran on, a line for everything it was started on."""
        return Path(f"{self.config.output}.machine.txt")

    def records(self) -> list[Record]:
        """Everything in its log.

        Raises:
            UnusableRun: the log has a line that is none of a run.
        """
        return read_records(self.folder.metrics, sys.maxsize)

    def failed_for(self) -> str | None:
        """Why it failed, in one line."""
        return self.failure.read_text(encoding="utf-8").strip() if self.failure.exists() else None


def is_complete(run: TableRun) -> bool:
    """Whether a run has been validated and saved after its last step, without a failure since. The last step is that of
    ``train.steps``, or the one at which a table saw it reach ``train.minutes``, which its log does not tell. A run
    whose log cannot be read is not complete."""
    try:
        records = run.records()
    except UnusableRun:
        return False
    steps, train = [record["step"] for record in records if record["kind"] == "train"], run.config.train
    done = max(steps, default=0)
    if done == 0 or not any(record["kind"] == "validation" and record["step"] == done for record in records):
        return False
    if len(steps) != done or run.failure.exists() or not _is_saved(run, done):
        return False
    return done >= train.steps or (train.minutes is not None and run.ended.exists())


def missing_records(run: TableRun) -> int:
    """How many of the steps before its checkpoint the log of a run lacks: no further step makes such a run complete. 0
    where log or checkpoint cannot be read, of which its start tells."""
    try:
        done = read_progress(run.folder.checkpoint).step  # first: the log of a run that goes on is never behind it
        records = run.records()
    except UnusableRun:
        return 0
    return done - sum(record["kind"] == "train" and record["step"] <= done for record in records)


def _is_saved(run: TableRun, done: int) -> bool:
    """Whether the checkpoint is that of the last step: others may start from it."""
    try:
        return read_progress(run.folder.checkpoint).step == done
    except UnusableRun:
        return False


def difference(run: TableRun, opened: OpenedData | None = None) -> str | None:
    """The first setting, of those that affect the result, in which the run in the folder differs from this one, or that
    its data or the weights that it started from have changed; None for a folder without a run, and where all is the
    same.

    Args:
        run: of a table.
        opened: keeps data for the next run.

    Raises:
        UnusableRun: the folder's config.yaml is none of a run.
        ValueError: the data are not where they were.
    """
    found = difference_of_settings(run)
    if found is not None or not _is_begun(run):
        return found
    changed = same_run.data_difference(run.folder, (opened or OpenedData()).of(run.config))
    return None if changed is None else f"data: {changed}"


def _is_begun(run: TableRun) -> bool:
    """A checkpoint alone is a run too: it is hours of work, and no one else's settings are to replace it."""
    return _is_logged(run) or _checkpointed(run) is not None


def _is_logged(run: TableRun) -> bool:
    return run.folder.metrics.exists() and run.folder.config.exists()


def _checkpointed(run: TableRun) -> dict[str, Any] | None:
    """The settings in the checkpoint; None where none can be read, of which its start tells."""
    try:
        return read_progress(run.folder.checkpoint).config
    except UnusableRun:
        return None


def difference_of_settings(run: TableRun) -> str | None:
    """As :func:`difference`, without a look at the data.

    Raises:
        UnusableRun: the folder's config.yaml, or its checkpoint where log or config.yaml are gone, is none of a run.
    """
    if not _is_begun(run):
        return None
    file = run.folder.config if _is_logged(run) else run.folder.checkpoint
    try:
        stored = yaml.safe_load(file.read_text(encoding="utf-8")) if _is_logged(run) else _checkpointed(run)
    except (yaml.YAMLError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name), dict) for name in SECTIONS):
        raise UnusableRun(
            f"{file}: expected the settings of a run, with the sections {', '.join(SECTIONS)}, got "
            "something else; remove the folder, or choose another one with --output"
        )
    plain = dataclasses.asdict(dataclasses.replace(run.config, task=described_task(run.config.task)))
    now, defaults = _flat(json.loads(json.dumps(plain))), _flat(json.loads(json.dumps(dataclasses.asdict(RunConfig()))))
    before = defaults | _flat(stored)  # a setting that came later had its default
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            return f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
    source, kept = run.config.train.initialize_from, run.folder.initial_weights
    there = "" if source is None else initial_fingerprint(source)
    if there and kept.exists() and kept.read_text(encoding="utf-8") != there:
        return f"{initial_weights.KEY}: other weights were in {source}"
    return None


class OpenedData:
    """The data of runs, of which those of one table are read once."""

    def __init__(self) -> None:
        self._opened: dict[str, TaskData] = {}

    def of(self, config: RunConfig) -> TaskData:
        """The data but for what follows from the seed."""
        task, train = described_task(config.task), dataclasses.replace(config.train, seed=0)
        key = json.dumps([task, dataclasses.asdict(config.data), dataclasses.asdict(train)], sort_keys=True)
        if key not in self._opened:
            self._opened = {key: open_data(build_task(task), config.data, train)}  # one at a time: data are large
        return self._opened[key]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that affect the result, by section.key."""
    sections = {name: settings[name] for name in SECTIONS if isinstance(settings[name], dict)}
    flat = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {key: value for key, value in flat.items() if key not in {f"train.{name}" for name in FREE_TRAIN_KEYS}}
