"""A byte-level language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import DataConfig, TrainConfig
from scatterbrain.training.data import Batches, GrowingBatches, read_corpus
from scatterbrain.training.metrics import BITS_PER_BYTE, Metric
from scatterbrain.training.sample import generate
from scatterbrain.training.tasks.base import Task
from scatterbrain.training.tasks.curriculum import require_first_tokens, require_shares, tokens_at
from scatterbrain.training.tasks.fingerprint import fingerprint_of


@dataclass(frozen=True)
class Language(Task):
    """Each byte of a text from those before it. Sequences have ``train.context`` bytes.

    Args:
        first_tokens: bytes of a sequence at the beginning of the run: to look far back is learned much sooner where it
            pays within a few hundred bytes. A batch has more sequences in return. None for ``train.context`` from the
            beginning.
        first_share: of the run that stays at ``first_tokens``. From there to the share ``full_share`` sequences become
            twice as long again and again.
        full_share: of the run from which on sequences have ``train.context``.
    """

    kind: ClassVar[str] = "language"
    metric: ClassVar[Metric] = BITS_PER_BYTE
    head: ClassVar[str] = "next"
    inputs: ClassVar[str] = "bytes of its validation text"

    first_tokens: int | None = None
    first_share: float = 0.4
    full_share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_shares(self.first_share, self.full_share)

    def open(self, data: DataConfig, train: TrainConfig) -> Text:
        require_first_tokens(self.first_tokens, train.context, "train.context")
        training, validation = read_corpus(data)

        def length(fraction: float) -> int:
            return tokens_at(fraction, self.first_tokens, train.context, self.first_share, self.full_share)

        return Text(training, validation, train, length)

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
