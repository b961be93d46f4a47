"""Passages of labelled texts, byte by byte."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from scatterbrain.training.batch import Batch
from scatterbrain.training.tasks.documents import LabelledTexts
from scatterbrain.training.tasks.fingerprint import fingerprint_of
from scatterbrain.training.tasks.randomness import generator_of

PassageChoice = Literal["first", "any"]


class LabelledPassages:
    """Batches of passages with their classes.

    Every class is drawn equally often, so the share of the largest class is 1 / classes.

    Args:
        texts: By class.
        tokens: Bytes of a passage; a shorter text is padded.
        passages: "first" for the first bytes of each text, as the long-range arena has it; "any" for passages from
            anywhere in it. A validation part then has each text cut into consecutive passages.
        batch: Passages per batch.
        seed: Of what is drawn in training. Validation batches are the same for every seed.
    """

    def __init__(self, texts: LabelledTexts, tokens: int, passages: PassageChoice, batch: int, seed: int) -> None:
        self.tokens, self.passages, self.batch, self.seed = tokens, passages, batch, seed
        self.classes = len(texts.classes)
        self.input_size = 256
        self.fingerprint = fingerprint_of(
            text for part in (texts.training, texts.validation) for of_class in part for text in of_class
        )
        self.training = [[as_tensor(text) for text in of_class] for of_class in texts.training]
        self.validation = [self._passages_of(index, of_class) for index, of_class in enumerate(texts.validation)]
        count = sum(map(len, self.training))
        passage_count = sum(map(len, self.validation))
        self.description = (
            f"{count:,} texts to train on, {passage_count:,} passages of {tokens:,} bytes to validate on; "
            f"{self.classes} classes: {', '.join(map(_shown, texts.classes))}"
        )

    def training_batch(self, number: int, fraction: float = 0.0) -> Batch:
        """Passages drawn with replacement, by ``number`` and the seed alone: the class first, then the text (with
        "any", by its length), then where the passage starts."""
        generator = generator_of(self.seed, number)
        classes = torch.randint(self.classes, (self.batch,), generator=generator)
        return self._batch([self._draw(self.training[index], generator) for index in classes.tolist()], classes)

    def validation_batch(self, number: int) -> Batch:
        """Rows go through the classes in turn; a class begins again after its last passage."""
        rows = range(number * self.batch, (number + 1) * self.batch)
        classes = torch.tensor([row % self.classes for row in rows])
        chosen = []
        for row in rows:
            passages = self.validation[row % self.classes]
            chosen.append(passages[row // self.classes % len(passages)])
        return self._batch(chosen, classes)

    def _draw(self, texts: list[Tensor], generator: torch.Generator) -> Tensor:
        if self.passages == "first":
            return texts[int(torch.randint(len(texts), (), generator=generator))][: self.tokens]
        sizes = torch.tensor([text.numel() for text in texts], dtype=torch.float64)
        text = texts[int(torch.multinomial(sizes, 1, generator=generator))]
        start = int(torch.randint(max(text.numel() - self.tokens, 0) + 1, (), generator=generator))
        return text[start : start + self.tokens]

    def _passages_of(self, index: int, texts: list[bytes]) -> list[Tensor]:
        """Validation passages of a class, in a fixed random order. A rest shorter than a passage is left out."""
        passages = []
        for text in map(as_tensor, texts):
            last = 0 if self.passages == "first" else max(text.numel() - self.tokens, 0)
            passages += [text[start : start + self.tokens] for start in range(0, last + 1, self.tokens)]
        order = torch.randperm(len(passages), generator=generator_of("validation", index))
        return [passages[position] for position in order.tolist()]

    def _batch(self, passages: list[Tensor], classes: Tensor) -> Batch:
        inputs, mask = pad(passages, self.tokens)
        return Batch(inputs, classes, mask)


def _shown(name: str) -> str:
    """The name of a folder, which need not be text, as text."""
    return name.encode(errors="replace").decode()


def as_tensor(text: bytes) -> Tensor:
    """uint8 (bytes,); the text must not be empty."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def pad(passages: list[Tensor], tokens: int) -> tuple[Tensor, Tensor | None]:
    """Inputs int64 (rows, tokens), zero behind a passage's end, and the mask of what is not padding, bool (rows,
    tokens); None if all passages are whole."""
    sizes = torch.tensor([passage.numel() for passage in passages])
    inputs = torch.zeros(len(passages), tokens, dtype=torch.int64)
    for row, passage in zip(inputs, passages, strict=True):
        row[: passage.numel()] = passage
    if bool((sizes == tokens).all()):
        return inputs, None
    return inputs, torch.arange(tokens) < sizes[:, None]
