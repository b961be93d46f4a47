"""Byte-level text classification: which class a text is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.metrics import ACCURACY, Metric
from scatterbrain.training.tasks.base import Task
from scatterbrain.training.tasks.documents import label_documents, read_documents
from scatterbrain.training.tasks.text_classification_data import LabelledPassages, PassageChoice


@dataclass(frozen=True)
class TextClassification(Task):
    """Texts by class, as bytes: the text task of the long-range arena (Tay et al., ICLR 2021) for any labelled texts.

    ``data.path`` is a folder, or a .zip archive of one, with one folder per class, or with the folders train and test
    with one folder per class in each. The IMDB reviews, which the long-range arena uses, have the second layout:
    https://ai.stanford.edu/~amaas/data/sentiment (unpack them; data.glob "*.txt", data.exclude [unsup]). "stdlib" has
    the first one: which package of the standard library is a passage from?

    Args:
        tokens: bytes of a passage; a shorter text is padded. The long-range arena has 4,000.
        classes: classes to tell apart, those with the most bytes; null for all folders.
        passages: "first" for the beginning of each text, one passage of each, as in the long-range arena; "any" for
            passages from anywhere in it, where texts are few and long.
    """

    kind: ClassVar[str] = "text_classification"
    layout: ClassVar[str] = (
        "Expected is a folder, or a .zip archive of one, with a folder of text files per class, or with the folders "
        "train and test that have these in both, as the IMDB reviews (https://ai.stanford.edu/~amaas/data/sentiment; "
        "data.glob '*.txt', data.exclude [unsup]). 'stdlib' needs no data"
    )
    metric: ClassVar[Metric] = ACCURACY
    head: ClassVar[str] = "sequence"

    tokens: int = 1024
    classes: int | None = None
    passages: PassageChoice = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens > 0, "task.tokens", "positive", self.tokens)
        require(self.classes is None or self.classes > 1, "task.classes", "2 or more, or null", self.classes)

    def open(self, data: DataConfig, train: TrainConfig) -> LabelledPassages:
        texts = label_documents(read_documents(data), data.validation_fraction, self.classes)
        return LabelledPassages(texts, self.tokens, self.passages, train.batch, train.seed)
