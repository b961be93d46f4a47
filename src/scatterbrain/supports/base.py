"""What every support is: the class to derive from, and the form in which the operators take it."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor

from scatterbrain.registry import Registry

if TYPE_CHECKING:
    from scatterbrain.call import Call
    from scatterbrain.low_rank import LowRankKernel


class BlockLists(NamedTuple):
    """A support as the operators take it: lists of keys for blocks of queries. Fields are named as the operators'
    arguments.

    Args:
        index, count, query_order: as :class:`scatterbrain.Blocks`; None without lists.
        span: int32 (1 or B, blocks, 2), a window [lo, hi) of absolute key positions per block; None without one.
        block_q: queries that share a list. block_k: consecutive keys of an entry.
        span_keys: upper bound of hi - lo, as close as it is known: on GPUs causal calls with a low-rank kernel read
            states only behind the longest list, so a bound of the number of tokens costs them quadratic time.
        span_sinks: so many first keys of the row are listed besides the window.
    """

    index: Tensor | None = None
    count: Tensor | None = None
    span: Tensor | None = None
    query_order: Tensor | None = None
    block_q: int = 16
    block_k: int = 1
    span_keys: int = 0
    span_sinks: int = 0


class OperatorRouting(NamedTuple):
    """Lists that the attention operator makes itself, in the same call: the fields of Routed."""

    keys: int
    window: int
    block_q: int
    block_k: int
    sinks: int = 0
    pools: int = 1
    head_keys: Tensor | None = None


class Support:
    """Which keys each query attends to exactly. A frozen dataclass that derives from this class is a support; what it
    must have is :meth:`lists`. :func:`register` makes it known by its name to YAML files and to the benchmark.

    Attributes:
        kind: name in configuration files, lower case.
        is_full: every key is listed, so attention is exact and a low-rank kernel has nothing to do.
        is_bidirectional_only: causal attention is refused by :meth:`check`.
        depends_on_content: lists depend on queries and keys, so :func:`scatterbrain.route` can return them.
        reads_coordinates: lists depend on the low-rank kernel's coordinates too.
        evaluates_kernel: :meth:`lists` takes what it needs of a kernel without coordinates from
            ``LowRankKernel.inputs``.
        gains_from_order: neighbouring tokens share a list or are each other's support, so attention over an image is
            better where neighbours in the sequence are neighbours in the image (``token_order="auto"``).
        is_configurable: numbers and names make it, so a configuration file can.
        can_be_prepared: equal supports make equal lists for equal lengths, or the operator makes them, so a call can be
            kept (scatterbrain.prepared).
        takes_keys_by_head: ``keys`` may be a tuple with a number for every query head.
    """

    kind: ClassVar[str]
    is_full: ClassVar[bool] = False
    is_bidirectional_only: ClassVar[bool] = False
    depends_on_content: ClassVar[bool] = False
    reads_coordinates: ClassVar[bool] = False
    evaluates_kernel: ClassVar[bool] = False
    gains_from_order: ClassVar[bool] = False
    is_configurable: ClassVar[bool] = True
    can_be_prepared: ClassVar[bool] = False
    takes_keys_by_head: ClassVar[bool] = False

    @classmethod
    def with_keys(cls, keys: int) -> Support:
        """The support with a budget of ``keys`` per query and defaults otherwise; without one where it takes none."""
        return cls(keys) if takes_keys(cls) else cls()

    def check(self, low_rank: LowRankKernel | None, is_causal: bool) -> None:
        """Raises ValueError, with the cure, where the support rules out the kernel or causality."""

    def check_heads(self, heads: int) -> None:
        """Raises ValueError where the support is for another number of query heads."""

    def covers_every_key(self, queries: int, keys: int, is_causal: bool) -> bool:
        """Whether every query's support holds all keys that it may see, without padding or offset. Torch's own kernel
        then computes the call. Lengths are at least 1 and may be symbolic: pass conditions through
        ``operators.tracing.is_known``."""
        return False

    def lists(self, call: Call, query_map: Tensor | None, key_map: Tensor | None) -> BlockLists:
        """The support of one call. ``query_map`` (B, Hq, N, r + 1) and ``key_map`` (B, Hkv, M, r + 1) are the low-rank
        kernel's coordinates; they may be None unless the support ``reads_coordinates``, and are without a kernel."""
        raise NotImplementedError(f"{type(self).__name__} must define lists(call, query_map, key_map)")

    def operator_routing(self, call: Call) -> OperatorRouting | None:
        """Settings with which the attention operator makes the lists itself, without :meth:`lists`, so a class that
        overrides one of the two overrides both; None where :meth:`lists` makes them."""
        return None

    def for_cross_attention(self) -> tuple[Support, str]:
        """A support for the cross-attention of a decoder, and a note if it is another one than this. The keys that one
        target token reads must depend neither on the tokens after it nor on how many they are.

        Raises:
            ValueError: with the reason, where there is none.
        """
        return self, ""


def takes_keys(cls: type[Support]) -> bool:
    """Whether a support has a budget of keys."""
    return any(field.name == "keys" for field in fields(cls))


SUPPORTS = Registry(Support)
register = SUPPORTS.register


def check_support(support: object, name: str = "support") -> None:
    """Raises TypeError for anything but a support. ``name``: of the argument."""
    if not isinstance(support, Support):
        raise TypeError(f"{name} must be one of {SUPPORTS.names()}, got {type(support).__name__}")
