"""The interpreter of PTX: instructions compute what the PTX manual says, threads part and meet, and everything that is
not known or not allowed is an error with a name."""

from __future__ import annotations

import math
import random
import re
import struct

import pytest
import torch
from ptx_machine import Buffer, Prepared, PtxFault
from ptx_program import PtxError, read_kernels

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


# -------------------- whole numbers


def _bfe(a: int, first: int, count: int, width: int, is_signed: bool) -> int:
    field = [a >> min(first + k, width - 1) & 1 if first + k < width else None for k in range(min(count, width))]
    sign = a >> min(first + count - 1, width - 1) & 1 if is_signed and count else 0
    return sum((sign if field[k] is None else field[k]) << k if k < len(field) else sign << k for k in range(width))


def _bfi(a: int, b: int, first: int, count: int) -> int:
    for k in range(count):
        if first + k < 32:
            b = b & ~(1 << (first + k)) | (a >> k & 1) << (first + k)
    return b


def _prmt(a: int, b: int, choice: int) -> int:
    given = (b << 32 | a).to_bytes(8, "little")
    made = []
    for k in range(4):
        byte = given[choice >> 4 * k & 7]
        made.append(255 * (byte >> 7) if choice >> 4 * k & 8 else byte)
    return int.from_bytes(bytes(made), "little")


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


