"""What a swap must not do to a model, and how it is said."""

from __future__ import annotations

import math

from torch import nn

from scatterbrain.low_rank import LowRank, Quadratic
from scatterbrain.supports import LSH, Full, Routed, Support, Window


class NotReplaceable(Exception):
    """Raised by a handler for a module of its family that it cannot swap; the text is the reason."""


def parallel_wrapper(model: nn.Module) -> str | None:
    """The name of the data parallelism around or inside ``model``; by name, since importing it takes long."""
    names = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
    found = (base.__name__ for module in model.modules() for base in type(module).__mro__ if base.__name__ in names)
    return next(found, None)


def query_by_query(support: Support, low_rank: LowRank) -> tuple[Support, str]:
    """A support for the cross-attention of a decoder, where what one target token reads must not depend on the tokens
    after it, nor on how many they are, and a note if it is another one than asked for.

    Raises:
        NotReplaceable: where there is none.
    """
    if isinstance(low_rank, Quadratic) and low_rank.statistics == "input" and not isinstance(support, Full):
        raise NotReplaceable("statistics='input' would show a target token the ones after it; use stored statistics")
    if isinstance(support, LSH):
        raise NotReplaceable("LSH sorts all queries, which would show a target token the ones after it; use Routed")
    if isinstance(support, Routed) and support.block_q > 1:
        own, why = _own_lists(support.keys), "lists that queries share would show a target token the ones after it"
    elif isinstance(support, Window) or (isinstance(support, Routed) and support.window):
        own, why = _own_lists(support.keys), "a window lies where the number of target tokens puts it"
    else:
        return support, ""
    return own, f"{own}: {why}"


def _own_lists(keys: int) -> Routed:
    """Lists of single queries that hold at least ``keys`` keys, chosen by content alone."""
    return Routed(8 * math.ceil(keys / 8), block_q=1, block_k=8)
