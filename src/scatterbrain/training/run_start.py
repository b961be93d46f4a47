"""The output folder of a run before its first step: whose it is, what it holds, and the files that say what is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from scatterbrain.training.checkpoint import Progress, read_progress
from scatterbrain.training.config import RunConfig
from scatterbrain.training.files import FolderLock, RunFolder, UnusableRun, write_atomically
from scatterbrain.training.initial_weights import initial_fingerprint
from scatterbrain.training.run_log import Record, read_records
from scatterbrain.training.same_run import check_same_data, check_same_run, data_text
from scatterbrain.training.tasks.base import TaskData


def lock_folder(folder: RunFolder, config: RunConfig) -> FolderLock:
    """Makes the folder, and keeps other runs out of it.

    Raises:
        ValueError: there is no checkpoint to continue from.
        UnusableRun: another run holds the folder, or a file is in its way.
    """
    if config.resume is True and not folder.checkpoint.exists():
        raise ValueError(f"resume: expected a checkpoint at {folder.checkpoint}, found none; leave resume out to start")
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UnusableRun(
            f"output: expected a folder, or a path where one can be made, got {folder.path}, where a file is in the "
            "way; choose another with --output"
        ) from error
    return FolderLock(folder.path)


def progress_in(folder: RunFolder, config: RunConfig, description: dict[str, Any]) -> Progress | None:
    """What the run in the folder has come to, if it is to be continued.

    Args:
        folder: locked.
        config: of this start.
        description: of the run, as it is stored.

    Raises:
        ValueError: there is a run that is neither to be continued nor to be replaced.
        UnusableRun: its checkpoint cannot be read, or is that of a run with other settings.
    """
    found = folder.checkpoint.exists()
    if not config.resume and found and not config.overwrite:
        raise ValueError(
            f"output: {folder.path} already has a checkpoint; continue it with --resume true, replace it with "
            "--overwrite true, or choose another folder with --output"
        )
    if not (config.resume and found):
        return None
    progress = read_progress(folder.checkpoint)
    check_same_run(progress.config, description)
    return progress


def write_first_files(
    folder: RunFolder,
    config: RunConfig,
    description: dict[str, Any],
    data: TaskData,
    progress: Progress | None,
    say: Callable[[str], None],
) -> list[Record]:
    """Writes what the run is. Of a run that continues, its records are returned; what is left of another one is
    removed.

    Args:
        folder: locked.
        config: of this start.
        description: of the run, as it is stored.
        data: of its task.
        progress: of the run that is continued; None for a new one.
        say: prints a line.

    Raises:
        UnusableRun: the records cannot be read, or the data are not those that the run began with.
        OSError: a file cannot be written.
    """
    records = []
    if progress is not None:
        records = read_records(folder.metrics, progress.step)
        known = sum(record["kind"] == "train" for record in records)
        if known < progress.step:
            say(f"{folder.metrics} has records of {known} of {progress.step} steps; the others are not drawn")
        check_same_data(folder, data)
    else:
        source, fingerprint = config.train.initialize_from, ""
        if source is not None:
            if Path(source).expanduser().resolve() in {path.resolve() for path in folder.results}:
                raise UnusableRun(
                    f"train.initialize_from: expected a file that outlives the results in {folder.path}, which a new "
                    f"run removes, got {source}, one of them; choose another --output, or copy the file"
                )
            fingerprint = initial_fingerprint(source)
        # Before the new settings are written: a log must never stand beside settings that are not its own.
        for path in folder.results:
            path.unlink(missing_ok=True)
        shutil.rmtree(folder.board, ignore_errors=True)
        if source is not None:
            write_atomically(folder.initial_weights, fingerprint.encode())
    for name, content in getattr(data, "files", {}).items():
        write_atomically(folder.path / name, content)
    write_atomically(folder.data, data_text(data).encode())
    write_atomically(folder.config, yaml.safe_dump(description, sort_keys=False).encode())
    return records
