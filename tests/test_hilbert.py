"""The Hilbert curve through a grid."""

from __future__ import annotations

import torch

from scatterbrain.hilbert import hilbert_distance, hilbert_order


def test_distances_give_the_order():
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(11), indexing="ij")
    assert torch.equal(hilbert_distance(rows.flatten(), columns.flatten(), 16).argsort(), hilbert_order(5, 11))
    square = hilbert_distance(rows.flatten(), columns.flatten(), 64).sort().values
    assert square.unique().numel() == 55
