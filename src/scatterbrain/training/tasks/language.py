"""A byte-level language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import DataConfig, TrainConfig
from scatterbrain.training.data import Batches, GrowingBatches, read_corpus
from scatterbrain.training.metrics import BITS_PER_BYTE, Metric
from scatterbrain.training.sample import generate
from scatterbrain.training.tasks.curriculum import GrowingSequences
from scatterbrain.training.tasks.fingerprint import fingerprint_of


@dataclass(frozen=True)
class Language(GrowingSequences):
    """Each byte of a text from those before it. Sequences have ``train.context`` bytes.
    They grow with the run as in :class:`GrowingSequences`."""

    kind: ClassVar[str] = "language"
    metric: ClassVar[Metric] = BITS_PER_BYTE
    head: ClassVar[str] = "next"
    inputs: ClassVar[str] = "bytes of its validation text"

    def open(self, data: DataConfig, train: TrainConfig) -> Text:
        self.require_first_tokens(train.context, "train.context")
        training, validation = read_corpus(data)
        return Text(training, validation, train, partial(self.tokens_at, tokens=train.context))

    def sample(self, model: nn.Module, prompt: str, length: int, temperature: float, context: int, seed: int) -> str:
        start = prompt.encode()
        return (start + generate(model, start, length, temperature, context, seed)).decode(errors="replace")


class Text:
    """Sequences of a training and a validation text.

    Args:
        training: uint8 (bytes,); validation: likewise.
        train: sizes of a batch, and the seed.
        tokens_at: bytes of a training sequence when a share of the run is done. Shorter ones are more in a batch.
    """

    def __init__(
        self, training: Tensor, validation: Tensor, train: TrainConfig, tokens_at: Callable[[float], int]
    ) -> None:
        self.training = GrowingBatches(training, train.context, train.batch, train.seed, tokens_at)
        self.validation = Batches(validation, train.context, train.batch, train.seed, name="validation")
        self.input_size = self.classes = 256
        self.tokens = train.context
        self.fingerprint = fingerprint_of([training, validation])
        self.description = f"{training.numel():,} bytes to train on, {validation.numel():,} to validate on"

    def training_batch(self, number: int, fraction: float) -> Batch:
        return Batch(*self.training.at(number, fraction))

    def validation_batch(self, number: int) -> Batch:
        return Batch(*self.validation[number])
