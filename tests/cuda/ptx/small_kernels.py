"""Kernels of a few instructions, written as PTX, and what they leave in their output."""

from __future__ import annotations

import struct

from ptx_machine import Buffer, Prepared
from ptx_program import read_kernels

IN, OUT = 0x10000000, 0x20000000
REGISTERS = """.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<30>; .reg .f32 %f<9>; .reg .b64 %d<30>; .reg .f64 %g<9>;
"""


def kernel(body: str, head: str = "") -> Prepared:
    """An entry with the addresses of the input and of the output in %d1 and %d2, %tid.x in %r1 and four times it in
    %d3."""
    text = f"""
.version 9.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
{head}
.visible .entry one(
  .param .u64 in,
  .param .u64 out
)
{{
  {REGISTERS}
  ld.param.u64 %d1, [in]; ld.param.u64 %d2, [out];
  mov.u32 %r1, %tid.x; mul.wide.u32 %d3, %r1, 4;
  {body}
  ret;
}}
"""
    return Prepared(read_kernels(text)["one"])


def run(
    body: str,
    given: bytes = b"",
    out_bytes: int = 0,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    head: str = "",
) -> bytes:
    """What a kernel leaves in the output, which begins as zeros."""
    out = bytearray(out_bytes or 4 * threads)
    buffers = [Buffer(IN, bytearray(given), bytes([1]) * len(given)), Buffer(OUT, out, bytes([3]) * len(out))]
    kernel(body, head).run(blocks, threads, shared, struct.pack("<2Q", IN, OUT), buffers)
    return bytes(out)


def words(body: str, **more: object) -> list[int]:
    """%r9 of every thread."""
    out = run(f"{body} add.s64 %d4, %d2, %d3; st.global.u32 [%d4], %r9;", **more)
    return list(struct.unpack(f"<{len(out) // 4}I", out))


PREFIX = {"b16": "h", "u16": "h", "s16": "h", "b32": "r", "u32": "r", "s32": "r", "b64": "d", "u64": "d", "s64": "d"}
PREFIX |= {"f32": "f", "f64": "g", "f16": "h", "bf16": "h"}


def applied(instruction: str, types: list[str], rows: list[tuple[int, ...]], *last: str) -> list[int]:
    """The bits that an instruction makes of rows of bits: ``types`` of the result and of the operands, and a last
    operand."""
    rows = rows + [rows[-1]] * (-len(rows) % 32)
    given = b"".join(struct.pack("<4Q", *row, *[0] * (4 - len(row))) for row in rows)
    names = [f"%{PREFIX[type]}{(20 if PREFIX[type] in 'rd' else 0) + 8 - k}" for k, type in enumerate(types)]
    loads = " ".join(
        f"ld.global.b{type.lstrip('bfus')} {name}, [%d4+{8 * k}];"
        for k, (name, type) in enumerate(zip(names[1:], types[1:]))
    )
    width = types[0].lstrip("bfus")
    body = f"""mov.u32 %r2, %ctaid.x; shl.b32 %r2, %r2, 5; add.u32 %r2, %r2, %r1;
    mul.wide.u32 %d5, %r2, 32; add.s64 %d4, %d1, %d5; mul.wide.u32 %d6, %r2, 8; add.s64 %d6, %d6, %d2;
    {loads} {instruction} {", ".join([*names, *last])}; st.global.b{width} [%d6], {names[0]};"""
    out = run(body, given, 8 * len(rows), blocks=len(rows) // 32)
    return list(struct.unpack(f"<{len(rows)}Q", out))


def bits_of(value: float, type: str) -> int:
    return int.from_bytes(struct.pack({"f32": "<f", "f64": "<d", "f16": "<e"}[type], value), "little")


def value_of(bits: int, type: str) -> float:
    return struct.unpack({"f32": "<f", "f64": "<d", "f16": "<e"}[type], bits.to_bytes(int(type[1:]) // 8, "little"))[0]


def signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) & 1 else value


# Every thread copies its 16 bytes of the input to shared memory.
COPY = "shl.b32 %r2, %r1, 4; mul.wide.u32 %d5, %r1, 16; add.s64 %d5, %d1, %d5;"
COPY += "cp.async.cg.shared.global [%r2], [%d5], 16;"
