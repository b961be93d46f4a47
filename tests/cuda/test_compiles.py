"""nvcc compiles every kernel for the architectures of a default build, none spills, and docs/gpu.md says what they
need."""

from __future__ import annotations

import pytest
from cuda_compiler import NEEDS_NVCC, SOURCES, nvcc, release
from cuda_resources import MULTIPROCESSORS, TABLE, resident_warps, table
from emulated import Emulator
from testkit import ROOT

pytestmark = pytest.mark.skipif(not SOURCES, reason="needs the source tree, not only the installed package")


@pytest.mark.skipif(nvcc() is None, reason=NEEDS_NVCC)
def test_every_kernel_compiles_without_spills_and_is_in_the_documentation(emulator: Emulator) -> None:
    needed, listed = table(emulator), TABLE.read()
    for row in needed[2:]:
        for of_architecture in row.strip("| ").split(" | ")[3:]:
            registers, spilled, warps = map(int, of_architecture.split(", "))
            assert registers <= 255 and spilled == 0 and warps > 0, row
    if release() != "13.0":  # another compiler takes other registers
        needed, listed = ([row.split(" | ")[:3] for row in rows] for rows in (needed, listed))
    assert needed == listed, "python tests/cuda_resources.py writes the table anew"


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared_bytes", "warps"),
    [  # by NVIDIA's occupancy calculator
        ("80", 128, 32, 0, 64),
        ("80", 128, 33, 0, 48),
        ("90", 256, 168, 0, 8),
        ("80", 128, 255, 0, 8),
        ("80", 128, 64, 48 << 10, 12),
        ("90", 128, 64, 48 << 10, 16),
        ("90", 32, 16, 0, 32),
    ],
)
def test_warps_of_a_multiprocessor(
    architecture: str, threads: int, registers: int, shared_bytes: int, warps: int
) -> None:
    assert resident_warps(MULTIPROCESSORS[architecture], threads, registers, shared_bytes) == warps


def test_no_kernel_file_knows_torch() -> None:
    for path in (ROOT / "csrc" / "cuda").glob("*.cu*"):
        assert "torch" not in path.read_text()
