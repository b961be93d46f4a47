"""nvcc compiles every kernel for the architectures of a default build, none spills, and docs/gpu.md lists them."""

from __future__ import annotations

import re

import pytest
from cuda_resources import SOURCES, nvcc, resources
from testkit import ROOT

pytestmark = pytest.mark.skipif(not SOURCES, reason="needs the source tree, not only the installed package")


@pytest.mark.skipif(
    nvcc() is None, reason="needs nvcc: on PATH, in /usr/local/cuda/bin or of the package nvidia-cuda-nvcc"
)
def test_every_kernel_compiles_without_spills_and_is_in_the_documentation() -> None:
    table = resources()
    assert all(spilled == 0 for of in table.values() for _, spilled in of.values())
    assert all(used <= 255 for of in table.values() for used, _ in of.values())
    listed = re.findall(r"^\| `([^`]+)` \| \d+, \d+ \|", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(listed), "python tests/cuda_resources.py prints the table anew"


def test_no_kernel_file_knows_torch() -> None:
    for path in (ROOT / "csrc" / "cuda").glob("*.cu*"):
        assert "torch" not in path.read_text()
