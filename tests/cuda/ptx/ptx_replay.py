"""Executor B: launches that the emulator (executor A) runs are recorded and replayed on nvcc's PTX of the same kernels,
on copies of the same memory, and what both have written is compared."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cuda_compiler import SOURCES, kernel_name, ptx_file
from emulated import Emulator, Observed
from ptx_machine import Buffer, Prepared, PtxFault
from ptx_program import entry_names, read_kernels

# torch's numbers of the scalar types that launchers use.
TYPES = {0: torch.uint8, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32, 7: torch.float64}
TYPES |= {1: torch.int8, 2: torch.int16, 11: torch.bool, 15: torch.bfloat16}
# What a launcher allocates as such bytes is working memory of a kernel, with numbers of several types: what is left in
# it is no result and is not compared.
WORKING_MEMORY = torch.int8
# How far the executors may differ, as a share of the number and of the usual size of the buffer's numbers: they round
# some sums in different places.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 1e-5, torch.bfloat16: 1e-5, torch.int16: 1e-5}
# Numbers of 16 bits that lie between two steps may fall to either side, in few places. Whole ones of 16 bits are
# multiples of a row's unit, rounded from products of such numbers, and may lie one unit apart anywhere.
STEPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.int16: 2.0**-7}
SHARE_OF_OTHER_STEPS = 0.02


# -------------------- PTX


class Library:
    """The kernels of some sources for a target; decoded when they are first run."""

    def __init__(self, target: str, sources: Sequence[Path] = SOURCES) -> None:
        self.target = target
        texts = [ptx_file(source, target).read_text() for source in sources]
        self._texts = {name: text for text in texts for name in entry_names(text)}
        self._prepared: dict[str, Prepared] = {}

    def names(self) -> list[str]:
        return sorted(self._texts)

    def kernel(self, name: str) -> Prepared:
        if name not in self._prepared:
            self._prepared[name] = Prepared(read_kernels(self._texts[name], [name])[name])
        return self._prepared[name]


# -------------------- launches


@dataclass
class Recorded:
    """A launch that executor A has run."""

    kernel: str  # its symbol, which is the name of its .entry too
    blocks: int
    threads: int
    shared_bytes: int
    params: bytes
    ranges: list[tuple[int, int, bool, torch.dtype]]  # begin, end, may it be written, of what numbers
    before: dict[int, bytes]  # by address, of memory that does not overlap
    after: dict[int, bytes] = field(default_factory=dict)

    def buffers(self) -> list[Buffer]:
        """Copies of the memory, as it was before the launch."""
        made = []
        for address, content in self.before.items():
            permissions = bytearray(len(content))
            for begin, end, is_writable, _ in sorted(self.ranges, key=lambda one: one[2]):
                if address <= begin and end <= address + len(content):
                    permissions[begin - address : end - address] = bytes([3 if is_writable else 1]) * (end - begin)
            made.append(Buffer(address, bytearray(content), bytes(permissions)))
        return made


def _unions(ranges: list[tuple[int, int, bool, torch.dtype]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end, *_ in sorted(ranges, key=lambda one: one[:2]):
        if merged and begin < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


@contextmanager
def recorded(emulator: Emulator) -> Iterator[list[Recorded]]:
    """The launches that operators start inside, with registered operators run by the emulator."""
    launches: list[Recorded] = []
    held: dict[int, bytes] = {}

    def content(address: int, size: int) -> bytes:
        """Of memory; the same object as last time where it is unchanged, since launches in turn share most of it."""
        now = ctypes.string_at(address, size)
        if held.get(address) != now:
            held[address] = now
        return held[address]

    def observe(seen: Observed, is_after: bool) -> None:
        if is_after:
            launches[-1].after = {at: content(at, len(before)) for at, before in launches[-1].before.items()}
            return
        given = [seen.exposed[i] for i in range(seen.exposed_count)]
        ranges = [(one.begin, one.end, bool(one.is_writable), TYPES[one.element]) for one in given]
        before = {begin: content(begin, end - begin) for begin, end in _unions(ranges)}
        params = ctypes.string_at(seen.params, seen.param_bytes)
        name = emulator.symbol(seen.function)
        launches.append(Recorded(name, seen.blocks, seen.threads, seen.shared_bytes, params, ranges, before))

    with emulator.installed(), emulator.observed(observe):
        yield launches


# -------------------- comparison


def _numbers(memory: dict[int, bytes], begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    at = max(address for address in memory if address <= begin)
    return torch.frombuffer(bytearray(memory[at][begin - at : end - at]), dtype=dtype)


def difference(want: torch.Tensor, got: torch.Tensor) -> str:
    """What differs by more than rounding, or nothing."""
    dtype = want.dtype
    if dtype not in TOLERANCES:
        wrong = want != got
        steps = None
    else:
        a, b = want.double(), got.double()
        far = (a - b).abs()
        same = (a == b) | (a.isnan() & b.isnan()) | ((far <= 1) & (dtype == torch.int16))
        usual = a[a.isfinite() & (a.abs() < 1e20)]
        size = float(usual.square().mean().sqrt()) if usual.numel() else 0.0
        near = far <= TOLERANCES[dtype] * (a.abs() + size)
        if dtype in STEPS:
            steps = ~same & (far <= STEPS[dtype] * (a.abs() + size / 2))  # those of weights show in small sums
            if int(steps.sum()) > max(2, SHARE_OF_OTHER_STEPS * want.numel()):
                return f"rounding: {int(steps.sum())} of {want.numel()} numbers lie at another step of {dtype}"
            near |= steps
        wrong = ~(same | near)
    if not wrong.any():
        return ""
    at = int(wrong.nonzero()[0])
    count = f"{int(wrong.sum())} of {want.numel()} {dtype}"
    return f"parity: {count}, first at {at}: {got[at].item()!r} from PTX, {want[at].item()!r} on the host"


def replay(launch: Recorded, library: Library) -> None:
    """Runs a launch on PTX; a fault, or a result that is not the host's, is an error that begins with its name."""
    kernel = library.kernel(launch.kernel)
    buffers = launch.buffers()
    kernel.run(launch.blocks, launch.threads, launch.shared_bytes, launch.params, buffers)
    after = {buffer.address: bytes(buffer.memory) for buffer in buffers}
    for number, (begin, end, is_writable, dtype) in enumerate(launch.ranges):
        if is_writable and dtype != WORKING_MEMORY and after != launch.after:
            what = difference(_numbers(launch.after, begin, end, dtype), _numbers(after, begin, end, dtype))
            if what:
                raise PtxFault(f"{what}, in buffer {number} of kernel {kernel_name(launch.kernel)} on {library.target}")
