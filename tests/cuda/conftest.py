"""The emulator is built once for all tests of this folder."""

from __future__ import annotations

import shutil

import pytest
from emulated import COMPILER, CSRC, Emulator, build


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    if not CSRC.is_dir():
        pytest.skip("needs the source tree, not only the installed package")
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("needs a C++ compiler")
    return Emulator(build())
