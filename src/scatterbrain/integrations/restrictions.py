"""Reasons for which a module keeps its own attention, or gets another support than asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from scatterbrain.nn.pairs import Pairs


class NotReplaceable(Exception):
    """Raised by a :class:`Replacer` for a module of its family that it cannot replace; the text is the reason."""


class NotExpressible(ValueError):
    """Raised by a layer that was replaced, for arguments that sparse + low-rank attention does not have.

    Args:
        what: was given.
        cure: for who runs the model; nothing for who measures it with attention that stands in.
    """

    def __init__(self, what: str, cure: str = "") -> None:
        super().__init__(f"{what}; {cure}" if cure else what)
        self.what = what


@contextmanager
def errors_as_reasons() -> Iterator[None]:
    """Turns a ValueError into the reason for which a module cannot be replaced."""
    try:
        yield
    except ValueError as error:
        raise NotReplaceable(str(error)) from error


def parallel_wrapper(model: nn.Module) -> str | None:
    """The name of the data parallelism around or inside ``model``, or None. Found by class name, since importing the
    classes is slow."""
    names = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
    found = (base.__name__ for module in model.modules() for base in type(module).__mro__ if base.__name__ in names)
    return next(found, None)


def pairs_that_run(pairs: Pairs, is_query_by_query: bool) -> tuple[Pairs, str]:
    """What a layer runs with that is given ``pairs``, and a note if that is something else. What replaces attention and
    what measures it both ask here.

    Args:
        pairs: what was asked for.
        is_query_by_query: whether the layer is the cross-attention of a decoder, as
            :attr:`ScatterbrainAttention.is_query_by_query` says of one that was replaced.

    Raises:
        NotReplaceable: if there is nothing that it may run with.
    """
    return query_by_query(pairs) if is_query_by_query else (pairs, "")


def query_by_query(pairs: Pairs) -> tuple[Pairs, str]:
    """What the cross-attention of a decoder runs with, and a note if that is something else than bidirectional calls
    run with. The keys that one target token reads, and the weights of the others, must depend neither on the tokens
    after it nor on how many they are: a kernel that reads all target tokens gives way to that of causal calls.

    Raises:
        NotReplaceable: if there is nothing.
    """
    kernel, why = pairs.low_rank, ""
    if kernel is not None and kernel.reads_input and not pairs.support.is_full:
        kernel = pairs.low_rank_of(True)
        if kernel is not None and kernel.reads_input:
            raise NotReplaceable(
                f"{pairs.low_rank} would show a target token the ones after it; give causal_low_rank=Quadratic() "
                "beside it, which uses stored statistics"
            )
        why = f"{kernel or 'no low-rank part'}: {pairs.low_rank} would show a target token the ones after it"
    with errors_as_reasons():
        support, note = pairs.support.for_cross_attention()
    return Pairs(support, kernel), "; ".join(text for text in (note, why) if text)
