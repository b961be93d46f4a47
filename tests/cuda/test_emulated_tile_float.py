"""The forward pass on tensor cores for float32 tokens, in the emulator: as near to float64 as the CPU's kernel, by bits
under padding, the future, layouts and repetition, without bank conflicts in its loop; and faults that are planted into
it. The parity table's drawn cases run through it in test_emulated.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from emulated import Emulator
from oracle import row_error
from planted import FLOAT, Kernels
from testkit import assert_same_bits, rand
from tiles import lists, ragged, rms, statistics_of
from torch import Tensor
from torch.nn.functional import pad

import scatterbrain as sb

LOW_RANKS = {"none": None, "quadratic": sb.Quadratic(4), "centroid": sb.Centroid(20)}
N = 200


@contextmanager
def on_tensor_cores(emulator: Emulator, expected: bool = True) -> Iterator[None]:
    """Operators run in the emulator, and the kernel on tensor cores is started or not, as expected."""
    started = []
    with emulator.installed(), emulator.observed(lambda launch, is_after: started.append(launch.kernel)):
        yield
    assert (b"attention_tile_float" in started) == expected


def tokens_of(head_dim: int = 24, value_dim: int = 40, n: int = N) -> list[Tensor]:
    return [rand(1, 2, n, head_dim, seed=1), rand(1, 1, n, head_dim, seed=2), rand(1, 1, n, value_dim, seed=3)]


def attend(emulator: Emulator, tokens: list[Tensor], support: object, low_rank: object, **more: object) -> list[Tensor]:
    if isinstance(low_rank, sb.Quadratic):
        d = tokens[0].shape[3]
        more["statistics"] = sb.fit_statistics(rand(1, 2, 99, d, seed=4), rand(1, 1, 99, d, seed=5), low_rank.rank)
    with on_tensor_cores(emulator):
        return list(sb.attention(*tokens, support, low_rank, return_lse=True, **more))


def errors(
    emulator: Emulator, tokens: list[Tensor], support: object, low_rank: object, **more: object
) -> tuple[list[float], list[float]]:
    """Against float64: of out by rms and in its worst row, and of lse; and those of the CPU's kernel."""
    more.setdefault("statistics", statistics_of(low_rank, tokens))
    with on_tensor_cores(emulator):
        got = sb.attention(*tokens, support, low_rank, return_lse=True, **more)
    cpu = sb.attention(*tokens, support, low_rank, return_lse=True, **more)
    exact = sb.reference.attention(*tokens, support, return_lse=True, low_rank=low_rank, dtype=torch.float64, **more)
    shown = exact[1].isfinite()
    assert torch.equal(got[1].isfinite(), shown)

    def of(out: Tensor, lse: Tensor) -> list[float]:
        of_lse = float((lse.double() - exact[1])[shown].abs().max())
        return [rms(out, exact[0]), row_error(out, exact[0]), of_lse]

    return of(*got), of(*cpu)


def excess(emulator: Emulator, tokens: list[Tensor], support: object, low_rank: object, **more: object) -> str:
    """Empty where the errors are within 1.5 times those of the CPU's kernel, which sums in float32 too, else which one
    is not."""
    got, cpu = errors(emulator, tokens, support, low_rank, **more)
    for name, error, of_cpu in zip(("rms", "row", "lse"), got, cpu):
        if not error <= 1.5 * of_cpu:
            return f"{name}: {error:.1e}, {error / of_cpu:.2f} times the CPU's"
    return ""


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 8), (64, 64), (72, 128), (128, 56)])
@pytest.mark.parametrize("kind", LOW_RANKS)
def test_errors_are_those_of_the_cpu_kernel_at_every_width(
    emulator: Emulator, head_dim: int, value_dim: int, kind: str
) -> None:
    assert not excess(emulator, tokens_of(head_dim, value_dim), ragged(N, 2, 70, head_dim == 64, 1), LOW_RANKS[kind])


