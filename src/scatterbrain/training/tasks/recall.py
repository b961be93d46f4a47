"""Associative recall: which value was shown with a key? (Arora et al., Zoology, ICLR 2024)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.metrics import ACCURACY, Metric
from scatterbrain.training.tasks.base import Task
from scatterbrain.training.tasks.curriculum import grown, require_shares
from scatterbrain.training.tasks.randomness import generator_of, permutations


@dataclass(frozen=True)
class Recall(Task):
    """Keys, each followed by its value, and then every key again in another order: its value is to be predicted there.
    A model of two layers needs a short convolution (model.convolution: 2), by which a value's token knows its key.

    Args:
        pairs: keys with their values.
        tokens: of a sequence, at least 3 for each pair; blanks at random places fill the rest.
        keys: that the pairs' keys are drawn from, without repetition.
        values: that are drawn from; guessing is right once in so many.
        first_pairs: pairs at the beginning of the run: few are learned much sooner than many. Sequences are shorter
            in proportion, and a batch has more of them in return.
        first_share: of the run that stays at ``first_pairs``. From there to the share ``full_share`` their number grows
            steadily.
        full_share: of the run from which on there are ``pairs``.
    """

    kind: ClassVar[str] = "recall"
    metric: ClassVar[Metric] = ACCURACY
    head: ClassVar[Literal["next"]] = "next"

    pairs: int = 64
    tokens: int = 192
    keys: int = 64
    values: int = 64
    first_pairs: int = 16
    first_share: float = 0.4
    full_share: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.pairs >= 1, "task.pairs", "1 or more", self.pairs)
        require(self.tokens >= 3 * self.pairs, "task.tokens", f"at least 3 * pairs = {3 * self.pairs}", self.tokens)
        require(self.keys >= self.pairs, "task.keys", f"at least pairs = {self.pairs}", self.keys)
        require(self.values >= 2, "task.values", "2 or more", self.values)
        require(1 <= self.first_pairs <= self.pairs, "task.first_pairs", f"1 to pairs = {self.pairs}", self.first_pairs)
        require_shares(self.first_share, self.full_share)

    def open(self, data: DataConfig, train: TrainConfig) -> RecallData:
        return RecallData(self, train.batch, train.seed)

    def pairs_at(self, fraction: float) -> int:
        """Pairs of a sequence when ``fraction`` of the run is done."""
        share = grown(fraction, self.first_share, self.full_share)
        return self.first_pairs + int(share * (self.pairs - self.first_pairs))


class RecallData:
    """Fresh sequences in every batch. Tokens are the keys, then the values, then the blank.

    Args:
        task: its settings.
        batch: sequences of a batch with all pairs.
        seed: of the draws.
    """

    def __init__(self, task: Recall, batch: int, seed: int) -> None:
        self.task, self.batch, self.seed = task, batch, seed
        self.blank = task.keys + task.values
        self.input_size = self.classes = self.blank + 1
        self.tokens = task.tokens
        self.description = (
            f"{task.pairs} pairs of {task.keys} keys and {task.values} values, drawn anew for every batch"
        )

    def training_batch(self, number: int, fraction: float) -> Batch:
        pairs = self.task.pairs_at(fraction)
        rows = self.batch * self.task.pairs // pairs
        return self._batch(rows, pairs, self.task.tokens * pairs // self.task.pairs, "training", number)

    def validation_batch(self, number: int) -> Batch:
        return self._batch(self.batch, self.task.pairs, self.task.tokens, "validation", number)

    def _batch(self, rows: int, pairs: int, tokens: int, part: str, number: int) -> Batch:
        task, generator = self.task, generator_of(self.seed, "recall", part, number)
        keys = permutations(rows, task.keys, generator)[:, :pairs]
        values = task.keys + torch.randint(task.values, (rows, pairs), generator=generator)
        blanks = tokens - 3 * pairs
        questions = pairs + blanks - blanks // 2  # tokens after the last pair
        # Pairs are kept in order, so that each comes as many tokens later as there are pairs and blanks before it.
        shown = permutations(rows, pairs + blanks // 2, generator)[:, :pairs].sort(dim=1).values + torch.arange(pairs)
        asked = tokens - 1 - permutations(rows, questions, generator)[:, :pairs]
        inputs = torch.full((rows, tokens), self.blank)
        inputs.scatter_(1, shown, keys).scatter_(1, shown + 1, values).scatter_(1, asked, keys)
        return Batch(inputs, torch.full_like(inputs, -100).scatter_(1, asked, values))
