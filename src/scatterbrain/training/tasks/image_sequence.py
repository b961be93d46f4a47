"""Images as sequences of pixels: the class of a picture (Tay et al., Long Range Arena, 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.metrics import ACCURACY, Metric
from scatterbrain.training.tasks.base import Task
from scatterbrain.training.tasks.fingerprint import fingerprint_of
from scatterbrain.training.tasks.images import Images, read_images
from scatterbrain.training.tasks.randomness import generator_of, permutations

RED_GREEN_BLUE = 0.299, 0.587, 0.114  # shares of brightness (ITU-R BT.601)


@dataclass(frozen=True)
class ImageSequence(Task):
    """A pixel is a token, row by row; the class is the picture's. CIFAR-10 gives 1024 tokens.

    Args:
        colours: false: a token is the pixel's brightness, as in the Long Range Arena. true: its three colours.
        side: pixels of a side, to which larger pictures are averaged; null for those they have.
    """

    kind: ClassVar[str] = "image_sequence"
    metric: ClassVar[Metric] = ACCURACY
    head: ClassVar[Literal["sequence"]] = "sequence"

    colours: bool = False
    side: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.side is None or self.side >= 2, "task.side", "2 or more, or null", self.side)

    def open(self, data: DataConfig, train: TrainConfig) -> ImageSequenceData:
        images = read_images(data.path)
        smallest = min(images.train.shape[2:])
        require(
            self.side is None or self.side <= smallest,
            "task.side",
            f"at most the pictures' own {smallest}",
            self.side,
        )
        require(
            not self.colours or images.train.shape[1] == 3,
            "task.colours",
            "false for the grey pictures of data.path",
            True,
        )
        return ImageSequenceData(self, images, train.batch, train.seed)


class ImageSequenceData:
    """The published parts: training pictures in another order in every pass, and test pictures for validation.

    Args:
        task: its settings.
        images: as they were read.
        batch: pictures of a batch.
        seed: of the order.
    """

    has_features = True

    def __init__(self, task: ImageSequence, images: Images, batch: int, seed: int) -> None:
        self.task, self.images, self.batch, self.seed = task, images, batch, seed
        self.input_size, self.classes = (3 if task.colours else 1), images.classes
        height, width = (task.side, task.side) if task.side else images.train.shape[2:]
        self.tokens = height * width
        self.fingerprint = fingerprint_of(images)
        self.description = (
            f"{len(images.train):,} pictures to train on and {len(images.test):,} to validate, {height} x {width}, "
            f"{images.classes} classes"
        )
        # Validation batches are read in this order, for the first of them to be of all classes.
        self._test_order = permutations(1, len(images.test), generator_of(0, "image sequences", "test"))[0]
        self._pass, self._order = -1, torch.empty(0)

    def training_batch(self, number: int, fraction: float) -> Batch:
        chosen = [self._place(number * self.batch + row) for row in range(self.batch)]
        return self._batch(self.images.train[chosen], self.images.train_labels[chosen])

    def validation_batch(self, number: int) -> Batch:
        places = (number * self.batch + torch.arange(self.batch)) % len(self._test_order)
        chosen = self._test_order[places]
        return self._batch(self.images.test[chosen], self.images.test_labels[chosen])

    def _place(self, picture: int) -> int:
        """Which of the training pictures comes at a place of all passes."""
        number, place = divmod(picture, len(self.images.train))
        if number != self._pass:
            generator = generator_of(self.seed, "image sequences", number)
            self._pass, self._order = number, torch.randperm(len(self.images.train), generator=generator)
        return int(self._order[place])

    def _batch(self, pixels: Tensor, labels: Tensor) -> Batch:
        pictures = pixels.float() / 127.5 - 1
        if self.task.side:
            pictures = F.adaptive_avg_pool2d(pictures, self.task.side)
        if not self.task.colours and pictures.shape[1] == 3:
            pictures = (pictures * torch.tensor(RED_GREEN_BLUE)[:, None, None]).sum(1, keepdim=True)
        return Batch(pictures.flatten(2).transpose(1, 2).contiguous(), labels)
