"""The interpreter of PTX: what is not known or not allowed is an error with a name."""

from __future__ import annotations

import re
import struct

import pytest
from ptx_machine import PtxFault
from ptx_program import PtxError
from small_kernels import COPY, kernel, run

UNKNOWN = {
    "foo.u32 %r9, %r1;": "unknown instruction foo.u32",
    "atom.global.add.u32 %r9, [%d2], %r1;": "unknown instruction atom.global.add.u32",
    "add.sat.s32 %r9, %r1, %r1;": "expected one of .* got .s32",
    "add.rz.f32 %f1, %f2, %f2;": "expected one of .* got .rz",
    "ex2.approx.f16 %h1, %h2;": "expected one of .f32, got .f16",
    "shfl.sync.bfly.b64 %d1, %d2, 1, 31, -1;": "expected one of .b32, got .b64",
    "add.u32 %r9, %d1, %r1;": "expected an operand of 32 bits, %d1 has 64",
    "add.u32 %h1, %r1, %r1;": "expected a register of 32 bits, %h1 has 16",
    "add.u32 %r9, %r1, %nothing;": "unknown operand '%nothing'",
    "add.u32 %r9, %r1, %clock;": "unknown operand '%clock'",
    "add.u32 %r9, %r1;": "expected 3 operands, got 2",
    "mov.f32 %f1, 0d0000000000000000;": "expected a number of 32 bits",
    "ld.global.u32.wide %r9, [%d1];": "unknown modifier .wide",
    "cvt.f16.f32 %h1, %f1;": "expected a rounding mode",
    "cvt.rn.f64.f32 %g1, %f1;": "unknown modifier .rn",
    "setp.lt.b32 %p1, %r1, %r1;": "bits have no order",
    "bra $nowhere;": "unknown label [$]nowhere",
    "bar.sync 0, 64;": "expected 1 operands, got 2",
    ".section a;": "unknown statement",
    "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 %f1, %r1, %r1, %f1;": "expected one of .col, got .row",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 %f1, %r1, %r1, %f1;": "expected one of .f16, got .bf16",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 %r1, %r1, %r1, %r1;": "expected one of .f32, got .f16",
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r1, %r2, %r3, %r4}, {%r5}, "
    "{%f0, %f1, %f2, %f3};": "expected 2 registers",
    "mma.sync.aligned.m16n8k16.row.col.f32.tf32.tf32.f32 %f1, %r1, %r1, %f1;": "expected one of .f16, .bf16, got .tf32",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0, %f1, %f2, %f3}, {%r1, %r2}, {%r3}, "
    "{%f0, %f1, %f2, %f3};": "expected 4 registers",
    "ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r2, %r3, %r4}, [%r1];": "expected one of .x1, .x2, .x4, got .x3",
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r2}, [%r1];": "expected 2 registers",
    "ldmatrix.sync.m8n8.x1.shared.b16 {%r2}, [%r1];": "expected one of .aligned, got .m8n8",
    "movmatrix.sync.aligned.m8n8.b16 %r2, %r1;": "expected one of .trans",
    "cp.async.cg.shared.global [%r1], [%d1], 8;": "expected a copy of 16 bytes, got 8",
    "cp.async.ca.shared.global [%r1], [%d1], 12;": "expected a copy of 4 or 8 or 16 bytes, got 12",
    "cp.async.wait_group %r1;": "expected a number of groups, got %r1",
    "cp.async.bulk.commit_group;": "expected one of .ca, .cg, .commit_group, .wait_group, .wait_all, got .bulk",
    "fma.rn.f16x2 %r2, %r1, %r1, %r1;": "expected one of .f32, .f64, got .f16x2",
    ".reg .b128 %q;": "unknown declaration",
}


@pytest.mark.parametrize("statement", UNKNOWN)
def test_what_is_not_known_is_an_error_that_names_it(statement: str) -> None:
    with pytest.raises(PtxError, match=UNKNOWN[statement]):
        kernel(statement)


