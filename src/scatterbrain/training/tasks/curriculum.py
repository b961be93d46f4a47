"""How far the curriculum of a task has come, whose sequences grow between two shares of a run."""

from __future__ import annotations

import math

from scatterbrain.training.config import require


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


def require_first_tokens(first: int | None, tokens: int, of_all: str = "task.tokens") -> None:
    """Of a task's settings.

    Args:
        first: tokens of the first sequences; None where all have ``tokens``.
        tokens: of the last ones. of_all: the key that says so, for the error.

    Raises:
        ValueError: first sequences without tokens, or longer than the last.
    """
    require(first is None or 0 < first <= tokens, "task.first_tokens", f"1 to {of_all} {tokens}", first)


def tokens_at(fraction: float, first: int | None, tokens: int, first_share: float, full_share: float) -> int:
    """Tokens of a training sequence when ``fraction`` of the run is done: ``first``, or ``tokens`` where it is None,
    until ``first_share``. From there to ``full_share`` they become twice as many again and again."""
    if first is None:
        return tokens
    octaves = math.log2(tokens / first) * grown(fraction, first_share, full_share)
    return min(first * 2 ** math.ceil(octaves), tokens)
