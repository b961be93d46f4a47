"""docs/gpu.md says what calls on a GPU allocate, and that grows with the tokens alone."""

from __future__ import annotations

import cuda_memory
import pytest
from emulated import Emulator


def test_the_documentation_says_what_calls_allocate(emulator: Emulator) -> None:
    assert cuda_memory.table(emulator) == cuda_memory.TABLE.read(), "python tests/cuda_memory.py writes the table anew"


def test_bytes_per_token_stay_the_same_on_more_tokens(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    few = cuda_memory.figures(emulator)
    monkeypatch.setattr(cuda_memory, "TOKENS", 4 * cuda_memory.TOKENS)
    many = cuda_memory.figures(emulator)
    for call, columns in few.items():
        for before, now in zip(columns, many[call], strict=True):
            assert all(b <= 1.02 * a for a, b in zip(before, now, strict=True)), (call, before, now)
