"""The same bits from run to run, for any number of threads and any memory layout, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import testkit
import torch
from testkit import LAYOUTS, assert_same_bits, low_ranks, part_of_a_larger_one, projections, rand, width_first
from torch import Tensor

import scatterbrain as sb
from scatterbrain.low_rank.moments import moments

D, DV = 16, 12
SUPPORTS = {
    "window": sb.Window(40, 16),
    "single queries": sb.Window(24, 1),
    "routed": sb.Routed(32, 16),
    "routed per query": sb.Routed(32, 1, 8, 16),
    "routed per query of two pools": sb.Routed(32, 1, 8, 16, pools=2),
    "routed per query by sketches": sb.Routed(32, 1, 8, 16, pools=0),
    "window with sinks": sb.Window(44, 16, sinks=4),
    "routed with window and sinks": sb.Routed(48, 16, window=32, sinks=4),
    "lsh": sb.LSH(32, rounds=2),
    "empty": sb.Empty(),
}
LOW_RANKS = {name: kernel for name, kernel in low_ranks(4, 16).items() if name not in ("stored", "ema")}
# (query heads, key/value heads). Fewer heads than threads are split into rounds of units, more are taken whole.
HEADS = {"one head": (1, 1), "four heads": (4, 4), "two groups of heads": (4, 2), "one group of heads": (3, 1)}


def tensors(n: int, heads: tuple[int, int]) -> list[Tensor]:
    return testkit.qkv(n, batch=1, heads=heads[0], kv_heads=heads[1], head_dim=D, value_dim=DV)


def run(inputs: list[Tensor], support: object, low_rank: object, **arguments: object) -> list[Tensor]:
    """out, lse and every gradient."""
    statistics = None
    if low_rank == LOW_RANKS["learned"]:
        heads, kv_heads = (t.shape[1] for t in inputs[:2])
        statistics = projections(4, heads=heads, kv_heads=kv_heads, head_dim=D)
    return testkit.attend(inputs, support, low_rank, statistics, allow_unused=True, **arguments)


CASES = [
    (support, low_rank, is_causal)
    for support in SUPPORTS
    for low_rank in LOW_RANKS
    for is_causal in (False, True)
    if not (support == "empty" and low_rank == "none") and not (is_causal and (support == "lsh" or low_rank == "input"))
]


@pytest.mark.parametrize("support, low_rank, is_causal", CASES)
def test_the_bits_do_not_depend_on_threads_or_runs(support: str, low_rank: str, is_causal: bool) -> None:
    """700 queries are eleven causal units, 1100 are five bidirectional ones and two segments of keys."""
    names = (
        list(HEADS) if support in ("window", "routed per query") and low_rank == "learned" else ["one group of heads"]
    )
    for name in names:
        inputs = tensors(700 if is_causal else 1100, HEADS[name])
        want = None
        for count in (1, 2, 3, 1) if len(names) > 1 else (1, 3):
            torch.set_num_threads(count)
            got = run(inputs, SUPPORTS[support], LOW_RANKS[low_rank], is_causal=is_causal)
            assert all(t.isfinite().all() for t in got)
            want = want or got
            assert_same_bits(got, want)


def test_many_rounds_of_units_give_the_bits_of_whole_heads() -> None:
    """3000 queries of one head with 96 keys each: more kept pairs than one round of the backward pass holds."""
    inputs = tensors(3000, (1, 1))
    for support in (sb.Window(96, 16), sb.Window(96, 1)):
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(inputs, support, sb.Quadratic(4, "learned"), is_causal=True))
        for got in results[1:]:
            assert_same_bits(got, results[0])


LONG_LISTS = """
import torch
import scatterbrain as sb
from scatterbrain.bench.memory import _CLEAR, _trim, resident
from testkit import rand

tokens, results = [rand(1, 1, 8192, 64, seed=seed).requires_grad_() for seed in range(3)], []
for threads in (1, 16):
    torch.set_num_threads(threads)
    out = sb.attention(*tokens, sb.Window(6000, int(sys.argv[1])), None)
    _trim()
    _CLEAR.write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    results.append(torch.autograd.grad(out, tokens, torch.ones_like(out)))
    peak = (resident("VmHWM") - before) >> 20
