"""Jobs of benchmarks/device.sh in a process of their own: one that brings its process down, or hangs, is noted, and the
rest goes on in another process."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

from device_machine import Machine, reason

# By kind: the module and the function that does it, on a machine.
JOBS = {
    "smoke": ("device_smoke", "smoke_of"),
    "ceilings": ("device_table", "ceilings_of"),
    "setting": ("device_table", "setting_of"),
}


def serve(connection: Connection, device: str) -> None:
    """Answers jobs until told to stop. An error that leaves a CUDA context unusable ends the process."""
    machine = Machine(device)
    machine.tell = connection.send
    connection.send({"ready": True})
    while (job := connection.recv()) is not None:
        kind, arguments = job
        try:
            module, function = JOBS[kind]
            answer = getattr(importlib.import_module(module), function)(machine, **arguments)
            machine.synchronize()
        except Exception as error:  # the parent notes it
            answer = {"error": reason(error)}
        connection.send(answer)
        with contextlib.suppress(Exception):
            machine.synchronize()
            continue
        return


class Worker:
    """A process that is started again where a job has brought it down or was stopped.

    Attributes:
        at: what the last job was doing when it was heard of last.
    """

    def __init__(self, device: str) -> None:
        self.device, self.at, self._process, self._connection = device, "", None, None

    def ask(self, kind: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """What the job answers, or {"error": why it does not}."""
        deadline = time.monotonic() + limit
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, self.device), daemon=True)
            process.start()
            self._process = process
            theirs.close()
            started = self._receive(deadline)
            if "error" in started:
                return started
        try:
            self._connection.send((kind, arguments))
        except (BrokenPipeError, OSError):
            self.close()
            return {"error": "its process had ended"}
        return self._receive(deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        try:
            while self._connection.poll(max(0.0, deadline - time.monotonic())):
                answer = self._connection.recv()
                if "at" not in answer:
                    return answer
                self.at = answer["at"]
            answer = {"error": "stopped: it took too long"}
        except (EOFError, OSError):
            self._process.join(5)
            answer = {"error": f"its process ended with code {self._process.exitcode}"}
        self.close()
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None
