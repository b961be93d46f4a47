"""Calls of ``sb.attention`` drawn over every axis: what is computed, on which tokens, with which masks, in which
layout. A call is a few numbers and names, so that a line of JSON tells all of it."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from hypothesis import strategies as st
from testkit import LAYOUTS, rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain.low_rank import LOW_RANK_KERNELS
from scatterbrain.padding import valid_range
from scatterbrain.supports import SUPPORTS

DTYPES = ("float32", "float32", "float32", "bfloat16", "float16", "float64")
PADDINGS = ("none", "none", "right", "left", "both", "holes", "everything of a row", "all but one", "everything")
# Around the edges of vectors, tiles, chunks, segments and units of the kernels.
EDGES = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 511, 512, 513)
WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 72, 96, 128, 130, 192, 256)
LARGEST_WORK = 300_000  # pairs of a call, over batch rows and heads: what the dense definition does in a blink


@dataclass(frozen=True)
class DrawnCall:
    """One call. ``support`` and ``low_rank`` are their fields with their ``kind``; of Blocks the sizes, the lists are
    drawn from the seed.

    Args:
        group: query heads per key/value head.
        key_padding, query_padding: one of PADDINGS; "default" leaves the query mask to the key mask.
        offset: query_offset; "rows" for another one in each batch row.
        autocast: dtype of an autocast region around the call, or "".
        layout: memory of query, key and value, one of LAYOUTS, "contiguous" or "expanded".
        return_lse: whether the log weights are returned and take part in the gradients.
        needs_gradient: of q(uery), k(ey), v(alue), p(rojections).
        mean_query, mean_key, spread, outlier: added to every query and key, their standard deviation, and a factor of
            one key.
        seed: of all tokens, masks and lists.
    """

    support: dict = field(default_factory=lambda: {"kind": "window", "keys": 1, "block_q": 16, "sinks": 0})
    low_rank: dict | None = None
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int = 1
    keys: int = 1
    head_dim: int = 1
    value_dim: int = 1
    is_causal: bool = False
    key_padding: str = "none"
    query_padding: str = "default"
    offset: int | str = 0
    scale: float | None = None
    dtype: str = "float32"
    autocast: str = ""
    layout: str = "contiguous"
    return_lse: bool = False
    needs_gradient: str = "qkvp"
    mean_query: float = 0.0
    mean_key: float = 0.0
    spread: float = 1.0
    outlier: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, line: str) -> DrawnCall:
        """The call of :meth:`line`."""
        try:
            given = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"expected a call as a JSON object, as a failure prints it, got {line!r}: {error}"
            ) from None
        known = [f.name for f in fields(cls)]
        if not isinstance(given, dict) or given.keys() - set(known):
            raise ValueError(f"expected a JSON object with some of the keys {', '.join(known)}, got {line!r}")
        return cls(**given)

    def line(self) -> str:
        """What differs from the defaults, as JSON."""
        plain = asdict(DrawnCall())
        return json.dumps({name: value for name, value in asdict(self).items() if value != plain[name]})

    # -------------------- what is computed

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def is_extreme(self) -> bool:
        return (self.mean_query, self.mean_key, self.spread, self.outlier) != (0.0, 0.0, 1.0, 1.0)

    @property
    def precision(self) -> torch.dtype:
        """In which the tokens reach the kernels."""
        return getattr(torch, self.dtype if self.dtype == "float64" or not self.autocast else self.autocast)

    def tokens(self) -> list[Tensor]:
        """query, key and value in the call's dtype and memory layout."""
        query = self.mean_query + self.spread * self._normal(0, self.heads, self.queries, self.head_dim)
        key = self.mean_key + self.spread * self._normal(1, self.kv_heads, self.keys, self.head_dim)
        value = self._normal(2, self.kv_heads, self.keys, self.value_dim)
        if self.keys:
            key[:, :, self.seed % self.keys] *= self.outlier
        tokens = [t.to(getattr(torch, self.dtype)) for t in (query, key, value)]
        if self.layout == "expanded":  # stride 0 along batch rows, heads and tokens
            query, key, value = (t[:1] for t in tokens)
            return [
                query[:, :1].expand(self.batch, self.heads, -1, -1),
                key.expand(self.batch, -1, -1, -1),
                value[:, :, :1].expand(self.batch, -1, self.keys, -1),
            ]
        return [LAYOUTS[self.layout](t) for t in tokens] if self.layout != "contiguous" else tokens

    def _normal(self, stream: int, heads: int, tokens: int, width: int) -> Tensor:
        return rand(self.batch, heads, tokens, width, seed=10 * self.seed + stream, dtype=torch.float64)

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``sb.attention`` and ``sb.reference.attention``, but for the tokens."""
        key_mask = self._mask(self.key_padding, self.keys, 3)
        query_mask = None if self.query_padding == "default" else self._mask(self.query_padding, self.queries, 4)
        low_rank = None if self.low_rank is None else _built(LOW_RANK_KERNELS, self.low_rank)
        offset = self.offset
        if offset == "rows":
            offset = torch.tensor([random.Random(self.seed + b).randint(-9, 70) for b in range(self.batch)])
        arguments = dict(
            low_rank=low_rank,
            key_padding_mask=key_mask,
            is_causal=self.is_causal,
            scale=self.scale,
            statistics=self._statistics(low_rank, key_mask, query_mask),
            query_padding_mask=query_mask,
            query_offset=offset,
        )
        if self.support["kind"] == "blocks":
            return dict(support=self._blocks(arguments), **arguments)
        return dict(support=_built(SUPPORTS, self.support), **arguments)

    def _mask(self, pattern: str, tokens: int, stream: int) -> Tensor | None:
        if pattern == "none":
            return None
        generator = torch.Generator().manual_seed(10 * self.seed + stream)
        position, edge = torch.arange(tokens).expand(self.batch, -1), max(1, tokens // 3)
        left, right = (torch.randint(0, edge + 1, (self.batch, 1), generator=generator) for _ in range(2))
        holes = torch.rand(self.batch, tokens, generator=generator) < 0.4
        mask = torch.zeros(self.batch, tokens, dtype=torch.bool)
        if pattern in ("left", "both"):
            mask |= position < left
        if pattern in ("right", "both"):
            mask |= position >= tokens - right
        if pattern in ("holes", "everything of a row"):
            mask |= holes
        if pattern == "everything of a row":
            mask[self.seed % self.batch] = True
        if pattern in ("all but one", "everything"):
            mask[:] = True
        if pattern == "all but one" and tokens:
            mask[:, self.seed % tokens] = False
        return mask

    def _statistics(self, low_rank: object, key_mask: Tensor | None, query_mask: Tensor | None) -> object:
        """Fitted to other tokens of ordinary size, or drawn near the start of training; clusters of the call's own
        keys, fixed since which of two centres is nearer may be rounding."""
        if isinstance(low_rank, sb.Centroid):
            query, key, _ = (t.to(self.precision) for t in self.tokens())
            return sb.reference.cluster(query, key, low_rank.clusters, key_mask, self.scale, query_mask)
        kind, stream = getattr(low_rank, "statistics", None), 10 * self.seed + 5
        if kind in ("stored", "ema"):
            others = [
                rand(1, heads, 99, self.head_dim, seed=stream + i)
                for i, heads in enumerate((self.heads, self.kv_heads))
            ]
            return sb.reference.fit_statistics(*others, low_rank.rank, scale=self.scale)
        if kind != "learned":
            return None
        r, d, dtype = low_rank.rank, self.head_dim, torch.float64 if self.dtype == "float64" else torch.float32
        shapes = ((self.heads, r, d), (self.heads, d), (self.heads,), (self.kv_heads, r, d), (self.kv_heads, d))
        return sb.Projections(*(rand(*shape, seed=stream + i, dtype=dtype) * d**-0.5 for i, shape in enumerate(shapes)))

    def _blocks(self, arguments: dict[str, Any]) -> sb.Blocks:
        """Lists that obey padding and the causal edge; some are empty."""
        chance, given = random.Random(self.seed), self.support
        block_q, block_k, capacity = given["block_q"], given["block_k"], given["capacity"]
        heads, lists = (self.kv_heads if given["per_key_head"] else self.heads), -(-self.queries // block_q)
        index = torch.full((self.batch, heads, lists, capacity), -1, dtype=torch.int32)
        count = torch.zeros(self.batch, heads, lists, dtype=torch.int32)
        key_mask, query_mask = arguments["key_padding_mask"], arguments["query_padding_mask"]
        if query_mask is None and self.queries == self.keys:
            query_mask = key_mask
        offset = torch.as_tensor(arguments["query_offset"]).expand(self.batch)
        for b in range(self.batch):
            k_first, k_end = (0, self.keys) if key_mask is None else valid_range(key_mask)[b].tolist()
            q_first, q_end = (0, self.queries) if query_mask is None else valid_range(query_mask)[b].tolist()
            for h in range(heads):
                for t in range(lists):
                    end = k_end
                    if self.is_causal:
                        end = min(end, min(q_first + (t + 1) * block_q, q_end) + int(offset[b]))
                    available = max(0, -(-(end - k_first) // block_k)) if q_end else 0
                    n = min(chance.choice((0, capacity, chance.randint(0, capacity))), available)
                    index[b, h, t, :n] = torch.tensor(sorted(chance.sample(range(available), n)), dtype=torch.int32)
                    count[b, h, t] = n
        order = None
        if given["ordered"] and not self.is_causal:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.rand(self.batch, heads, self.queries, generator=generator).argsort(-1)
            order = order.to(torch.int32)
            order[..., : self.queries // 5] = -1  # slots without a query, and so queries that no slot names
        return sb.Blocks(index, count, block_q, block_k, order)


def _built(registry: dict[str, type], given: dict[str, Any]) -> Any:
    return registry[given["kind"]](**{name: value for name, value in given.items() if name != "kind"})


# -------------------- strategies


def _lengths(draw: st.DrawFn, least: int = 1) -> int:
    """1 to 600 tokens, most of them short, and those at the kernels' edges more often."""
    return draw(
        st.one_of(
            st.integers(least, 70),
            st.sampled_from(EDGES),
            st.integers(least, 300).map(lambda n: n | 1),
            st.integers(least, 600),
        )
    )


