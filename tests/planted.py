"""Faults that are planted into a copy of the kernels, for tests that must notice them. Every fault takes a build of its
own, so tests plant one in three: which ones changes with the sources, so that changes of them meet all in turn. ``make
faults`` plants them all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from build_cache import digest
from emulated import CSRC, Emulator, build

# Of builds with a fault: the types of one test, and little optimisation, are compiled in a hurry.
FLOAT = ("-DSB_ONLY_FLOAT", "-O1", "-Wno-error")
BFLOAT16 = ("-DSB_ONLY_BFLOAT16", "-O1", "-Wno-error")
ALL = os.environ.get("SCATTERBRAIN_FAULTS") == "all"
TURNS = 3


class Kernels:
    """A copy of what the emulator is built from, in ``csrc``."""

    def __init__(self, folder: Path) -> None:
        self.csrc = folder / "csrc"
        for name in (".", "math", "cuda", "emulator"):
            (self.csrc / name).mkdir(parents=True, exist_ok=True)
            for path in (CSRC / name).glob("*.*"):
                shutil.copy(path, self.csrc / name / path.name)
        self._turn = _turn_of(*(path.read_bytes() for path in sorted((self.csrc / "cuda").iterdir())))

    @contextmanager
    def planted(self, file: str, old: str, new: str) -> Iterator[Path]:
        """Inside, ``new`` stands in a file of csrc/cuda in place of ``old``, which must be there once."""
        path = self.csrc / "cuda" / file
        text = self._fitting(file, old)
        path.write_text(text.replace(old, new))
        try:
            yield path
        finally:
            path.write_text(text)

    def _fitting(self, file: str, old: str) -> str:
        """The text of the file, in which ``old`` must be once."""
        text = (self.csrc / "cuda" / file).read_text()
        assert text.count(old) == 1, f"the fault no longer fits {file}"
        return text

    def skip_in_turn(self, file: str, old: str, new: str) -> None:
        """Skips the test of a fault, which has to fit all the same, unless it is its turn."""
        self._fitting(file, old)
        if not ALL and _turn_of(file, old, new) != self._turn:
            pytest.skip(f"one fault in {TURNS} is planted; make faults plants all")

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
        self.skip_in_turn(file, old, new)
        with self.planted(file, old, new):
            found = first_complaint(Emulator(build(self.csrc, flags)))
        assert re.match(complaint, found), found or "nothing was noticed"


def _turn_of(*parts: str | bytes) -> int:
    return int(digest(*parts), 16) % TURNS
