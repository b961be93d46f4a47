"""A support and a low-rank kernel on a captured call."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from scatterbrain import functional, presets
from scatterbrain.analysis.layer_call import LayerCall
from scatterbrain.checks import check_pair, lists_keys
from scatterbrain.integrations.restrictions import pairs_that_run
from scatterbrain.layer_settings import Pair
from scatterbrain.low_rank import LowRank
from scatterbrain.nn.pairs import Pairs
from scatterbrain.supports import Full, Support


class Run:
    """A configuration on a captured call: what it computes, and with which lists."""

    def __init__(self, call: LayerCall, support: Support, low_rank: LowRank, statistics: object) -> None:
        self.call, self.support, self.low_rank, self.statistics = call, support, low_rank, statistics
        self.out = partial(call.attention, support, low_rank, statistics=statistics)
        is_exact = call.exact_queries == 0 or support.is_full
        self.first = None if is_exact else call.first_queries(call.exact_queries)

    def whole(self, return_lse: bool = False) -> Any:
        """All that a module computes: also exact attention of the first queries, where the layer wants that."""
        found = self.out(return_lse=return_lse)
        if self.first is not None:
            first = self.first.attention(Full(), None, return_lse=return_lse)
            for rows, exact_rows in zip(found, first) if return_lse else ((found, first),):
                rows[:, :, : exact_rows.shape[2]] = exact_rows
        return found

    @property
    def pair(self) -> Pair:
        """What runs."""
        return self.support, self.low_rank

    def lists_keys(self) -> bool:
        """Whether anything is left without the low-rank part."""
        return lists_keys(self.support, self.call.is_causal)

    def lists(self) -> Support:
        """A support with the lists that the call uses."""
        if not self.support.depends_on_content:
            return self.support
        arguments = self.call.masks() | {"statistics": self.statistics}
        return functional.route(self.call.query, self.call.key, self.support, self.low_rank, **arguments)


def fitting(low_rank: LowRank, head_dim: int) -> LowRank:
    """A kernel whose rank is at most the width of the heads, as modules choose it where they are given none."""
    is_wide = low_rank is not None and low_rank.least_head_dim > head_dim
    return replace(low_rank, rank=head_dim) if is_wide else low_rank


def pair_that_runs(call: LayerCall, pair: Pair) -> Pair:
    """What :func:`scatterbrain.replace_attention` runs in the layer of the call for a pair that a user asks for: in the
    cross-attention of a decoder lists of single queries, and the kernel of causal calls in place of one that reads all
    queries. What runs there runs as itself: of that pair this is the pair.

    Raises:
        NotReplaceable: if there is nothing.
    """
    support, low_rank = pair
    kernel = fitting(presets.causal()[1], call.query.shape[3])
    pairs, _ = pairs_that_run(Pairs(support, low_rank, causal_low_rank=kernel), call.is_query_by_query)
    return pairs.support, pairs.low_rank


def attention_of(call: LayerCall, pair: Pair, fit_on: LayerCall) -> Run:
    """The call with a configuration. Raises ValueError or NotReplaceable where it cannot run so."""
    support, low_rank = pair_that_runs(call, pair)
    check_pair(support, low_rank, call.is_causal)
    fitted = None
    if low_rank is not None and low_rank.is_calibrated_from_data:
        fitted = functional.fit_statistics(
            fit_on.query, fit_on.key, low_rank.rank, fit_on.key_padding_mask, fit_on.scale
        )
    return Run(call, support, low_rank, fitted)