def _few(draw: st.DrawFn, most: int) -> int:
    """Sinks: none in half of the calls."""
    return draw(st.one_of(st.just(0), st.integers(0, most)))


@st.composite
def _supports(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(("window", "pooled", "per query", "blocks", "lsh", "window", "empty", "full")))
    if kind == "window":
        block_q = draw(st.sampled_from((16, 1, 2, 5, 8, 15, 17, 24, 32, 64)))
        keys = draw(st.integers(1, 140))
        return dict(kind="window", keys=keys, block_q=block_q, sinks=_few(draw, keys))
    if kind == "pooled":
        block_q = draw(st.sampled_from((16, 8, 32)))
        window = draw(st.sampled_from((0, 0, block_q, block_q + 1, block_q + 24)))
        sinks, others = _few(draw, 40), draw(st.integers(0, 80))
        always = dict(window=window, sinks=sinks, pools=draw(st.sampled_from((1, 2))))
        return dict(kind="routed", keys=max(window, block_q) + sinks + others, block_q=block_q, **always)
    if kind == "per query":
        keys = draw(st.integers(1, 12))
        window = draw(st.integers(0, keys))
        always = dict(window=8 * window, sinks=_few(draw, 8 * (keys - window)))
        return dict(kind="routed", keys=8 * keys, block_q=1, block_k=8, pools=keys % 3, **always)
    if kind == "lsh":
        rounds = draw(st.integers(1, 4))
        budget = dict(keys=rounds * draw(st.integers(1, 20)), rounds=rounds)
        return dict(
            kind="lsh", **budget, hash=draw(st.sampled_from(("e2lsh", "angular"))), seed=draw(st.integers(0, 9))
        )
    if kind == "blocks":
        sizes = dict(
            block_q=draw(st.integers(1, 40)), block_k=draw(st.integers(1, 16)), capacity=draw(st.integers(0, 20))
        )
        return dict(kind="blocks", **sizes, per_key_head=draw(st.booleans()), ordered=draw(st.booleans()))
    return dict(kind=kind)


