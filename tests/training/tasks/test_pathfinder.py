from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scatterbrain.training.config import DataConfig, TrainConfig
from scatterbrain.training.tasks import pathfinder
from scatterbrain.training.tasks.pathfinder import Pathfinder
from scatterbrain.training.tasks.pathfinder_images import Pictures, Shape, draw_pictures

SMALL = Shape(size=32, dashes=6, distractors=2, distractor_dashes=3)
LARGE = Shape(size=128, dashes=24, distractors=12, distractor_dashes=8)
LINKED = 8  # squared distance of pixels that are taken for neighbours: it bridges gaps of a path, not two paths


def pictures_of(count: int, shape: Shape = SMALL, seed: int = 0) -> Pictures:
    return draw_pictures(count, shape, torch.Generator().manual_seed(seed))


def reached(image: Tensor, start: tuple[int, int]) -> set[tuple[int, int]]:
    """Bright pixels that are reached from one of them by steps between neighbours."""
    bright = {(int(row), int(column)) for row, column in (image > 0.5).nonzero()}
    steps = [(r, c) for r in range(-3, 4) for c in range(-3, 4) if r * r + c * c <= LINKED]
    seen, open_ends = {start}, [start]
    while open_ends:
        row, column = open_ends.pop()
        new = {(row + r, column + c) for r, c in steps} & bright - seen
        seen |= new
        open_ends += new
    return seen


def dots_of(image: Tensor) -> list[set[tuple[int, int]]]:
    """Groups of pixels where four bright ones fill a square, as no line does."""
    squares = (image.unfold(0, 2, 1).unfold(1, 2, 1).flatten(2).amin(-1) > 0.7).nonzero().tolist()
    groups: list[set[tuple[int, int]]] = []
    for row, column in squares:
        near = [group for group in groups if any(abs(row - r) <= 1 and abs(column - c) <= 1 for r, c in group)]
        groups = [group for group in groups if group not in near] + [set().union({(row, column)}, *near)]
    return groups


@pytest.mark.parametrize(("count", "shape"), [(300, SMALL), (16, LARGE), (40, Shape(24, 4, 1, 2))])
def test_the_label_says_whether_one_path_of_the_picture_joins_its_two_dots(count, shape):
    pictures = pictures_of(count, shape)
    for image, label in zip(pictures.images, pictures.labels.tolist(), strict=True):
        dots = [min(dot) for dot in dots_of(image)]
        assert len(dots) == 2
        assert (dots[1] in reached(image, dots[0])) == bool(label)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_every_path_is_apart_from_the_others(shape):
    """As many connected parts as paths: neither a gap of a path is too wide nor are two paths too near."""
    for image in pictures_of(12, shape).images:
        left = {(int(row), int(column)) for row, column in (image > 0.5).nonzero()}
        parts = 0
        while left:
            left -= reached(image, next(iter(left)))
            parts += 1
        assert parts == 2 + shape.distractors


def test_as_many_pictures_of_either_label_in_random_order():
    pictures = pictures_of(101)
    assert abs(int(pictures.labels.sum()) - 50.5) < 1
    assert 30 < int((pictures.labels[1:] != pictures.labels[:-1]).sum()) < 70
    assert pictures.images.shape == (101, 32, 32) and pictures.images.dtype == torch.float32
    assert 0 == pictures.images.min() and pictures.images.max() <= 1


def test_equal_generators_draw_equal_pictures_and_others_draw_others():
    first, again, other = pictures_of(8), pictures_of(8), pictures_of(8, seed=1)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    state = torch.random.get_rng_state()
    pictures_of(2)
    assert torch.equal(state, torch.random.get_rng_state())


def near_dots(pictures: Pictures) -> Tensor:
    """Brightness within 5 pixels of the dots."""
    side = torch.arange(pictures.images.shape[-1]).float()
    pixels = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)
    distance = (pixels - pictures.dots[:, :, None, None]).norm(dim=-1).amin(1)
    return (pictures.images * (distance < 5)).sum((1, 2))


