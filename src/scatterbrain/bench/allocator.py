"""What the C library does with memory that a method freed."""

from __future__ import annotations

import ctypes

ALLOCATORS = ("keep", "system")
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # parameters of glibc's mallopt


def keep_freed_memory() -> bool:
    """Asks glibc to keep freed memory in this process from now on: what one method gives back to the system, another
    gets again page by page, in its own time.

    Returns:
        Whether the C library can do that.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, 1 << 30), mallopt(_TOP_PAD, 1 << 26)])
