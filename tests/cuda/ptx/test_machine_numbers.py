"""The interpreter of PTX: instructions on numbers compute what the PTX manual says."""

from __future__ import annotations

import math
import random

import pytest
import torch
from small_kernels import applied, bits_of, signed, value_of


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


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_pairs_of_floats_are_narrowed_the_first_above(type: str) -> None:
    dtype = torch.float16 if type == "f16" else torch.bfloat16
    given = floats(256, "f32")
    rows = [(bits_of(a, "f32"), bits_of(b, "f32")) for a, b in zip(given, given[7:] + given[:7])]
    for bits, a, b in zip(applied(f"cvt.rn.{type}x2.f32", ["b32", "f32", "f32"], rows), given, given[7:] + given[:7]):
        low, high = torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.int32).to(torch.int16).view(dtype).tolist()
        want_low, want_high = torch.tensor([b, a], dtype=torch.float32).to(dtype).tolist()
        assert same(low, want_low) and same(high, want_high)
