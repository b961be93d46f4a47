"""Pathfinder: are two dots joined by a path? (Linsley et al., NeurIPS 2018; Tay et al., Long Range Arena, 2021)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.metrics import ACCURACY, Metric
from scatterbrain.training.tasks.base import Task
from scatterbrain.training.tasks.pathfinder_images import Pictures, Shape, draw_pictures
from scatterbrain.training.tasks.randomness import generator_of


@dataclass(frozen=True)
class Pathfinder(Task):
    """Pictures of dashed paths and two dots on ends of them; the class is 1 where one path joins the dots, in half of
    the pictures. A pixel is a token with one feature, its brightness, row by row.

    Args:
        size: pixels of a side; a sequence has size * size tokens.
        dashes: of the two long paths, 4 pixels each; at least 3.
        distractors: number of shorter paths.
        distractor_dashes: of a shorter path.
    """

    kind: ClassVar[str] = "pathfinder"
    metric: ClassVar[Metric] = ACCURACY
    head: ClassVar[Literal["sequence"]] = "sequence"

    size: int = 32
    dashes: int = 6
    distractors: int = 2
    distractor_dashes: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.size >= 8, "task.size", "8 or more", self.size)
        require(self.dashes >= 3, "task.dashes", "3 or more, so that two dots have room", self.dashes)
        require(self.distractors >= 0, "task.distractors", "0 or more", self.distractors)
        require(self.distractor_dashes >= 1, "task.distractor_dashes", "1 or more", self.distractor_dashes)

    @property
    def shape(self) -> Shape:
        """Which pictures are drawn."""
        return Shape(self.size, self.dashes, self.distractors, self.distractor_dashes)

    def open(self, data: DataConfig, train: TrainConfig) -> PathfinderData:
        _draw(1, self.shape, generator_of(0, "pathfinder", "trial"))
        return PathfinderData(self, train.batch, train.seed)


class PathfinderData:
    """Fresh pictures in every batch.

    Args:
        task: its settings.
        batch: pictures of a batch.
        seed: of the draws.
    """

    input_size = 1
    classes = 2
    has_features = True

    def __init__(self, task: Pathfinder, batch: int, seed: int) -> None:
        self.shape, self.batch, self.seed = task.shape, batch, seed
        self.tokens = task.size**2
        self.description = (
            f"pictures of {task.size} x {task.size} with two paths of {task.dashes} dashes and {task.distractors} of "
            f"{task.distractor_dashes}, drawn anew for every batch; half of the dots are joined"
        )

    def training_batch(self, number: int, fraction: float) -> Batch:
        return self._batch("training", number)

    def validation_batch(self, number: int) -> Batch:
        return self._batch("validation", number)

    def _batch(self, part: str, number: int) -> Batch:
        pictures = _draw(self.batch, self.shape, generator_of(self.seed, "pathfinder", part, number))
        return Batch(2 * pictures.images.flatten(1)[..., None] - 1, pictures.labels)


def _draw(pictures: int, shape: Shape, generator: torch.Generator) -> Pictures:
    try:
        return draw_pictures(pictures, shape, generator)
    except ValueError as error:
        raise ValueError(f"task.dashes, task.distractors, task.size: {error}") from error
