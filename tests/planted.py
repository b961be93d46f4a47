"""Faults that are planted into a copy of the kernels, for tests that must notice them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emulated import CSRC

# Of builds with a fault: the types of one test, and little optimisation, are compiled in a hurry.
FLOAT = ("-DSB_ONLY_FLOAT", "-O1", "-Wno-error")
BFLOAT16 = ("-DSB_ONLY_BFLOAT16", "-O1", "-Wno-error")


class Kernels:
    """A copy of what the emulator is built from, in ``csrc``."""

    def __init__(self, folder: Path) -> None:
        self.csrc = folder / "csrc"
        for name in (".", "math", "cuda", "emulator"):
            (self.csrc / name).mkdir(parents=True, exist_ok=True)
            for path in (CSRC / name).glob("*.*"):
                shutil.copy(path, self.csrc / name / path.name)

    @contextmanager
    def planted(self, file: str, old: str, new: str) -> Iterator[Path]:
        """Inside, ``new`` stands in a file of csrc/cuda in place of ``old``, which must be there once."""
        path = self.csrc / "cuda" / file
        text = path.read_text()
        assert text.count(old) == 1, f"the fault no longer fits {file}"
        path.write_text(text.replace(old, new))
        try:
            yield path
        finally:
            path.write_text(text)
