"""What the tests of executor B share: the launches of all calls, and nvcc's PTX."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_resources import SOURCES, nvcc
from emulated import Emulator
from ptx_calls import CALLS, DTYPES
from ptx_replay import TARGETS, Library, Recorded, ptx, recorded


@pytest.fixture(scope="session")
def launches(emulator: Emulator) -> dict[tuple[str, torch.dtype], list[Recorded]]:
    """Of every call and type of tokens."""
    found = {}
    for name, call in CALLS.items():
        for dtype in DTYPES:
            with recorded(emulator) as found[name, dtype]:
                call(dtype)
    return found


@pytest.fixture(scope="session")
def libraries() -> dict[str, Library]:
    """The kernels of every target, compiled once."""
    if nvcc() is None:
        pytest.skip("needs nvcc: none on PATH, in /usr/local/cuda/bin or of the package nvidia-cuda-nvcc")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: ptx(*job), [(source, target) for source in SOURCES for target in TARGETS]))
    return {target: Library(target) for target in TARGETS}
