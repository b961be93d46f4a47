"""Builds csrc/cuda for the host (csrc/emulator) and lets the registered operators run it on CPU tensors."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from build_cache import contents, digest, made_once
from testkit import ROOT

CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
# -O2 halves the time of the tests; -g0 that of the compiler. The operators' build has the same version of torch's ABI.
FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fvisibility=hidden"]
FLAGS += ["-DSB_EMULATOR", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
STATISTICS = ("launches", "blocks", "barriers", "shuffles", "shared_accesses", "bank_conflicts", "copied_bytes")


def sources(csrc: Path = CSRC) -> list[Path]:
    return sorted([*csrc.glob("cuda/*.cu"), *csrc.glob("cuda/*.cpp"), *csrc.glob("emulator/*.cpp")])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-8000:]}")


def _compile(source: Path, flags: Sequence[str]) -> Path:
    """The object of a source."""
    includes = ["-isystem", str(Path(torch.__file__).parent / "include")]
    key = digest(*contents(source), *flags, *COMPILER, torch.__version__)
    command = [*COMPILER, *flags, *includes, "-x", "c++", "-c", str(source), "-o"]
    return made_once(CACHE / f"{source.name}-{key}.o", lambda path: _run([*command, str(path)]))


def build(csrc: Path = CSRC, kernel_flags: Sequence[str] = ()) -> Path:
    """The library of the sources in ``csrc``, with further flags for the kernels."""
    flags = {".cu": [*FLAGS, *kernel_flags], ".cpp": FLAGS}
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
        objects = list(pool.map(lambda source: _compile(source, flags[source.suffix]), sources(csrc)))
    folder = Path(torch.__file__).parent / "lib"
    command = [*COMPILER, "-shared", *map(str, objects), f"-L{folder}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder}"]
    library = CACHE / f"emulator-{digest(*(path.name for path in objects))}.so"
    return made_once(library, lambda path: _run([*command, "-o", str(path)]))


class Exposed(ctypes.Structure):
    """Memory that a launch may access (sb::emulator::Exposed)."""

    _fields_ = [(name, ctypes.c_int64) for name in ("begin", "end", "is_writable", "element")]


class Observed(ctypes.Structure):
    """A launch, as an observer sees it (sb::emulator::Observed)."""

    _fields_ = [("kernel", ctypes.c_char_p), ("function", ctypes.c_void_p), ("params", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int64) for name in ("param_bytes", "blocks", "threads", "shared_bytes")]
    _fields_ += [("exposed", ctypes.POINTER(Exposed)), ("exposed_count", ctypes.c_int64)]


OBSERVER = ctypes.CFUNCTYPE(None, ctypes.POINTER(Observed), ctypes.c_int32)


class Emulator:
    """A loaded library. Tensors of its calls are on the CPU."""

    device = torch.device("cpu")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.sb_emulator_symbol_value.restype = ctypes.c_int64
        self._library.sb_emulator_launchers_bytes.restype = ctypes.c_int64

    @contextmanager
    def installed(self) -> Iterator[Emulator]:
        """Inside, operators on CPU tensors run the CUDA launchers that exist; the others stay the CPU's."""
        operators, expected = torch.ops.scatterbrain, self._library.sb_emulator_launchers_bytes()
        got = operators.launchers_bytes() if hasattr(operators, "launchers_bytes") else "none"
        if got != expected:
            raise RuntimeError(
                f"the emulator is of other sources than the operators' library: expected a table of {expected} bytes, "
                f"got {got}; build the operators again: python setup.py build_ext --inplace"
            )
        self._library.sb_emulator_install(ctypes.c_int64(operators.launchers_address("cpu")))
        try:
            yield self
        finally:
            self._library.sb_emulator_remove()

    @contextmanager
    def observed(self, observer: Callable[[Observed, bool], None]) -> Iterator[None]:
        """Inside, ``observer(launch, is_after)`` is called before and after every launch. What it raises is raised at
        the end."""
        raised: list[BaseException] = []

        def call(launch: ctypes._Pointer, is_after: int) -> None:
            try:
                observer(launch.contents, bool(is_after))
            except BaseException as error:
                raised.append(error)

        kept = OBSERVER(call)
        self._library.sb_emulator_observe(kept)
        try:
            yield
        finally:
            self._library.sb_emulator_observe(None)
        if raised:
            raise raised[0]

    @contextmanager
    def limited_to(self, blocks: int) -> Iterator[None]:
        """Inside, a launch has at most so many blocks, which take several tasks each."""
        self._library.sb_emulator_limit_grid(ctypes.c_int64(blocks))
        try:
            yield
        finally:
            self._library.sb_emulator_limit_grid(ctypes.c_int64(2**31 - 1))

    def symbol(self, function: int) -> str:
        """Of a function of this library, by its address."""
        return self._symbols[self._library.sb_emulator_symbol_value(ctypes.c_void_p(function))]

    @cached_property
    def _symbols(self) -> dict[int, str]:
        command = ["nm", "--defined-only", str(self.path)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        rows = [line.split() for line in lines]
        return {int(row[0], 16): row[2] for row in rows if len(row) == 3 and row[1] in "tTwWuV"}

    def statistics(self) -> dict[str, int]:
        counts = (ctypes.c_int64 * len(STATISTICS))()
        self._library.sb_emulator_statistics(counts)
        return dict(zip(STATISTICS, counts))
