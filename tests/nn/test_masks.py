from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scatterbrain.nn.masks import kept_keys_and_offset, once_per_mask

KEEP = torch.tensor([[True, True, False, True, True], [False, True, True, True, True]])[:, None, None, :]


def causal(queries: int, offset: int) -> Tensor:
    return torch.ones(queries, 5, dtype=torch.bool).tril(offset)


@pytest.mark.parametrize(
    ("mask", "offset"),
    [(KEEP.expand(-1, 1, 3, -1), None)]
    + [(KEEP & causal(queries, offset), offset) for queries, offset in ((5, 0), (3, 0), (3, 2), (7, 0), (7, -2))],
)
def test_padding_and_causality_are_taken_apart(mask: Tensor, offset: int | None):
    kept, found = kept_keys_and_offset(mask)
    assert found == offset
    edge = True if offset is None else causal(mask.shape[2], offset)
    assert torch.equal((kept & edge).expand_as(mask), mask)


@pytest.mark.parametrize("mask", [KEEP & causal(5, 1), KEEP & causal(5, 0).flip(0)], ids=["offset", "reversed"])
def test_other_masks_are_neither(mask: Tensor):
    assert kept_keys_and_offset(mask) is None


def test_an_answer_is_kept_until_the_mask_is_written_to():
    asked = []

    def question(mask: Tensor, *arguments: int) -> int:
        asked.append(arguments)
        return len(asked)

    mask = torch.ones(2, 2, dtype=torch.bool)
    assert [once_per_mask(mask, question), once_per_mask(mask, question, 5), once_per_mask(mask, question)] == [1, 2, 1]
    mask[0, 1] = False
    assert once_per_mask(mask, question) == 3 and asked == [(), (5,), ()]