def test_a_directive_that_is_not_known_is_an_error() -> None:
    with pytest.raises(PtxError, match="unknown declaration"):
        kernel("", head=".global .u32 counter;")


# -------------------- what is not allowed

FORBIDDEN = {
    "a register without a value": ("add.u32 %r9, %r1, %r2;", "uninitialised register"),
    "a register that half of the lanes have": (
        "setp.lt.u32 %p1, %r1, 16; @%p1 mov.u32 %r2, 1; add.u32 %r9, %r1, %r2;",
        "uninitialised register: .*thread 16",
    ),
    "a predicate without a value": ("@%p3 mov.u32 %r9, 1;", "uninitialised register: the predicate"),
    "a read behind a buffer": (
        "ld.global.u32 %r9, [%d1+16];",
        "out of bounds: .* 4 bytes at 0x10000010 of global",
    ),
    "a read of address 0": ("mov.u64 %d4, 0; ld.global.u32 %r9, [%d4];", "out of bounds: a read of 4 bytes at 0x0"),
    "a read of the highest address": ("mov.u64 %d4, -4; ld.global.u32 %r9, [%d4];", "out of bounds: a read of 4 bytes"),
    "a write before a buffer": ("st.global.u32 [%d2+-4], %r1;", "out of bounds: a write"),
    "a write to an input": ("st.global.u32 [%d1], %r1;", "write to an input"),
    "an address between two numbers": ("ld.global.u32 %r9, [%d1+2];", "misaligned: 4 bytes at 0x10000002"),
    "a vector between two vectors": ("ld.global.v2.u32 {%r9, %r3}, [%d1+4];", "misaligned: 8 bytes at 0x10000004"),
    "shared memory that nobody wrote": ("ld.shared.u32 %r9, [dynamic];", "uninitialised shared memory"),
    "shared memory that is not there": ("mov.u32 %r2, 64; st.shared.u32 [%r2], %r1;", "out of bounds: .*shared"),
    "local memory that is not there": (
        ".local .align 4 .b8 own[4]; mov.b64 %d5, own; st.local.u32 [%d5+4], %r1;",
        "out of bounds: .*local",
    ),
    "local memory without a value": (
        ".local .align 4 .b8 own[4]; mov.b64 %d5, own; ld.local.u32 %r9, [%d5];",
        "uninitialised local memory",
    ),
    "a parameter that is not there": ("ld.param.u64 %d5, [out+8];", "out of bounds: .*parameter"),
    "two lanes write the same word": ("st.shared.u32 [dynamic], %r1;", "race: shared memory at 0x0 was written"),
    "a lane reads what another writes": (
        "shl.b32 %r2, %r1, 2; st.shared.u32 [%r2], %r1; xor.b32 %r2, %r2, 4; ld.shared.u32 %r9, [%r2];",
        "race",
    ),
    "two lanes write the same result": ("st.global.u32 [%d2], %r1;", "race: global memory at 0x20000000 was written"),
    "a shuffle that some lanes never reach": (
        "setp.lt.u32 %p1, %r1, 16; @%p1 ret; shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;",
        "divergent warp: .*which has left",
    ),
    "a shuffle in two branches": (
        """setp.lt.u32 %p1, %r1, 16; @%p1 bra $low; shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1; bra $end;
        $low: shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1; $end:""",
        "divergent warp: .*waits at another instruction",
    ),
    "a shuffle from a lane that takes no part": (
        "setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 %r9, %r1, 16, 31, 0xffff;",
        "divergent warp: .*takes no part",
    ),
    "a lane that does not name itself": ("bar.warp.sync 0xffff;", "divergent warp: .*not among those"),
    "a barrier that some threads never reach": (
        "setp.eq.u32 %p1, %r1, 3; @%p1 ret; bar.sync 0;",
        "divergent barrier: this thread has left.*thread 3",
    ),
    "two barriers": (
        "setp.eq.u32 %p1, %r1, 3; @%p1 bar.sync 1; @!%p1 bar.sync 0;",
        "divergent barrier: threads wait at barriers of different numbers",
    ),
    "a copy that nobody waits for": (f"{COPY} cp.async.commit_group;", "asynchronous copy: the thread has left .*cp.a"),
    "a copy of no group": (f"{COPY} cp.async.wait_group 0;", "asynchronous copy: the thread has left .*cp.async.cg"),
    "a read before the wait": (
        f"{COPY} cp.async.commit_group; cp.async.wait_group 1; ld.shared.u32 %r9, [%r2]; cp.async.wait_group 0;",
        "asynchronous copy: byte 0 of shared memory, which thread 0 fills",
    ),
    "a write before the wait": (
        f"{COPY} st.shared.u32 [%r2+12], %r1; cp.async.wait_all;",
        "asynchronous copy: byte 12 of shared memory, which thread 0 fills",
    ),
    "a copy to where one is under way": (f"{COPY} {COPY} cp.async.wait_all;", "asynchronous copy: byte 0 of"),
    "a read of another lane's copy before a barrier": (
        f"{COPY} cp.async.wait_all; xor.b32 %r2, %r2, 16; ld.shared.u32 %r9, [%r2];",
        "race: shared",
    ),
    "a copy over what another lane reads": (
        f"shl.b32 %r2, %r1, 4; st.shared.u32 [%r2], %r1; bar.warp.sync -1; xor.b32 %r2, %r2, 16;"
        f"ld.shared.u32 %r9, [%r2]; {COPY} cp.async.wait_all;",
        "race: shared memory at 0x0 was read by thread 1",
    ),
    "a copy from an address between two": (
        "shl.b32 %r2, %r1, 4; add.s64 %d5, %d1, 4; cp.async.cg.shared.global [%r2], [%d5], 16;",
        "misaligned: 16 bytes at 0x10000004",
    ),
    "a copy to an address between two": (
        "shl.b32 %r2, %r1, 4; cp.async.cg.shared.global [%r2+8], [%d1], 16;",
        "misaligned: 16 bytes at 0x8",
    ),
    "a copy from behind a buffer": (
        "shl.b32 %r2, %r1, 4; cp.async.cg.shared.global [%r2], [%d1+512], 16, 4;",
        "out of bounds: a read of 4 bytes at 0x10000200 of global",
    ),
    "a copy that reads more than it writes": (
        "shl.b32 %r2, %r1, 4; cp.async.cg.shared.global [%r2], [%d1], 16, 20;",
        "out of bounds: a copy of 16 bytes that reads 20",
    ),
    "a copy to behind shared memory": (
        "shl.b32 %r2, %r1, 4; cp.async.cg.shared.global [%r2+512], [%d1], 16;",
        "out of bounds: a write of 16 bytes at 0x200 of shared",
    ),
    "a matrix whose rows are not there yet": (
        f"{COPY} ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r2]; cp.async.wait_all;",
        "asynchronous copy: byte 0 of",
    ),
    "a matrix whose rows other lanes wrote before a barrier": (
        f"{COPY} cp.async.wait_all; xor.b32 %r2, %r2, 16; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r10}}, [%r2];",
        "race: shared",
    ),
    "a matrix whose rows nobody wrote": (
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [dynamic];",
        "uninitialised shared memory: byte 0",
    ),
    "a row of a matrix between two": (
        f"{COPY} cp.async.wait_all; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r10}}, [%r2+8];",
        "misaligned: 16 bytes at 0x8",
    ),
    "a matrix that a lane does not load": (
        f"{COPY} cp.async.wait_all; setp.ne.u32 %p1, %r1, 9;"
        "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r2];",
        "divergent warp: the lane waits for lane 9, which has left",
    ),
    "a product that half of a warp takes part in": (
        """mov.f32 %f0, 0f00000000; setp.lt.u32 %p1, %r1, 16; @%p1 bar.sync 0;
        mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r1, %r1}, {%r1}, {%f0, %f0, %f0, %f0};
        @!%p1 bar.sync 0;""",
        "divergent warp: the lane waits for lane 0, which waits for the block",
    ),
    "a product of a register without a value": (
        """mov.f32 %f0, 0f00000000;
        mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r1, %r1}, {%r2}, {%f0, %f0, %f0, %f0};
        """,
        "uninitialised register: operand 3",
    ),
    "a transposed matrix of half of a warp": (
        "setp.lt.u32 %p1, %r1, 16; @%p1 movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;",
        "divergent warp: .*which has left",
    ),
    "a division by zero": ("mov.u32 %r2, 0; div.u32 %r9, %r1, %r2;", "division by zero"),
    "a trap": ("trap;", "trap"),
    "a choice beyond a table": ("$t: .branchtargets $a; brx.idx %r1, $t; $a:", "out of bounds: branch 1 of 1"),
    "an address of another space": ("cvta.to.shared.u64 %d5, %d2;", "out of bounds: cvta.to"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_not_allowed_is_a_fault_with_a_name(name: str) -> None:
    body, message = FORBIDDEN[name]
    with pytest.raises(PtxFault, match=f"^{message}"):
        run(
            body,
            bytes(512 if "cp.async" in body else 16),
            shared=0 if name == "shared memory that is not there" else 512 * ("shared" in body),
        )


def test_blocks_must_not_touch_what_others_write() -> None:
    with pytest.raises(PtxFault, match="race: global memory at 0x20000000 was written by thread 0 of block 0"):
        run("add.s64 %d4, %d2, %d3; mov.u32 %r2, %ctaid.x; st.global.u32 [%d4], %r2;", blocks=2)
    own = "mov.u32 %r2, %ctaid.x; mad.wide.u32 %d4, %r2, 128, %d2; add.s64 %d4, %d4, %d3; st.global.u32 [%d4], %r1;"
    run(own, blocks=2, out_bytes=256)


def test_threads_may_write_the_same_but_not_read_it_then() -> None:
    """As flags are set that many may set."""
    body = "mov.u32 %r2, 7; st.global.u32 [%d2], %r2;"
    assert run(body, threads=64, blocks=2)[:4] == struct.pack("<I", 7)
    with pytest.raises(PtxFault, match="race: global memory at 0x20000000 was written"):
        run(f"{body} ld.global.u32 %r3, [%d2];", threads=64, blocks=2)


def test_a_barrier_orders_what_threads_write() -> None:
    body = """add.s64 %d4, %d2, %d3; st.global.u32 [%d4], %r1; bar.sync 0;
    xor.b32 %r2, %r1, 33; mad.wide.u32 %d5, %r2, 4, %d2; ld.global.u32 %r3, [%d5];"""
    run(body, threads=64)
    with pytest.raises(PtxFault, match="race"):
        run(body.replace("bar.sync 0", "bar.warp.sync -1"), threads=64)
    run(body.replace("bar.sync 0", "bar.warp.sync -1").replace("33", "1"), threads=64)


def test_a_fault_has_a_place() -> None:
    body = """mov.u32 %r2, %ctaid.x; setp.ne.u32 %p1, %r2, 1;
    .loc 1 40 3
    .loc 2 110 3, function_name $name, inlined_at 1 41 5
    @%p1 bra $end; ld.global.u32 %r9, [%d1+4];
    $end:"""
    files = '.file 1 "/a/rows.cuh"\n.file 2 "/a/device.h"'
    place = "in kernel one, block 1, thread 0, at rows.cuh:41, line 20 of the PTX: ld.global.u32 %r9, [%d1+4]"
    with pytest.raises(PtxFault, match=f"{re.escape(place)}$"):
        run(body, bytes(4), blocks=2, head=files)


def test_a_launch_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx_machine.STEP_LIMIT", 10_000)
    with pytest.raises(PtxFault, match="endless"):
        run("$again: bra $again;")


def test_parameters_of_another_size_are_refused() -> None:
    with pytest.raises(PtxFault, match="one takes 16 bytes, and the launch gives 8"):
        kernel("").run(1, 32, 0, bytes(8), [])
