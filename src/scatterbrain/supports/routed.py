"""The keys where the low-rank kernel errs most, chosen from the content."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scatterbrain.call import Call
from scatterbrain.fields import check_int, repr_of
from scatterbrain.operators import untraced
from scatterbrain.operators.arguments import KernelInputs, RouteArguments
from scatterbrain.operators.device_constants import kept
from scatterbrain.operators.tracing import is_known, is_untraced
from scatterbrain.supports.base import BlockLists, OperatorRouting, Support


@dataclass(frozen=True)
class Routed(Support):
    """The keys where the low-rank kernel errs most, chosen from the content (no gradient flows through the choice).

    Two forms. Pooled: ``block_q`` in {8, 16, 32}, ``block_k`` = 1; a block's own keys and the best of the rest by the
    residual score ``log |exp(s) - L|`` of the block's mean query, its pool. Causal routing pools the block's first
    query with the 15 before it. With ``pools`` = 2 each half of these queries is a pool, and the squared residuals of
    the two, relative to their whole weights, are added: less error where a block's queries differ, for half as much
    routing time again. With ``window`` the keys of a :class:`Window` of that length, which hold the block's own ones,
    take their place; causal routing then chooses among the keys before the window. Per query: ``block_q`` = 1,
    ``block_k`` = 8; a window of ``window`` keys (its start rounded down to a block) and the best ``(keys - window) /
    8`` blocks of 8 keys by ``q . mean(k)``, in the causal form among the complete blocks before the window. The per-
    query form is for training from scratch, the pooled one for pretrained models. A block's score is the log of what
    the query would weigh its keys with, to second order around their mean; with ``pools`` = 2 around the means of two
    groups of the 8 keys, which finds a single key that fits among seven that do not. With ``pools`` = 0 no mean stands
    for a block: the candidates are the blocks with the key whose sketch, the signs of 64 random projections (SimHash,
    Charikar 2002), agrees best with the query's, and their scores are exact. It finds single keys most surely; its
    search takes up to twice as long as by two means, or 2.7 times without AVX2 (``docs/performance.md``).

    Args:
        keys: keys per query in all: sinks, window, own and listed keys. The per-query form rounds its window to whole
            blocks and can list up to 7 more. A tuple gives every query head its own number, from candidates as the
            largest one takes them.
        block_q: queries that share a list.
        block_k: consecutive keys that are chosen together.
        window: keys near the query that are always listed; the pooled form takes 0 or at least ``block_q``. The default
            0 leaves the choice to the scores, which is best for bidirectional models; causal ones read near keys most.
        sinks: first keys of each row's valid range that are always listed, as :class:`Window` has them; the per-query
            form rounds them up to whole blocks of 8 keys.
        pools: means that stand for a block when lists are chosen, 1 or 2: of the ``block_q`` queries that share a
            list, or, in the per-query form, of the ``block_k`` keys that are chosen together. 2 pay for lists of 96
            keys and more that 32 queries share, and per query wherever attention looks for single keys. 0, in the
            per-query form alone: keys are found by their sketches.

    Raises:
        TypeError, ValueError: naming the field, where one is no int or out of its range, or the window and the sinks
            take more than ``keys``; a tuple of another length than a call has query heads.
    """

    kind: ClassVar[str] = "routed"
    depends_on_content: ClassVar[bool] = True
    reads_coordinates: ClassVar[bool] = True
    evaluates_kernel: ClassVar[bool] = True
    can_be_prepared: ClassVar[bool] = True
    gains_from_order: ClassVar[bool] = True
    takes_keys_by_head: ClassVar[bool] = True

    keys: int | tuple[int, ...]
    block_q: int = 16
    block_k: int = 1
    window: int = 0
    sinks: int = 0
    pools: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.keys, list):
            object.__setattr__(self, "keys", tuple(self.keys))
        if isinstance(self.keys, tuple) and not self.keys:
            raise ValueError("Routed: keys must be an int, or one for every query head, got an empty tuple")
        for keys in self.budgets:
            check_int("Routed", "keys", keys, 1)
        check_int("Routed", "block_q", self.block_q, 1)
        check_int("Routed", "block_k", self.block_k, 1)
        check_int("Routed", "window", self.window, 0)
        check_int("Routed", "sinks", self.sinks, 0)
        check_int("Routed", "pools", self.pools, 0, 2)
        if (self.block_q, self.block_k) not in ((8, 1), (16, 1), (32, 1), (1, 8)):
            raise ValueError(
                "Routed: expected block_q in (8, 16, 32) with block_k=1 (pooled), or block_q=1 with "
                f"block_k=8 (per query), got block_q={self.block_q}, "
                f"block_k={self.block_k}"
            )
        if self.is_pooled and self.pools == 0:
            raise ValueError(
                "Routed: pools=0 finds every query's keys by sketches, expected block_q=1 with block_k=8, got "
                f"block_q={self.block_q}, block_k={self.block_k}; use 1 or 2 pools for lists that queries share"
            )
        if self.fewest_keys < self.block_q:
            raise ValueError(
                "Routed: keys is the whole budget and holds the block's own keys, expected at least "
                f"block_q={self.block_q}, got {self.fewest_keys}"
            )
        if self.is_pooled and 0 < self.window < self.block_q:
            raise ValueError(
                "Routed: the window of the pooled form holds the block's own keys, expected 0 (those alone) or at "
                f"least block_q={self.block_q}, got window={self.window}"
            )
        if not self.is_pooled and (
            self.window % 8 or any(keys % 8 for keys in self.budgets) or self.window > self.fewest_keys
        ):
            raise ValueError(
                "Routed: expected keys and window in multiples of 8 with window <= keys, got "
                f"keys={self.keys}, window={self.window}"
            )
        always = (max(self.window, self.block_q) if self.is_pooled else self.window) + self._sink_keys
        if always > self.fewest_keys:
            raise ValueError(
                f"Routed: keys is the whole budget, expected at least {always} for window={self.window} and "
                f"sinks={self.sinks}, got {self.fewest_keys}"
            )

    def __repr__(self) -> str:
        return repr_of(self, if_set=("sinks", "pools"))

    @property
    def budgets(self) -> tuple[int, ...]:
        """``keys`` of every query head; of all of them together where they are the same."""
        return self.keys if isinstance(self.keys, tuple) else (self.keys,)

    @property
    def most_keys(self) -> int:
        """Of any head."""
        return max(self.budgets)

    @property
    def fewest_keys(self) -> int:
        """Of any head."""
        return min(self.budgets)

    @property
    def _sink_keys(self) -> int:
        """Keys of the budget that the sinks take: whole entries of a list."""
        return -(-self.sinks // self.block_k) * self.block_k

    @property
    def is_pooled(self) -> bool:
        """Whether a block of queries shares a list of single keys."""
        return self.block_k == 1

    @property
    def capacity(self) -> int:
        """Entries of a list at most; no list has more than all keys fill."""
        return torch.ops.scatterbrain.list_capacity(self.most_keys, self.block_k)

    def covers_every_key(self, queries: int, keys: int, is_causal: bool) -> bool:
        if self.is_pooled:
            return is_known(keys <= self.fewest_keys) or (is_causal and is_known(queries <= self.fewest_keys))
        listed, sinks = (self.fewest_keys - self.window) // self.block_k, self._sink_keys // self.block_k
        if is_causal:  # the last query has the most blocks before its window
            return is_known((queries - self.window) // self.block_k <= listed)
        # The first query's window, cut by the start of the sequence, is the smallest, and holds sinks.
        nearby = -(-(self.window // 2) // self.block_k)
        return is_known(keys <= (listed - sinks + max(nearby, sinks)) * self.block_k)

    def lists(self, call: Call, query_map: Tensor | None, key_map: Tensor | None) -> BlockLists:
        # Always in float32, so that float64 copies of the same inputs are routed alike. The operator itself converts
        # half types; below autograd there is nothing to detach from.
        if is_untraced():
            operator = untraced.route
            as_float = lambda t: t.float() if t is not None and t.dtype == torch.float64 else t
        else:
            operator = lambda arguments: torch.ops.scatterbrain.route(*arguments)
            as_float = lambda t: t if t is None or not t.is_floating_point() else t.detach().float()
        inputs = KernelInputs(query_map, key_map)
        if query_map is None and call.low_rank is not None and self.is_pooled:
            inputs = call.low_rank.inputs(call)
        index, count = operator(
            RouteArguments(
                query=as_float(call.query),
                key=as_float(call.key),
                **{name: as_float(t) for name, t in inputs.for_routing().items()},
                **call.padding._asdict(),
                head_keys=self._head_keys(call),
                low_rank=0 if call.low_rank is None else call.low_rank.code,
                keys=self.most_keys,
                block_q=self.block_q,
                block_k=self.block_k,
                window=self.window,
                sinks=self.sinks,
                pools=self.pools,
                is_causal=call.is_causal,
                scale=call.scale,
            )
        )
        return BlockLists(index=index, count=count, block_q=self.block_q, block_k=self.block_k)

    def operator_routing(self, call: Call) -> OperatorRouting | None:
        # The operator would route float64 inputs in float64: `lists` routes float32 copies.
        if call.query.dtype == torch.float64 or type(self).lists is not Routed.lists:
            return None
        return OperatorRouting(
            self.most_keys, self.window, self.block_q, self.block_k, self.sinks, self.pools, self._head_keys(call)
        )

    def _head_keys(self, call: Call) -> Tensor | None:
        """int32 (1, Hq), the keys of every query head; None where they are the same."""
        if not isinstance(self.keys, tuple):
            return None
        device = call.query.device
        return kept(_as_row, device, self.keys) if is_untraced() else _as_row(self.keys, device)

    def check_heads(self, heads: int) -> None:
        if isinstance(self.keys, tuple) and len(self.keys) != heads:
            raise ValueError(
                f"Routed: expected keys for each of the {heads} query heads, got {len(self.keys)}: {self.keys}; give "
                "one int for all heads, or one for each"
            )

    def for_cross_attention(self) -> tuple[Support, str]:
        if self.block_q > 1:
            why = "lists that queries share would show a target token the ones after it"
        elif self.window:
            why = "a window lies where the number of target tokens puts it"
        else:
            return self, ""
        own = lists_of_single_queries(self.keys, 1 if self.is_pooled else self.pools)
        return own, f"{own}: {why}"


def lists_of_single_queries(keys: int | tuple[int, ...], pools: int = 1) -> Routed:
    """Routing of every query by itself, to at least ``keys`` keys, by content alone."""
    whole_blocks = lambda n: 8 * math.ceil(n / 8)
    budget = tuple(map(whole_blocks, keys)) if isinstance(keys, tuple) else whole_blocks(keys)
    return Routed(budget, block_q=1, block_k=8, pools=pools)


def _as_row(keys: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([keys], dtype=torch.int32, device=device)
