"""How far the curriculum of a task has come, whose sequences grow between two shares of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scatterbrain.training.config import require
from scatterbrain.training.tasks.base import Task


def require_shares(first_share: float, full_share: float) -> None:
    """Of a task's settings.

    Raises:
        ValueError: shares that are not in order, or beyond 0 to 1.
    """
    require(0 <= first_share <= 1, "task.first_share", "0 to 1", first_share)
    require(first_share <= full_share <= 1, "task.full_share", f"first_share = {first_share} to 1", full_share)


def grown(fraction: float, first_share: float, full_share: float) -> float:
    """0 until ``first_share`` of the run is done, 1 from ``full_share`` on, in proportion between them."""
    if fraction >= full_share:
        return 1.0
    return (fraction - first_share) / (full_share - first_share) if fraction > first_share else 0.0


@dataclass(frozen=True)
class GrowingSequences(Task):
    """A task whose run begins with short sequences, in which what is to be found is near and learned much sooner. A
    batch has more of them in return.

    Args:
        first_tokens: of the longest sequence at the beginning of the run; None for the full length from the beginning.
        first_share: of the run that stays at ``first_tokens``; not read without it. Then sequences become twice as long
            again and again.
        full_share: of the run by which sequences have their full length: of n doublings the first comes at
            ``first_share``, and each other one an n-th of the way from there to ``full_share`` later.
    """

    first_tokens: int | None = None
    first_share: float = 0.4
    full_share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_shares(self.first_share, self.full_share)

    def require_first_tokens(self, tokens: int, key: str = "task.tokens", least: int = 1) -> None:
        """Of the settings.

        Args:
            tokens: of a sequence in the end. key: that says so, for the error. least: of any sequence.

        Raises:
            ValueError: first sequences that are too short, or longer than the last.
        """
        first = self.first_tokens
        require(first is None or least <= first <= tokens, "task.first_tokens", f"{least} to {key} {tokens}", first)

    def tokens_at(self, fraction: float, tokens: int) -> int:
        """Tokens of the longest sequence when ``fraction`` of the run is done and those of the end have ``tokens``."""
        if self.first_tokens is None:
            return tokens
        octaves = math.log2(tokens / self.first_tokens) * grown(fraction, self.first_share, self.full_share)
        return min(self.first_tokens * 2 ** math.ceil(octaves), tokens)

    def lengths(self, tokens: int) -> list[int]:
        """All that :meth:`tokens_at` gives in a run, the shortest first."""
        if self.first_tokens is None or self.full_share == 0:
            return [tokens]
        doublings = math.ceil(math.log2(tokens / self.first_tokens))
        # Where both shares are the same the run goes from the first length to the last at once.
        between = range(1, doublings) if self.first_share < self.full_share else ()
        return sorted({self.first_tokens, *(self.first_tokens * 2**doubling for doubling in between), tokens})
