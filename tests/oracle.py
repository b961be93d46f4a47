"""The parity table's cases: drawn from a seed, run by what is judged and by the definition, compared row by row."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import scatterbrain as sb
from scatterbrain.reference import Inputs, log_kernel


@dataclass
class Case:
    """One drawn call of the operator: everything that shapes it, and the tensors made from its seed. Where statistics
    are fitted, what is judged and the definition each fit their own: ``arguments`` and ``definition``."""

    support: object
    low_rank: object
    batch: int = 2
    q_heads: int = 2
    kv_heads: int = 2
    queries: int = 64
    keys: int = 64
    head_dim: int = 16
    value_dim: int = 16
    is_causal: bool = False
    padding: str = "none"
    query_offset: object = 0
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    strided: bool = False
    seed: int = 0
    query: torch.Tensor = field(init=False)
    key: torch.Tensor = field(init=False)
    value: torch.Tensor = field(init=False)
    arguments: dict = field(init=False)
    definition: dict = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def tokens(heads: int, n: int, width: int) -> torch.Tensor:
            t = torch.randn(self.batch, heads, n, width, generator=generator).to(self.dtype)
            if self.strided:  # (batch, tokens, heads, width) memory, as projections of a model leave it
                t = t.transpose(1, 2).contiguous().transpose(1, 2)
            return t

        self.query, self.key = (
            tokens(self.q_heads, self.queries, self.head_dim),
            tokens(self.kv_heads, self.keys, self.head_dim),
        )
        self.value = tokens(self.kv_heads, self.keys, self.value_dim)
        mask = None
        if self.padding != "none" and self.keys:
            mask = torch.zeros(self.batch, self.keys, dtype=torch.bool)
            edge = max(1, self.keys // 5)
            if self.padding in ("right", "both"):
                mask[-1, -edge:] = True
            if self.padding in ("left", "both"):
                mask[0, :edge] = True
            if self.padding == "holes":
                mask = torch.rand(self.batch, self.keys, generator=generator) < 0.3
            if self.padding == "all":
                mask[0] = True
        statistics = defined = None
        if isinstance(self.low_rank, sb.Quadratic):
            if self.low_rank.statistics == "stored":  # other tokens of the same distribution
                others = [
                    torch.randn(1, h, 200, self.head_dim, generator=generator) for h in (self.q_heads, self.kv_heads)
                ]
                statistics = sb.fit_statistics(*others, self.low_rank.rank, scale=self.scale)
                defined = sb.reference.fit_statistics(*others, self.low_rank.rank, scale=self.scale)
            elif self.low_rank.statistics == "learned":  # near the start of training
                r, d = self.low_rank.rank, self.head_dim
                draw = lambda *shape: torch.randn(*shape, generator=generator) * d**-0.5  # noqa: E731
                statistics = defined = sb.Projections(
                    draw(self.q_heads, r, d),
                    draw(self.q_heads, d),
                    draw(self.q_heads),
                    draw(self.kv_heads, r, d),
                    draw(self.kv_heads, d),
                )
        if isinstance(self.low_rank, sb.Centroid):  # fixed, as lists are: the nearer of two centres may be rounding
            statistics = defined = sb.reference.cluster(
                self.query, self.key, self.low_rank.clusters, mask, scale=self.scale
            )
        self.arguments = dict(
            low_rank=self.low_rank,
            key_padding_mask=mask,
            is_causal=self.is_causal,
            scale=self.scale,
            statistics=statistics,
            query_offset=self.query_offset,
        )
        self.definition = self.arguments | {"statistics": defined}
        if isinstance(self.support, (sb.Routed, sb.LSH)):  # parity is judged at fixed lists
            self.support = sb.route(self.query, self.key, self.support, **self.arguments)

    def judged(self, precision: torch.dtype, place: Callable[[Any], Any] = lambda given: given) -> list[torch.Tensor]:
        """[out, dq, dk, dv and the gradients of learned projections] of ``sb.attention`` on copies in ``precision``,
        for one fixed output gradient. ``place`` moves what the call is given to the device that is judged."""
        return self._run(sb.attention, precision, self.arguments, place)

    def defined(self, precision: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """The same by the definition, computed in ``precision``."""
        return self._run(sb.reference.attention, precision, self.definition | {"dtype": precision})

    def _run(
        self,
        function: Callable,
        precision: torch.dtype,
        arguments: dict,
        place: Callable[[Any], Any] = lambda given: given,
    ) -> list[torch.Tensor]:
        support, arguments = place(self.support), place(arguments)
        leaves = [place(t.detach().to(precision)).requires_grad_() for t in (self.query, self.key, self.value)]
        if isinstance(arguments["statistics"], sb.Projections):
            accumulate = torch.float64 if precision == torch.float64 else torch.float32
            fields = [t.detach().to(accumulate).requires_grad_() for t in vars(arguments["statistics"]).values()]
            arguments = arguments | {"statistics": sb.Projections(*fields)}
            leaves += fields
        out = function(*leaves[:3], support, **arguments)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(self.seed + 1), dtype=torch.float64).to(
            self.dtype
        )
        grad = place(grad.to(out.dtype))
        gradients = torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)
        return [t.cpu() for t in (out.detach(), *gradients)]

    def low_rank_share(self) -> float:
        """:func:`low_rank_share` of the case."""
        return low_rank_share(self.query, self.key, self.value, self.support, **self.definition)


def low_rank_share(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, support: object, **arguments: Any
) -> float:
    """The largest share that L of all keys a query sees, before the support is subtracted, is of the query's
    normaliser. Arguments as the definition's."""
    if arguments["low_rank"] is None or not query.shape[2] or not key.shape[2]:
        return 0.0
    query, key, value = (t.double() for t in (query, key, value))
    inputs = Inputs.of(query, key, **arguments)
    exponent, factor = log_kernel(arguments["low_rank"], inputs)
    _, lse = sb.reference.attention(query, key, value, support, return_lse=True, **arguments)
    counted = inputs.visible() & torch.isfinite(lse)[..., None]
    weight = torch.where(counted, torch.exp(exponent - lse[..., None]) * factor, 0)
    return float(weight.sum(-1).max())


