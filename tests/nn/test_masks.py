from __future__ import annotations

import pytest
import torch
from testkit import rand, under_grad, under_inference_mode
from torch import Tensor

from scatterbrain.nn.masks import as_bool_padding, kept_keys_and_offset, once_per_mask

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


@pytest.mark.parametrize("passing", [under_inference_mode, under_grad])
def test_an_answer_that_was_first_asked_elsewhere_can_be_trained_with(passing):
    mask = torch.zeros(2, 3).masked_fill(KEEP[:, 0, 0, :3].logical_not(), -torch.inf)
    passing(lambda: as_bool_padding(mask))
    x = rand(2, 3).requires_grad_()
    x.masked_fill(as_bool_padding(mask), 0).sum().backward()
    assert torch.equal(x.grad, (mask == 0).float())
    assert not torch._C._functorch.is_functorch_wrapped_tensor(as_bool_padding(mask))
