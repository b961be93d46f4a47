"""Every test starts from the same seed and leaves torch's settings as it found them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# OpenMP reads this when torch is loaded. Threads that spin between small kernels slow the tests down several times
# where other programs want the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


def pytest_collection_finish() -> None:
    """What collection made stays to the end: thousands of tests, which the garbage collector need not walk again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _calibration_on_few_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests calibrate on a few tokens; those of the warning are marked."""
    if request.node.get_closest_marker("counts_tokens") is None:
        monkeypatch.setattr("scatterbrain.nn.observed.FEWEST_TOKENS", 0)


@pytest.fixture(autouse=True)
def _seed_and_settings() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
