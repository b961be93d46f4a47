"""The output folder of a run, which one process at a time writes to, and atomic writing: a file is either the old one
or the new one, whole."""

from __future__ import annotations

import dataclasses
import errno
import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None


class UnusableRun(ValueError):
    """An output folder, or a file in it, that a run cannot use."""

    exit_code = 2


class FolderInUse(UnusableRun):
    """An output folder that another process writes to."""


def output_folder(path: str | Path) -> Path:
    """The path of an output folder, in which ~ is the user's own.

    Raises:
        ValueError: ~ stands before the name of a user who has no folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"output: expected a folder, got {str(path)!r}: {error}; write the whole path") from error


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        return self.path / "data.txt"

    @property
    def initial_weights(self) -> Path:
        return self.path / "initial_weights.txt"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def table(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def results(self) -> tuple[Path, ...]:
        """Every file but the settings that a run may leave; the log first, by which others judge the run."""
        last = (self.exact_metrics, self.loss_curve, self.sample, self.comparison)
        return (self.metrics, self.checkpoint, self.best, self.table, self.initial_weights, *last)

    @property
    def board(self) -> Path:
        return self.path / "tensorboard"

    @property
    def exact_metrics(self) -> Path:
        return self.path / "exact_metrics.jsonl"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss.png"

    @property
    def sample(self) -> Path:
        return self.path / "sample.txt"

    @property
    def comparison(self) -> Path:
        return self.path / "comparison.txt"


class FolderLock:
    """Keeps other processes' runs out of a folder until :meth:`release`, or until the process ends, however it does. No
    file is left behind. File systems without locks are used without.

    Raises:
        FolderInUse: another run holds the folder.
    """

    def __init__(self, path: Path) -> None:
        self.release = lambda: None
        if fcntl is None:
            return
        descriptor = os.open(path, os.O_RDONLY)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise FolderInUse(
                    f"output: another run is writing to {path}; wait for its end, stop it, or choose another folder "
                    "with --output"
                ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file by ``content``, or leaves it as it was: the content is written and synced to a file beside it,
    which is then renamed.

    Raises:
        OSError: if the content cannot be written, on a full disk for example; the partial file is removed.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def sync(path: Path) -> None:
    """Makes what was written to the file survive a power cut. A file that does not exist is made.

    Raises:
        OSError: if the content cannot be written, on a full disk for example.
    """
    with open(path, "ab") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, on systems that can open a folder."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
