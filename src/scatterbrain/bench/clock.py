"""How long calls take on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

SAMPLE_SECONDS = 0.005  # a sample is repeated calls of at least this long, so that the clock does not count


class Clock(Protocol):
    """``name`` says what it counts."""

    name: str

    def seconds(self, calls: list[Callable[[], object]]) -> float:
        """Of the calls, one after another, all together."""
        ...


class HostClock:
    """Of the CPU. The CPU time of one thread does not count a busy machine; with more threads nothing but the wall
    clock says how long a call took."""

    def __init__(self, threads: int) -> None:
        self._now = time.thread_time if threads == 1 else time.perf_counter
        self.name = "CPU time of one thread" if threads == 1 else f"wall time, {threads} threads"

    def seconds(self, calls: list[Callable[[], object]]) -> float:
        start = self._now()
        for call in calls:
            call()
        return self._now() - start


class EventClock:
    """Of a GPU: the time between two CUDA events around the calls, on the current stream. The host runs ahead of the
    device, so it counts only where it is the slower of the two."""

    name = "CUDA events"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, calls: list[Callable[[], object]]) -> float:
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for call in calls:
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3


def clock_of(device: torch.device, threads: int = 1) -> Clock:
    return EventClock(device) if device.type == "cuda" else HostClock(threads)


def calls_of_a_sample(clock: Clock, call: Callable[[], object]) -> int:
    """How many calls take :data:`SAMPLE_SECONDS`, by one that is timed now."""
    return max(1, round(SAMPLE_SECONDS / max(clock.seconds([call]), 1e-7)))


def sets_beyond_cache(bytes_of_a_set: int, device: torch.device) -> int:
    """Sets of inputs to take in turn, so that none is in the second-level cache when its turn comes: together they are
    at least three times as large. One on the CPU, whose caches a call of another method empties."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-3 * cache // max(1, bytes_of_a_set)))
