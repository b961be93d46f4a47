"""How far the curriculum of a task has come, whose sequences grow between two shares of a run."""

from __future__ import annotations

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
