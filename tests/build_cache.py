"""What tests compile is kept in build/ under a name that says what it is made from, and is made once, also by several
test processes at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path


def digest(*parts: str | bytes) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(part if isinstance(part, bytes) else part.encode())
    return made.hexdigest()[:24]


def read_by(source: Path, seen: set[Path]) -> set[Path]:
    """The source and every header of ours that it includes."""
    if source not in seen and source.exists():
        seen.add(source)
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', source.read_text(), re.MULTILINE):
            read_by((source.parent / name).resolve(), seen)
    return seen


def contents(source: Path) -> list[bytes]:
    """Of the source and of every header of ours that it includes, in an order that is the same wherever they lie."""
    return sorted(path.read_bytes() for path in read_by(source.resolve(), set()))


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """The file, after ``make(file to write)`` if there is none yet."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits, and finds it made
        if not path.exists():
            partial = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
            make(partial)
            partial.rename(path)
    return path
