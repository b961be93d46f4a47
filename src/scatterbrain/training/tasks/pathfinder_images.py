"""Pictures of dashed paths, with two dots on ends of paths: do they lie on one path? (Linsley et al., NeurIPS 2018)

Every picture has two long paths, and shorter ones that distract. Joined dots lie on both ends of one long path, others
on an end of each. Pictures are drawn in pairs, one of each label, with the dots in the same places and as many dashes:
neither where the dots are nor how bright a picture is says anything.

Paths keep clear of each other and of themselves: bright pixels (above 0.5) of two paths are at least 3 pixels apart,
those of consecutive dashes of one path at most 2.9.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

STEP = 0.5  # pixels between the points of a path
DASH, GAP = 5, 3  # steps of a dash, and between two
PERIOD = DASH + GAP
CLEARANCE = 4.1  # pixels between the middle lines of two paths; 0.1 as points are checked every second step
APART = 2 * CLEARANCE  # pixels along a path from where on it must keep clear of itself
LINE = 1.0  # pixels from the middle of a dash at which it has faded to black
DOT = 2.2  # pixels from the middle of a dot at which it has faded to black
DOT_CLEARANCE = DOT - LINE  # pixels that an end with a dot needs more
MARGIN = 2.0  # pixels between a path and the border
TURN = math.radians(40)  # largest turn from a dash to the next
PROPOSALS = 16  # curves tried together for a path
ROUNDS = 5  # of proposals before the picture is given up
ATTEMPTS = 256  # pairs without room for their paths before the shape is refused
AT_ONCE = 1024  # sides of pictures that are drawn together: the distances of all their points take memory


class Shape(NamedTuple):
    """Which pictures are drawn.

    Args:
        size: pixels of a side.
        dashes: of a long path.
        distractors: number of shorter paths.
        distractor_dashes: of a shorter path.
    """

    size: int
    dashes: int
    distractors: int
    distractor_dashes: int


class Pictures(NamedTuple):
    """Pictures and what they show.

    Args:
        images: float32 (count, size, size), from 0 to 1.
        labels: int64 (count,), 1 where one path joins the dots.
        dots: float32 (count, 2, 2), row and column of both.
    """

    images: Tensor
    labels: Tensor
    dots: Tensor


def draw_pictures(count: int, shape: Shape, generator: torch.Generator) -> Pictures:
    """``count`` pictures in random order, as many of either label; an odd one more is of either.

    Raises:
        ValueError: no room for the paths.
    """
    pairs = -(-count // 2)
    dashes, dots = torch.empty(0, 2, total_dashes(shape), 2, 2), torch.empty(0, 2, 2)
    attempts = 0
    while len(dashes) < pairs:
        wanted = min(2 * (pairs - len(dashes)), max(AT_ONCE // shape.size, 1))
        drawn, ends = draw_pairs(wanted, shape, generator)
        dashes, dots = torch.cat((dashes, drawn)), torch.cat((dots, ends))
        attempts += wanted
        if attempts >= ATTEMPTS and not len(dashes):
            raise ValueError(
                f"expected paths that leave room for each other, got none in {attempts} pairs of {shape}; use fewer "
                "or shorter paths, or larger pictures"
            )
    order = torch.randperm(2 * pairs, generator=generator)[:count]
    dots = dots[:pairs].repeat_interleave(2, 0)[order]
    labels = torch.tensor([1, 0]).repeat(pairs)[order]
    return Pictures(render(dashes[:pairs].flatten(0, 1)[order], dots, shape.size), labels, dots)


def total_dashes(shape: Shape) -> int:
    return 2 * shape.dashes + shape.distractors * shape.distractor_dashes


def draw_pairs(count: int, shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of pictures, those of ``count`` pairs that have room for their paths.

    Returns:
        Dashes float32 (pairs, 2, dashes, 2 ends, 2), those of the picture with joined dots first, and the dots
        (pairs, 2, 2) of both.
    """
    joined, apart = Scene(count, shape.size, generator), Scene(count, shape.size, generator)
    path = joined.add_path(shape.dashes, DOT_CLEARANCE)
    dots = path[:, [0, -1]]
    joined.add_path(shape.dashes, DOT_CLEARANCE)
    apart.add_path(shape.dashes, DOT_CLEARANCE, start=dots[:, 0], avoid=dots[:, 1:])
    apart.add_path(shape.dashes, DOT_CLEARANCE, start=dots[:, 1])
    for scene in (joined, apart):
        for _ in range(shape.distractors):
            scene.add_path(shape.distractor_dashes)
    has_room = joined.has_room & apart.has_room
    return torch.stack((joined.dashes, apart.dashes), 1)[has_room], dots[has_room]