# Lists one after the other, and merged by groups of keys; with and without a causal edge.
RAGGED = {
    "lists of 8 queries": (lists(N, 8, 1, 60, batch=1), False),
    "windows of 8 queries": (sb.Window(40, 8, sinks=3), False),
    "windows of 24 queries": (sb.Window(48, 24, sinks=19), True),
    "lists of blocks of keys": (lists(N, 2, 8, 6, True, batch=1), True),
}


# Clusters are of all keys.
PAIRS = [(form, kind) for form in RAGGED for kind in LOW_RANKS if not (RAGGED[form][1] and kind == "centroid")]


@pytest.mark.parametrize(("form", "kind"), PAIRS)
def test_errors_of_ragged_tiles_are_those_of_the_cpu_kernel(emulator: Emulator, form: str, kind: str) -> None:
    support, is_causal = RAGGED[form]
    assert not excess(emulator, tokens_of(), support, LOW_RANKS[kind], is_causal=is_causal)


def test_large_scores_and_values_are_as_exact(emulator: Emulator) -> None:
    """Weights from 1 down to nothing, and numbers near both ends of float32."""
    for of_scores, of_values in ((20.0, 1e30), (4.0, 1e-30)):
        query, key, value = tokens_of(64, 64)
        assert not excess(emulator, [of_scores * query, key, of_values * value], sb.Window(64), None)


def test_what_does_not_fit_runs_without_tensor_cores(emulator: Emulator) -> None:
    for head_dim, value_dim in ((20, 40), (24, 20), (136, 40), (8, 40)):
        with on_tensor_cores(emulator, expected=False):
            sb.attention(*tokens_of(head_dim, value_dim, n=60), sb.Window(16), None)
    with on_tensor_cores(emulator, expected=False):
        sb.attention(*(t.double() for t in tokens_of(n=60)), sb.Window(16), None)


# -------------------- bits


@pytest.mark.parametrize(
    ("form", "kind"), [("windows of 24 queries", "quadratic"), ("lists of blocks of keys", "none")]
)
def test_no_bit_of_the_past_depends_on_the_future(emulator: Emulator, form: str, kind: str) -> None:
    """Later tokens choose other lists of later queries, too."""
    tokens = tokens_of()
    base = attend(emulator, tokens, RAGGED[form][0], LOW_RANKS[kind], is_causal=True)
    for edge, content in ((70, 1e4), (101, torch.inf), (137, torch.nan)):
        changed = [t.clone() for t in tokens]
        for t in changed:
            t[:, :, edge:] = content * torch.sign(t[:, :, edge:])
        got = attend(emulator, changed, RAGGED[form][0], LOW_RANKS[kind], is_causal=True)
        assert_same_bits([t[:, :, :edge] for t in got], [t[:, :, :edge] for t in base], ("out", "lse"))


@pytest.mark.parametrize("kind", LOW_RANKS)
@pytest.mark.parametrize("support", [sb.Window(43, 32, sinks=5), sb.Window(24, 8)], ids=["shared", "ragged"])
def test_no_bit_depends_on_padding(emulator: Emulator, support: object, kind: str) -> None:
    """To the left, to the right and in holes, however much there is and whatever it holds."""
    holes = torch.zeros(1, N, dtype=torch.bool)
    holes[:, 13::4] = True
    tokens = tokens_of()
    base = attend(emulator, tokens, support, LOW_RANKS[kind], key_padding_mask=holes)
    for left, right, content in ((0, 0, 1e4), (5, 77, torch.inf), (64, 3, torch.nan)):
        mask = pad(holes, (left, right), value=True)
        moved = [pad(t, (0, 0, left, right)).masked_fill(mask[:, None, :, None], content) for t in tokens]
        got = attend(emulator, moved, support, LOW_RANKS[kind], key_padding_mask=mask)
        assert_same_bits([t[:, :, left : left + N] for t in got], base, ("out", "lse"))


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_two_runs_and_every_layout_give_the_same_bits(emulator: Emulator, kind: str) -> None:
    tokens = tokens_of()
    base = attend(emulator, tokens, sb.Window(48), LOW_RANKS[kind])
    heads_inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tokens]
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in tokens]  # not at 16 bytes
    for given in (tokens, heads_inside, shifted):
        assert_same_bits(attend(emulator, given, sb.Window(48), LOW_RANKS[kind]), base, ("out", "lse"))