SHORTCUTS: dict[str, Callable[[Pictures], Tensor]] = {
    "brightness": lambda p: p.images.sum((1, 2)),
    "bright pixels": lambda p: (p.images > 0.5).sum((1, 2)),
    "brightness near the dots": near_dots,
    "distance of the dots": lambda p: (p.dots[:, 0] - p.dots[:, 1]).norm(dim=-1),
    "slope between the dots": lambda p: (p.dots[:, 0] - p.dots[:, 1]).abs().unbind(-1)[0],
    "distance of the dots' middle from the centre": lambda p: (p.dots.mean(1) - 15.5).norm(dim=-1),
    "distance of the outer dot from the centre": lambda p: (p.dots - 15.5).norm(dim=-1).amax(-1),
    "distance of a dot from the border": lambda p: (15.5 - (p.dots - 15.5).abs()).amin((1, 2)),
}


def best_accuracy(values: Tensor, labels: Tensor) -> float:
    """Share of labels that the best threshold on a statistic gets right, either way round."""
    order = values.double().argsort(stable=True)
    signs = 2 * labels[order] - 1
    # A threshold lies between values that differ.
    balance = signs.cumsum(0)[torch.cat((values[order].diff() != 0, torch.tensor([True])))]
    return 0.5 + float(balance.abs().max()) / len(labels)


@pytest.fixture(scope="module")
def many() -> Pictures:
    return pictures_of(2000)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_no_simple_statistic_tells_the_label(many, shortcut):
    assert best_accuracy(SHORTCUTS[shortcut](many), many.labels) < 0.55


def test_a_statistic_that_tells_it_would_be_found():
    labels = torch.arange(1000) % 2
    assert best_accuracy(labels + torch.rand(1000) * 0.9, labels) == 1.0
    assert best_accuracy(torch.ones(1000), labels) == 0.5


def test_paths_without_room_are_refused():
    with pytest.raises(ValueError, match="room for each other, got none in .* use fewer or shorter paths, or larger"):
        pictures_of(2, Shape(size=16, dashes=8, distractors=4, distractor_dashes=4))


def test_the_task_gives_pixels_row_by_row_with_their_labels():
    data = Pathfinder().open(DataConfig(), TrainConfig(batch=6, seed=5))
    for batch in (data.training_batch(0, 0.0), data.validation_batch(0)):
        assert batch.inputs.shape == (6, 1024, 1) and batch.targets.sum() == 3 and batch.mask is None
        for row, label in zip(batch.inputs, batch.targets.tolist(), strict=True):
            image = (row.view(32, 32) + 1) / 2
            first, second = (min(dot) for dot in dots_of(image))
            assert (second in reached(image, first)) == bool(label)
    assert (data.input_size, data.classes, data.tokens, data.has_features) == (1, 2, 1024, True)
    assert not torch.equal(data.training_batch(0, 0.0).inputs, data.validation_batch(0).inputs)
    assert torch.equal(data.training_batch(7, 0.0).inputs, data.training_batch(7, 1.0).inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 7}, "task.size: expected 8 or more, got 7"),
        ({"dashes": 2}, "task.dashes: expected 3 or more, so that two dots have room, got 2"),
        ({"distractors": -1}, "task.distractors: expected 0 or more, got -1"),
        ({"distractor_dashes": 0}, "task.distractor_dashes: expected 1 or more, got 0"),
        ({"size": 16}, "task.dashes, task.distractors, task.size: expected paths that leave room for each other"),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Pathfinder(**fields).open(DataConfig(), TrainConfig())


def test_pictures_of_a_later_batch_that_have_no_room_name_their_keys(monkeypatch):
    data = Pathfinder().open(DataConfig(), TrainConfig(batch=2))

    def draw(*_):
        raise ValueError("expected paths that leave room for each other")

    monkeypatch.setattr(pathfinder, "draw_pictures", draw)
    for batch in (lambda: data.training_batch(3, 0.5), lambda: data.validation_batch(1)):
        with pytest.raises(ValueError, match="^task.dashes, task.distractors, task.size: expected paths"):
            batch()
