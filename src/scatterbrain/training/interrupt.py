"""SIGINT and SIGTERM as a request to stop between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

from scatterbrain.training.processes import Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = (
    5.0  # seconds in which further signals are those of torchrun, which passes on what the terminal has sent already
)


def stopped_by(number: signal.Signals) -> str:
    """Why something has stopped, for people."""
    return f"stopped by {number.name}" + (": nobody reads what it prints any more" if number == signal.SIGPIPE else "")


class StopRequest:
    """While active, takes the first SIGINT or SIGTERM for a request; a second one acts as usual, with several processes
    after five seconds. Outside the main thread, where Python allows no signal handlers, every signal acts as usual. One
    inside another takes on what the other was asked before.

    Args:
        processes: that stop together, whichever of them was asked.

    ``signal`` is what :meth:`check` has found, None before.
    """

    _innermost: StopRequest | None = None

    def __init__(self, processes: Processes = Processes()) -> None:
        self.signal: signal.Signals | None = None
        self._processes = processes
        self._received, self._when = 0, 0.0
        self._previous: dict[signal.Signals, object] = {}
        self._outer: StopRequest | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
            self._outer, StopRequest._innermost = StopRequest._innermost, self
            if self._outer is not None:
                self._received, self._when = self._outer._received, self._outer._when
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if StopRequest._innermost is self:
            StopRequest._innermost = self._outer
        self._restore()

    def ask_as_unread(self) -> None:
        """Requests a stop as nobody reads what is printed any more, which ends most programs by this signal."""
        request: StopRequest | None = self
        while request is not None:
            request._received = request._received or signal.SIGPIPE
            request = request._outer

    @classmethod
    def is_asked(cls) -> bool:
        """Whether a signal has come to the innermost request that is active; for any thread of this process alone."""
        return cls._innermost is not None and cls._innermost._received != 0

    def check(self) -> bool:
        """Whether to stop now. All processes must call it, and all get the same answer."""
        if self.signal is None:
            (number,) = self._processes.largest(self._received)
            self.signal = signal.Signals(int(number)) if number else None
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received and self._processes.are_several and time.monotonic() - self._when < GRACE:
            return
        is_first, self._when = not self._received, time.monotonic()
        self._received = self._received or number
        if self._outer is not None:  # whose handler a second signal may reach
            self._outer._received, self._outer._when = self._received, self._when
        if not is_first or not self._processes.are_several:
            self._restore()
        if not is_first:
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
