"""Files that are written after minutes of measuring."""

from __future__ import annotations

import os
from pathlib import Path

from scatterbrain.version import __version__

IS_FOLDER = "it is a folder"
PICTURE = {"Software": f"scatterbrain {__version__}"}  # in the text of a PNG, by which it is known again


def why_not_written(file: Path, is_replaced: bool = False) -> str | None:
    """Why a file cannot be written, as far as that can be told before; None where nothing is known. ``is_replaced``:
    whether another file takes the place of one that is there, which its folder has to let happen."""
    try:
        if file.is_dir():
            return IS_FOLDER
        if file.exists() and not os.access(file, os.W_OK):
            return "it may not be written to"
        if file.exists() and not is_replaced:
            return None
        folder = next((parent for parent in file.absolute().parents if parent.exists()), None)
    except OSError as error:  # of names that are too long
        return error.strerror
    if folder is None or (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return None
    return f"the folder {folder} may not be written to" if folder.is_dir() else f"{folder} is no folder"


def is_own_picture(file: Path) -> bool:
    """Whether a PNG was written with PICTURE, by any release.

    Raises:
        OSError: a file that cannot be read.
    """
    with file.open("rb") as opened:
        begin = opened.read(4096)
    return begin.startswith(b"\x89PNG\r\n\x1a\n") and b"tEXtSoftware\0scatterbrain " in begin
