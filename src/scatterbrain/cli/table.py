"""``scatterbrain table FOLDER [options] [--key value]``."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scatterbrain.cli.command import CommandError, HelpParser, asks_for_help, one_line, readable_errors

if TYPE_CHECKING:
    from scatterbrain.training.config import RunConfig
    from scatterbrain.training.table_run import TableRun
    from scatterbrain.training.table_task import TableOptions

USAGE = "scatterbrain table FOLDER [options] [--key value ...]"
DESCRIPTION = """\
Trains every method of a task with several seeds and compares them: metric, cost, time, share of the low-rank part.

  scatterbrain table configs/copy                                   all methods, seeds 0 1 2
  scatterbrain table configs/copy --methods full routed-quadratic --seeds 0
  scatterbrain table configs/copy --jobs 2                          two runs at a time
  scatterbrain table configs/copy_long --until 1.1                  seconds until the perplexity is 1.1 as well
  scatterbrain table configs/copy --only-collect                    the table of the runs that are there

FOLDER has a task.yaml with what all runs of the task share, and a file for each method, which extends it. A run is in
OUTPUT/METHOD-SEED and is one of scatterbrain train, whose keys may follow as options, such as --train.steps 20. Runs
that are complete are kept, and stopped ones go on where they were. A run that fails is noted and does not end the
others; the next call tries it again.
The table is printed and written to OUTPUT: table.md, table.csv and table.png.
Ctrl-C lets the runs finish their step and save it; the same command goes on."""
RESERVED = ("output", "resume", "overwrite", "train.seed")  # keys of a run that the table sets


def table(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0, or 1 where a run failed, is left to another process, or none is complete.

    Raises:
        CommandError: with exit code 1 for bad input and missing data, 2 for a value of the wrong type and for a folder
            with runs of other settings, and 128 plus the signal's number for a table that was interrupted.
    """
    with readable_errors():
        if asks_for_help(arguments):
            parser = HelpParser("scatterbrain table", USAGE, DESCRIPTION)
            _add_options(parser)
            parser.exit_with_help()
        options, overrides = _parse(arguments)
        from scatterbrain.training.table_runs import TableStopped
        from scatterbrain.training.table_task import make_table, method_files

        files = method_files(options.folder)
        configs = {name: _config([str(path), *overrides], name) for name, path in files.items()}
        runs = [_run(options, method, seed, configs[method]) for method in options.methods for seed in options.seeds]
        try:
            return make_table(options, runs, configs, f"scatterbrain table {shlex.join(arguments)}")
        except TableStopped as stopped:
            raise CommandError(str(stopped), stopped.exit_code) from stopped


def _parse(arguments: Sequence[str]) -> tuple[TableOptions, list[str]]:
    """The table's own options, and the keys of ``scatterbrain train`` after them."""
    from scatterbrain.training.config import RunConfig
    from scatterbrain.training.files import output_folder
    from scatterbrain.training.table_task import TableOptions, method_files

    if not arguments or arguments[0].startswith("-"):
        _refuse(f"expected a folder of configurations first, got {arguments[0] if arguments else 'nothing'}")
    parser = argparse.ArgumentParser("scatterbrain table", exit_on_error=False, allow_abbrev=False)
    _add_options(parser)
    try:
        found, overrides = parser.parse_known_args(list(arguments[1:]))
    except argparse.ArgumentError as error:
        _refuse(one_line(error))
    sections = {field.name for field in dataclasses.fields(RunConfig)}
    for argument in overrides:
        key = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and key.partition(".")[0] not in sections:
            _refuse(f"there is no option --{key}; its own stand before keys of a run, such as --train.steps 20")
        if argument.startswith("--") and key in RESERVED:
            raise ValueError(f"--{key}: the table sets this key of every run; use --output, --seeds or --overwrite")
    folder = Path(arguments[0])
    files = method_files(folder)
    methods = tuple(files) if found.methods is None else tuple(dict.fromkeys(found.methods))
    for name in methods:
        if name not in files:
            raise ValueError(f"--methods: expected some of {', '.join(files)}, got {name!r}")
    for name, values in (("seeds", found.seeds), ("jobs", [found.jobs])):
        if min(values) < (name == "jobs"):
            raise ValueError(f"--{name}: expected {'1' if name == 'jobs' else '0'} or more, got {min(values)}")
    return TableOptions(
        folder=folder,
        output=Path("runs") / folder.resolve().name if found.output is None else output_folder(found.output),
        methods=methods,
        seeds=tuple(dict.fromkeys(found.seeds)),
        jobs=found.jobs,
        until=found.until,
        only_collect=found.only_collect,
        overwrite=found.overwrite,
    ), overrides


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--methods", nargs="+", metavar="NAME", help="Files of the folder, without .yaml; default all.")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="A run of every method with each.")
    add("--output", metavar="OUTPUT", help="Folder of the runs and the table; default runs/ and the folder's name.")
    add("--jobs", type=int, default=1, metavar="N", help="Runs at a time; they share the cores.")
    add("--until", type=float, metavar="VALUE", help="A column with the seconds until the metric is as good as this.")
    add("--only-collect", action="store_true", help="Start no run.")
    add("--overwrite", action="store_true", help="Do runs again that are there with other settings.")


def _run(options: TableOptions, method: str, seed: int, config: RunConfig) -> TableRun:
    from scatterbrain.training.table_run import TableRun

    output = str(options.output / f"{method}-{seed}")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed), output=output)
    return TableRun(method, seed, config)


def _config(arguments: list[str], method: str) -> RunConfig:
    """A run's settings; errors name its method."""
    from scatterbrain.cli.train import parse_run_config

    try:
        return parse_run_config(arguments)
    except ValueError as error:
        error.args = (f"{method}: {error}",)
        raise


def _refuse(message: str) -> None:
    print(f"scatterbrain table: {message}; see scatterbrain table --help", file=sys.stderr)
    raise SystemExit(2)
