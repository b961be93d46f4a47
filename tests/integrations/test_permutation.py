"""Orders of image tokens, of one grid and from image to image of a batch."""

from __future__ import annotations

import pytest
import torch
from testkit import PASSING, rand

from scatterbrain.hilbert import hilbert_order
from scatterbrain.integrations.permutation import coordinate_order, grid_permutation


def test_coordinates_are_ordered_for_each_image_and_padding_keeps_its_place():
    grids, tokens = [(2, 4), (3, 2)], 9
    coordinates, valid = torch.zeros(2, tokens, 2, dtype=torch.long), torch.zeros(2, tokens, dtype=torch.bool)
    coordinates[0, :8] = torch.cartesian_prod(torch.arange(2), torch.arange(4))
    valid[0, :8] = True
    coordinates[1, [0, 2, 3, 5, 6, 8]] = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    valid[1, [0, 2, 3, 5, 6, 8]] = True
    order = coordinate_order(coordinates, valid, 1)
    assert torch.equal(order.sort(-1).values, torch.arange(tokens + 1).expand(2, -1)) and (order[:, 0] == 0).all()
    for row, (height, width) in enumerate(grids):
        kept = order[row, 1:] - 1
        assert torch.equal(kept[~valid[row]], torch.arange(tokens)[~valid[row]])
        cells = coordinates[row, kept[valid[row]]]
        steps = (cells[1:] - cells[:-1]).abs().sum(-1)
        assert len(cells) == height * width and steps.max() <= 3


@pytest.mark.parametrize("passing", PASSING)
def test_the_order_of_a_grid_that_was_first_made_elsewhere_can_be_trained_with(passing):
    size = (3 + PASSING.index(passing), 11)  # sizes that no other test has
    passing(lambda: grid_permutation(*size, 1, torch.device("cpu")))
    permutation = grid_permutation(*size, 1, torch.device("cpu"))
    assert torch.equal(permutation.order[1:] - 1, hilbert_order(*size))
    tokens = rand(2, 1 + size[0] * size[1], 4).requires_grad_()
    ordered = permutation.apply(tokens)
    ordered.square().sum().backward()
    assert torch.equal(permutation.undo(ordered), tokens) and torch.equal(tokens.grad, 2 * tokens)