class Scene:
    """Pictures to which paths are added that keep clear of those before.

    Args:
        count: Number of pictures.
        size: Pixels of a side.
        generator: Of the paths.
    """

    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        self.size, self.generator = size, generator
        self.dashes = torch.empty(count, 0, 2, 2)
        self.has_room = torch.ones(count, dtype=torch.bool)  # pictures in which every path has found a place
        self._points, self._radii = torch.empty(count, 0, 2), torch.empty(0)

    def add_path(
        self, dashes: int, ends: float = 0.0, start: Tensor | None = None, avoid: Tensor | None = None
    ) -> Tensor:
        """Adds a path to every picture.

        Args:
            dashes: Its number of dashes.
            ends: Pixels that its ends keep clear of others more than the rest of it.
            start: Where it starts (pictures, 2); None for any place.
            avoid: Points (pictures, points, 2) that it keeps clear of as if they were ends.

        Returns:
            Points (pictures, points, 2), ``STEP`` pixels apart.
        """
        count = len(self.dashes)
        path = torch.zeros(count, dashes * PERIOD - GAP + 1, 2)
        radii = torch.zeros(len(checked(path[0])))
        radii[[0, -1]] = ends
        taken, taken_radii = self._points, self._radii
        if avoid is not None:
            taken, taken_radii = torch.cat((taken, avoid), 1), torch.cat((taken_radii, taken.new_full((1,), ends)))
        searching = self.has_room.nonzero().flatten()
        for _ in range(ROUNDS):
            if not len(searching):
                break
            curves = draw_curves(len(searching), dashes, self.generator)
            curves = self._moved(curves) if start is None else curves + start[searching, None, None]
            fits = self._is_inside(curves) & is_clear_of_itself(checked(curves), radii)
            fits &= is_clear(checked(curves), radii, taken[searching], taken_radii)
            found = fits.any(1)
            path[searching[found]] = curves[found, fits[found].int().argmax(1)]
            searching = searching[~found]
        self.has_room[searching] = False
        self._points = torch.cat((self._points, checked(path)), 1)
        self._radii = torch.cat((self._radii, radii))
        self.dashes = torch.cat((self.dashes, torch.stack((path[:, ::PERIOD], path[:, DASH::PERIOD]), 2)), 1)
        return path

    def _moved(self, curves: Tensor) -> Tensor:
        """Curves (pictures, curves, points, 2) at random places of the picture, if it is large enough for them."""
        low, high = curves.amin(2), curves.amax(2)
        room = (self.size - 1 - 2 * MARGIN - (high - low)).clamp(min=0)
        return curves + (MARGIN - low + room * torch.rand(room.shape, generator=self.generator))[:, :, None]

    def _is_inside(self, curves: Tensor) -> Tensor:
        slack = 1e-3  # of the rounding of points that were moved to the margin
        middle = (self.size - 1) / 2
        return ((curves - middle).abs() <= middle - MARGIN + slack).all(-1).all(-1)


def checked(points: Tensor) -> Tensor:
    """Every second point of curves (..., points, 2), and the last: what distances are taken of."""
    return torch.cat((points[..., ::2, :], points[..., -1:, :]), -2)


def draw_curves(count: int, dashes: int, generator: torch.Generator) -> Tensor:
    """Curves (count, PROPOSALS, points, 2) that start at 0, with a curvature of their own and some noise on it."""

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(count, PROPOSALS, *sizes, generator=generator)

    turns = TURN * (uniform(1) + uniform(dashes) - 1)
    turning = (turns / PERIOD).repeat_interleave(PERIOD, -1)[..., : dashes * PERIOD - GAP]
    heading = 2 * math.pi * uniform(1) + turning.cumsum(-1)
    points = STEP * torch.stack((heading.cos(), heading.sin()), -1).cumsum(2)
    return torch.cat((torch.zeros(count, PROPOSALS, 1, 2), points), 2)


def is_clear_of_itself(points: Tensor, radii: Tensor) -> Tensor:
    """Whether each of the curves (..., points, 2) keeps clear of itself."""
    place = torch.arange(points.shape[-2])
    far = (place[:, None] - place).abs() * 2 * STEP > APART
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    clear = distance >= CLEARANCE + radii[:, None] + radii
    return (clear | ~far).all(-1).all(-1)


def is_clear(points: Tensor, radii: Tensor, taken: Tensor, taken_radii: Tensor) -> Tensor:
    """Whether each of the curves (count, proposals, points, 2) keeps clear of the points (count, taken, 2)."""
    count, proposals, number, _ = points.shape
    distance = torch.cdist(points.flatten(1, 2), taken, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.view(count, proposals, number, taken.shape[1])
    return (distance >= CLEARANCE + radii[:, None] + taken_radii).all(-1).all(-1)


def render(segments: Tensor, dots: Tensor, size: int) -> Tensor:
    """Pictures (count, size, size) of the dashes (count, dashes, 2 ends, 2) and dots (count, 2, 2)."""
    side = torch.arange(size, dtype=torch.float32)
    pixels = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(1, -1, 2)
    start, end = segments.unbind(2)
    picture = torch.zeros(len(segments), size * size)
    for one in range(segments.shape[1]):  # one at a time, as a dash for every pixel of every picture takes much memory
        along = (end - start)[:, one, None]
        offset = pixels - start[:, one, None]
        share = ((offset * along).sum(-1) / (along * along).sum(-1)).clamp(0, 1)
        distance = (offset - share[..., None] * along).norm(dim=-1)
        torch.maximum(picture, (LINE - distance).clamp(0, 1), out=picture)
    for one in range(2):
        distance = (pixels - dots[:, one, None]).norm(dim=-1)
        torch.maximum(picture, (DOT - distance).clamp(0, 1), out=picture)
    return picture.view(-1, size, size)
