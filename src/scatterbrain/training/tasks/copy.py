"""Copy: can a model learn to look half a sequence away?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.metrics import PERPLEXITY, Metric
from scatterbrain.training.tasks.base import Task
from scatterbrain.training.tasks.randomness import generator_of


@dataclass(frozen=True)
class Copy(Task):
    """Random symbols, a separator, and the same symbols again. The perplexity of the second half is 1 for a model that
    has learned to copy, and the number of symbols for one that guesses.

    Args:
        tokens: of a sequence, an odd number from 3: two halves and the separator.
        symbols: that are drawn from; 64 are many enough that guessing is far from copying.
        masked: false: each symbol of the second half is predicted from all tokens before it (causal). true: the second
            half is hidden, and every token reads every other (bidirectional).
    """

    kind: ClassVar[str] = "copy"
    metric: ClassVar[Metric] = PERPLEXITY

    tokens: int = 255
    symbols: int = 64
    masked: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens >= 3 and self.tokens % 2 == 1, "task.tokens", "an odd number from 3", self.tokens)
        require(self.symbols >= 2, "task.symbols", "2 or more", self.symbols)

    @property
    def head(self) -> Literal["next", "token"]:
        return "token" if self.masked else "next"

    def open(self, data: DataConfig, train: TrainConfig) -> CopyData:
        return CopyData(self, train.batch, train.seed)


class CopyData:
    """Fresh sequences in every batch.

    Args:
        task: its settings.
        batch: sequences of a batch.
        seed: of the draws.
    """

    def __init__(self, task: Copy, batch: int, seed: int) -> None:
        self.task, self.batch, self.seed = task, batch, seed
        self.half = (task.tokens - 1) // 2
        self.separator, self.hidden = task.symbols, task.symbols + 1
        self.input_size = task.symbols + (2 if task.masked else 1)
        self.classes, self.tokens = self.input_size, task.tokens
        self.description = f"{self.half} of {task.symbols} symbols to copy, drawn anew for every batch"

    def training_batch(self, number: int, fraction: float) -> Batch:
        return self._batch("training", number)

    def validation_batch(self, number: int) -> Batch:
        return self._batch("validation", number)

    def _batch(self, part: str, number: int) -> Batch:
        generator = generator_of(self.seed, "copy", part, number)
        symbols = torch.randint(self.task.symbols, (self.batch, self.half), generator=generator)
        separator = torch.full((self.batch, 1), self.separator)
        return self._masked(symbols, separator) if self.task.masked else self._causal(symbols, separator)

    def _causal(self, symbols: Tensor, separator: Tensor) -> Batch:
        """Sequences without their last token, and the next tokens, of which only the copied half is scored."""
        tokens = torch.cat((symbols, separator, symbols), dim=1)
        targets = tokens[:, 1:].clone()
        targets[:, : self.half] = -100
        return Batch(tokens[:, :-1], targets)

    def _masked(self, symbols: Tensor, separator: Tensor) -> Batch:
        """Sequences with a hidden second half, and what belongs there."""
        tokens = torch.cat((symbols, separator, torch.full_like(symbols, self.hidden)), dim=1)
        targets = torch.cat((torch.full((self.batch, self.half + 1), -100), symbols), dim=1)
        return Batch(tokens, targets)
