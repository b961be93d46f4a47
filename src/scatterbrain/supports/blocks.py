"""Lists of keys that the caller gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from scatterbrain.call import Call
from scatterbrain.fields import check_int
from scatterbrain.operators.tracing import is_readable
from scatterbrain.supports.base import BlockLists, Support
from scatterbrain.supports.mask_blocks import lists_of_mask

if TYPE_CHECKING:
    from scatterbrain.low_rank import LowRankKernel


@dataclass(frozen=True, eq=False)
class Blocks(Support):
    """Lists given by the caller, by a mask (:meth:`from_mask`), or by :func:`scatterbrain.route`.

    Block b of a row holds queries ``first + b * block_q ...`` where ``first`` is the row's first query that is not
    padding, and entry e of its list stands for keys ``first + e * block_k ...`` counted from the row's first key that
    is not padding.

    Args:
        index: int32 (batch, heads of query or of key, ceil(queries / block_q), capacity); each list strictly ascending,
            unused slots -1 at its end. A batch or heads of 1 stand for every row and every head; in a padded row a list
            for all rows then ends with the row's last valid key.
        count: int32, the shape of ``index`` without its last dimension: entries in use.
        block_q: queries that share a list, at least 1.
        block_k: consecutive keys of an entry, at least 1.
        query_order: optional int32 (batch, heads, queries): slot s of the lists is query ``query_order[b, h, s]`` (-1:
            none). A query that no slot names is not computed: its row is zero. Bidirectional only.

    Raises:
        TypeError, ValueError: naming the field, on a wrong dtype or shape, two devices, entries out of order, twice or
            negative. Entries past the last key, or that no query of a causal block may see, and lists on another device
            than the tokens are found when the lists are used. Reading lists on a GPU waits for it, so there entries are
            looked at only if the environment variable SCATTERBRAIN_CHECK is 1; wrong ones otherwise list nothing.
    """

    kind: ClassVar[str] = "blocks"
    is_configurable: ClassVar[bool] = False

    index: Tensor
    count: Tensor
    block_q: int
    block_k: int
    query_order: Tensor | None = None

    @classmethod
    def from_lists(cls, lists: BlockLists) -> Blocks:
        """Lists that the package made, without looking at their content again."""
        blocks = object.__new__(cls)
        for name in ("index", "count", "block_q", "block_k", "query_order"):
            object.__setattr__(blocks, name, getattr(lists, name))
        return blocks

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        block_q: int | None = None,
        block_k: int | None = None,
        is_causal: bool = False,
        query_offset: int = 0,
    ) -> Blocks:
        """The lists of a mask. Exact weights where it is True; the low-rank kernel has the rest.

        Queries and keys count from each row's first token that is not padding. Reads the mask, which on a GPU waits for
        it. A list takes memory by the longest: a mask with a full row makes lists as long as the row. On a GPU so does
        the time of a causal call with a low-rank kernel: give queries that attend to everything a call of their own.

        Args:
            mask: bool (queries, keys), for every batch row and head, or (batch, heads, queries, keys) with the heads of
                query or of key, and 1 for every row or every head. True: exact.
            block_q, block_k: size of the blocks of queries and of keys, each of which must be all True or all False.
                None: the largest that the mask allows. Sizes of 1 fit any mask; larger blocks are faster.
            is_causal: whether the lists are for causal calls: pairs after the causal edge, key > query +
                ``query_offset``, then count neither for nor against a block, and no list names them.
            query_offset: position of the first query among the keys, as in :func:`scatterbrain.attention`.

        Raises:
            TypeError, ValueError: for anything but such a mask, and for blocks that are neither all True nor all False,
                with the first of them.
        """
        return cls(*lists_of_mask(mask, block_q, block_k, is_causal, query_offset))

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
            if tensor.device != self.index.device:
                raise ValueError(
                    f"Blocks: index, count and query_order must be on one device, got index on {self.index.device} and "
                    f"{name} on {tensor.device}; move one of them"
                )
        check_int("Blocks", "block_q", self.block_q, 1)
        check_int("Blocks", "block_k", self.block_k, 1)
        if self.count.shape != self.index.shape[:3]:
            raise ValueError(
                f"Blocks: count must have shape {tuple(self.index.shape[:3])}, that of index without its "
                f"last dimension, got {tuple(self.count.shape)}"
            )
        if is_readable(self.index, self.count, self.query_order):
            self._check_content()

    def _check_content(self) -> None:
        capacity = self.index.shape[3]
        if bool(((self.count < 0) | (self.count > capacity)).any()):
            raise ValueError(
                f"Blocks: count must lie between 0 and the capacity {capacity} of index, got "
                f"{int(self.count.min())} .. {int(self.count.max())}"
            )
        used = torch.arange(capacity, dtype=torch.int32, device=self.index.device) < self.count[..., None]
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

    def check(self, low_rank: LowRankKernel | None, is_causal: bool) -> None:
        if is_causal and self.query_order is not None:
            raise ValueError(
                "Blocks with a query_order are bidirectional only; use is_causal=False or lists in the order of the "
                "queries"
            )

    def lists(self, call: Call, query_map: Tensor | None, key_map: Tensor | None) -> BlockLists:
        self.check_fit(call)
        index, count, order = self.index, self._count_in(call), self.query_order
        batch, heads = call.query.shape[0], index.shape[1]
        if index.shape[0] != batch or heads not in (call.query.shape[1], call.key.shape[1]):  # 1: for all of them
            heads = call.key.shape[1] if heads == 1 else heads
            index = index.expand(batch, heads, -1, -1).contiguous()
            count = count.expand(batch, heads, -1).contiguous()
        if order is not None and order.shape[0] != batch:
            order = order.expand(batch, -1, -1).contiguous()
        return BlockLists(index, count, None, order, self.block_q, self.block_k)

    def _count_in(self, call: Call) -> Tensor:
        """``count`` without the entries that padding takes from a list: those of :meth:`_count_within_keys`, and in
        causal calls those that only queries which are padding could see."""
        padding, count = call.padding, self._count_within_keys(call)
        if not call.is_causal or padding.query_range is None:
            return count
        seen = self._last_seen(call, unpadded=False)
        if padding.key_range is not None:
            seen = seen - padding.key_range[:, :1].long()
        return self._before(seen.div(self.block_k, rounding_mode="floor")[:, None, :, None] + 1).minimum(count)

    def _count_within_keys(self, call: Call) -> Tensor:
        """``count``, with a batch of its own where one list stands for every row and rows have different keys: entries
        past a row's last valid key are left out."""
        key_range = call.padding.key_range
        if key_range is None or self.index.shape[0] != 1:
            return self.count
        blocks = (key_range[:, 1] - key_range[:, 0] + self.block_k - 1).div(self.block_k, rounding_mode="floor")
        return self._before(blocks[:, None, None, None]).minimum(self.count)

    def _before(self, blocks: Tensor) -> Tensor:
        """How many entries of every list are below ``blocks``."""
        return ((self.index >= 0) & (self.index < blocks)).sum(-1, dtype=torch.int32)

    def _last_seen(self, call: Call, unpadded: bool) -> Tensor:
        """(batch or 1, lists): the last key that causality lets a list name, for its last query that is no padding or,
        ``unpadded``, for its last query if all of them were none."""
        queries, padding = call.query.shape[2], call.padding
        lists = torch.arange(1, self.index.shape[2] + 1, device=self.index.device)
        last = (lists * self.block_q).clamp(max=queries)[None] - 1
        if padding.query_range is not None:
            first, end = padding.query_range.long().unbind(1)
            last = first[:, None] + last
            last = last if unpadded else last.minimum(end[:, None] - 1)
        return last if padding.query_offset is None else last + padding.query_offset[:, None].long()

    def check_fit(self, call: Call) -> None:
        """Raises where the lists do not have the shapes of the call or, on the CPU and with SCATTERBRAIN_CHECK=1, name
        keys past the end or after everything that their block may see. On a GPU such entries list nothing."""
        (batch, q_heads, q_tokens, _), (_, kv_heads, k_tokens, _) = call.query.shape, call.key.shape
        padding, is_causal = call.padding, call.is_causal
        if self.index.device != call.query.device:
            raise ValueError(
                f"Blocks: lists must be on the device of query, {call.query.device}, got {self.index.device}; move "
                "index, count and query_order there"
            )
        if self.index.shape[0] not in (batch, 1) or self.index.shape[1] not in (q_heads, kv_heads, 1):
            raise ValueError(
                f"Blocks: index must lead with (batch, heads) = ({batch}, {q_heads}) or ({batch}, "
                f"{kv_heads}), or 1 for all of them, got {tuple(self.index.shape[:2])}"
            )
        expected = -(-q_tokens // self.block_q)
        if self.index.shape[2] != expected:
            raise ValueError(
                f"Blocks: {q_tokens} queries in blocks of {self.block_q} make {expected} lists, got index "
                f"with {self.index.shape[2]}"
            )
        order = self.query_order
        if order is not None and (
            order.shape[0] not in (batch, 1) or q_heads % order.shape[1] or order.shape[2] != q_tokens
        ):
            raise ValueError(
                f"Blocks: query_order must be (batch, heads, queries) = ({batch}, {q_heads}, {q_tokens}), "
                f"got {tuple(order.shape)}"
            )
        if not is_readable(self.index, self.count, padding.key_range, padding.query_range, padding.query_offset):
            return
        device = self.index.device
        if not self.index.is_cpu and is_readable(self.query_order):  # on the CPU the operator looks at what it reads
            self._check_content()
        slots = torch.arange(self.index.shape[3], dtype=torch.int32, device=device)
        used = slots < self.count[..., None]
        entry = torch.where(used, self.index, -1).long()
        if bool((entry * self.block_k >= k_tokens).any()):
            raise ValueError(
                f"Blocks: index names key block {int(entry.max())}, past the {k_tokens} keys in blocks of "
                f"{self.block_k}; drop entries out of range"
            )
        first = 0
        if padding.key_range is not None:
            first, end = (edge[:, None, None, None].long() for edge in padding.key_range.unbind(1))
            used = slots < self._count_within_keys(call)[..., None]
            past = used & (first + entry * self.block_k >= end)
            if bool(past.any()):
                row = int(past.flatten(1).any(1).nonzero()[0])
                raise ValueError(
                    f"Blocks: index names key block {int(entry[row][past[row]].max())}, past the "
                    f"{int(end[row] - first[row])} valid keys of row {row} in blocks of {self.block_k}; drop entries "
                    "out of range, or give lists for all rows (an index with a batch of 1), which end with each row's "
                    "keys"
                )
        start = first + entry * self.block_k
        if is_causal and bool((used & (start > self._last_seen(call, unpadded=True)[:, None, :, None])).any()):
            raise ValueError(
                "Blocks: a list names keys after its block's last query, which breaks causality; leave them "
                "out or use is_causal=False"
            )
