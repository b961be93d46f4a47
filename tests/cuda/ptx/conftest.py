"""What the tests of executor B share: the launches of all calls, and nvcc's PTX."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_compiler import NEEDS_NVCC, TARGETS, nvcc, of_all_sources, ptx_file
from emulated import Emulator
from ptx_calls import CALLS
from ptx_replay import Library, Recorded, recorded

Launches = Callable[[str, torch.dtype], list[Recorded]]


@pytest.fixture(scope="session")
def launches(emulator: Emulator) -> Launches:
    """Of a call and a type of tokens."""
    found: dict[tuple[str, torch.dtype], list[Recorded]] = {}

    def of(call: str, dtype: torch.dtype) -> list[Recorded]:
        if (call, dtype) not in found:
            with recorded(emulator) as found[call, dtype]:
                CALLS[call](dtype)
        return found[call, dtype]

    return of


@pytest.fixture(scope="session")
def libraries() -> dict[str, Library]:
    """The kernels of every target, compiled once."""
    if nvcc() is None:
        pytest.skip(NEEDS_NVCC)
    of_all_sources(lambda source, architecture: ptx_file(source, f"compute_{architecture}"))
    return {target: Library(target) for target in TARGETS}
