"""A task's table from its folder of configurations to its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from scatterbrain.macos_files import without_macos_files
from scatterbrain.training.closed_output import say
from scatterbrain.training.config import RunConfig
from scatterbrain.training.files import UnusableRun, write_atomically
from scatterbrain.training.table import (
    Table,
    as_csv,
    baseline_of,
    equal_cost,
    markdown,
    method_order,
    multiply_adds,
    row_of,
)
from scatterbrain.training.table_picture import draw_table
from scatterbrain.training.table_run import (
    OpenedData,
    TableRun,
    difference,
    difference_of_settings,
    is_complete,
    missing_records,
)
from scatterbrain.training.table_runs import TableStopped, carry_out
from scatterbrain.training.tasks import build_task, open_data
from scatterbrain.yaml_text import read_yaml

SHARED = "task.yaml"


def method_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that extend its task.yaml, by themselves or through others, by the name of their method, in
    the order of a table.

    Raises:
        ValueError: there are none.
    """
    if not (folder / SHARED).is_file():
        raise ValueError(
            f"expected a folder of configurations with a {SHARED}, such as configs/copy, got {folder}, which has none"
        )
    shared = (folder / SHARED).resolve()
    files = {path.stem: path for path in _yaml_files(folder) if shared in _all_extended(path)}
    if not files:
        raise ValueError(f"{folder}: expected files of methods with the line 'extends: {SHARED}', found none")
    return dict(sorted(files.items(), key=lambda item: method_order(item[0])))


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(without_macos_files(folder.glob("*.yaml")))


def _all_extended(path: Path) -> set[Path]:
    """The files that a file extends, those that these extend, and so on, without links. What is not there or no mapping
    extends nothing: only of a method it is an error, of which its settings tell."""
    found: set[Path] = set()
    waiting = [_place(path)]
    while waiting:
        one = waiting.pop()
        for name in _extended(one):
            other = _place(one.parent / str(name))
            if other not in found and other.is_file():
                found.add(other)
                waiting.append(other)
    return {place.resolve() for place in found}


def _left_out(folder: Path, methods: Iterable[str]) -> list[str]:
    """The files of a folder that are no methods and that none of these extends."""
    files = [folder / f"{name}.yaml" for name in methods]
    used = {path.resolve() for path in files}.union(*map(_all_extended, files))
    return [path.name for path in _yaml_files(folder) if path.resolve() not in used]


def _place(path: Path) -> Path:
    """Where a path stands. A file that is a link itself is not followed: a run takes what it extends from the folder of
    the link."""
    return path.parent.resolve() / path.name


def _extended(path: Path) -> list[str]:
    """What a file extends, as it is written."""
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, got what cannot be read: {' '.join(str(error).split())}") from error
    names: Any = content.get("extends", []) if isinstance(content, dict) else []
    return names if isinstance(names, list) else [names]


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """What ``scatterbrain table`` is asked for.

    Args:
        folder: of the configurations of a task.
        output: folder of the runs and of table.md, table.csv and table.png.
        methods: names of files; all of the folder in the order of a table.
        seeds: of the runs.
        jobs: runs at a time.
        until: a value of the metric; the seconds until it is reached are a column.
        only_collect: no run is started.
        overwrite: whether complete runs of other settings are done again.
    """

    folder: Path
    output: Path
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 1
    until: float | None = None
    only_collect: bool = False
    overwrite: bool = False


def make_table(options: TableOptions, runs: Sequence[TableRun], configs: dict[str, RunConfig], again: str) -> int:
    """Does the runs that are missing, then prints the table and writes its files.

    Args:
        options: what is asked for.
        runs: of every method and seed.
        configs: of every method of the folder, whether it is run or not, for their costs.
        again: the command that goes on after a stop.

    Returns:
        The exit code: 0, or 1 where a run failed or is left to another process or, with ``only_collect``, none is
        complete.

    Raises:
        ValueError: missing data, but with ``only_collect``, which then leaves out what follows from them; settings that
            do not fit; or a folder with runs of other settings.
        TableStopped: after SIGINT or SIGTERM. The table of the runs that are complete is written before.
    """
    known = _Known(configs, runs, options.only_collect)
    left_out = _left_out(options.folder, configs)
    try:
        if not options.only_collect:
            carry_out(list(runs), options.output, options.jobs, options.overwrite, again)
    except TableStopped:
        _collect(options, runs, known, left_out)
        raise
    found = _collect(options, runs, known, left_out)
    failed = any(run.failed_for() for run in runs) or not (options.only_collect or all(map(is_complete, runs)))
    return 1 if failed or not found else 0


