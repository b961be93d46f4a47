"""Keys that outweigh all others, by the CUDA kernels on the emulator: states in float64, which serve queries that are
computed again, float64 and narrow heads, hold them out, so that no query has to sum all keys by itself."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulator
from heavy_keys import RANK, SINKS, Call, D, N, late_call
from oracle import assert_as_exact, row_error
from testkit import assert_same_bits
from torch import Tensor

import scatterbrain as sb

SUPPORTS = {
    "window": sb.Window(40),
    "window with sinks": sb.Window(24, sinks=6),
    "pooled": sb.Routed(32, 16),
    "per query": sb.Routed(32, block_q=1, block_k=8, window=16),
    "empty": sb.Empty(),
}


def run(emulator: Emulator, call: Call, support: object, is_causal: bool, **arguments: object) -> tuple[Tensor, Tensor]:
    """out and lse, at lists of the CPU's."""
    support = call.fixed(support, is_causal, **arguments)
    settings = dict(is_causal=is_causal, scale=call.scale, statistics=call.statistics, **arguments)
    with emulator.installed():
        return sb.attention(*call.inputs, support, sb.Quadratic(RANK), return_lse=True, **settings)


def assert_parity(emulator: Emulator, call: Call, support: object, is_causal: bool, **arguments: object) -> None:
    support = call.fixed(support, is_causal, **arguments)
    out, lse = run(emulator, call, support, is_causal, **arguments)
    plain = call.defined(support, is_causal, call.dtype, **arguments)
    exact = call.defined(support, is_causal, torch.float64, **arguments)
    floor = 1e-9 if call.dtype == torch.float64 else 1e-5
    for name, mine, same, right in zip(("out", "lse"), (out, lse), plain, exact):
        mine, same, right = (t.nan_to_num(neginf=0.0) for t in (mine, same, right))
        assert_as_exact(mine, right, same, floor, f"{support}, {name}:")


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("strength", [10.0, 200.0])
def test_a_sink_changes_no_result(emulator: Emulator, support: str, is_causal: bool, strength: float) -> None:
    for dtype in (torch.float32, torch.float64):
        assert_parity(emulator, Call(strength, dtype=dtype), SUPPORTS[support], is_causal)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("sinks", SINKS)
def test_several_sinks_change_no_result(emulator: Emulator, sinks: str, is_causal: bool) -> None:
    growth = 5.0 if sinks == "later ones heavier" else 0.0
    for dtype in (torch.float32, torch.float64):
        assert_parity(emulator, Call(30.0, SINKS[sinks], growth=growth, dtype=dtype), SUPPORTS["window"], is_causal)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_every_key_may_outweigh_all_before_it(emulator: Emulator, is_causal: bool) -> None:
    """Keys that are held once enter later states then."""
    for growth in (0.1, 0.7):
        call = Call(0.0, list(range(N)), growth=growth, dtype=torch.float64)
        assert_parity(emulator, call, SUPPORTS["window"], is_causal)


def test_a_key_that_outweighs_the_others_for_a_while_enters_a_later_state(emulator: Emulator) -> None:
    arguments, want = late_call()
    with emulator.installed():
        out, _ = torch.ops.scatterbrain.attention(*arguments)
    assert row_error(out, want) <= 1e-6


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_sinks_of_groups_of_heads_and_among_padding(emulator: Emulator, is_causal: bool) -> None:
    mask = torch.zeros(1, N, dtype=torch.bool)
    mask[:, [*range(9), 25, *range(300, N)]] = True
    call = Call(30.0, [1, 25, 60, 150, 310], heads=4, kv_heads=2, dtype=torch.float64)
    assert_parity(emulator, call, SUPPORTS["window"], is_causal, key_padding_mask=mask)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_time_is_linear_whatever_a_sink_weighs(emulator: Emulator, dtype: torch.dtype, is_causal: bool) -> None:
    """Every query lists the sink. Warps that walk keys exchange the largest exponent of every step."""
    shuffles = []
    for tokens in (500, 1000):
        call = Call(300.0, [3], tokens=tokens, dtype=dtype)
        before = emulator.statistics()["shuffles"]
        run(emulator, call, sb.Window(8, sinks=6), is_causal)
        shuffles.append(emulator.statistics()["shuffles"] - before)
    assert shuffles[1] <= 2.3 * shuffles[0], shuffles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_later_sink_changes_no_bit_of_earlier_rows(emulator: Emulator, dtype: torch.dtype) -> None:
    for edge, later in ((180, [180]), (65, [70, 150, 310]), (256, [256, 257])):
        results = [
            [t[:, :, :edge] for t in run(emulator, Call(200.0, sinks, growth=3.0, dtype=dtype), sb.Window(16), True)]
            for sinks in ([5, 40], [5, 40, *later])
        ]
        assert_same_bits(*results)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padding_around_sinks_changes_no_bit(emulator: Emulator, dtype: torch.dtype, is_causal: bool) -> None:
    call, padded = (Call(200.0, [5, 150], dtype=dtype) for _ in range(2))
    base = run(emulator, call, sb.Window(16), is_causal)
    before, behind = 70, 9
    for name in ("query", "key", "value"):
        given = getattr(call, name)
        fill = [torch.full((1, given.shape[1], n, D), 1e4) for n in (before, behind)]
        setattr(padded, name, torch.cat([fill[0], given, fill[1]], 2))
    mask = torch.ones(1, before + N + behind, dtype=torch.bool)
    mask[:, before : before + N] = False
    got = run(emulator, padded, sb.Window(16), is_causal, key_padding_mask=mask)
    assert_same_bits([t[:, :, before : before + N] for t in got], base)
