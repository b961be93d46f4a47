"""Builds the machine (machine/) and runs decoded kernels on it."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from build_cache import digest, made_once
from cuda_compiler import CACHE, kernel_name
from emulated import COMPILER
from ptx_program import Kernel, PtxError

SOURCES = sorted(path for path in Path(__file__).with_name("machine").iterdir() if path.suffix in (".cpp", ".h"))
# No sum of a product is made one operation, and rounding follows what the machine sets.
FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-shared", "-ffp-contract=off", "-frounding-math", "-Wall", "-Wextra"]
FLAGS += ["-fvisibility-inlines-hidden"]
STEP_LIMIT = 200_000_000
OPERANDS = 16


class PtxFault(Exception):
    """A kernel does what it must not; the message begins with the fault's name."""


class _Constant(ctypes.Structure):
    _fields_ = [("register", ctypes.c_int64), ("value", ctypes.c_uint64)]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_int64),
        ("memory", ctypes.c_void_p),
        ("permissions", ctypes.c_char_p),
    ]


SPECIALS = ("tid", "ntid", "ctaid", "nctaid", "laneid", "warpid", "zero", "one")


class _Launch(ctypes.Structure):
    _fields_ = [("instructions", ctypes.c_char_p), ("instruction_count", ctypes.c_int64)]
    _fields_ += [("register_count", ctypes.c_int64), ("constants", ctypes.POINTER(_Constant))]
    _fields_ += [("constant_count", ctypes.c_int64), *((name, ctypes.c_int64) for name in SPECIALS)]
    _fields_ += [(name, ctypes.c_int64) for name in ("blocks", "threads", "shared_bytes", "local_bytes")]
    _fields_ += [("params", ctypes.c_char_p), ("param_bytes", ctypes.c_int64)]
    _fields_ += [("buffers", ctypes.POINTER(_Buffer)), ("buffer_count", ctypes.c_int64)]
    _fields_ += [("branch_targets", ctypes.POINTER(ctypes.c_int32)), ("branch_target_count", ctypes.c_int64)]
    _fields_ += [("step_limit", ctypes.c_int64), ("executed", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int64) for name in ("steps", "fault_block", "fault_thread", "fault_instruction")]
    _fields_ += [("fault", ctypes.c_char * 32), ("detail", ctypes.c_char * 256)]


@cache
def _library() -> ctypes.CDLL:
    def compile_machine(path: Path) -> None:
        main = [str(source) for source in SOURCES if source.suffix == ".cpp"]
        command = [*COMPILER, *FLAGS, *main, "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the machine does not compile:\n{done.stderr[-8000:]}")

    path = made_once(
        CACHE / f"machine-{digest(*(source.read_bytes() for source in SOURCES), *FLAGS, *COMPILER)}.so", compile_machine
    )
    library = ctypes.CDLL(str(path))
    library.ptx_instruction_bytes.restype = library.ptx_launch_bytes.restype = ctypes.c_int64
    assert library.ptx_launch_bytes() == ctypes.sizeof(_Launch)
    assert library.ptx_instruction_bytes() == struct.calcsize(f"<12iq{OPERANDS}i")
    return library


@cache
def _code(kind: int, name: str) -> int:
    code = _library().ptx_code(kind, name.encode())
    if code < 0:
        raise PtxError(f"the machine does not know {name}")
    return code


def _encoded(kernel: Kernel) -> bytes:
    rows = []
    for one in kernel.instructions:
        if len(one.results) + len(one.operands) > OPERANDS:
            raise PtxError(f"more operands than the machine has room for: {one.text}")
        at = [*one.results, *one.operands]
        numbers = [_code(0, one.operation), _code(1, one.type), _code(1, one.source_type), _code(3, one.mode)]
        numbers += [_code(2, one.space), one.flags, one.bits, one.predicate, int(one.is_negated)]
        numbers += [len(one.results), len(one.operands), one.target, one.offset]
        rows.append(struct.pack(f"<12iq{OPERANDS}i", *numbers, *at, *[0] * (OPERANDS - len(at))))
    return b"".join(rows)


@dataclass
class Buffer:
    """Global memory from an address on: what it holds, and for every byte 1 where it may be read, 3 where written."""

    address: int
    memory: bytearray
    permissions: bytes


@dataclass
class Prepared:
    """A kernel as the machine takes it."""

    kernel: Kernel
    encoded: bytes = b""
    executed: bytearray = field(default_factory=bytearray)  # by instruction, over all of its runs
    steps: int = 0

    def __post_init__(self) -> None:
        self.encoded = _encoded(self.kernel)
        self.executed = bytearray(len(self.kernel.instructions))

    def coverage(self) -> float:
        """The share of instructions that some thread has executed."""
        return sum(self.executed) / len(self.executed)

    def run(self, blocks: int, threads: int, shared_bytes: int, params: bytes, buffers: Sequence[Buffer]) -> None:
        """Runs a grid, and leaves what it writes in the buffers."""
        kernel = self.kernel
        if len(params) != kernel.param_bytes:
            raise PtxFault(
                f"parameters: {kernel.name} takes {kernel.param_bytes} bytes, and the launch gives {len(params)}"
            )
        if threads % 32:
            raise PtxFault(f"threads: the machine runs whole warps, and the launch has {threads} threads")
        launch = _Launch()
        launch.instructions, launch.instruction_count = self.encoded, len(kernel.instructions)
        launch.register_count = kernel.registers
        launch.constants = (_Constant * max(1, len(kernel.constants)))(*kernel.constants.items())
        launch.constant_count = len(kernel.constants)
        for name in SPECIALS:
            setattr(launch, name, kernel.specials.get(name, -1))
        launch.blocks, launch.threads = blocks, threads
        launch.shared_bytes, launch.local_bytes = kernel.static_shared_bytes + shared_bytes, kernel.local_bytes
        launch.params, launch.param_bytes = params, len(params)
        views = [(ctypes.c_char * len(buffer.memory)).from_buffer(buffer.memory) for buffer in buffers]
        launch.buffers = (_Buffer * max(1, len(buffers)))(
            *(
                _Buffer(buffer.address, len(buffer.memory), ctypes.addressof(view), buffer.permissions)
                for buffer, view in zip(buffers, views)
            )
        )
        launch.buffer_count = len(buffers)
        targets = kernel.branch_targets
        launch.branch_targets, launch.branch_target_count = (
            (ctypes.c_int32 * max(1, len(targets)))(*targets),
            len(targets),
        )
        launch.step_limit = STEP_LIMIT
        executed = (ctypes.c_char * len(self.executed)).from_buffer(self.executed)
        launch.executed = ctypes.addressof(executed)
        failed = _library().ptx_run(ctypes.byref(launch))
        self.steps += launch.steps
        if failed:
            instruction = kernel.instructions[launch.fault_instruction]
            raise PtxFault(
                f"{launch.fault.decode()}: {launch.detail.decode()}, in kernel {kernel_name(kernel.name)}, block "
                f"{launch.fault_block}, thread {launch.fault_thread}, at {instruction.place or '?'}, line "
                f"{instruction.line} of the PTX: {instruction.text}"
            )