class _Known:
    """What a table says of its task, found before hours of runs, not after.

    Args:
        configs: of every method.
        runs: of the table, whose folders know what their data were.
        only_collect: whether the data may be missing.

    Without data ``lacks_data`` says why, and there are no baseline and no costs, which follow from them.
    """

    def __init__(self, configs: dict[str, RunConfig], runs: Sequence[TableRun], only_collect: bool) -> None:
        first = next(iter(configs.values()))
        self.task = build_task(first.task)
        self.baseline, self.tokens, self.lacks_data = None, None, ""
        self._opened = OpenedData()
        there = [run for run in runs if run.folder.data.exists()]
        # A run of other settings may have had other data, and is no row.
        there.sort(key=lambda run: _unless_usable(lambda: difference_of_settings(run)) is not None)
        stored = [run.folder.data.read_text(encoding="utf-8") for run in there]
        try:
            data = open_data(self.task, first.data, first.train)
        except ValueError as error:
            if not (only_collect and stored and str(error).startswith("data.path")):
                raise
            self.lacks_data, self._stored = " ".join(str(error).split()), stored[0]
            self.description = stored[0].partition("\n")[0]
        else:
            self.description, self.tokens = data.description, data.tokens
            batches = [data.validation_batch(number) for number in range(first.train.validation_batches)]
            self.baseline = baseline_of(batches)
        self.costs = {name: self._cost(name, config) for name, config in configs.items()}

    def difference(self, run: TableRun) -> str | None:
        """In what the run in the folder is not the one that is asked for. Without data its own are to be those of the
        other runs."""
        if not self.lacks_data:
            return difference(run, self._opened)
        found = difference_of_settings(run)
        if found is None and run.folder.data.exists() and run.folder.data.read_text(encoding="utf-8") != self._stored:
            return f"data: {run.folder.data} is not that of the other runs"
        return found

    def notes(self) -> list[str]:
        """Of what the figures stand on."""
        if not self.lacks_data:
            return [f"multiply-adds at {self.tokens} tokens, counted by scatterbrain.analysis.cost"]
        return [f"without multiply-adds and the guess that reads no input: the data are not here ({self.lacks_data})"]

    def _cost(self, name: str, config: RunConfig) -> float | None:
        if self.tokens is None:
            return None
        try:
            return multiply_adds(config, self.task, self.tokens)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _collect(options: TableOptions, runs: Sequence[TableRun], known: _Known, left_out: list[str]) -> bool:
    """Prints and writes the table of the complete runs; whether there is any."""
    complete: dict[str, list[TableRun]] = {}
    notes = [f"left out, as they do not extend {SHARED}: {', '.join(left_out)}"] if left_out else []
    for run in runs:
        if (other := _unless_usable(lambda: known.difference(run))) is not None:
            notes.append(f"{run.name} is left out, it has other settings: {other}")
        elif is_complete(run):
            complete.setdefault(run.method, []).append(run)
        elif (reason := run.failed_for()) is not None:
            notes.append(f"{run.name} failed: {reason}")
        else:
            notes.append(f"{run.name} is not complete{_reason(run)}")
    if not complete:
        say("\n".join([f"{options.output}: no run is complete", *notes]))
        return False
    machines = {line for group in complete.values() for run in group for line in _machines(run)}
    metric = known.task.metric
    table = Table(
        title=f"{options.folder.resolve().name}: {known.description}",
        metric=metric,
        rows=tuple(row_of(group, metric, known.costs[name], options.until) for name, group in complete.items()),
        baseline=known.baseline,
        reference=equal_cost(known.costs),
        until=options.until,
        notes=(
            "± is the standard deviation over seeds; seconds are those of training steps, without validation",
            *known.notes(),
            f"run on {'; '.join(sorted(machines))}",
            *notes,
        ),
    )
    text = markdown(table)
    for name, content in (("table.md", text), ("table.csv", as_csv(table))):
        write_atomically(options.output / name, content.encode())
    logs = {name: [run.records() for run in group] for name, group in complete.items()}
    draw_table(options.output / "table.png", table, logs)
    say(f"\n{text}in {options.output}: table.md, table.csv, table.png")
    return True


def _reason(run: TableRun) -> str:
    """Why a run that has not failed is not complete, where that is more than missing steps."""
    if (lost := missing_records(run)) > 0:
        return f": its log lacks {lost} of the steps of its checkpoint; the table does it anew without --only-collect"
    found = _unless_usable(lambda: "" if run.records() else "it has taken no step yet")
    return f": {found}" if found else ""


def _machines(run: TableRun) -> list[str]:
    """What a run was done on."""
    return run.machine.read_text(encoding="utf-8").splitlines() if run.machine.exists() else ["an unrecorded machine"]


def _unless_usable(check: Callable[[], str | None]) -> str | None:
    """What a check finds, or why it cannot be made."""
    try:
        return check()
    except UnusableRun as error:
        return str(error)