@st.composite
def _low_ranks(draw: st.DrawFn, head_dim: int, is_causal: bool) -> dict[str, Any] | None:
    kind = draw(st.sampled_from((None, "stored", "learned", "favor", "ema", "input", "centroid")))
    if kind is None:
        return None
    if kind == "favor":
        hyperbolic, features = draw(st.booleans()), draw(st.integers(1, 65))
        features *= 2 if hyperbolic else 1
        return dict(kind="favor", features=features, hyperbolic=hyperbolic, orthogonal=draw(st.booleans()))
    if kind == "centroid" and not is_causal:
        return dict(kind="centroid", clusters=draw(st.integers(1, 70)))
    if kind in ("input", "centroid") and is_causal:
        kind = "stored"
    return dict(kind="quadratic", rank=draw(st.integers(1, min(head_dim, 20))), statistics=kind)


@st.composite
def drawn_calls(draw: st.DrawFn, extremes: bool = False) -> DrawnCall:
    """Calls that have a meaning. ``extremes``: also tokens with means, of large scale, and outliers among the keys."""
    support, is_causal = draw(_supports()), draw(st.booleans())
    is_causal = is_causal and support["kind"] != "lsh"
    head_dim = draw(st.sampled_from(WIDTHS))
    low_rank = draw(_low_ranks(head_dim, is_causal))
    if support["kind"] == "empty" and low_rank is None:
        low_rank = dict(kind="favor", features=8)
    queries = _lengths(draw)
    keys = queries if draw(st.integers(0, 9)) < 6 else draw(st.integers(0, 9)) and _lengths(draw)
    most = max(1, LARGEST_WORK // max(1, queries * keys))
    kv_heads = draw(st.integers(1, min(3, most)))
    group = draw(st.integers(1, min(3, max(1, most // kv_heads))))
    batch = draw(st.integers(1, min(3, max(1, most // (kv_heads * group)))))
    dtype = draw(st.sampled_from(DTYPES))
    magnitudes = {}
    if extremes:
        magnitudes = dict(
            mean_query=draw(st.sampled_from((0.0, 0.0, 3.0, 10.0))),
            mean_key=draw(st.sampled_from((0.0, 0.0, 3.0, 10.0, 100.0))),
            spread=draw(st.sampled_from((1.0, 1.0, 0.01, 5.0, 30.0))),
            outlier=draw(st.sampled_from((1.0, 1.0, 10.0, 100.0))),
        )
    return DrawnCall(
        support=support,
        low_rank=low_rank,
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        value_dim=draw(st.one_of(st.just(head_dim), st.sampled_from(WIDTHS))),
        is_causal=is_causal,
        key_padding=draw(st.sampled_from(PADDINGS)),
        query_padding=draw(st.sampled_from(("default", "default", *PADDINGS))),
        offset=draw(st.sampled_from((0, 0, 1, 5, 64, -3, "rows"))) if is_causal else 0,
        scale=draw(st.sampled_from((None, None, None, 0.3, 1.0, -0.2, 0.0))),
        dtype=dtype,
        autocast=draw(st.sampled_from(("", "", "", "", "bfloat16", "float16"))),
        layout=draw(st.sampled_from(("contiguous", "contiguous", "expanded", *LAYOUTS))),
        return_lse=draw(st.booleans()),
        needs_gradient=draw(st.sampled_from(("qkvp", "qkvp", "qkvp", "q", "k", "v", "p", "kv", "qp", ""))),
        seed=draw(st.integers(0, 9999)),
        **magnitudes,
    )
