"""The processes of a table that do its runs side by side."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from scatterbrain.training.interrupt import StopRequest

if TYPE_CHECKING:
    from scatterbrain.training.table_run import TableRun

_CLOSE_SECONDS = 10.0

Do = Callable[["TableRun", StopRequest], "signal.Signals | None"]
"""Does a run; the signal that stopped it, or None."""


class Worker:
    """A process that does the runs it is sent, one at a time. It stops after its step when the table's process is gone,
    however that ended.

    Args:
        do: a function of a module, which the process can import.

    ``run`` is what it does, None while it waits. ``has_crashed`` says whether the last run ended with the process.
    """

    def __init__(self, do: Do) -> None:
        context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, do), daemon=True)
        self.process.start()
        other.close()
        self.run: TableRun | None = None
        self.has_crashed = False
        self._told = False

    def start(self, run: TableRun) -> None:
        self.run = run
        self.connection.send(run)

    def collect(self) -> TableRun | None:
        """The run, if it has ended."""
        if self.run is None or (self.process.is_alive() and not self.connection.poll()):
            return None
        try:
            self.connection.recv()
        except (EOFError, OSError):
            self.has_crashed = True
            self.process.join()
        run, self.run = self.run, None
        return run

    def stop(self) -> None:
        """Asks once for the end of the step: a second signal would end it at once."""
        if not self._told and self.process.is_alive():
            self.process.terminate()
        self._told = True

    def close(self) -> None:
        self.connection.close()
        if self.run is None:
            self.process.join(_CLOSE_SECONDS)
        self.process.kill()


def _work(connection: Connection, do: Do) -> None:
    """What a process does until its pipe is closed."""
    os.setsid()  # Ctrl-C reaches the table alone, which asks every run to stop once
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    while True:
        try:
            run = connection.recv()
        except (EOFError, OSError):
            return
        with open(run.output, "a", encoding="utf-8", buffering=1) as output:
            sys.stdout = sys.stderr = output
            with StopRequest() as stop:
                stopped_by = do(run, stop)
            if stopped_by is not None:
                print(f"stopped by {stopped_by.name}; the next call of the table goes on with what is saved")
        try:
            connection.send(None)
        except OSError:  # the table is gone
            return
        if stopped_by is not None:
            return


def _stop_without_parent() -> None:
    """Nobody would start the next run, and the table of the next call could not have this one. A table that has asked
    already is not asked for again: a second signal would end the step unsaved."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    if not StopRequest.is_asked():
        os.kill(os.getpid(), signal.SIGTERM)
