"""ListOps: the value of nested lists of digits (Nangia and Bowman, 2018; Tay et al., Long Range Arena, 2021)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.metrics import ACCURACY, Metric
from scatterbrain.training.tasks import listops_sequences
from scatterbrain.training.tasks.curriculum import GrowingSequences
from scatterbrain.training.tasks.listops_sequences import Shape, draw_sequences


@dataclass(frozen=True)
class ListOps(GrowingSequences):
    """Operators MIN, MAX, MED (median) and SM (sum modulo 10) over digits and further lists; the class of a sequence is
    its value, a digit. The Long Range Arena has 500 to 2000 tokens; 512 at most are enough here that small models tell
    methods apart. Lists grow with the run as in :class:`GrowingSequences`, the shortest in proportion to the longest.

    Args:
        tokens: of the longest sequence.
        shortest: tokens of the shortest.
        depth: operators around a digit, at most.
        arguments: of an operator, at most; at least 2.
    """

    kind: ClassVar[str] = "listops"
    metric: ClassVar[Metric] = ACCURACY
    head: ClassVar[Literal["sequence"]] = "sequence"

    tokens: int = 512
    shortest: int = 128
    depth: int = 10
    arguments: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.depth >= 1, "task.depth", "1 or more", self.depth)
        require(self.arguments >= 2, "task.arguments", "2 or more", self.arguments)
        usual = self.shape.usual_length()
        require(
            4 <= self.tokens <= usual,
            "task.tokens",
            f"4 to {usual}, which depth = {self.depth} and arguments = {self.arguments} leave room for",
            self.tokens,
        )
        require(4 <= self.shortest <= self.tokens, "task.shortest", f"4 to tokens = {self.tokens}", self.shortest)
        self.require_first_tokens(self.tokens, least=4)
        for longest in reversed(self.lengths(self.tokens)):
            self._require_lists(self._shape_of(longest))

    def _require_lists(self, shape: Shape) -> None:
        """Else the run would look for them for ever, and the lengths of a growing run hours after its start."""
        if shape.has_lists():
            return
        missing = f"no list with arguments = {self.arguments} has {shape.shortest} to {shape.longest} tokens"
        if shape == self.shape:
            lower = next(one for one in range(self.shortest, 3, -1) if shape._replace(shortest=one).has_lists())
            require(False, "task.shortest", f"4 to {lower}, as {missing}", self.shortest)
        raise ValueError(
            f"task.shortest: expected less than {self.shortest}, as {missing}, to which lists grow from "
            f"task.first_tokens = {self.first_tokens}, got {self.shortest}; lower it, or set another task.first_tokens"
        )

    @property
    def shape(self) -> Shape:
        """Which lists are drawn."""
        return Shape(self.shortest, self.tokens, self.depth, self.arguments)

    def shape_at(self, fraction: float) -> Shape:
        """Which lists are drawn when ``fraction`` of the run is done."""
        return self._shape_of(self.tokens_at(fraction, self.tokens))

    def _shape_of(self, longest: int) -> Shape:
        shortest = max(self.shortest * longest // self.tokens, 4)
        return self.shape._replace(shortest=shortest, longest=longest)

    def open(self, data: DataConfig, train: TrainConfig) -> ListOpsData:
        return ListOpsData(self, train.batch, train.seed)


class ListOpsData:
    """Fresh sequences in every batch, padded at the end to the longest of it. A sequence's hash says whether it is for
    training or for validation, so none is for both.

    Args:
        task: its settings.
        batch: sequences of a batch.
        seed: of the draws.
    """

    input_size = listops_sequences.VOCABULARY
    classes = 10

    def __init__(self, task: ListOps, batch: int, seed: int) -> None:
        self.task, self.shape, self.batch, self.seed = task, task.shape, batch, seed
        self.tokens = task.tokens
        frequent, by_operator = self._guesses()
        self.description = (
            f"lists of {task.shortest} to {task.tokens} tokens, drawn anew for every batch; the most frequent value is "
            f"right for {frequent:.0%}, the most frequent of the first operator for {by_operator:.0%}"
        )

    def training_batch(self, number: int, fraction: float) -> Batch:
        shape = self.task.shape_at(fraction)
        rows = self.batch * self.tokens // shape.longest
        return Batch(*draw_sequences(rows, shape, self.seed, "training", number))

    @functools.cache  # one of several sequences is for validation, so that these take longer to find
    def validation_batch(self, number: int) -> Batch:
        return Batch(*draw_sequences(self.batch, self.shape, self.seed, "validation", number))

    def _guesses(self, sequences: int = 1024) -> tuple[float, float]:
        """Accuracy of two guesses that read no list, over ``sequences``."""
        inputs, values, _ = draw_sequences(sequences, self.shape, 0, "training", -1)
        counts = values.new_zeros(self.input_size, self.classes)
        counts.index_put_((inputs[:, 0], values), values.new_ones(()), accumulate=True)
        return float(counts.sum(0).max()) / sequences, float(counts.amax(1).sum()) / sequences
