"""Reasons for which a module keeps its own attention, or gets another support than asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from scatterbrain.low_rank import LowRank
from scatterbrain.supports import Support


class NotReplaceable(Exception):
    """Raised by a :class:`Replacer` for a module of its family that it cannot replace; the text is the reason."""


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


def query_by_query(support: Support, low_rank: LowRank) -> tuple[Support, str]:
    """A support for the cross-attention of a decoder, and a note if it is another one than asked for. The keys that one
    target token reads must depend neither on the tokens after it nor on how many they are.

    Raises:
        NotReplaceable: if there is none.
    """
    if low_rank is not None and low_rank.reads_input and not support.is_full:
        raise NotReplaceable("statistics='input' would show a target token the ones after it; use stored statistics")
    with errors_as_reasons():
        return support.for_cross_attention()
