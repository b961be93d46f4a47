"""What a run is judged by: figures of an evaluation, and the metric of a task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over what was scored, as means.

    Args:
        loss: mean cross-entropy of a target, in nats.
        accuracy: share of targets that the largest logit names.
    """

    loss: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number that says how good a model is.

    Args:
        name: in records and files.
        label: for people.
        rises: whether more is better.
        of: the number of an evaluation.
        format: of the number, for people.
    """

    name: str
    label: str
    rises: bool
    of: Callable[[Evaluation], float]
    format: str = ".3f"

    def show(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:{self.format}} {self.label}"

    def better(self, first: float, second: float) -> bool:
        """Whether the first value is better than the second."""
        return first > second if self.rises else first < second


def bits(loss: float) -> float:
    """A loss in nats, in bits."""
    return loss / math.log(2)


def perplexity(loss: float) -> float:
    """e to the power of a loss in nats; infinite where that is no number."""
    return math.exp(loss) if loss < 700 else math.inf


BITS_PER_BYTE = Metric("bits_per_byte", "bits per byte", False, lambda found: bits(found.loss))
BITS_PER_TOKEN = Metric("bits_per_token", "bits per token", False, lambda found: bits(found.loss))
PERPLEXITY = Metric("perplexity", "perplexity", False, lambda found: perplexity(found.loss))
ACCURACY = Metric("accuracy", "accuracy", True, lambda found: found.accuracy)
