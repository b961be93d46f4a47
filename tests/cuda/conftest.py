"""The emulator is built once for all tests of this folder, and the kernels are copied once for faults."""

from __future__ import annotations

import shutil

import pytest
from emulated import COMPILER, CSRC, Emulator, build
from planted import Kernels


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    if not CSRC.is_dir():
        pytest.skip("needs the source tree, not only the installed package")
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("needs a C++ compiler")
    return Emulator(build())


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("planted"))
