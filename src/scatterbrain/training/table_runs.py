"""How the runs of a table that are not complete are done."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
import traceback
from pathlib import Path

import torch

from scatterbrain.training.closed_output import say, shown
from scatterbrain.training.files import FolderInUse, FolderLock, UnusableRun, write_atomically
from scatterbrain.training.interrupt import StopRequest, stopped_by
from scatterbrain.training.table_run import OpenedData, TableRun, difference, is_complete, missing_records
from scatterbrain.training.table_workers import Worker
from scatterbrain.training.trainer import RunStopped, Trainer

_POLL_SECONDS = 0.2


class TableStopped(Exception):
    """The table ended early; the message says how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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
        TableStopped: after SIGINT or SIGTERM, or when nobody reads what it prints any more, once every run has finished
            its step and saved it.
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
        replaced = others.keys() | gaps
        missing = [
            _to_start(run, run.name in replaced, jobs) for run in runs if run.name in replaced or not is_complete(run)
        ]
        with StopRequest() as stop:
            for name in sorted(gaps):
                say(f"{name} is done anew: its log lacks steps that its checkpoint has", stop.ask_as_unread)
            count = f"{len(missing)} of {len(runs)} runs to do"
            say(f"{count}, {jobs} at a time, {cores()} cores", stop.ask_as_unread)
            number = _one_by_one(runs, missing, stop) if jobs == 1 else _side_by_side(runs, missing, jobs, stop)
    finally:
        lock.release()
    if number is not None:
        complete = sum(map(is_complete, runs))
        raise TableStopped(
            f"{stopped_by(number)}; {complete} of {len(runs)} runs are complete, and what was running has "
            f"saved its last step; go on with: {again}",
            128 + number,
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
            place = 1 + sum(map(_has_ended, runs))
            say(f"\n{run.name}, run {place} of {len(runs)}{_left(runs, 1)}", stop.ask_as_unread)
            number = do(run, stop)
            if number is not None:
                return number
    return stop.signal


def do(run: TableRun, stop: StopRequest) -> signal.Signals | None:
    """Does one run; the signal that stopped it, or None for one that has ended, also by a failure, which is printed and
    written down. A run that another process is doing is left to it."""
    run.failure.unlink(missing_ok=True)  # of an earlier start, whoever does the run now
    try:
        try:
            trainer = Trainer(run.config)
        except FolderInUse:
            say(f"{run.name} is still running in another process, which is left to do it", stop.ask_as_unread)
            return None
        run.ended.unlink(missing_ok=True)
        with trainer.own_threads():
            _note_machine(run, continues=trainer.steps_done > 0)
        if stop.check():
            return stop.signal
        trainer.run()
        write_atomically(run.ended, f"{trainer.steps_done} steps\n".encode())
    except RunStopped as stopped:
        if stopped.exit_code > 128:
            return signal.Signals(stopped.exit_code - 128)
        _fail(run, str(stopped), stop)
    except Exception as error:  # whatever it is, the other runs can be done
        if not isinstance(error, ValueError):
            shown(traceback.print_exc, stop.ask_as_unread)
        _fail(run, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}", stop)
    return None


def _note_machine(run: TableRun, continues: bool) -> None:
    """Writes down what the run computes on, beside what it was computed on before."""
    before = run.machine.read_text(encoding="utf-8").splitlines() if continues and run.machine.exists() else []
    lines = dict.fromkeys([*before, machine(run.config.train.device)])
    write_atomically(run.machine, "".join(f"{line}\n" for line in lines).encode())


def _fail(run: TableRun, reason: str, stop: StopRequest) -> None:
    reason = " ".join(reason.split())
    write_atomically(run.failure, (reason + "\n").encode())
    say(f"{run.name} failed: {reason}", stop.ask_as_unread)


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
                say(f"{worker.run.name} starts, its output is in {worker.run.output}", stop.ask_as_unread)
            if stop.check():
                for worker in workers:
                    worker.stop()
            for worker in workers:
                ended = worker.collect()
                if ended is None:
                    continue
                if is_complete(ended):
                    place = f"{sum(map(_has_ended, runs))} of {len(runs)}"
                    say(f"{ended.name} is complete, {place}{_left(runs, jobs)}", stop.ask_as_unread)
                elif ended.failure.exists():
                    say(f"{ended.name} failed: {ended.failed_for()}", stop.ask_as_unread)
                elif worker.has_crashed and not stop.check():
                    code = worker.process.exitcode
                    _fail(ended, f"its process ended with exit code {code} (is there enough memory?)", stop)
                elif not stop.check():
                    say(f"{ended.name} is not complete, the end of {ended.output} says why", stop.ask_as_unread)
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
