"""A language model of program source whose names are random, so that only what stands far before tells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.metrics import BITS_PER_BYTE, Metric
from scatterbrain.training.tasks.base import Task
from scatterbrain.training.tasks.documents import read_documents, split_documents
from scatterbrain.training.tasks.renamed_source import RenamedSource


@dataclass(frozen=True)
class Names(Task):
    """Python source in which every sequence gives each identifier a random name of its own, the same at every
    occurrence. A name is then predictable from its earlier occurrences in the sequence alone. Training scores every
    byte; the metric is the bits per byte of names that were seen before, but not within the last ``distance`` bytes.

    ``data.path`` is a folder of source files or a .zip archive of one; no file is in both parts.

    Args:
        tokens: bytes of a sequence.
        distance: how far back, in bytes, a name's nearest earlier occurrence must start for the name to count in
            validation. 128 leaves out what a window of 128 bytes sees. 0 counts every byte, names or not.
    """

    kind: ClassVar[str] = "names"
    metric: ClassVar[Metric] = BITS_PER_BYTE
    head: ClassVar[str] = "next"

    tokens: int = 4096
    distance: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens > 0, "task.tokens", "positive", self.tokens)
        require(
            0 <= self.distance < self.tokens, "task.distance", f"0 to below task.tokens {self.tokens}", self.distance
        )

    def open(self, data: DataConfig, train: TrainConfig) -> RenamedSource:
        parts = split_documents(read_documents(data), data.validation_fraction)
        return RenamedSource(*parts, self.tokens, self.distance, train.batch, train.seed)
