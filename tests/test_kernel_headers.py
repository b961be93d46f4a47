"""The headers of the kernels and of the algebra that devices share: each compiles alone, and none needs torch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
PATTERNS = (
    "params.h",
    "math/*.h",
    "cpu/kernels.h",
    "cpu/tuning.h",
    "cpu/kernels/*.h",
    "cuda/params.h",
    "cuda/kernels.h",
)
HEADERS = sorted(str(path.relative_to(CSRC)) for pattern in PATTERNS for path in CSRC.glob(pattern))
SYSTEM_HEADERS = {"cstdint", "immintrin.h"}

pytestmark = pytest.mark.skipif(not HEADERS, reason="needs the source tree, not only the installed package")


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("header", HEADERS)
def test_a_header_compiles_alone(header):
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fsyntax-only"]
    command = [*COMPILER, *flags, "-I", str(CSRC), "-x", "c++", "-"]
    run = subprocess.run(command, input=f'#include "{header}"\n', capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs Clang")
@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("cpu/kernels_*.cpp")))
def test_clang_reads_the_kernels_of_every_instruction_set(source):
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fsyntax-only"]
    command = ["clang++", *flags, "-I", CSRC, CSRC / "cpu" / source]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_includes_nothing_of_torch(header):
    """Only system headers and other headers of this list, to which the same applies."""
    path = CSRC / header
    for kind, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        if kind == "<":
            assert name in SYSTEM_HEADERS
        else:
            assert os.path.relpath((path.parent / name).resolve(), CSRC) in HEADERS
