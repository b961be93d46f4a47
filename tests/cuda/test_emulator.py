"""The emulator on small kernels with one fault each (small_kernels.cu): every fault has its name, and what is right
passes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulated import COMPILER, CSRC, FLAGS, Emulator

PASS = ""
EXPECTED = {
    "shared_after_a_barrier": PASS,
    "shared_without_a_barrier_between_tasks": PASS,
    "shared_after_a_warps_barrier": PASS,
    "shared_of_another_warp_after_a_warps_barrier": "uninitialised shared memory",
    "shared_after_a_shuffle": "race",
    "shared_read_then_written": "race",
    "shared_read_by_two_warps_then_written": "race",
    "shared_of_the_block_before": "uninitialised shared memory",
    "shared_half_written": "uninitialised shared memory",
    "shared_beyond_its_end": "out of bounds",
    "shared_before_its_begin": "out of bounds",
    "shared_misaligned": "misaligned",
    "barrier_of_some": "divergent barrier",
    "barrier_in_two_branches": "divergent barrier",
    "barrier_more_often_by_some": "divergent barrier",
    "warp_barrier_of_some": "divergent warp",
    "shuffle_of_some": "divergent warp",
    "shuffle_by_different_masks": "divergent warp",
    "warp_barrier_against_a_block_barrier": "divergent warp",
    "global_after_a_barrier": PASS,
    "global_without_a_barrier": "race",
    "global_read_then_written": "race",
    "global_of_another_block": "race between blocks",
    "global_read_by_two_blocks_then_written": "race between blocks",
    "global_written_by_two_blocks": "race between blocks",
    "global_same_value_by_all": PASS,
    "global_same_value_by_all_then_read": "race between blocks",
    "global_of_the_launch_before": PASS,
    "global_unwritten": "uninitialised global memory",
    "global_beyond_its_end": "out of bounds",
    "global_across_its_end": "out of bounds",
    "global_misaligned": "misaligned",
    "global_input_written": "write to an input",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not CSRC.is_dir() or shutil.which(COMPILER[0]) is None:
        pytest.skip("needs the source tree and a C++ compiler")
    made = tmp_path_factory.mktemp("small") / "small_kernels.so"
    sources = [CSRC / "emulator" / name for name in ("emulator.cpp", "fiber.cpp")]
    sources.append(Path(__file__).with_name("small_kernels.cu"))
    command = [*COMPILER, *FLAGS, "-I", str(CSRC / "cuda"), "-shared", "-x", "c++", *map(str, sources), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    library = ctypes.CDLL(str(made))
    library.sb_complaint.restype = library.sb_kernels.restype = ctypes.c_char_p
    library.sb_complaint.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    return library


@pytest.mark.parametrize("kernel", EXPECTED)
def test_a_fault_is_caught_by_its_name_and_nothing_else_is(library: ctypes.CDLL, kernel: str) -> None:
    complaint = library.sb_complaint(kernel.encode(), 2).decode()
    assert complaint.split(":")[0] == EXPECTED[kernel], complaint
    assert not complaint or f"in kernel {kernel}, block " in complaint


def test_every_small_kernel_has_an_expectation(library: ctypes.CDLL) -> None:
    assert library.sb_kernels().decode().split() == sorted(EXPECTED)


@pytest.mark.parametrize("barrier", [True, False])
def test_a_block_that_takes_several_tasks_needs_a_barrier_between_them(library: ctypes.CDLL, barrier: bool) -> None:
    kernel = b"shared_after_a_barrier" if barrier else b"shared_without_a_barrier_between_tasks"
    assert library.sb_complaint(kernel, 1).decode().split(":")[0] == (PASS if barrier else "race")


@pytest.mark.parametrize("got", ["none", "8"])
def test_operators_of_other_sources_are_an_error_that_says_what_to_do(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, got: str
) -> None:
    """A table of other launchers would end the process."""
    with emulator.installed():
        pass
    operators = SimpleNamespace() if got == "none" else SimpleNamespace(launchers_bytes=lambda: int(got))
    monkeypatch.setattr(torch.ops, "scatterbrain", operators)
    with pytest.raises(RuntimeError, match=f"a table of [0-9]+ bytes, got {got}; build the operators again"):
        emulator.installed().__enter__()
