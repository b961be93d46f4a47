"""Orders of tokens that differ from image to image of a batch."""

from __future__ import annotations

import torch

from scatterbrain.integrations.permutation import coordinate_order


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
