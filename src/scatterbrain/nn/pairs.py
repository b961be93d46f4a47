"""The two pairs of a support and a low-rank kernel that a module runs with, one for bidirectional and one for causal
calls, and the pairs of modules that are given none."""

from __future__ import annotations

from types import EllipsisType
from typing import NamedTuple

import torch

from scatterbrain import checks, presets
from scatterbrain.low_rank import Heads, LowRank, check_low_rank
from scatterbrain.supports import Support

SUPPORT, LOW_RANK = presets.drop_in()
CAUSAL_SUPPORT, CAUSAL_LOW_RANK = presets.causal()

Choice = LowRank | EllipsisType
"""A low-rank kernel as an argument: None for none, ``...`` where the caller leaves the choice to the library."""


class Pairs(NamedTuple):
    """What calls run with.

    Args:
        support, low_rank: of bidirectional calls.
        causal_support: of causal calls; None: ``support``.
        causal_low_rank: of causal calls; ``...``: ``low_rank``.
    """

    support: Support
    low_rank: LowRank
    causal_support: Support | None = None
    causal_low_rank: Choice = ...

    @classmethod
    def chosen(
        cls,
        support: Support | None = None,
        low_rank: Choice = ...,
        causal_support: Support | None = None,
        causal_low_rank: Choice = ...,
    ) -> Pairs:
        """From the arguments of a user. Supports that are not given are those of ``presets.drop_in`` and
        ``presets.causal``; a support that is given serves both kinds of calls, unless there are two. The kernels
        likewise."""
        if support is None:
            support, causal_support = SUPPORT, causal_support or CAUSAL_SUPPORT
        if low_rank is ...:
            return cls(
                support, LOW_RANK, causal_support, CAUSAL_LOW_RANK if causal_low_rank is ... else causal_low_rank
            )
        return cls(support, low_rank, causal_support, causal_low_rank)

    def support_of(self, is_causal: bool) -> Support:
        """The support of causal or of bidirectional calls."""
        return self.causal_support if is_causal and self.causal_support is not None else self.support

    def low_rank_of(self, is_causal: bool) -> LowRank:
        """The kernel of causal or of bidirectional calls."""
        return self.causal_low_rank if is_causal and self.causal_low_rank is not ... else self.low_rank

    @property
    def is_exact(self) -> bool:
        """Whether the support of every call is every key."""
        return self.support.is_full and self.support_of(True).is_full

    def never_causal(self) -> Pairs:
        """For a module that has bidirectional calls alone."""
        return Pairs(self.support, self.low_rank)

    def always_causal(self) -> Pairs:
        """For a module whose calls are causal: their kernel serves all that come."""
        return self._replace(low_rank=self.low_rank_of(True), causal_low_rank=...)

    def needed(self) -> Pairs:
        """Without the kernels that never run: those of calls whose support is every key, and of causal calls that the
        support refuses. A kernel that serves both kinds of calls stays for the other one."""
        low_rank, causal_low_rank = self.low_rank, self.low_rank_of(True)
        if low_rank != causal_low_rank or self.is_exact:
            low_rank = None if self.support.is_full else low_rank
            causal_low_rank = None if self.support_of(True).is_full else causal_low_rank
        if low_rank == causal_low_rank or self.support_of(True).is_bidirectional_only:
            causal_low_rank = ...
        return self._replace(low_rank=low_rank, causal_low_rank=causal_low_rank)

    def check(self) -> None:
        """Raises TypeError or ValueError for pairs that do not fit together, or two that causal calls cannot have. A
        kernel of bidirectional calls alone that is given for all is refused by causal calls themselves."""
        checks.check_pair(self.support, self.low_rank, is_causal=False)
        self.check_causal()
        self.needed().kernel_of_state()

    def check_causal(self) -> None:
        """:meth:`check` of what is for causal calls alone."""
        if self.causal_support is not None:
            checks.check_causal_support(self.causal_support)
        if self.causal_low_rank is not ...:
            check_low_rank(self.causal_low_rank, "causal_low_rank")
            if self.causal_low_rank is not None:
                checks.check_causal_low_rank(self.causal_low_rank)

    def kernel_of_state(self) -> LowRank:
        """The kernel that a module with these pairs keeps state for, buffers and parameters; the one kernel where they
        are one.

        Raises:
            ValueError: both have state, and are two.
        """
        low_rank, causal_low_rank = self.low_rank, self.low_rank_of(True)
        if low_rank == causal_low_rank or not _has_state(causal_low_rank):
            return low_rank
        if _has_state(low_rank):
            raise ValueError(
                f"a module keeps the state of one low-rank kernel, got low_rank={low_rank} and causal_low_rank="
                f"{causal_low_rank}, which both have statistics, parameters or random features of their own; give one "
                "kernel for all calls, or one of them without state (Centroid, Quadratic(statistics='input'), None)"
            )
        return causal_low_rank


def _has_state(low_rank: LowRank) -> bool:
    """Whether a module would keep anything for the kernel."""
    if low_rank is None:
        return False
    with torch.random.fork_rng(devices=[]):
        state = low_rank.initial_state(Heads(1, low_rank.least_head_dim, 1))
    return bool(state.parameters or state.buffers or low_rank.counts)
