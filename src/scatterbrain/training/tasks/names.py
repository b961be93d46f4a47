"""A language model of program source whose names are random, so that only what stands far before tells them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.metrics import BITS_PER_TOKEN, Metric
from scatterbrain.training.tasks.curriculum import GrowingSequences
from scatterbrain.training.tasks.documents import read_documents, split_documents
from scatterbrain.training.tasks.renamed_source import RenamedSource


@dataclass(frozen=True)
class Names(GrowingSequences):
    """Python source in which every sequence gives each identifier a token of its own, drawn at random, the same at
    every occurrence; what is between identifiers are bytes. A name is then predictable from its earlier occurrences in
    the sequence alone. A share of the passages repeats one that stands at least ``distance`` tokens before, as code
    that was copied, or a file beside its next version, does. Training scores every token; the metric is the bits per
    name of names that were seen before, but not within the last ``distance`` tokens.

    ``data.path`` is a folder of source files or a .zip archive of one; no file is in both parts.
    Sequences grow with the run as in :class:`GrowingSequences`; what repeats then stands ``distance`` before in
    proportion, but not less than 128 tokens.

    Args:
        tokens: of a sequence.
        names: tokens that names are drawn from. A model that guesses needs their number's logarithm in bits.
        distance: how far back, in tokens, a name's nearest earlier occurrence must be for the name to count in
            validation. 128 leaves out what a window of 128 tokens sees. 0 counts every token, names or not.
        repeats: share of passages, of 64 to 128 tokens, that repeat an earlier one. By default half of them: of names
            that come again far behind, the repeated ones alone can be told well.
    """

    kind: ClassVar[str] = "names"
    metric: ClassVar[Metric] = BITS_PER_TOKEN
    head: ClassVar[str] = "next"

    tokens: int = 4096
    names: int = 1024
    distance: int = 128
    repeats: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens > 0, "task.tokens", "positive", self.tokens)
        require(self.names > 0, "task.names", "positive", self.names)
        require(
            0 <= self.distance < self.tokens, "task.distance", f"0 to below task.tokens {self.tokens}", self.distance
        )
        require(0 <= self.repeats < 1, "task.repeats", "0 to below 1", self.repeats)
        self.require_first_tokens(self.tokens)

    def open(self, data: DataConfig, train: TrainConfig) -> RenamedSource:
        parts = split_documents(read_documents(data), data.validation_fraction)
        sizes = self.tokens, self.names, self.distance, self.repeats
        return RenamedSource(*parts, *sizes, train.batch, train.seed, partial(self.tokens_at, tokens=self.tokens))
