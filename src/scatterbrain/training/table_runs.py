"""The runs of a table: which are complete, and how the others are done."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml

from scatterbrain.training import initial_weights, same_run
from scatterbrain.training.checkpoint import read_progress
from scatterbrain.training.config import RunConfig
from scatterbrain.training.files import FolderInUse, FolderLock, RunFolder, UnusableRun, write_atomically
from scatterbrain.training.initial_weights import initial_fingerprint
from scatterbrain.training.interrupt import StopRequest
from scatterbrain.training.run_log import Record, read_records
from scatterbrain.training.table_workers import Worker
from scatterbrain.training.tasks import TaskData, build_task, described_task, open_data
from scatterbrain.training.trainer import RunStopped, Trainer

# Settings of a run that do not change its row; every other one of these sections does.
SECTIONS = ("task", "data", "model", "attention", "train")
FREE_TRAIN_KEYS = tuple(
    key for key in same_run.FREE_TRAIN_KEYS if key not in ("steps", "minutes", "validate_every", "validation_batches")
)

_POLL_SECONDS = 0.2


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


class TableStopped(Exception):
    """The table ended early; the message says how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# -------------------- what is there


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
    return run.folder.metrics.exists() and run.folder.config.exists()


def difference_of_settings(run: TableRun) -> str | None:
    """As :func:`difference`, without a look at the data.

    Raises:
        UnusableRun: the folder's config.yaml is none of a run.
    """
    if not _is_begun(run):
        return None
    try:
        stored = yaml.safe_load(run.folder.config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name), dict) for name in SECTIONS):
        raise UnusableRun(
            f"{run.folder.config}: expected the settings of a run, with the sections {', '.join(SECTIONS)}, got "
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


# -------------------- doing the others


def carry_out(runs: list[TableRun], folder: Path, jobs: int, overwrite: bool, again: str) -> None:
    """Does the runs that are not complete, and writes down why one fails.

    Args:
        runs: all runs of the table.
        folder: of the table.
        jobs: runs at a time. One is done in this process; more in as many others, which share the cores.
        overwrite: whether runs of other settings are replaced.
        again: the command that goes on after a stop.

    Raises:
        UnusableRun: a folder has a run of other settings, or another table is being made in ``folder``.
        TableStopped: after SIGINT or SIGTERM, once every run has finished its step and saved it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    try:
        opened = OpenedData()
        others = {run.name: found for run in runs if (found := difference(run, opened)) is not None}
        if others and not overwrite:
            name, found = next(iter(others.items()))
            raise UnusableRun(
                f"output: {len(others)} of {len(runs)} runs in {folder} have other settings ({name}: {found}); replace "
                "them with --overwrite, or choose another folder with --output"
            )
        gaps = {run.name for run in runs if run.name not in others and missing_records(run)}
        for name in sorted(gaps):
            print(f"{name} is done anew: its log lacks steps that its checkpoint has")
        replaced = others.keys() | gaps
        missing = [
            _to_start(run, run.name in replaced, jobs) for run in runs if run.name in replaced or not is_complete(run)
        ]
        print(f"{len(missing)} of {len(runs)} runs to do, {jobs} at a time, {cores()} cores")
        with StopRequest() as stop:
            stopped_by = _one_by_one(runs, missing, stop) if jobs == 1 else _side_by_side(runs, missing, jobs, stop)
    finally:
        lock.release()
    if stopped_by is not None:
        complete = sum(map(is_complete, runs))
        raise TableStopped(
            f"stopped by {stopped_by.name}; {complete} of {len(runs)} runs are complete, and what was running has "
            f"saved its last step; go on with: {again}",
            128 + stopped_by,
        )


def _to_start(run: TableRun, replaced: bool, jobs: int) -> TableRun:
    """The run with the settings of its start."""
    threads = run.config.train.threads or (max(1, cores() // jobs) if jobs > 1 else None)
    config = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, threads=threads))
    start = {"overwrite": True} if replaced else {"resume": "auto"}
    return dataclasses.replace(run, config=dataclasses.replace(config, **start))


def _one_by_one(runs: list[TableRun], missing: list[TableRun], stop: StopRequest) -> signal.Signals | None:
    for run in missing:
        if not stop.check():
            print(f"\n{run.name}, run {1 + sum(map(_has_ended, runs))} of {len(runs)}{_left(runs, 1)}")
            stopped_by = do(run, stop)
            if stopped_by is not None:
                return stopped_by
    return stop.signal


def do(run: TableRun, stop: StopRequest) -> signal.Signals | None:
    """Does one run; the signal that stopped it, or None for one that has ended, also by a failure, which is printed and
    written down. A run that another process is doing is left to it."""
    try:
        try:
            trainer = Trainer(run.config)
        except FolderInUse:
            print(f"{run.name} is still running in another process, which is left to do it")
            return None
        for note in (run.failure, run.ended):
            note.unlink(missing_ok=True)
        _note_machine(run, continues=trainer.steps_done > 0)
        if stop.check():
            return stop.signal
        trainer.run()
        write_atomically(run.ended, f"{trainer.steps_done} steps\n".encode())
    except RunStopped as stopped:
        if stopped.exit_code > 128:
            return signal.Signals(stopped.exit_code - 128)
        _fail(run, str(stopped))
    except Exception as error:  # whatever it is, the other runs can be done
        if not isinstance(error, ValueError):
            traceback.print_exc()
        _fail(run, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
    return None


def _note_machine(run: TableRun, continues: bool) -> None:
    """Writes down what the run computes on, beside what it was computed on before."""
    before = run.machine.read_text(encoding="utf-8").splitlines() if continues and run.machine.exists() else []
    lines = dict.fromkeys([*before, machine(run.config.train.device)])
    write_atomically(run.machine, "".join(f"{line}\n" for line in lines).encode())


def _fail(run: TableRun, reason: str) -> None:
    reason = " ".join(reason.split())
    write_atomically(run.failure, (reason + "\n").encode())
    print(f"{run.name} failed: {reason}")


def _side_by_side(runs: list[TableRun], missing: list[TableRun], jobs: int, stop: StopRequest) -> signal.Signals | None:
    """In processes that do one run after the other. A process that is killed, as by lack of memory, fails its run."""
    waiting, workers = list(missing), [Worker(do) for _ in range(min(jobs, len(missing)))]
    try:
        while any(worker.run is not None for worker in workers) or (waiting and not stop.check()):
            for index, worker in enumerate(workers):
                if worker.run is not None or not waiting or stop.check():
                    continue
                if not worker.process.is_alive():
                    workers[index] = worker = Worker(do)
                worker.start(waiting.pop(0))
                print(f"{worker.run.name} starts, its output is in {worker.run.output}")
            if stop.check():
                for worker in workers:
                    worker.stop()
            for worker in workers:
                ended = worker.collect()
                if ended is None:
                    continue
                if is_complete(ended):
                    print(f"{ended.name} is complete, {sum(map(_has_ended, runs))} of {len(runs)}{_left(runs, jobs)}")
                elif ended.failure.exists():
                    print(f"{ended.name} failed: {ended.failed_for()}")
                elif worker.has_crashed and not stop.check():
                    _fail(
                        ended, f"its process ended with exit code {worker.process.exitcode} (is there enough memory?)"
                    )
                elif not stop.check():
                    print(f"{ended.name} is not complete, the end of {ended.output} says why")
            time.sleep(_POLL_SECONDS)
    finally:
        for worker in workers:
            worker.close()
    return stop.signal


def _has_ended(run: TableRun) -> bool:
    return is_complete(run) or run.failure.exists()


def _left(runs: list[TableRun], jobs: int) -> str:
    """The time that is left, for people; nothing while it is not known."""
    seconds = time_left([(run, _seconds_of_steps(run)) for run in runs if not run.failure.exists()])
    if seconds is None:
        return ""
    minutes = seconds / jobs / 60
    return f", about {f'{minutes:.0f} min' if minutes >= 2 else f'{60 * minutes:.0f} s'} of training left"


def time_left(runs: list[tuple[TableRun, list[float]]]) -> float | None:
    """Seconds of training that are left: of every run its remaining steps, at the mean time of a step in the complete
    runs of its method, or of all if there is none; None without complete runs.

    Args:
        runs: with the seconds of the steps that each has done.
    """
    times: dict[str, list[float]] = {}
    for run, seconds in runs:
        if len(seconds) >= run.config.train.steps:
            times.setdefault(run.method, []).extend(seconds)
    everything = [second for seconds in times.values() for second in seconds]
    if not everything:
        return None
    left = 0.0
    for run, seconds in runs:
        known = times.get(run.method, everything)
        left += max(0, run.config.train.steps - len(seconds)) * sum(known) / len(known)
    return left


def _seconds_of_steps(run: TableRun) -> list[float]:
    """Of an unreadable log none."""
    try:
        return [record["seconds"] for record in run.records() if record["kind"] == "train"]
    except UnusableRun:
        return []


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str) -> str:
    """What computes in this process, in one line."""
    threads = torch.get_num_threads()
    what = f"{cores()} cores, {threads} thread{'s' * (threads != 1)}"
    if device.startswith("cuda"):
        what = torch.cuda.get_device_name(device)
    return f"{what}, torch {torch.__version__}"