def row_errors(got: torch.Tensor, want: torch.Tensor, floor: float = 1e-3) -> torch.Tensor:
    """The error of every row (last dimension), relative to max(its norm, ``floor`` of the mean row norm). Where the
    gradient is zero but for rounding (a softmax over one key) there is nothing to be relative to, and the error counts
    as it is."""
    got, want = got.double(), want.double()
    if want.dim() == 1:
        got, want = got[:, None], want[:, None]
    norm = want.norm(dim=-1)
    base = torch.maximum(norm, floor * norm.mean()) if float(norm.mean()) > 1e-10 else torch.ones_like(norm)
    return (got - want).norm(dim=-1) / base


def row_error(got: torch.Tensor, want: torch.Tensor, floor: float = 1e-3) -> float:
    """The largest of ``row_errors``."""
    return float(row_errors(got, want, floor).max()) if want.numel() > 0 else 0.0


def assert_as_exact(
    got: torch.Tensor,
    want: torch.Tensor,
    same_dtype: torch.Tensor,
    floor: float = 1e-5,
    message: str = "",
    largest: int = 3,
) -> None:
    """``got`` errs by at most ``floor`` or twice as much as ``same_dtype``, the same formula in torch in the same
    dtype: in the mean square over rows. The largest of all rows, which is chance, may be
    ``largest`` times as large."""
    ours, torchs = (row_errors(t, want) for t in (got, same_dtype))
    for name, measure, times in (
        ("mean", lambda e: float(e.square().mean().sqrt()), 2),
        ("largest", torch.max, largest),
    ):
        error, allowed = float(measure(ours)), max(floor, times * float(measure(torchs)))
        assert error <= allowed, f"{message} {name} error {error:.2e}, allowed {allowed:.2e}"


# -------------------- the table

CASES = 336
CENTROID_CASES = 48  # the last ones


def pooled(keys: int, block_q: int) -> sb.Routed:
    """Some of them with a window, with sinks, or with both."""
    always = {(48, 8): (24, 0), (48, 16): (24, 5), (32, 8): (0, 5), (48, 32): (0, 5)}
    window, sinks = always.get((keys, block_q), (0, 0))
    return sb.Routed(keys, block_q=block_q, window=window, sinks=sinks)


