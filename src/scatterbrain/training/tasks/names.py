"""A language model of program source whose names are random, so that only what stands far before tells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.metrics import BITS_PER_TOKEN, Metric
from scatterbrain.training.tasks.base import Task
from scatterbrain.training.tasks.curriculum import require_first_tokens, require_shares, tokens_at
from scatterbrain.training.tasks.documents import read_documents, split_documents
from scatterbrain.training.tasks.renamed_source import RenamedSource


@dataclass(frozen=True)
class Names(Task):
    """Python source in which every sequence gives each identifier a token of its own, drawn at random, the same at
    every occurrence; what is between identifiers are bytes. A name is then predictable from its earlier occurrences in
    the sequence alone. A share of the passages repeats one that stands at least ``distance`` tokens before, as code
    that was copied, or a file beside its next version, does. Training scores every token; the metric is the bits per
    name of names that were seen before, but not within the last ``distance`` tokens.

    ``data.path`` is a folder of source files or a .zip archive of one; no file is in both parts.

    Args:
        tokens: of a sequence.
        names: tokens that names are drawn from. A model that guesses needs their number's logarithm in bits.
        distance: how far back, in tokens, a name's nearest earlier occurrence must be for the name to count in
            validation. 128 leaves out what a window of 128 tokens sees. 0 counts every token, names or not.
        repeats: share of passages, of 64 to 128 tokens, that repeat an earlier one. By default half of them: of names
            that come again far behind, the repeated ones alone can be told well.
        first_tokens: of a sequence at the beginning of the run: to repeat a name is learned much sooner where it is
            near. ``distance`` is smaller in proportion, and a batch has more sequences in return. None for sequences of
            ``tokens`` from the beginning.
        first_share: of the run that stays at ``first_tokens``. From there to the share ``full_share`` sequences become
            twice as long again and again.
        full_share: of the run from which on sequences have ``tokens``.
    """

    kind: ClassVar[str] = "names"
    metric: ClassVar[Metric] = BITS_PER_TOKEN
    head: ClassVar[str] = "next"

    tokens: int = 4096
    names: int = 1024
    distance: int = 128
    repeats: float = 0.5
    first_tokens: int | None = None
    first_share: float = 0.4
    full_share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens > 0, "task.tokens", "positive", self.tokens)
        require(self.names > 0, "task.names", "positive", self.names)
        require(
            0 <= self.distance < self.tokens, "task.distance", f"0 to below task.tokens {self.tokens}", self.distance
        )
        require(0 <= self.repeats < 1, "task.repeats", "0 to below 1", self.repeats)
        require_first_tokens(self.first_tokens, self.tokens)
        require_shares(self.first_share, self.full_share)

    def open(self, data: DataConfig, train: TrainConfig) -> RenamedSource:
        parts = split_documents(read_documents(data), data.validation_fraction)
        sizes = self.tokens, self.names, self.distance, self.repeats
        return RenamedSource(*parts, *sizes, train.batch, train.seed, self.tokens_at)

    def tokens_at(self, fraction: float) -> int:
        """Tokens of a training sequence when ``fraction`` of the run is done."""
        return tokens_at(fraction, self.first_tokens, self.tokens, self.first_share, self.full_share)