S, M32, M64 = signed, (1 << 32) - 1, (1 << 64) - 1
WHOLE = {
    "add.s32": ("b32 b32 b32", lambda a, b: a + b),
    "sub.s64": ("b64 b64 b64", lambda a, b: a - b),
    "add.s16": ("b16 b16 b16", lambda a, b: a + b),
    "mul.lo.s64": ("b64 b64 b64", lambda a, b: a * b),
    "mul.hi.u32": ("b32 b32 b32", lambda a, b: a * b >> 32),
    "mul.hi.s32": ("b32 b32 b32", lambda a, b: S(a, 32) * S(b, 32) >> 32),
    "mul.hi.u64": ("b64 b64 b64", lambda a, b: a * b >> 64),
    "mul.hi.s64": ("b64 b64 b64", lambda a, b: S(a, 64) * S(b, 64) >> 64),
    "mul.wide.s32": ("b64 b32 b32", lambda a, b: S(a, 32) * S(b, 32)),
    "mul.wide.u16": ("b32 b16 b16", lambda a, b: a * b),
    "mad.lo.s32": ("b32 b32 b32 b32", lambda a, b, c: a * b + c),
    "mad.hi.u32": ("b32 b32 b32 b32", lambda a, b, c: (a * b >> 32) + c),
    "mad.wide.u32": ("b64 b32 b32 b64", lambda a, b, c: a * b + c),
    "mad.wide.s32": ("b64 b32 b32 b64", lambda a, b, c: S(a, 32) * S(b, 32) + c),
    "div.u32": ("b32 b32 b32", lambda a, b: a // b),
    "div.s64": ("b64 b64 b64", lambda a, b: _truncated(S(a, 64), S(b, 64))),
    "rem.u64": ("b64 b64 b64", lambda a, b: a % b),
    "rem.s32": ("b32 b32 b32", lambda a, b: int(math.fmod(S(a, 32), S(b, 32)))),
    "min.s32": ("b32 b32 b32", lambda a, b: min(S(a, 32), S(b, 32))),
    "max.u32": ("b32 b32 b32", max),
    "abs.s32": ("b32 b32", lambda a: abs(S(a, 32))),
    "neg.s64": ("b64 b64", lambda a: -a),
    "and.b32": ("b32 b32 b32", lambda a, b: a & b),
    "or.b16": ("b16 b16 b16", lambda a, b: a | b),
    "xor.b64": ("b64 b64 b64", lambda a, b: a ^ b),
    "not.b32": ("b32 b32", lambda a: ~a),
    "cnot.b32": ("b32 b32", lambda a: int(a == 0)),
    "popc.b32": ("b32 b32", lambda a: a.bit_count()),
    "popc.b64": ("b32 b64", lambda a: a.bit_count()),
    "clz.b32": ("b32 b32", lambda a: 32 - a.bit_length()),
    "clz.b64": ("b32 b64", lambda a: 64 - a.bit_length()),
    "brev.b32": ("b32 b32", lambda a: int(f"{a:032b}"[::-1], 2)),
    "bfind.u32": ("b32 b32", lambda a: a.bit_length() - 1),
    "bfind.s32": ("b32 b32", lambda a: (a if S(a, 32) >= 0 else a ^ M32).bit_length() - 1),
    "prmt.b32": ("b32 b32 b32 b32", _prmt),
    "lop3.b32 0xca": ("b32 b32 b32 b32", lambda a, b, c: a & b | ~a & c),
    "shf.l.wrap.b32": ("b32 b32 b32 b32", lambda a, b, c: (b << 32 | a) << (c % 32) >> 32),
    "shf.r.clamp.b32": ("b32 b32 b32 b32", lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    "cvt.u32.u64": ("b32 b64", lambda a: a),
    "cvt.s64.s32": ("b64 b32", lambda a: S(a, 32)),
    "cvt.u64.u32": ("b64 b32", lambda a: a),
    "cvt.s32.s8": ("b32 b32", lambda a: S(a & 255, 8)),
    "cvt.s8.s32": ("b32 b32", lambda a: S(a & 255, 8)),
    "cvt.u16.u32": ("b16 b32", lambda a: a),
    "cvt.sat.u8.s32": ("b32 b32", lambda a: min(max(S(a, 32), 0), 255)),
}


@pytest.mark.parametrize("instruction", WHOLE)
def test_whole_numbers(instruction: str) -> None:
    types, formula = WHOLE[instruction]
    names = types.split()
    r = random.Random(instruction)
    edges = [0, 1, 2, 31, 33, 127, 128, 0x7FFF, 0x8000, M32, 1 << 31, (1 << 31) - 1, M64, 1 << 63, (1 << 63) - 1]
    rows = []
    for _ in range(320):
        row = [r.choice([r.choice(edges), r.getrandbits(64), r.getrandbits(64) >> r.randrange(64)]) for _ in names[1:]]
        row = [value & ((1 << int(type[1:])) - 1) for value, type in zip(row, names[1:])]
        if instruction.startswith(("div", "rem")):
            row[1] = row[1] or 1
        rows.append(tuple(row))
    got = applied(*instruction.split(maxsplit=1)[:1], names, rows, *instruction.split(maxsplit=1)[1:])
    want = [formula(*row) & ((1 << int(names[0][1:])) - 1) for row in rows]
    assert got[: len(rows)] == want


@pytest.mark.parametrize("type", ["u32", "s32", "u64", "s64"])
def test_bit_fields_are_taken_out(type: str) -> None:
    width, r = int(type[1:]), random.Random(type)
    rows = [(r.getrandbits(width), r.randrange(70), r.randrange(70)) for _ in range(320)]
    got = applied(f"bfe.{type}", [f"b{width}", f"b{width}", "b32", "b32"], rows)
    assert got == [_bfe(*row, width, type[0] == "s") for row in rows]


def test_bit_fields_are_put_in() -> None:
    r = random.Random(0)
    rows = [(r.getrandbits(32), r.getrandbits(32), r.randrange(40), r.randrange(40)) for _ in range(320)]
    assert applied("bfi.b32", ["b32"] * 5, rows) == [_bfi(*row) & M32 for row in rows]


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shifts_beyond_the_width_leave_nothing_or_the_sign(width: int) -> None:
    r, all_ones = random.Random(width), (1 << width) - 1
    rows = [(r.getrandbits(width), r.choice([0, 1, 7, width - 1, width, width + 1, 2**31])) for _ in range(64)]
    types = [f"b{width}", f"b{width}", "b32"]
    assert applied(f"shl.b{width}", types, rows) == [a << b & all_ones if b < width else 0 for a, b in rows]
    assert applied(f"shr.u{width}", types, rows) == [a >> b if b < width else 0 for a, b in rows]
    assert applied(f"shr.s{width}", types, rows) == [signed(a, width) >> min(b, width - 1) & all_ones for a, b in rows]


# -------------------- floats

SPECIAL = [0.0, -0.0, 1.0, -1.5, 2.5, 3.5, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 3e38, 65504.0, 65520.0, 6e-8]


def floats(count: int, type: str, seed: int = 0) -> list[float]:
    r = random.Random(seed)
    drawn = SPECIAL + [r.gauss(0, 1) * 2.0 ** r.randrange(-30, 18) for _ in range(count - len(SPECIAL))]
    return [value_of(bits_of(value, type), type) for value in drawn]


def same(a: float, b: float) -> bool:
    return a == b and math.copysign(1, a) == math.copysign(1, b) or math.isnan(a) and math.isnan(b)


@pytest.mark.parametrize("type", ["f32", "f64"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div.rn", "fma.rn", "min", "max", "neg", "abs", "sqrt.rn"])
def test_floats_round_to_nearest(name: str, type: str) -> None:
    dtype = torch.float32 if type == "f32" else torch.float64
    a, b, c = (torch.tensor(floats(256, type, seed), dtype=dtype) for seed in range(3))
    b, c = b.roll(5), c.roll(11)
    wide = [t.double() for t in (a, b, c)]
    # A fused product in f64 has no counterpart in torch: whole numbers are exact.
    if name == "fma.rn" and type == "f64":
        a, b, c = wide = [t.nan_to_num(0, 0, 0).clamp(-1e6, 1e6).round() for t in wide]
    want, operands = {
        "add": (a + b, 2),
        "sub": (a - b, 2),
        "mul": (a * b, 2),
        "div.rn": (a / b, 2),
        "fma.rn": ((wide[0] * wide[1] + wide[2]).to(dtype), 3),
        "min": (torch.fmin(a, b), 2),
        "max": (torch.fmax(a, b), 2),
        "neg": (-a, 1),
        "abs": (a.abs(), 1),
        "sqrt.rn": (torch.tensor([math.sqrt(x) if x >= 0 else math.nan for x in a.tolist()], dtype=dtype), 1),
    }[name]
    rows = [tuple(bits_of(x, type) for x in row) for row in zip(*(t.tolist() for t in (a, b, c)[:operands]))]
    got = [value_of(bits, type) for bits in applied(f"{name}.{type}", [type] * (operands + 1), rows)]
    is_extreme = name in ("min", "max")  # torch may give either zero
    for i, (x, y) in enumerate(zip(got, want.tolist())):
        assert same(x, y) or is_extreme and x == y or name == "fma.rn" and abs(x - y) <= 1e-7 * abs(y), (rows[i], x, y)


def test_a_fused_product_is_not_rounded_before_the_sum() -> None:
    a = 1 + 2.0**-12
    row = tuple(bits_of(x, "f32") for x in (a, a, -(1 + 2.0**-11)))
    assert value_of(applied("fma.rn.f32", ["f32"] * 4, [row])[0], "f32") == 2.0**-24


def test_extremes_ignore_one_nan_and_order_zeros() -> None:
    zero, minus, nan, one = (bits_of(x, "f32") for x in (0.0, -0.0, math.nan, 1.0))
    rows = [(zero, minus), (minus, zero), (nan, one), (one, nan)]
    assert applied("max.f32", ["f32"] * 3, rows)[:4] == [zero, zero, one, one]
    assert applied("min.f32", ["f32"] * 3, rows)[:4] == [minus, minus, one, one]
    assert all(math.isnan(value_of(bits, "f32")) for bits in applied("max.NaN.f32", ["f32"] * 3, rows)[2:4])


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("ex2.approx.ftz.f32", lambda x: 2.0**x if x < 128 else math.inf),
        ("lg2.approx.f32", lambda x: math.log2(x) if x > 0 else -math.inf if x == 0 else math.nan),
        ("rcp.rn.f32", lambda x: 1 / x if x else math.copysign(math.inf, x)),
        ("rsqrt.approx.f32", lambda x: x**-0.5 if x > 0 else math.copysign(math.inf, x) if x == 0 else math.nan),
        ("tanh.approx.f32", math.tanh),
    ],
)
def test_functions_of_one_number(name: str, formula: object) -> None:
    given = [x for x in floats(256, "f32") if not math.isinf(x)]
    got = applied(name, ["f32", "f32"], [(bits_of(x, "f32"),) for x in given])
    for x, bits in zip(given, got):
        want = math.nan if math.isnan(x) else formula(0.0 if "ftz" in name and abs(x) < 2.0**-126 else x)
        got_value = value_of(bits, "f32")
        if not math.isnan(want) and abs(want) < 2.0**-126 and "ftz" in name:
            assert got_value == 0
        elif not math.isnan(want) and abs(want) > 3.4028235e38:
            assert got_value == math.copysign(math.inf, want)
        else:
            assert same(got_value, want) or abs(got_value - want) <= 2.0**-23 * abs(want), (x, got_value, want)


def test_the_fast_reciprocal_of_a_double_has_no_low_word() -> None:
    (got,) = applied("rcp.approx.ftz.f64", ["f64", "f64"], [(bits_of(3.0, "f64"),)])[:1]
    assert got & M32 == 0 and abs(value_of(got, "f64") * 3 - 1) < 2.0**-20


@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize(("short", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_short_floats_round_to_nearest_and_widen(short: str, dtype: torch.dtype, is_double: bool) -> None:
    source = "f64" if is_double else "f32"
    ties = (
        [1 + k * 2.0**-12 for k in range(64)] + [k * 2.0**-26 for k in range(64)] + [1 + k * 2.0**-9 for k in range(64)]
    )
    given = floats(256, source) + ties + [-x for x in ties]
    # From double to a short float torch rounds twice, by way of a float: only what a float holds is compared.
    given = [value_of(bits_of(x, "f32"), "f32") for x in given]
    got = applied(f"cvt.rn.{short}.{source}", ["b16", source], [(bits_of(x, source),) for x in given])
    want = torch.tensor(given, dtype=torch.float32).to(dtype)
    made = torch.tensor(got[: len(given)], dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(torch.nan_to_num(made, 77.0), torch.nan_to_num(want, 77.0))
    if not is_double:
        every = list(range(65536))
        wide = applied(f"cvt.f32.{short}", ["f32", "b16"], [(bits,) for bits in every])
        wanted = torch.tensor(every, dtype=torch.int32).to(torch.int16).view(dtype).float()
        wide_floats = torch.tensor([signed(bits, 32) for bits in wide], dtype=torch.int32).view(torch.float32)
        assert torch.equal(torch.nan_to_num(wide_floats, 77.0), torch.nan_to_num(wanted, 77.0))


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_rounding_modes_of_conversions(mode: str) -> None:
    given = [x for x in floats(256, "f64") if math.isfinite(x) and 1e-7 < abs(x) < 6e4]
    got = applied(f"cvt.{mode}.f16.f32", ["b16", "f32"], [(bits_of(x, "f32"),) for x in given])
    for x, bits in zip(given, got):
        x = value_of(bits_of(x, "f32"), "f32")
        y = value_of(bits, "f16")
        step = 2.0 ** (max(math.frexp(x)[1], -13) - 11)
        assert abs(x - y) < step
        assert {"rz": abs(y) <= abs(x), "rm": y <= x, "rp": y >= x}[mode], (x, y)
    got = applied(f"cvt.{mode}.f32.s64", ["f32", "b64"], [((1 << 60) + 1,), (-(1 << 60) - 1 & M64,)])[:2]
    step = 2.0**37
    assert [value_of(bits, "f32") for bits in got] == {
        "rz": [2.0**60, -(2.0**60)],
        "rm": [2.0**60, -(2.0**60) - step],
        "rp": [2.0**60 + step, -(2.0**60)],
    }[mode]


def test_floats_become_whole_numbers_within_their_range() -> None:
    given = [2.5, 3.5, -2.5, 1e10, -1e10, math.nan, math.inf, -0.7]
    rows = [(bits_of(x, "f32"),) for x in given]
    want = {"rni": [2, 4, -2], "rzi": [2, 3, -2], "rmi": [2, 3, -3], "rpi": [3, 4, -2]}
    for mode, first in want.items():
        last = {"rni": -1, "rzi": 0, "rmi": -1, "rpi": 0}[mode]
        got = [signed(bits, 32) for bits in applied(f"cvt.{mode}.s32.f32", ["b32", "f32"], rows)[:8]]
        assert got == [*first, 2**31 - 1, -(2**31), 0, 2**31 - 1, last]
    assert applied("cvt.rzi.u64.f32", ["b64", "f32"], [(bits_of(-3.0, "f32"),)])[0] == 0


@pytest.mark.parametrize(
    "compare", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_comparisons_of_floats_and_nan(compare: str) -> None:
    given = [1.0, 2.0, math.nan]
    rows = [(bits_of(a, "f32"), bits_of(b, "f32")) for a in given for b in given]
    got = applied(f"set.{compare}.u32.f32", ["b32", "f32", "f32"], rows)
    for (a, b), found in zip(((a, b) for a in given for b in given), got):
        has_nan = math.isnan(a) or math.isnan(b)
        ordered = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
        want = {"num": not has_nan, "nan": has_nan}.get(compare)
        if want is None:
            want = has_nan if has_nan and compare[-1] == "u" else not has_nan and ordered[compare[:2]]
        assert found == (M32 if want else 0), (a, b)


# -------------------- threads that part and meet


def test_threads_of_a_loop_meet_behind_it() -> None:
    """Every lane counts to its own number; then the last lane's count goes to all."""
    body = """mov.u32 %r2, 0;
    $again: setp.ge.u32 %p1, %r2, %r1; @%p1 bra $done; add.u32 %r2, %r2, 1; bra.uni $again;
    $done: shfl.sync.idx.b32 %r9, %r2, 31, 31, -1;"""
    assert words(body) == [31] * 32


def test_threads_that_take_a_way_back_are_waited_for() -> None:
    """The rare branch stands behind the shuffle and jumps back before it."""
    body = """setp.eq.u32 %p1, %r1, 5; mov.u32 %r2, %r1; @%p1 bra $rare;
    $common: shfl.sync.bfly.b32 %r9, %r2, 1, 31, -1; bra.uni $end;
    $rare: mov.u32 %r2, 500; bra.uni $common;
    $end: nop_is_unknown;""".replace("nop_is_unknown;", "")
    assert words(body) == [500 if i == 4 else i ^ 1 for i in range(32)]


@pytest.mark.parametrize(
    ("mode", "clamp", "source"),
    [
        ("up", 0, lambda i: i - 3 if i >= 3 else i),
        ("down", 31, lambda i: i + 3 if i + 3 < 32 else i),
        ("bfly", 31, lambda i: i ^ 3),
        ("idx", 31, lambda i: 3),
        ("idx", 0x1F | 24 << 8, lambda i: i // 8 * 8 + 3),
        ("down", 0x1F | 24 << 8, lambda i: i + 3 if i % 8 + 3 < 8 else i),
        ("up", 24 << 8, lambda i: i - 3 if i % 8 >= 3 else i),
    ],
)
def test_shuffles(mode: str, clamp: int, source: object) -> None:
    got = words(f"mul.lo.u32 %r2, %r1, 10; shfl.sync.{mode}.b32 %r3|%p1, %r2, 3, {clamp}, -1; mov.u32 %r9, %r3;")
    assert got == [10 * source(i) for i in range(32)]


def test_votes_and_sums_of_a_warp() -> None:
    odd = "and.b32 %r2, %r1, 1; setp.ne.u32 %p1, %r2, 0;"
    assert words(f"{odd} vote.sync.ballot.b32 %r9, %p1, -1;") == [0xAAAAAAAA] * 32
    assert words(f"{odd} vote.sync.any.pred %p2, %p1, -1; selp.u32 %r9, 1, 0, %p2;") == [1] * 32
    assert words(f"{odd} vote.sync.all.pred %p2, %p1, -1; selp.u32 %r9, 1, 0, %p2;") == [0] * 32
    assert words("redux.sync.add.s32 %r9, %r1, -1;") == [496] * 32
    assert words("redux.sync.max.u32 %r9, %r1, -1;") == [31] * 32
    assert words(f"{odd} match.any.sync.b32 %r9, %r2, -1;") == [0x55555555, 0xAAAAAAAA] * 16


def test_halves_of_a_warp_meet_apart() -> None:
    """Each half sums its own lanes, in branches of its own."""
    body = """setp.lt.u32 %p1, %r1, 16; @%p1 bra $low;
    redux.sync.add.s32 %r9, %r1, 0xffff0000; bra.uni $end;
    $low: redux.sync.add.s32 %r9, %r1, 0xffff;
    $end:"""
    assert words(body) == [120] * 16 + [376] * 16


def test_a_block_exchanges_through_shared_memory() -> None:
    body = """shl.b32 %r2, %r1, 2; mov.u32 %r3, dynamic; add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r1; bar.sync 0;
    sub.u32 %r5, 95, %r1; shl.b32 %r5, %r5, 2; add.u32 %r5, %r5, %r3; ld.shared.u32 %r9, [%r5];"""
    assert words(body, threads=96, shared=384) == list(range(95, -1, -1))


def test_local_memory_belongs_to_a_thread_and_generic_addresses_find_it() -> None:
    body = """.local .align 8 .b8 own[16]; mov.b64 %d5, own; cvta.local.u64 %d6, %d5; st.local.u32 [%d5+4], %r1;
    ld.u32 %r9, [%d6+4];"""
    assert words(body) == list(range(32))


def test_vectors_are_loaded_and_stored_in_order() -> None:
    given = struct.pack("<4I", 7, 8, 9, 10)
    body = "ld.global.v4.u32 {%r9, %r3, %r4, %r5}, [%d1]; st.global.v2.u32 [%d2+8], {%r5, %r4}; ret;"
    assert struct.unpack("<4I", run(f"setp.ne.u32 %p1, %r1, 0; @%p1 ret; {body}", given, 16)) == (0, 0, 10, 9)


def test_parts_of_registers_are_packed_and_unpacked() -> None:
    body = "{ .reg .b32 %low; mov.b64 {%low, %r3}, 0x100000002; mov.b64 %d7, {%r3, %low}; cvt.u32.u64 %r9, %d7; }"
    assert words(body) == [1] * 32


def test_a_table_of_branches_is_followed() -> None:
    body = """and.b32 %r2, %r1, 1; $table: .branchtargets $even, $odd; brx.idx %r2, $table;
    $even: mov.u32 %r9, 20; bra $end; $odd: mov.u32 %r9, 10;
    $end:"""
    assert words(body) == [20, 10] * 16


# -------------------- matrices


def matrix_rows(count: int, seed: int = 0) -> bytes:
    """So many 8 x 8 matrices of 16-bit numbers that all differ."""
    numbers = random.Random(seed).sample(range(1 << 16), 64 * count)
    return struct.pack(f"<{64 * count}H", *numbers)


def fragment(matrix: list[int], lane: int, is_transposed: bool) -> int:
    """What a lane holds of a matrix, by the manual's figure: two elements of row lane / 4."""
    row, column = lane // 4, lane % 4 * 2
    low, high = (matrix[8 * (column + i) + row] if is_transposed else matrix[8 * row + column + i] for i in range(2))
    return high << 16 | low


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_loaded_from_rows_that_lanes_name(count: int, is_transposed: bool) -> None:
    """Rows lie the last one first, 32 bytes apart. Lanes that have no row to name have an address out of bounds."""
    given = matrix_rows(4)
    registers = ", ".join(f"%r{10 + m}" for m in range(count))
    stores = " ".join(f"st.global.u32 [%d6+{4 * m}], %r{10 + m};" for m in range(count))
    body = f"""mul.wide.u32 %d5, %r1, 16; add.s64 %d5, %d5, %d1; ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%d5];
    sub.u32 %r6, 31, %r1; shl.b32 %r6, %r6, 5; mov.u32 %r7, dynamic; add.u32 %r6, %r6, %r7;
    st.shared.v4.u32 [%r6+16], {{%r2, %r3, %r4, %r5}}; bar.warp.sync -1;
    setp.ge.u32 %p1, %r1, {8 * count}; @%p1 mov.u32 %r6, 0x7fffffff;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" * is_transposed}.shared.b16 {{{registers}}}, [%r6+16];
    mul.wide.u32 %d6, %r1, 16; add.s64 %d6, %d6, %d2; {stores}"""
    out = struct.unpack("<128I", run(body, given, 512, shared=1024 + 16))
    matrices = [struct.unpack("<64H", given[128 * m :][:128]) for m in range(count)]
    for lane in range(32):
        want = [fragment(matrix, lane, is_transposed) for matrix in matrices]
        assert list(out[4 * lane :][:4]) == want + [0] * (4 - count)


def test_a_matrix_is_transposed_between_lanes() -> None:
    matrix = struct.unpack("<64H", matrix_rows(1))
    given = struct.pack("<32I", *(fragment(matrix, lane, False) for lane in range(32)))
    body = "add.s64 %d4, %d1, %d3; ld.global.u32 %r2, [%d4]; movmatrix.sync.aligned.m8n8.trans.b16 %r9, %r2;"
    assert words(body, given=given) == [fragment(matrix, lane, True) for lane in range(32)]


def multiplied(left: torch.Tensor, right: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """By mma: 16 rows of 16 or 8 numbers times 16 or 8 rows of 8 numbers, each laid out as the manual's figures say."""
    depth, kind = left.shape[1], {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"}[left.dtype]
    width = 1 if kind == "tf32" else 2  # numbers of a register
    given = b""
    for lane in range(32):
        row, first, pair = lane // 4, lane % 4 * width, lane % 4 * 2
        parts = [left[row + down, first + on :][:width] for on in range(0, depth, 4 * width) for down in (0, 8)]
        parts += [right[first + down :, row][:width] for down in range(0, depth, 4 * width)]
        parts += [sums[row + down, pair:][:2] for down in (0, 8)]
        given += b"".join(bytes(torch.stack([*part]).view(torch.uint8).tolist()) for part in parts)
    count, of_left = len(given) // 128 - 4, depth // 2 // width
    lefts = ", ".join(f"%r{10 + i}" for i in range(of_left))
    rights = ", ".join(f"%r{10 + i}" for i in range(of_left, count))
    body = f"mul.wide.u32 %d5, %r1, {4 * count + 16}; add.s64 %d6, %d1, %d5;"
    body += "".join(f"ld.global.b32 %r{10 + i}, [%d6+{4 * i}];" for i in range(count))
    body += "".join(f"ld.global.f32 %f{i}, [%d6+{4 * (count + i)}];" for i in range(4))
    body += f"""mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{%f4, %f5, %f6, %f7}}, {{{lefts}}},
    {{{rights}}}, {{%f0, %f1, %f2, %f3}}; mul.wide.u32 %d7, %r1, 16; add.s64 %d8, %d2, %d7;"""
    body += "".join(f"st.global.f32 [%d8+{4 * i}], %f{4 + i};" for i in range(4))
    out = torch.frombuffer(bytearray(run(body, given, 512)), dtype=torch.float32).view(8, 4, 2, 2)
    return out.permute(2, 0, 1, 3).reshape(16, 8)


@pytest.mark.parametrize("depth", [16, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_matrices_are_exact_and_summed_in_float32(dtype: torch.dtype, depth: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((16, depth), (depth, 8)))
    sums = torch.randn(16, 8, generator=generator)
    want = sums
    for k in range(depth):
        want = want + left[:, k, None].float() * right[k].float()  # no product of two is longer than float32
    assert torch.equal(multiplied(left, right, sums), want)
    # Whole numbers have no rounding at all, so that every element must be in its place.
    left, right = (torch.randint(-99, 100, t.shape, generator=generator).to(dtype) for t in (left, right))
    assert torch.equal(multiplied(left, right, sums.round()), (left.double() @ right.double() + sums.round()).float())


def test_products_of_tf32_read_the_upper_19_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right, sums = (torch.randn(*shape, generator=generator) for shape in ((16, 8), (8, 8), (16, 8)))
    upper = [(t.view(torch.int32) & -(1 << 13)).view(torch.float32) for t in (left, right)]
    want = sums
    for k in range(8):
        want = want + upper[0][:, k, None] * upper[1][k]  # exact
    assert torch.equal(multiplied(left, right, sums), want) and not torch.equal(upper[0], left)
    left, right = (torch.randint(-999, 1000, t.shape, generator=generator).float() for t in (left, right))
    assert torch.equal(multiplied(left, right, sums.round()), (left.double() @ right.double() + sums.round()).float())


def test_products_of_matrices_keep_what_is_not_finite_and_what_is_small() -> None:
    left, right, sums = torch.zeros(16, 16), torch.zeros(16, 8), torch.zeros(16, 8)
    left[0, 3], right[3, 1], left[5, 0], right[0, 2] = torch.inf, 2, 2.0**-24, 2.0**-24
    sums[7, 7] = torch.nan
    got = multiplied(left.half(), right.half(), sums)
    assert got[0, 1] == torch.inf and got[0, 0].isnan() and got[7, 7].isnan() and got[5, 2] == 2.0**-48
    large = torch.full((16, 16), 2.0**70).bfloat16()  # a product beyond float32
    assert (multiplied(large, large[:, :8], sums)[:7] == torch.inf).all()


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_pairs_of_floats_are_narrowed_the_first_above(type: str) -> None:
    dtype = torch.float16 if type == "f16" else torch.bfloat16
    given = floats(256, "f32")
    rows = [(bits_of(a, "f32"), bits_of(b, "f32")) for a, b in zip(given, given[7:] + given[:7])]
    for bits, a, b in zip(applied(f"cvt.rn.{type}x2.f32", ["b32", "f32", "f32"], rows), given, given[7:] + given[:7]):
        low, high = torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.int32).to(torch.int16).view(dtype).tolist()
        want_low, want_high = torch.tensor([b, a], dtype=torch.float32).to(dtype).tolist()
        assert same(low, want_low) and same(high, want_high)


# -------------------- copies beside the threads

COPY = "shl.b32 %r2, %r1, 4; mul.wide.u32 %d5, %r1, 16; add.s64 %d5, %d1, %d5;"
COPY += "cp.async.cg.shared.global [%r2], [%d5], 16;"


@pytest.mark.parametrize(("cache", "size"), [("cg", 16), ("ca", 16), ("ca", 8), ("ca", 4)])
@pytest.mark.parametrize("read", [None, 0, 1, 3, 4])
def test_copies_arrive_and_what_is_not_read_is_zero(cache: str, size: int, read: int | None) -> None:
    """Every lane copies from 16 bytes of its own, and its neighbour reads the words behind a barrier."""
    given, last = bytes(range(1, 256)) + bytes([7]) * 257, "" if read is None else ", %r3"
    wide = {4: "u32 %r20", 8: "v2.u32 {%r20, %r21}", 16: "v4.u32 {%r20, %r21, %r22, %r23}"}[size].split(maxsplit=1)
    body = f"""mov.u32 %r3, {read or 0}; mul.wide.u32 %d5, %r1, 16; add.s64 %d6, %d1, %d5; mul.lo.u32 %r2, %r1, {size};
    cp.async.{cache}.shared.global.L2::128B [%r2+32], [%d6], {size}{last};
    cp.async.commit_group; cp.async.wait_group 0; bar.warp.sync -1; xor.b32 %r4, %r1, 1; mul.lo.u32 %r4, %r4, {size};
    ld.shared.{wide[0]} {wide[1]}, [%r4+32]; add.s64 %d7, %d2, %d5; st.global.{wide[0]} [%d7], {wide[1]};"""
    out = run(body, given, 512, shared=32 + 32 * size)
    for lane in range(32):
        want = given[16 * (lane ^ 1) :][: size if read is None else read]
        assert out[16 * lane :][:16] == want + bytes(16 - len(want))


def test_a_predicate_keeps_a_copy_from_reading() -> None:
    """Lanes above 15 would read what is not there."""
    body = """setp.gt.u32 %p1, %r1, 15; mul.wide.u32 %d5, %r1, 4; add.s64 %d5, %d1, %d5; shl.b32 %r2, %r1, 2;
    cp.async.ca.shared.global [%r2], [%d5], 4, %p1; cp.async.wait_all; ld.shared.u32 %r9, [%r2];"""
    assert words(body, given=struct.pack("<16I", *range(1, 17)), shared=128) == [*range(1, 17), *[0] * 16]


def test_copies_are_waited_for_by_group_the_oldest_first() -> None:
    """Three groups, of which the second is empty; with one open the first two are there."""
    body = """shl.b32 %r2, %r1, 2; add.s64 %d5, %d1, %d3;
    cp.async.ca.shared.global [%r2], [%d5], 4; cp.async.commit_group; cp.async.commit_group;
    cp.async.ca.shared.global [%r2+128], [%d5], 4; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.u32 %r3, [%r2]; cp.async.wait_group 0; ld.shared.u32 %r4, [%r2+128];
    add.u32 %r9, %r3, %r4; cp.async.commit_group;"""
    assert words(body, given=struct.pack("<32I", *range(32)), shared=256) == [2 * i for i in range(32)]
    with pytest.raises(PtxFault, match="^asynchronous copy: byte 0 of .* thread 0 fills"):
        words(body.replace("wait_group 1", "wait_group 3", 1), given=bytes(128), shared=256)


def test_the_source_of_a_copy_stays_as_it_is_until_the_wait() -> None:
    """As in a kernel that copies from what it writes itself."""
    body = """shl.b32 %r2, %r1, 2; add.s64 %d5, %d2, %d3; st.global.u32 [%d5], %r1; bar.sync 0;
    cp.async.ca.shared.global [%r2], [%d5], 4; cp.async.commit_group; {early}
    cp.async.wait_group 0; {after} {late} ld.shared.u32 %r3, [%r2];"""
    # %d6: what a thread of the other warp copies.
    other = "xor.b32 %r4, %r1, 32; mad.wide.u32 %d6, %r4, 4, %d2; st.global.u32 [%d6], {value};"
    change, keep = other.format(value="%r1"), "st.global.u32 [%d5], %r1;"
    more = {"threads": 64, "shared": 256}
    run(body.format(early=keep, after="bar.sync 0;", late=change), **more)
    with pytest.raises(PtxFault, match="^asynchronous copy: a write to the source .*st.global.u32 .%d6., %r1$"):
        run(body.format(early=f"bar.sync 0; {change}", after="", late=""), **more)
    with pytest.raises(PtxFault, match="^asynchronous copy: a write to the source .*st.global.u32 .%d5., %r2$"):
        run(body.format(early="add.u32 %r2, %r2, 1; st.global.u32 [%d5], %r2;", after="", late=""), **more)
    # A copy may read as late as at its wait, and a barrier before that does not order it. The second warp is the later.
    change = change.replace("st.global", "setp.gt.u32 %p1, %r1, 31; @%p1 st.global")
    with pytest.raises(PtxFault, match="^race: global memory at 0x20000000 was read by thread 0 .*thread 32"):
        run(body.format(early="bar.sync 0;", after="", late=change), **more)


# -------------------- what is not known

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