def per_query(keys: int, window: int) -> sb.Routed:
    return sb.Routed(keys, block_q=1, block_k=8, window=window, sinks=9 if keys == 40 else 0, pools=keys // 8 % 3)


SUPPORTS = [
    lambda r: sb.Full(),
    lambda r: sb.Empty(),
    lambda r: sb.Window(r.choice([1, 7, 16, 32, 100]), block_q=r.choice([1, 5, 8, 16, 32])),
    lambda r: r.choice([sb.Window(16), sb.Window(33, sinks=4), sb.Window(64, sinks=17)]),
    lambda r: pooled(r.choice([32, 48]), r.choice([8, 16, 32])),
    lambda r: per_query(r.choice([24, 32, 40]), r.choice([0, 8, 16])),
    lambda r: sb.LSH(r.choice([8, 32]), r.choice([1, 2, 4]), r.choice(["e2lsh", "angular"]), seed=r.randrange(100)),
    lambda r: "blocks",
]
LOW_RANKS = [
    lambda r, d: None,
    lambda r, d: sb.Quadratic(min(d, r.choice([1, 4, 9, 16])), "stored"),
    lambda r, d: sb.Quadratic(min(d, r.choice([3, 9])), "learned"),
    lambda r, d: sb.Quadratic(min(d, 9), "input"),
    lambda r, d: of_features(r.choice([8, 17, 64]), r.randrange(100)),
    lambda r, d: of_pairs(r.choice([8, 32])),
]


def of_features(features: int, seed: int) -> sb.Favor:
    return sb.Favor(features, seed=seed, centred=seed % 3 == 0)


def of_pairs(features: int) -> sb.Favor:
    return sb.Favor(features, hyperbolic=True, orthogonal=False, centred=features == 32)


def of_clusters(r: random.Random) -> sb.Centroid:
    return sb.Centroid(r.choice([1, 6, 16, 33]))


def draw_blocks(r: random.Random, batch: int, heads: int, queries: int, keys: int, is_causal: bool) -> sb.Blocks:
    """Random lists: any block_q and block_k, any capacity, empty lists among them; causal ones name no block that their
    queries cannot see."""
    block_q, block_k, capacity = r.choice([1, 3, 8, 16, 24]), r.choice([1, 4, 8]), r.choice([1, 5, 12])
    blocks = -(-queries // block_q)
    index = torch.full((batch, heads, blocks, capacity), -1, dtype=torch.int32)
    count = torch.zeros(batch, heads, blocks, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            for t in range(blocks):
                last = min((t + 1) * block_q, queries) - 1
                available = -(-keys // block_k) if not is_causal else min(-(-keys // block_k), last // block_k + 1)
                n = r.randint(0, min(capacity, available))
                index[b, h, t, :n] = torch.tensor(sorted(r.sample(range(available), n)), dtype=torch.int32)
                count[b, h, t] = n
    order = None
    if not is_causal and r.random() < 0.4:
        order = torch.stack(
            [torch.randperm(queries, generator=torch.Generator().manual_seed(i)) for i in range(batch * heads)]
        )
        order = order.reshape(batch, heads, queries).to(torch.int32)
        order[..., : queries // 5] = -1  # slots without a query, and so queries that no slot names
    return sb.Blocks(index, count, block_q, block_k, order)


def draw(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """The seed's case. Supports and low-rank kernels are taken in turn, so that every pair of them appears; the rest is
    drawn."""
    r = random.Random(seed)
    support, head_dim = SUPPORTS[seed % len(SUPPORTS)](r), r.choice([3, 8, 16, 32, 40, 64])
    low_rank = LOW_RANKS[seed // len(SUPPORTS) % len(LOW_RANKS)](r, head_dim)
    if seed >= CASES - CENTROID_CASES:
        low_rank = of_clusters(r)
    if isinstance(support, sb.Full):
        low_rank = None
    if isinstance(support, sb.Empty) and low_rank is None:
        low_rank = sb.Quadratic(min(head_dim, 9), "stored")
    is_causal = not isinstance(support, sb.LSH) and not getattr(low_rank, "reads_input", False) and r.random() < 0.5
    kv_heads = r.choice([1, 2])
    q_heads = kv_heads * r.choice([1, 2, 3])
    queries = r.choice([0, 1, 2, 15, 33, 64, 65, 100, 129, 190])
    keys = queries if r.random() < 0.6 else r.choice([0, 1, 17, 64, 77, 150])
    padding = r.choice(["none", "none", "right", "left", "both", "holes", "all"])
    offset = 0
    if is_causal and r.random() < 0.3:
        offset = r.choice([5, 64, torch.tensor([3, 70])])
    if support == "blocks":
        padding, offset = r.choice(["none", "none"]), 0
        support = draw_blocks(r, 2, r.choice([q_heads, kv_heads]), queries, keys, is_causal)
    return Case(
        support,
        low_rank,
        2,
        q_heads,
        kv_heads,
        queries,
        keys,
        head_dim,
        r.choice([head_dim, 5, 16, 48]),
        is_causal,
        padding,
        offset,
        r.choice([None, None, 0.3, 1.0, -0.2]),
        dtype,
        r.random() < 0.5,
        seed,
    )


NAMES = ("out", "dq", "dk", "dv", "dPq", "db", "dc", "dPk", "da")


def assert_parity(
    case: Case,
    precision: torch.dtype,
    floor: float,
    share: float,
    place: Callable[[Any], Any] = lambda given: given,
) -> None:
    """Every row of the output and of every gradient: at most max(floor, twice the same formula in torch at this
    precision, 1e-6 of ``share``)."""
    for name, got, exact, plain in zip(NAMES, case.judged(precision, place), case.defined(), case.defined(precision)):
        assert got.shape == exact.shape and (got.dtype == precision or got.dtype == torch.float32)
        error, allowed = row_error(got, exact), max(floor, 2 * row_error(plain, exact), 1e-6 * share)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}; {case.support} {case.low_rank}"


def assert_parity_in_float32(seed: int) -> None:
    """One case of the table."""
    case = draw(seed)
    assert_parity(case, torch.float32, 1e-5, case.low_rank_share())
