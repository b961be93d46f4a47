"""Document retrieval: whether two passages are of one document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.metrics import ACCURACY, Metric
from scatterbrain.training.tasks.base import Task
from scatterbrain.training.tasks.documents import read_documents, split_documents
from scatterbrain.training.tasks.retrieval_data import PassagePairs


@dataclass(frozen=True)
class Retrieval(Task):
    """Pairs of passages of one document or of two, each encoded by itself, as bytes: the retrieval task of the
    long-range arena (Tay et al., ICLR 2021), which asks whether two papers are linked, for any folder of texts.

    ``data.path`` is a folder of text files or a .zip archive of one; no document is in both parts. Only documents of
    2 * tokens bytes or more are used.

    Args:
        tokens: bytes of a passage. The long-range arena has 4,000.
    """

    kind: ClassVar[str] = "retrieval"
    layout: ClassVar[str] = (
        "Expected is a folder of text files, or a .zip archive of one, such as the articles of an encyclopaedia, each "
        "of 2 * task.tokens bytes or more. 'stdlib' needs no data"
    )
    metric: ClassVar[Metric] = ACCURACY
    head: ClassVar[str] = "pair"

    tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens > 0, "task.tokens", "positive", self.tokens)

    def open(self, data: DataConfig, train: TrainConfig) -> PassagePairs:
        parts = split_documents(read_documents(data), data.validation_fraction)
        return PassagePairs(*parts, self.tokens, train.batch, train.seed)
