"""Faults that are planted into a copy of the kernels, for tests that must notice them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from emulated import CSRC, Emulator, build

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

    def assert_caught(
        self,
        file: str,
        old: str,
        new: str,
        complaint: str,
        first_complaint: Callable[[Emulator], str],
        flags: Sequence[str] = BFLOAT16,
    ) -> None:
        """That with a fault, as :meth:`planted` takes it, what ``first_complaint`` finds begins as the pattern
        ``complaint`` says; it finds "" where there is nothing to complain of."""
        with self.planted(file, old, new):
            found = first_complaint(Emulator(build(self.csrc, flags)))
        assert re.match(complaint, found), found or "nothing was noticed"
