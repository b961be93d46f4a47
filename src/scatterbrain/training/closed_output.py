"""What a run prints when nobody reads it any more, as behind ``| head -3`` or after its terminal was closed."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO, TypeVar

Result = TypeVar("Result")


def shown(show: Callable[[], Result], unread: Callable[[], object] = lambda: None) -> Result:
    """What ``show`` returns, which prints. Into a pipe that nobody reads any more, or a terminal that was closed, it
    prints nothing from then on: the error would be one like that of a file, and end a run wherever it is.

    Args:
        show: is called a second time where it could not print.
        unread: is called then.
    """
    try:
        return show()
    except OSError as error:
        if not _is_unread(error):
            raise
        _silence()
        unread()
        return show()


def say(text: str, unread: Callable[[], object] = lambda: None) -> None:
    """Prints a line at once, as :func:`shown` does."""
    shown(lambda: print(text, flush=True), unread)


def _is_unread(error: OSError) -> bool:
    """A pipe without a reader is EPIPE, a terminal that was closed EIO."""
    return error.errno in (errno.EPIPE, errno.EIO)


def _silence() -> None:
    """What is still in the buffer of a closed stream would be an error again, the last time as Python exits."""
    names = [name for name in ("stdout", "stderr") if _is_closed(getattr(sys, name))]
    for name in names or ("stdout", "stderr"):
        nowhere = open(os.devnull, "w", encoding="utf-8")
        try:
            os.dup2(nowhere.fileno(), getattr(sys, name).fileno())
        except (OSError, ValueError):  # a stream without a descriptor
            setattr(sys, name, nowhere)
        else:
            nowhere.close()


def _is_closed(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are told of always
        return bool(poll.poll(0))
    except (OSError, ValueError):  # no descriptor
        return _cannot_flush(stream)


def _cannot_flush(stream: TextIO) -> bool:
    try:
        stream.flush()
    except OSError as error:
        return _is_unread(error)
    return False
