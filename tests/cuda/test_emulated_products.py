"""Sums of features on tensor cores, in the emulator: states and their gradients are as near to float64 as those of the
kernels in float32, by bits under causality and padding, without bank conflicts; and faults planted into them."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated import Emulator, Observed
from operator_cases import operator_arguments
from planted import BFLOAT16, Kernels
from testkit import assert_same_bits, rand
from torch import Tensor
from torch.nn.functional import pad

import scatterbrain as sb
from scatterbrain.operators.arguments import QUADRATIC, AttentionArguments

OPERATORS = torch.ops.scatterbrain
HALF = [torch.bfloat16, torch.float16]
FEATURES = 2  # the low-rank kernel of features that are given
BY_TOKENS = {torch.bfloat16: "products", torch.float16: "products", torch.float32: "segments"}


class Maps:
    """A call of one row with empty lists: maps and values of wide range, so that its states tell every digit."""

    def __init__(self, kind: int, rank: int, width: int, queries: int = 40, keys: int = 200, spread: float = 1.0):
        self.kind, self.rank, self.width, self.queries, self.keys = kind, rank, width, queries, keys
        self.query, self.key = rand(1, 2, queries, 16, seed=1).bfloat16(), rand(1, 1, keys, 16, seed=2).bfloat16()
        self.value, self.d_out = (
            rand(1, 1, keys, width, seed=3).bfloat16(),
            rand(1, 2, queries, width, seed=4).bfloat16(),
        )
        maps = rand(1, 2, queries, rank + 1, seed=5), spread * rand(1, 1, keys, rank + 1, seed=6)
        if kind == FEATURES:
            for m in maps:
                m[..., :-1] = m[..., :-1].exp()
        self.x, self.y = maps

    def features(self, of: Tensor) -> Tensor:
        z = of[..., :-1].double()
        if self.kind == FEATURES:
            return z
        pairs = [
            z[..., a : a + 1] * z[..., a:] * torch.tensor([0.5] + [0.5**0.5] * (self.rank - a - 1)).double()
            for a in range(self.rank)
        ]
        return torch.cat([torch.ones_like(z[..., :1]), z, *pairs], -1)

    def states(self, segment: int) -> Tensor:
        """By segment, relative to its largest log scale."""
        parts = []
        for y, v in zip(self.y[0, 0].split(segment), self.value[0, 0].double().split(segment)):
            log = y[:, -1].double()
            weighted = self.features(y) * (log - log.max()).exp()[:, None]
            parts.append(weighted.T @ torch.cat([v, torch.ones_like(v[:, :1])], -1))
        return torch.stack(parts)

    def state_gradients(self) -> Tensor:
        """By head."""
        state, F = self.states(self.keys)[0], self.features(self.x[0])
        weight = 1 / (F @ state[:, -1:])
        d_out = self.d_out[0].double()
        delta = (d_out * (F @ state[:, :-1] * weight)).sum(-1, keepdim=True)
        return (weight * F).mT @ torch.cat([d_out, -delta], -1)

    def arguments(self, dtype: torch.dtype, is_causal: bool = False) -> tuple[list[Tensor], AttentionArguments]:
        tokens = [t.detach().to(dtype).requires_grad_() for t in (self.query, self.key, self.value)]
        index = torch.zeros(1, 1, self.queries, 1, dtype=torch.int32)  # of single queries: computed one by one
        return tokens, operator_arguments(
            AttentionArguments,
            query=tokens[0],
            key=tokens[1],
            value=tokens[2],
            query_map=self.x,
            key_map=self.y,
            index=index,
            count=torch.zeros(1, 1, self.queries, dtype=torch.int32),
            query_offset=torch.tensor([self.keys - self.queries], dtype=torch.int32) if is_causal else None,
            low_rank=self.kind,
            is_causal=is_causal,
            block_q=1,
        )

    def sums(self, emulator: Emulator, dtype: torch.dtype, is_causal: bool = False) -> tuple[Tensor, Tensor]:
        """Its states by segment, before they are added up, and gradients of states by head; which kernels make them
        is asserted."""
        tokens, arguments = self.arguments(dtype, is_causal)
        width = self.features(self.x).shape[-1] * (self.width + 1)
        segments = -(-self.keys // (64 if is_causal else 512))
        counts = {"feature": segments + 1, "query": 2 * (segments + 1 if is_causal else 1)}
        found: dict[str, tuple[str, Tensor]] = {}  # of the first pass

        def observe(launch: Observed, is_after: bool) -> None:
            of, _, kernel = launch.kernel.decode().partition("_")
            if not is_after or kernel not in BY_TOKENS.values() or of not in counts or of in found:
                return
            size = counts[of] * width * 4
            for one in (launch.exposed[i] for i in range(launch.exposed_count)):
                if one.is_writable and one.element == 6 and one.end - one.begin == size:
                    sums = torch.frombuffer(bytearray(ctypes.string_at(one.begin, size)), dtype=torch.float32)
                    found[of] = kernel, sums.view(counts[of], -1, self.width + 1)

        with emulator.installed(), emulator.observed(observe):
            out, _ = OPERATORS.attention(*arguments)
            torch.autograd.grad(out, tokens, self.d_out.to(dtype))
        assert [kernel for kernel, _ in found.values()] == [BY_TOKENS[dtype]] * 2
        return found["feature"][1][1:], found["query"][1]


def error(got: Tensor, exact: Tensor, of: str) -> float:
    """rms over all, or of the worst row, relative to what is summed."""
    far = (got.double() - exact).detach() / exact.square().mean(-1, keepdim=True).sqrt()
    return float(far.square().mean().sqrt() if of == "rms" else far.square().mean(-1).sqrt().max())


def excess(emulator: Emulator, maps: Maps, dtype: torch.dtype, is_causal: bool = False) -> str:
    """Empty where the sums are as near to float64 as those of float32 tokens with the same numbers."""
    got, plain = (maps.sums(emulator, one, is_causal) for one in (dtype, torch.float32))
    exact = [maps.states(64 if is_causal else 512), None if is_causal else maps.state_gradients()]
    for name, ours, floats, want in zip(("states", "gradients"), got, plain, exact):
        if want is None:  # slots that nobody reads have none
            far = float((ours - floats).norm() / floats.norm())
            if not far <= 1e-6:
                return f"{name}: {far:.1e} from those of float32"
            continue
        for of, times in (("rms", 1.2), ("row", 1.5)):
            ratio = error(ours, want, of) / error(floats, want, of)
            if not ratio <= times:
                return f"{name}: {of} error {ratio:.2f} times that of float32, {error(ours, want, of):.1e}"
    return ""


CALLS = {
    "quadratic": Maps(QUADRATIC, 4, 24),
    "several tiles of features": Maps(QUADRATIC, 11, 64, keys=100),
    "wide values": Maps(QUADRATIC, 9, 136, keys=90),
    "several segments": Maps(QUADRATIC, 3, 8, keys=600),
    "given features": Maps(FEATURES, 70, 40, keys=100),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_sums_are_as_exact_as_in_float32(emulator: Emulator, name: str, dtype: torch.dtype) -> None:
    assert not excess(emulator, CALLS[name], dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_causal_sums_are_as_exact_as_in_float32(emulator: Emulator, dtype: torch.dtype) -> None:
    assert not excess(emulator, CALLS["quadratic"], dtype, is_causal=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_features_of_wide_range_lose_nothing(emulator: Emulator, dtype: torch.dtype) -> None:
    maps = Maps(QUADRATIC, 4, 24, spread=6.0)
    got, plain = (maps.sums(emulator, one)[0] for one in (dtype, torch.float32))
    assert error(got, maps.states(512), "row") <= 1.2 * error(plain, maps.states(512), "row")


def test_values_near_the_ends_of_their_types_lose_nothing(emulator: Emulator) -> None:
    for dtype, largest in ((torch.bfloat16, 1e30), (torch.float16, 6e4)):
        maps = Maps(QUADRATIC, 4, 24)
        maps.value, maps.d_out = maps.value.clamp(-1, 1) * largest, maps.d_out / largest
        got, plain = (maps.sums(emulator, one)[0] for one in (dtype, torch.float32))
        exact = maps.states(512)
        assert error(got, exact, "rms") <= 1.2 * error(plain, exact, "rms")


# -------------------- bits


def results(
    emulator: Emulator, tokens: list[Tensor], low_rank: object, is_causal: bool, mask: Tensor | None = None
) -> list[Tensor]:
    """out, lse and gradients; d_out is the last of the tokens."""
    leaves = [t.detach().clone().requires_grad_() for t in tokens[:3]]
    more = {"statistics": sb.fit_statistics(rand(1, 2, 99, 16, seed=4), rand(1, 1, 99, 16, seed=5), 4)}
    more = more if isinstance(low_rank, sb.Quadratic) else {}
    with emulator.installed():
        out, lse = sb.attention(
            *leaves, sb.Window(16, 8), low_rank, return_lse=True, is_causal=is_causal, key_padding_mask=mask, **more
        )
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, tokens[3])]


NAMES = ("out", "lse", "dq", "dk", "dv")
N = 150
LOW_RANKS = [sb.Quadratic(4), sb.Favor(8)]


def some_tokens(dtype: torch.dtype) -> list[Tensor]:
    widths = ((2, 16), (1, 16), (1, 24), (2, 24))
    return [rand(1, heads, N, width, seed=i, dtype=dtype) for i, (heads, width) in enumerate(widths)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("low_rank", LOW_RANKS, ids=str)
def test_no_bit_of_the_past_depends_on_the_future(emulator: Emulator, low_rank: object, dtype: torch.dtype) -> None:
    given, edge = some_tokens(dtype), 101
    given[3][:, :, edge:] = 0
    base = results(emulator, given, low_rank, True)
    for content in (100.0, torch.nan):
        changed = [t.clone() for t in given]
        for t in changed[:3]:
            t[:, :, edge:] = content
        got = results(emulator, changed, low_rank, True)
        kept = slice(2) if content != content else slice(None)  # a key's gradient meets NaN of later queries
        assert_same_bits([t[:, :, :edge] for t in got][kept], [t[:, :, :edge] for t in base][kept], NAMES[kept])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("low_rank", LOW_RANKS, ids=str)
def test_no_bit_depends_on_padding(emulator: Emulator, low_rank: object, is_causal: bool) -> None:
    """On what it holds, how much there is and where it is."""
    given = some_tokens(torch.bfloat16)
    holes = torch.arange(N)[None] % 9 == 4
    base = results(emulator, given, low_rank, is_causal, holes)
    for content, (left, right) in ((torch.nan, (0, 0)), (1e4, (5, 70)), (torch.inf, (64, 0))):
        mask = pad(holes, (left, right), value=True)
        moved = [pad(t, (0, 0, left, right)).masked_fill(mask[:, None, :, None], content) for t in given]
        got = results(emulator, moved, low_rank, is_causal, mask)
        kept = ~mask[0]
        assert_same_bits([t[:, :, kept] for t in got], [t[:, :, ~holes[0]] for t in base], NAMES)


def test_rows_that_begin_anywhere_are_read_right(emulator: Emulator) -> None:
    maps = Maps(QUADRATIC, 4, 24)
    base = maps.sums(emulator, torch.bfloat16)
    for name in ("value", "d_out"):
        of = getattr(maps, name)
        setattr(maps, name, torch.cat([of[..., :1], of], -1)[..., 1:])  # 25 numbers a row
    assert_same_bits(maps.sums(emulator, torch.bfloat16), base)


# -------------------- projections


def projections(emulator: Emulator, x: Tensor, weight: Tensor, bias: Tensor) -> str:
    """Empty where maps of tokens of 16 bits are as near to float64 as those of the same tokens in float32."""
    started = []
    with emulator.installed(), emulator.observed(lambda launch, is_after: started.append(launch.kernel)):
        got, packed = OPERATORS.project(x, weight, bias), OPERATORS.project_packed(x, weight, bias)
        assert set(started) == {b"project_products"}
        plain = OPERATORS.project(x.float(), weight, bias)
        plain_packed = OPERATORS.project_packed(x.float(), weight, bias)
    matrix, shift = (t.double().repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (weight, bias))
    exact = x.double() @ matrix.mT + shift[:, :, None]
    far = float((got - exact).norm() / (plain - exact).norm())
    if not far <= 1.2:
        return f"maps: {far:.2f} times the error of float32"
    if not torch.allclose(packed, plain_packed, rtol=1e-5, atol=1e-5 * float(exact.abs().max())):
        return "packed maps"
    return ""


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_projections_are_as_exact_as_in_float32(emulator: Emulator, dtype: torch.dtype) -> None:
    for head_dim, outputs in ((8, 2), (24, 5), (64, 10), (72, 17), (256, 40)):
        x, weight = rand(2, 4, 150, head_dim, seed=1, dtype=dtype), rand(2, 2, outputs, head_dim, seed=2)
        assert not projections(emulator, x, weight, rand(2, 2, outputs, seed=3))
    spread = rand(1, 4, 6, 40, seed=7) * 10.0 ** (4 * rand(1, 4, 6, 1, seed=8))
    assert not projections(emulator, rand(1, 4, 50, 40, seed=1, dtype=dtype), spread, torch.zeros(1, 4, 6))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_projections_are_as_exact_as_in_float32(emulator: Emulator, dtype: torch.dtype) -> None:
    for head_dim, outputs in ((24, 5), (136, 70)):
        x, weight = rand(2, 2, 300, head_dim, seed=1, dtype=dtype), rand(1, 1, outputs, head_dim, seed=2)
        grad = rand(2, 2, 300, outputs, seed=3) * 10 ** rand(2, 2, 300, 1, seed=4)
        grad[:, :, ::7] = 0
        x[:, :, ::7] = torch.nan  # padding, perhaps
        with emulator.installed():
            got, plain = (OPERATORS.project_backward(grad, t, weight)[1:] for t in (x, x.float()))
        exact = grad.double().mT @ x.nan_to_num().double()
        for ours, floats, want in zip(got, plain, (exact.sum((0, 1)), grad.double().sum((0, 1, 2)))):
            assert float((ours - want).norm()) <= 1.2 * float((floats - want).norm())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_clusters_are_as_exact_as_in_float32(emulator: Emulator, dtype: torch.dtype) -> None:
    """Of states and of representatives, where queries are computed one by one."""
    n, d, width, clusters = 170, 24, 72, 70
    given = [rand(1, heads, n, w, seed=i).to(dtype) for i, (heads, w) in enumerate(((2, d), (1, d), (1, width)))]
    d_out, statistics = (
        rand(1, 2, n, width, seed=4).to(dtype),
        sb.reference.cluster(*(t.float() for t in given[:2]), clusters),
    )
    sizes = {"state": 2 * clusters * (width + 1), "representatives": 2 * clusters * d}
    own = torch.arange(n, dtype=torch.int32).view(1, 1, n, 1)
    one_by_one = sb.Blocks(own, torch.ones(1, 1, n, dtype=torch.int32), 1, 1)

    def sums(of: torch.dtype) -> dict[str, Tensor]:
        found, number = {}, {torch.float64: (7, 8)}.get(of, (6, 4))
        kinds = {b"query_segments": "state", b"cluster_query_products": "state"}
        kinds |= {b"representative_segments": "representatives", b"representative_products": "representatives"}

        def observe(launch: Observed, is_after: bool) -> None:
            name = kinds.get(launch.kernel)
            if not is_after or name is None or name in found:
                return
            assert (b"products" in launch.kernel) == (of in HALF)
            bytes_of = sizes[name] * number[1]
            for one in (launch.exposed[i] for i in range(launch.exposed_count)):
                if one.is_writable and one.element == number[0] and one.end - one.begin == bytes_of:
                    found[name] = torch.frombuffer(bytearray(ctypes.string_at(one.begin, bytes_of)), dtype=kind)

        leaves = [t.to(of).requires_grad_() for t in given]
        kind = torch.float64 if of == torch.float64 else torch.float32
        others = (getattr(statistics, name).to(kind) for name in ("representatives", "log_mass", "query_mean"))
        more = sb.Clusters(statistics.index, *others, statistics.scale)
        with emulator.installed(), emulator.observed(observe):
            out = sb.attention(*leaves, one_by_one, sb.Centroid(clusters), statistics=more)
            torch.autograd.grad(out, leaves, d_out.to(of))
        return found

    got, plain, exact = sums(dtype), sums(torch.float32), sums(torch.float64)
    assert sorted(got) == sorted(sizes)
    for name, ours in got.items():
        far, of_floats = (float((t - exact[name]).norm() / exact[name].norm()) for t in (ours, plain[name]))
        assert far <= max(1.2 * of_floats, 1e-7), name


def test_no_bit_of_a_map_depends_on_other_tokens(emulator: Emulator) -> None:
    x, weight = rand(1, 2, 150, 24, dtype=torch.bfloat16), rand(1, 1, 5, 24, seed=1)
    changed = x.clone()
    changed[:, :, 20::3] = torch.nan
    views = rand(1, 150, 2, 32, dtype=torch.bfloat16).transpose(1, 2)[..., 1:25]  # rows that begin anywhere
    views.copy_(x)
    with emulator.installed():
        base, got, of_view = (OPERATORS.project(t, weight, None) for t in (x, changed, views))
    kept = ~changed.isnan().any(-1)
    assert_same_bits([got[kept], of_view], [base[kept], base], ("other tokens", "layout"))


# -------------------- shared memory, and planted faults


def conflicts(emulator: Emulator, maps: Maps, dtype: torch.dtype) -> int:
    """Bank conflicts of the kernels of products."""
    found, before = 0, 0

    def observe(launch: Observed, is_after: bool) -> None:
        nonlocal found, before
        if not launch.kernel.endswith(b"_products"):
            return
        count = emulator.statistics()["bank_conflicts"]
        found, before = found + (count - before if is_after else 0), count

    tokens, arguments = maps.arguments(dtype)
    with emulator.installed(), emulator.observed(observe):
        out, _ = OPERATORS.attention(*arguments)
        torch.autograd.grad(out, tokens, maps.d_out.to(dtype))
    return found


@pytest.mark.parametrize("name", ["several tiles of features", "wide values", "given features"])
def test_sums_have_no_bank_conflicts(emulator: Emulator, name: str) -> None:
    assert conflicts(emulator, CALLS[name], torch.bfloat16) == 0


FAULTS = {
    "lost low part": ("for (int k = kParts - 1; k >= 0; --k)", "for (int k = kParts - 2; k >= 0; --k)", "states"),
    "swapped operand": (
        "left[s][k], right[n][2 * s], right[n][2 * s + 1]",
        "left[s][k], right[n][2 * s + 1], right[n][2 * s]",
        "states",
    ),
    "off-by-one wait": ("wait_copies<1>();", "wait_copies<2>();", "asynchronous copy"),
    "missing barrier": ("      wait_copies<1>();\n      sync_block();", "      wait_copies<1>();", "race|async|uninit"),
    "missing barrier at the end of the loop": (
        "      add_chunk(buffer * kRows);\n      sync_block();",
        "      add_chunk(buffer * kRows);",
        "race|async",
    ),
    "lost swizzle": ("(chunk ^ ((token & 1) | (token >> 1 & 6))) << 4", "chunk << 4", "conflicts"),
    "stale feature": ("return {a, a + pair,", "return {a, a + pair - 1,", "states"),
}
FAULTS_OF_PROJECTIONS = {
    "lost low part of weights": FAULTS["lost low part"][:2] + ("maps",),
    "swapped operand of a map": (
        "right[n][2 * s][k], right[n][2 * s + 1][k]",
        "right[n][2 * s + 1][k], right[n][2 * s][k]",
        "maps",
    ),
}


def maps_from_exact(emulator: Emulator) -> float:
    x, weight = rand(1, 1, 50, 72, dtype=torch.bfloat16), rand(1, 1, 10, 72, seed=1)
    with emulator.installed():
        got = OPERATORS.project(x, weight, None)
    exact = x.double() @ weight.double().mT
    return float((got - exact).norm() / exact.norm())


def first_complaint(emulator: Emulator) -> str:
    maps = CALLS["wide values"]
    try:
        got = maps.sums(emulator, torch.bfloat16)
        for name, ours, want in zip(("states", "gradients"), got, (maps.states(512), maps.state_gradients())):
            if not error(ours, want, "rms") <= 3e-7:
                return f"{name}: {error(ours, want, 'rms'):.1e}"
        if (of_maps := maps_from_exact(emulator)) > 3e-7:
            return f"maps: {of_maps:.1e}"
        return "conflicts" if conflicts(emulator, maps, torch.bfloat16) else ""
    except RuntimeError as error_of_kernel:
        return str(error_of_kernel)


def test_the_kernels_without_a_fault_raise_no_complaint(emulator: Emulator) -> None:
    assert first_complaint(emulator) == ""


@pytest.mark.parametrize("fault", [*FAULTS, *FAULTS_OF_PROJECTIONS])
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    old, new, name = (FAULTS | FAULTS_OF_PROJECTIONS)[fault]
    kernels.assert_caught(
        "feature_products.cuh" if fault in FAULTS else "project_products.cuh", old, new, name, first_complaint, BFLOAT16
    )
