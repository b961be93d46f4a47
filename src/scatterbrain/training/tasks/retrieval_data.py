"""Pairs of passages that come from one document or from two."""

from __future__ import annotations

import torch
from torch import Tensor

from scatterbrain.training.batch import Batch
from scatterbrain.training.tasks.documents import Document
from scatterbrain.training.tasks.fingerprint import fingerprint_of
from scatterbrain.training.tasks.randomness import generator_of
from scatterbrain.training.tasks.text_classification_data import as_tensor


class PassagePairs:
    """Batches of pairs: class 1 if both passages are from one document, class 0 if they are from two.

    The rows of a batch are of the two classes in turn, so half of all pairs are of each. The passages of a pair never
    overlap. Passages have the same distribution in both classes: the second passage of a pair of class 0 is drawn as
    that of class 1 is, from another document.

    Args:
        training: Documents to learn from. validation: Those of the validation pairs; none is in both.
        tokens: Bytes of a passage. Documents shorter than two passages are not used.
        batch: Pairs per batch.
        seed: Of the training pairs. Validation pairs are the same for every seed.

    Raises:
        ValueError: if fewer than two documents of a part are long enough.
    """

    classes = 2
    input_size = 256

    def __init__(
        self, training: list[Document], validation: list[Document], tokens: int, batch: int, seed: int
    ) -> None:
        self.tokens, self.batch, self.seed = tokens, batch, seed
        self.fingerprint = fingerprint_of(document.text for part in (training, validation) for document in part)
        self.training = self._long_enough(training, "training")
        self.validation = self._long_enough(validation, "validation")
        self.description = (
            f"{len(self.training):,} documents to train on, {len(self.validation):,} to validate on; pairs of passages "
            f"of {tokens:,} bytes"
        )

    def training_batch(self, number: int, fraction: float = 0.0) -> Batch:
        """Pairs drawn by ``number`` and the seed alone."""
        return self._batch(self.training, number, generator_of(self.seed, number))

    def validation_batch(self, number: int) -> Batch:
        """Always the same pairs of the validation documents."""
        return self._batch(self.validation, number, generator_of("validation", number))

    def _batch(self, documents: list[Tensor], number: int, generator: torch.Generator) -> Batch:
        targets = (torch.arange(self.batch) + number * self.batch) % 2
        pairs = [self._pair(documents, bool(target), generator) for target in targets]
        return Batch(torch.stack(pairs).long(), targets)

    def _pair(self, documents: list[Tensor], same: bool, generator: torch.Generator) -> Tensor:
        """Two passages, uint8 (2, tokens)."""
        first = int(torch.randint(len(documents), (), generator=generator))
        other = int(torch.randint(len(documents) - 1, (), generator=generator))
        places = self._places(documents[first], generator)
        passages = [self._passage(documents[first], place) for place in places]
        if not same:
            second = documents[other + (other >= first)]
            passages[1] = self._passage(second, self._places(second, generator)[1])
        return torch.stack(passages)

    def _places(self, document: Tensor, generator: torch.Generator) -> list[int]:
        """Where two passages start that do not overlap, in random order."""
        room = document.numel() - 2 * self.tokens
        low, high = sorted(torch.randint(room + 1, (2,), generator=generator).tolist())
        is_swapped = bool(torch.randint(2, (), generator=generator))
        return [high + self.tokens, low] if is_swapped else [low, high + self.tokens]

    def _passage(self, document: Tensor, place: int) -> Tensor:
        return document[place : place + self.tokens]

    def _long_enough(self, documents: list[Document], part: str) -> list[Tensor]:
        needed = 2 * self.tokens
        found = [as_tensor(document.text) for document in documents if len(document.text) >= needed]
        if len(found) < 2:
            raise ValueError(
                f"data.path: expected at least 2 {part} documents of 2 * task.tokens = {needed} bytes or more, got "
                f"{len(found)} of {len(documents)}; name a folder with longer files, or use a smaller task.tokens"
            )
        return found
