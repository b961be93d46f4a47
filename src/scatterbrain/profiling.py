"""Where the time of the operators goes, stage by stage: ``with sb.profile() as p: ...; print(p)``, or the environment
variable ``SCATTERBRAIN_PROFILE=1``, which prints the table of the whole process when it ends."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from scatterbrain.operators import library  # noqa: F401  (loads the operators)

VARIABLE = "SCATTERBRAIN_PROFILE"


@dataclass
class StageTimes:
    """Time of one stage.

    Args:
        calls: how often it ran.
        seconds: on the CPU wall-clock time of the thread that launched it, a parallel loop counting as a whole, without
            the time of stages inside it; of a kernel on a GPU the time between two events around it on its stream,
            which is at least that of starting it where the device waits for the host.
    """

    calls: int
    seconds: float


@dataclass
class Profile:
    """The stages that ran, in the order in which they first did; ``print(profile)`` shows them as a table. On a GPU
    every kernel is a stage of its name, unless a graph replays it.

    Args:
        total: seconds between the start and the end of recording.
        stages: by name. What of ``total`` is in no stage was spent outside the operators: Python, autograd, the rest of
            the model.
    """

    total: float = 0.0
    stages: dict[str, StageTimes] = field(default_factory=dict)

    def __str__(self) -> str:
        outside = self.total - sum(stage.seconds for stage in self.stages.values())
        rows = [("stage", "calls", "ms", "share")]
        for name, stage in (*self.stages.items(), ("outside the operators", StageTimes(0, outside))):
            share = f"{stage.seconds / self.total:.1%}" if self.total else ""
            rows.append((name, str(stage.calls or ""), f"{stage.seconds * 1e3:.2f}", share))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(
            "  ".join((row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))))
            for row in rows
        )


@contextmanager
def profile() -> Iterator[Profile]:
    """Records the stages of scatterbrain's operators in the block; one recording at a time, of all threads. Waits for
    a GPU that is in use before the first call and after the last one.

    Yields:
        :class:`Profile`, filled when the block ends.

    Example:
        >>> with sb.profile() as p:
        ...     model(batch).sum().backward()
        >>> print(p)
    """
    _wait_for_devices()
    result, start = Profile(), time.perf_counter()
    torch.ops.scatterbrain.stages(True)
    try:
        yield result
    finally:
        _wait_for_devices()
        text = torch.ops.scatterbrain.stages(False)
        result.total = time.perf_counter() - start
        for line in text.splitlines():
            name, calls, nanoseconds = line.split("\t")
            result.stages[name] = StageTimes(int(calls), int(nanoseconds) * 1e-9)


def _wait_for_devices() -> None:
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)


def profile_process() -> None:
    """Records from now on and prints the table to standard error when the process ends, if SCATTERBRAIN_PROFILE
    asks."""
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return
    recording = profile()
    result = recording.__enter__()

    def finish() -> None:
        recording.__exit__(None, None, None)
        print(result, file=sys.stderr)

    atexit.register(finish)