print(all(map(torch.equal, *results)), peak)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("block_q", [1, 16])
def test_many_threads_keep_no_more_than_a_round_may_hold(block_q: int) -> None:
    """16 units of 256 queries with 6000 keys each would keep more than 200 MiB; a round holds 64 MiB
    (kMostRoundBytes), beside what each thread works in."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{LONG_LISTS}"
    done = testkit.run_python("-c", code, block_q)
    assert done.returncode == 0, done.stderr
    same, peak = done.stdout.split()
    assert same == "True" and int(peak) < 130


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_padding_and_offsets_do_not_depend_on_threads(is_causal: bool) -> None:
    inputs = [t.expand(2, -1, -1, -1) * torch.tensor([1.0, 0.5])[:, None, None, None] for t in tensors(500, (2, 1))]
    mask = torch.rand(2, 500, generator=torch.Generator().manual_seed(5)) < 0.2
    mask[0, :100], mask[1, 320:] = True, True
    offset = dict(query_offset=torch.tensor([-30, 70])) if is_causal else {}
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(
            run(inputs, sb.Routed(32), sb.Quadratic(4, "learned"), key_padding_mask=mask, is_causal=is_causal, **offset)
        )
    assert_same_bits(results[1], results[0])


# ---------------------------------------------------------------------------------------- memory layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("support", [s for s in SUPPORTS if s != "empty"])
def test_the_layout_of_the_inputs_changes_no_bit(support: str, layout: str) -> None:
    inputs = tensors(150, (4, 2))
    arguments = dict(is_causal=support != "lsh")
    for width in (D, 11):  # multiples of a vector are used where they lie, other widths are packed
        plain = [t[..., :width].contiguous() for t in inputs[:2]] + inputs[2:]
        laid_out = [LAYOUTS[layout](t) for t in plain]
        for low_rank in (sb.Favor(16), None):
            assert_same_bits(
                run(laid_out, SUPPORTS[support], low_rank, **arguments),
                run(plain, SUPPORTS[support], low_rank, **arguments),
            )


def test_the_layout_changes_no_bit_with_projections() -> None:
    plain = tensors(150, (4, 2))
    for layout in LAYOUTS.values():
        got = run([layout(t) for t in plain], sb.Routed(32), sb.Quadratic(4, "learned"), is_causal=True)
        assert_same_bits(got, run(plain, sb.Routed(32), sb.Quadratic(4, "learned"), is_causal=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_no_bit_of_moments(layout: str) -> None:
    """Statistics are fitted from them, also those of the input within a call."""
    plain = testkit.qkv(77, batch=2, heads=2, kv_heads=2, head_dim=96)[:2]
    got, want = (moments(*tokens, 0.1) for tokens in ([LAYOUTS[layout](t) for t in plain], plain))
    assert_same_bits(list(vars(got).values()), list(vars(want).values()), tuple(vars(want)))


@pytest.mark.parametrize("tokens, head_dim", [(2, 64), (19, 256), (300, 128)])
def test_the_number_of_threads_changes_no_bit_of_statistics(tokens: int, head_dim: int) -> None:
    """Of fewer tokens than dimensions, most directions are alike: which of them a decomposition returns is rounding."""
    query, key = testkit.qkv(tokens, batch=2, heads=2, kv_heads=2, head_dim=head_dim)[:2]
    got = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        got.append(sb.fit_statistics(query, key, rank=5).tensors())
        assert torch.get_num_threads() == count
    for other in got[1:]:
        assert_same_bits(other, got[0], ("query projection", "query mean", "key projection", "key mean"))
    assert bool((got[0][0][0, 0] != 0).any())


@pytest.mark.parametrize("support", [s for s in SUPPORTS if s != "empty"])
def test_expanded_inputs_are_read_as_if_they_were_copies(support: str) -> None:
    """Stride 0 along batch, heads or tokens."""
    query, key, value = tensors(150, (4, 2))
    expanded = [
        query[:, :1].expand(2, 4, -1, -1),
        key[:, :1].expand(2, 2, -1, -1),
        value[:, :, :1].expand(2, -1, 150, -1),
    ]
    arguments = dict(is_causal=support != "lsh")
    assert_same_bits(
        run(expanded, SUPPORTS[support], sb.Quadratic(4, "learned"), **arguments),
        run([t.contiguous() for t in expanded], SUPPORTS[support], sb.Quadratic(4, "learned"), **arguments),
    )


def test_gradients_of_any_layout_are_read_alike() -> None:
    """The gradient of a sum is one number expanded; that of a transposed result is transposed."""
    inputs = testkit.leaves(tensors(150, (4, 2)))
    out = sb.attention(*inputs, sb.Window(24), sb.Favor(16))
    for upstream in (
        torch.ones(()).expand(out.shape),
        width_first(rand(*out.shape)),
        part_of_a_larger_one(rand(*out.shape)),
    ):
        got = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
        want = torch.autograd.grad(out, inputs, upstream.contiguous(), retain_graph=True)
        assert_same_bits(got, want, testkit.RESULTS[2:])


def test_masks_lists_and_offsets_of_any_layout_are_read_alike() -> None:
    inputs = [t.expand(2, -1, -1, -1).contiguous() for t in tensors(150, (4, 2))]
    mask = torch.rand(150, 2, generator=torch.Generator().manual_seed(1)).t() < 0.3
    lists = sb.route(*inputs[:2], sb.Routed(32), None, key_padding_mask=mask, is_causal=True)
    wide = torch.full((*lists.index.shape[:3], 2 * lists.index.shape[3]), 7, dtype=torch.int32)
    wide[..., ::2] = lists.index
    strided = sb.Blocks(wide[..., ::2], lists.count.transpose(1, 2).contiguous().transpose(1, 2), 16, 1)
    offset = torch.tensor([0, 9, 3, 9], dtype=torch.int32)[::2]
    got = run(inputs, strided, None, key_padding_mask=mask, is_causal=True, query_offset=offset)
    assert_same_bits(
        got,
        run(inputs, lists, None, key_padding_mask=mask.contiguous(), is_causal=True, query_offset=torch.tensor([0, 3])),
    )
