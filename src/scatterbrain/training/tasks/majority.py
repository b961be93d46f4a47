"""Noisy majority: what do most of the votes for a key say?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.metrics import ACCURACY, Metric
from scatterbrain.training.tasks.base import Task
from scatterbrain.training.tasks.randomness import generator_of, permutations


@dataclass(frozen=True)
class Majority(Task):
    """Every key has a right value. Votes, a key and a value each, say it or, more or less often, another one; questions
    are a key each, of which the right value is to be predicted (bidirectional). No vote alone is to be trusted, so
    attention has to spread over all votes for a key. A model needs a short convolution (model.convolution: 2), by which
    a value's token knows its key.

    Args:
        votes: of a sequence, as many for each key as for the others, give or take one.
        tokens: of a sequence, more than 2 for each vote; the others are questions.
        keys: with a right value each, drawn anew for every sequence.
        values: that a vote can be for.
        right: share of the votes that say the right value; the others say any of the rest.
    """

    kind: ClassVar[str] = "majority"
    metric: ClassVar[Metric] = ACCURACY
    head: ClassVar[Literal["token"]] = "token"

    votes: int = 64
    tokens: int = 192
    keys: int = 8
    values: int = 8
    right: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.keys >= 1, "task.keys", "1 or more", self.keys)
        require(self.votes >= self.keys, "task.votes", f"at least keys = {self.keys}", self.votes)
        require(self.tokens > 2 * self.votes, "task.tokens", f"more than 2 * votes = {2 * self.votes}", self.tokens)
        require(self.values >= 2, "task.values", "2 or more", self.values)
        require(
            1 / self.values < self.right <= 1,
            "task.right",
            f"more than 1 / values = {1 / self.values:.3g}, to 1",
            self.right,
        )

    def open(self, data: DataConfig, train: TrainConfig) -> MajorityData:
        return MajorityData(self, train.batch, train.seed)


class MajorityData:
    """Fresh sequences in every batch. Tokens are the keys, then the values; a class is a value.

    Args:
        task: its settings.
        batch: sequences of a batch.
        seed: of the draws.
    """

    def __init__(self, task: Majority, batch: int, seed: int) -> None:
        self.task, self.batch, self.seed = task, batch, seed
        self.input_size, self.classes, self.tokens = task.keys + task.values, task.values, task.tokens
        self.description = (
            f"{task.votes} votes for {task.keys} keys with {task.values} values, drawn anew for every batch; the value "
            f"with most votes is right for {most_votes_are_right(task):.1%} of the keys"
        )

    def training_batch(self, number: int, fraction: float) -> Batch:
        return self._batch(generator_of(self.seed, "majority", "training", number))

    def validation_batch(self, number: int) -> Batch:
        return self._batch(generator_of(self.seed, "majority", "validation", number))

    def _batch(self, generator: torch.Generator) -> Batch:
        task, rows = self.task, self.batch
        right, keys, values = draw_votes(rows, task, generator)
        asked = torch.randint(task.keys, (rows, task.tokens - 2 * task.votes), generator=generator)
        shown = torch.stack((keys, task.keys + values), -1).flatten(1)
        targets = torch.cat((torch.full_like(shown, -100), right.gather(1, asked)), 1)
        return Batch(torch.cat((shown, asked), 1), targets)


def draw_votes(rows: int, task: Majority, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Right values (rows, keys) from 0, and the keys and values (rows, votes) of the votes, from 0 too."""
    right = torch.randint(task.values, (rows, task.keys), generator=generator)
    # A key has votes / keys of them, rounded down or up: which keys have one more is random.
    names = permutations(rows, task.keys, generator).repeat(1, -(-task.votes // task.keys))[:, : task.votes]
    keys = names.gather(1, permutations(rows, task.votes, generator))
    is_right = torch.rand(rows, task.votes, generator=generator) < task.right
    wrong = torch.randint(1, task.values, (rows, task.votes), generator=generator)
    return right, keys, (right.gather(1, keys) + wrong.masked_fill(is_right, 0)) % task.values


def most_votes_are_right(task: Majority, sequences: int = 4096) -> float:
    """Share of the keys whose most frequent value is right, one of them at random where several are: what a model can
    reach. An estimate from ``sequences``."""
    generator = generator_of(0, "majority", "estimate")
    right, keys, values = draw_votes(sequences, task, generator)
    counts = torch.zeros(sequences, task.keys * task.values)
    counts.scatter_add_(1, keys * task.values + values, torch.ones_like(keys, dtype=counts.dtype))
    counts += torch.rand(counts.shape, generator=generator) / 2
    found = counts.view(sequences, task.keys, task.values).argmax(-1)
    return float((found == right).double().mean())
