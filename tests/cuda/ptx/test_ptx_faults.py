"""Faults planted where only the device's code has them, which the emulator never compiles: each is caught by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cuda_compiler import TARGETS
from planted import Kernels
from ptx_machine import PtxFault
from ptx_replay import Library, Recorded, replay

Launches = Callable[[str, torch.dtype], list[Recorded]]


class Fault(NamedTuple):
    old: str  # in the file
    new: str
    source: str  # a file of kernels that shows it
    call: str
    dtype: torch.dtype
    name: str  # what the fault is reported as, a regular expression
    file: str = "device.h"


def of_matrices(old: str, new: str, name: str) -> Fault:
    return Fault(old, new, "kernels_attention_tile.cu", "tiles", torch.bfloat16, name, "matrix.h")


FAULTS = {
    "rounding towards zero": Fault(
        "cvt.rn.f16.f32", "cvt.rz.f16.f32", "kernels_project.cu", "projections", torch.float16, "rounding: "
    ),
    "the wrong short float": Fault(
        'asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));',
        'asm("mov.b32 %0, {%2, %1};" : "=f"(wide) : "h"(v.bits), "h"(uint16_t(0)));',
        "kernels_project.cu",
        "projections",
        torch.float16,
        "parity: ",
    ),
    "swapped operands": Fault(
        "__shfl_xor_sync(0xffffffffu, value, mask)",
        "V(__shfl_xor_sync(0xffffffffu, mask, int(value)))",
        "kernels_kv_state.cu",
        "windows",
        torch.float32,
        "parity: ",
    ),
    "a shuffle in one direction": Fault(
        "__shfl_xor_sync(0xffffffffu, value, mask)",
        "__shfl_down_sync(0xffffffffu, value, unsigned(mask))",
        "kernels_attention_forward.cu",
        "windows",
        torch.float32,
        "parity: ",
    ),
    "a shuffle among half of a warp": Fault(
        "__shfl_xor_sync(0xffffffffu, value, mask)",
        "__shfl_xor_sync(0x0000ffffu, value, mask)",
        "kernels_kv_state.cu",
        "windows",
        torch.float32,
        "divergent warp: ",
    ),
    "another function": Fault(
        "ex2.approx.ftz.f32", "lg2.approx.ftz.f32", "kernels_kv_state.cu", "windows", torch.float32, "parity: "
    ),
    "no barrier of the block": Fault(
        "{ __syncthreads(); }",
        "{}",
        "kernels_rows.cu",
        "windows",
        torch.float32,
        "uninitialised shared memory: |race: ",
    ),
    "no barrier of the warp": Fault(
        "{ __syncwarp(); }",
        "{}",
        "kernels_attention_forward.cu",
        "windows",
        torch.float32,
        "uninitialised shared memory: |race: ",
    ),
    "every block does the same": Fault(
        "{ return blockIdx.x; }",
        "{ return blockIdx.y; }",
        "kernels_project.cu",
        "projections",
        torch.float32,
        "parity: ",
    ),
    "a stride in other units": Fault(
        "int(blockDim.x)", "int(blockDim.x * 4)", "kernels_project.cu", "projections", torch.float32, "parity: "
    ),
    "an address in other units": Fault(
        "*p = value;",
        "p[1] = value;",
        "kernels_rows.cu",
        "windows",
        torch.float32,
        "out of bounds: a write of|write to an input: |race: ",
    ),
    "shared memory between two numbers": Fault(
        "(sb_shared_memory + offset)",
        "(sb_shared_memory + offset + 2)",
        "kernels_rows.cu",
        "windows",
        torch.float32,
        "misaligned: ",
    ),
    "a value that is never set": Fault(
        "return fmaxf(a, b);",
        'asm("{ .reg .f32 unset; max.f32 %0, %1, unset; }" : "=f"(a) : "f"(b)); return a;',
        "kernels_kv_state.cu",
        "windows",
        torch.float32,
        "uninitialised register: ",
    ),
    "swapped operands of a product of matrices": of_matrices(
        "f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, ",
        "f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%9, %8}, ",
        "parity: ",
    ),
    "no wait for copies": of_matrices(
        'asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");',
        "",
        "asynchronous copy: byte",
    ),
    "a wait for one group less": of_matrices('"n"(kOpen)', '"n"(kOpen + 1)', "asynchronous copy: byte"),
    "values that are not transposed": of_matrices("m8n8.x4.trans.shared", "m8n8.x4.shared", "parity: "),
}


def first_complaint(launches: list[Recorded], library: Library) -> str:
    for launch in launches:
        if launch.kernel in library.names():
            try:
                replay(launch, library)
            except PtxFault as fault:
                return str(fault)
    return ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_by_name(
    kernels: Kernels, launches: Launches, libraries: dict[str, Library], name: str
) -> None:
    fault = FAULTS[name]
    kernels.skip_in_turn(fault.file, fault.old, fault.new)
    with kernels.planted(fault.file, fault.old, fault.new):
        library = Library(TARGETS[0], [kernels.csrc / "cuda" / fault.source])
    complaint = first_complaint(launches(fault.call, fault.dtype), library)
    assert re.match(fault.name, complaint), complaint or "nothing was noticed"
    if not complaint.startswith(("parity", "rounding")):
        assert re.search(
            r"in kernel \w+.*, block \d+, thread \d+, at [\w.]+\.cuh:\d+, line \d+ of the PTX: ", complaint
        )


def test_kernels_without_a_fault_raise_no_complaint(launches: Launches, libraries: dict[str, Library]) -> None:
    assert first_complaint(launches("windows", torch.float32), libraries[TARGETS[0]]) == ""
