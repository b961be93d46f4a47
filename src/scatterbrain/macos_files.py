"""What macOS leaves beside the files of a user."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import TypeVar

AnyPath = TypeVar("AnyPath", bound=PurePath)


def without_macos_files(names: Iterable[AnyPath]) -> list[AnyPath]:
    """Paths below a folder or inside an archive, without ``._NAME``, which holds the properties of NAME and matches the
    patterns that NAME does, and without ``__MACOSX``, the folder of these in an archive: its name would be a class."""
    return [name for name in names if "__MACOSX" not in name.parts and not name.name.startswith("._")]