@pytest.mark.parametrize("support", [ragged(N, 2, 60, False, 1), lists(N, 8, 1, 60, batch=1)], ids=["16", "8"])
def test_values_that_are_no_numbers_reach_those_who_list_them_alone(emulator: Emulator, support: sb.Blocks) -> None:
    """And stay what they are: parts of an infinite one are no numbers. So do values that round to infinity in TF32."""
    tokens = tokens_of()
    base = attend(emulator, tokens, support, None)[0]
    one_hot = torch.eye(N)[40:43].T.expand(1, 1, N, 3)
    lists_it = sb.reference.attention(*tokens[:2], one_hot, support, low_rank=None) > 0
    tokens[2][:, :, 40, 1], tokens[2][:, :, 41, 2], tokens[2][:, :, 42, 3] = torch.nan, torch.inf, 3.4028e38
    out = attend(emulator, tokens, support, None)[0]
    assert torch.equal(out[..., 1].isnan(), lists_it[..., 0])
    assert torch.equal(out[..., 2] == torch.inf, lists_it[..., 1])
    assert torch.equal(out[..., 3] > 1e30, lists_it[..., 2]) and out[..., 3].isfinite().all()
    assert lists_it.any() and not lists_it.all() and int((~out.isfinite()).sum()) == int(lists_it[..., :2].sum())
    untouched = ~lists_it.any(-1)
    assert_same_bits([out[untouched]], [base[untouched]], ("out",))
    assert row_error(out[..., 4:], base[..., 4:].double()) <= 1e-6


# -------------------- conflicts, planted faults


def conflicts_of_the_loop(emulator: Emulator) -> list[int]:
    """Bank conflicts that 64 further keys of every list cost, without a kernel and with the quadratic one, where 16
    queries share a list and where 8 do. Clusters are looked up wherever the keys' are, so that theirs depend on the
    keys."""
    found = []
    for low_rank, head_dim, block_q in ((None, 64, 16), (LOW_RANKS["quadratic"], 128, 16), (None, 128, 8)):
        counts = []
        for keys in (32, 96):
            before = emulator.statistics()["bank_conflicts"]
            attend(emulator, tokens_of(head_dim, head_dim), sb.Window(keys, block_q), low_rank)
            counts.append(emulator.statistics()["bank_conflicts"] - before)
        found.append(counts[1] - counts[0])
    return found


def first_complaint(emulator: Emulator) -> str:
    try:
        for low_rank in LOW_RANKS.values():
            wrong = excess(emulator, tokens_of(64, 64), ragged(N, 2, 70, False, 1), low_rank)
            if wrong:
                return wrong
        return "conflicts" if any(conflicts_of_the_loop(emulator)) else ""
    except RuntimeError as error:
        return str(error)


def test_neither_a_complaint_nor_a_bank_conflict_without_a_fault(emulator: Emulator) -> None:
    assert first_complaint(emulator) == ""


TILE = "attention_tile_float.cuh"
FAULTS = {
    "lost low part of a right operand": (
        "float_products.cuh",
        "  multiply_add(small, left.high, low[0], low[1], Tf32{});\n",
        "",
        "rms",
    ),
    "swizzle of keys lost where they are read": (TILE, "(chunk << 4) ^ moved_by_parity(row)", "(chunk << 4)", "rms"),
    "lost swizzle of keys": (TILE, "return (row & 1) << 6;", "return 0 * row;", "conflicts"),
    "missing wait for values": (
        TILE,
        "      wait_copies<1>();\n      sync_warp();\n      if (is_careful)",
        "      if (is_careful)",
        "asynchronous copy",
    ),
    "missing barrier before values are overwritten": (
        TILE,
        "      sync_warp();  // before values are overwritten\n",
        "",
        "race|async",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    file, old, new, name = FAULTS[fault]
    kernels.assert_caught(file, old, new, name, first_complaint, FLOAT)
