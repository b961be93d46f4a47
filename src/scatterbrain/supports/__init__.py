"""Supports: which keys each query attends to exactly.

All of them are one form: queries come in blocks of ``block_q`` that share a list of keys, a contiguous window or
gathered blocks of ``block_k`` consecutive keys. Everything is counted from a row's first token that is not padding.
Frozen dataclasses, validated on construction, usable from YAML.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor


def _check_int(owner: str, name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < low:
        raise ValueError(f"{owner}: {name} must be at least {low}, got {value}")


@dataclass(frozen=True)
class Full:
    """Every key: exact attention. The low-rank kernel has nothing left to do and is ignored."""


@dataclass(frozen=True)
class Empty:
    """No key: attention is the low-rank kernel alone (linear attention)."""


@dataclass(frozen=True)
class Window:
    """The keys nearest to the query's block.

    Bidirectional: a block whose centre is c sees ``[c - keys/2, c + keys/2)``, shifted to stay inside the sequence;
    with M keys for N queries c is scaled by M/N. Causal: query i of the block that starts at b sees keys ``max(0, b +
    block_q - keys) .. i`` (with keys < block_q the first queries of a block see none).

    Args:
        keys: keys per query, at least 1.
        block_q: queries that share a window; 16 is one register tile of the kernels.
    """

    keys: int
    block_q: int = 16

    def __post_init__(self) -> None:
        _check_int("Window", "keys", self.keys, 1)
        _check_int("Window", "block_q", self.block_q, 1)


@dataclass(frozen=True)
class Routed:
    """The keys where the low-rank kernel errs most, chosen from the content (no gradient flows through the choice).

    Two forms. Pooled: ``block_q`` in {8, 16, 32}, ``block_k`` = 1; a block's own keys and the best of the rest by the
    residual score ``log |exp(s) - L|`` of the block's mean query. Causal routing pools the block's first query with the
    15 before it. Per query: ``block_q`` = 1, ``block_k`` = 8; a window of ``window`` keys (its start rounded down to a
    block) and the best ``(keys - window) / 8`` blocks of 8 keys by ``q . mean(k)``, in the causal form among the
    complete blocks before the window. The per-query form is for training from scratch, the pooled one for pretrained
    models.

    Args:
        keys: keys per query in all: window, own and listed keys. The per-query form rounds its window to whole blocks
            and can list up to 7 more.
        block_q: queries that share a list.
        block_k: consecutive keys that are chosen together.
        window: keys of the window of the per-query form.
    """

    keys: int
    block_q: int = 16
    block_k: int = 1
    window: int = 0

    def __post_init__(self) -> None:
        _check_int("Routed", "keys", self.keys, 1)
        _check_int("Routed", "block_q", self.block_q, 1)
        _check_int("Routed", "block_k", self.block_k, 1)
        _check_int("Routed", "window", self.window, 0)
        if (self.block_q, self.block_k) not in ((8, 1), (16, 1), (32, 1), (1, 8)):
            raise ValueError(
                "Routed: expected block_q in (8, 16, 32) with block_k=1 (pooled), or block_q=1 with "
                f"block_k=8 (per query), got block_q={self.block_q}, "
                f"block_k={self.block_k}"
            )
        if self.keys < self.block_q:
            raise ValueError(
                "Routed: keys is the whole budget and holds the block's own keys, expected at least "
                f"block_q={self.block_q}, got {self.keys}"
            )
        if self.block_k == 1 and self.window:
            raise ValueError(
                "Routed: window belongs to the per-query form (block_q=1, block_k=8); the pooled form has "
                f"its own block, got {self.window}"
            )
        if self.block_k == 8 and (self.window % 8 or self.keys % 8 or self.window > self.keys):
            raise ValueError(
                "Routed: expected keys and window in multiples of 8 with window <= keys, got "
                f"keys={self.keys}, window={self.window}"
            )

    @property
    def capacity(self) -> int:
        """Entries of a list. A window whose ends are rounded to blocks touches one block more than it fills."""
        return self.keys if self.block_k == 1 else self.keys // self.block_k + 1


@dataclass(frozen=True)
class LSH:
    """Equal-size clusters of queries and keys by locality-sensitive hashing, several rounds, the union counted once per
    pair (SMYRF, Daras et al. 2020).

    Bidirectional only: clusters come from a sort of the whole sequence, so a causal form would let later tokens choose
    what earlier ones read.

    Args:
        keys: keys per query over all rounds; each round's clusters hold ``keys / rounds`` keys.
        rounds: independent hash rounds.
        hash: "e2lsh" on the asymmetric XBOX+ transform, the paper's.
        seed: seed of the hash directions. The same seed gives the same clusters for the same input.
    """

    keys: int
    rounds: int = 2
    hash: str = "e2lsh"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_int("LSH", "keys", self.keys, 1)
        _check_int("LSH", "rounds", self.rounds, 1)
        _check_int("LSH", "seed", self.seed, 0)
        if self.hash != "e2lsh":
            raise ValueError(f"LSH: expected hash='e2lsh', got {self.hash!r}")
        if self.keys % self.rounds:
            raise ValueError(
                f"LSH: keys is the total over rounds and must divide by rounds={self.rounds}, got {self.keys}"
            )


@dataclass(frozen=True, eq=False)
class Blocks:
    """Lists given by the caller, or by :func:`scatterbrain.route`.

    Block b of a row holds queries ``first + b * block_q ...`` where ``first`` is the row's first query that is not
    padding, and entry e of its list stands for keys ``first + e * block_k ...`` counted from the row's first key that
    is not padding.

    Args:
        index: int32 (batch, heads of query or of key, ceil(queries / block_q), capacity); each list strictly ascending,
            unused slots -1 at its end.
        count: int32, the shape of ``index`` without its last dimension: entries in use.
        block_q: queries that share a list, at least 1.
        block_k: consecutive keys of an entry, at least 1.
        query_order: optional int32 (batch, heads, queries): slot s of the lists is query ``query_order[b, h, s]`` (-1:
            none). A query that no slot names is not computed: its row is zero. Bidirectional only.

    Raises:
        TypeError, ValueError: naming the field, on a wrong dtype or shape, entries out of order, twice or negative.
            Entries past the last key, or that no query of a causal block may see, are found when the lists are used.
    """

    index: Tensor
    count: Tensor
    block_q: int
    block_k: int
    query_order: Tensor | None = None

    @classmethod
    def _from_kernel(cls, index: Tensor, count: Tensor, block_q: int, block_k: int) -> Blocks:
        """Lists that are right by construction, without looking at their content again."""
        blocks = object.__new__(cls)
        for name, value in zip(
            ("index", "count", "block_q", "block_k", "query_order"), (index, count, block_q, block_k, None)
        ):
            object.__setattr__(blocks, name, value)
        return blocks

    def __post_init__(self) -> None:
        for name, dim in (("index", 4), ("count", 3), ("query_order", 3)):
            tensor = getattr(self, name)
            if tensor is None and name == "query_order":
                continue
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"Blocks: {name} must be an int32 tensor, got {kind}")
            if tensor.dim() != dim:
                raise ValueError(f"Blocks: {name} must have {dim} dimensions, got shape {tuple(tensor.shape)}")
        _check_int("Blocks", "block_q", self.block_q, 1)
        _check_int("Blocks", "block_k", self.block_k, 1)
        if self.count.shape != self.index.shape[:3]:
            raise ValueError(
                f"Blocks: count must have shape {tuple(self.index.shape[:3])}, that of index without its "
                f"last dimension, got {tuple(self.count.shape)}"
            )
        if self.index.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_content()

    def _check_content(self) -> None:
        capacity = self.index.shape[3]
        if bool(((self.count < 0) | (self.count > capacity)).any()):
            raise ValueError(
                f"Blocks: count must lie between 0 and the capacity {capacity} of index, got "
                f"{int(self.count.min())} .. {int(self.count.max())}"
            )
        used = torch.arange(capacity, dtype=torch.int32) < self.count[..., None]
        if bool((used & (self.index < 0)).any()):
            raise ValueError(
                "Blocks: index has a negative entry among the first count entries of a list; put unused "
                "slots (-1) at the end and count the others"
            )
        if capacity > 1 and bool((used[..., 1:] & (self.index[..., 1:] <= self.index[..., :-1])).any()):
            raise ValueError(
                "Blocks: each list of index must be strictly ascending (no key twice); sort it and drop duplicates"
            )
        if self.query_order is not None and self.query_order.numel() > 0:
            queries = self.query_order.shape[2]
            order = self.query_order.sort(-1).values
            if bool(((order < -1) | (order >= queries)).any()):
                wrong = order.max() if bool((order >= queries).any()) else order.min()
                raise ValueError(
                    f"Blocks: query_order names query {int(wrong)} of {queries}; use -1 for a slot without a query"
                )
            twice = (order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0)
            if bool(twice.any()):
                raise ValueError(
                    f"Blocks: query_order names query {int(order[..., 1:][twice][0])} twice; a query belongs to "
                    "one list"
                )


Support = Union[Full, Empty, Window, Routed, LSH, Blocks]
SUPPORTS = (Full, Empty, Window, Routed, LSH, Blocks)
