"""The interpreter of PTX: threads part and meet, and exchange through registers and memory."""

from __future__ import annotations

import struct

import pytest
from small_kernels import run, words


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
