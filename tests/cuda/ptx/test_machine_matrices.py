"""The interpreter of PTX: matrices of a warp, and copies beside the threads."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from ptx_machine import PtxFault
from small_kernels import run, words


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
