from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from testkit import rand, under_grad, under_inference_mode
from torch import Tensor

import scatterbrain as sb
from scatterbrain.nn.masks import as_bool_padding, is_causal_mask, kept_keys_and_offset, once_per_mask, padding_of

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


def by_numpy(mask: Tensor, index: tuple[int, ...], value: object) -> None:
    pytest.importorskip("numpy")
    mask.numpy()[index] = value


def by_data(mask: Tensor, index: tuple[int, ...], value: object) -> None:
    mask.data[index] = value


def in_shared_memory(mask: Tensor, index: tuple[int, ...], value: object) -> None:
    torch.from_dlpack(mask)[index] = value


def compact(mask: Tensor) -> Tensor:
    pytest.importorskip("transformers")
    from scatterbrain.integrations.transformers.masks import compacted

    return compacted(mask)


def is_same(answer: object, other: object) -> bool:
    if isinstance(answer, Tensor) and isinstance(other, Tensor):
        return torch.equal(answer, other)
    return type(answer) is type(other) and answer == other


TRIANGLE = torch.ones(6, 6, dtype=torch.bool).tril()
# name: (question, mask, the entry that changes, what it becomes)
WRITTEN = {
    "float padding": (as_bool_padding, torch.zeros(2, 6), (1, 5), -torch.inf),
    "float padding of odd width": (as_bool_padding, torch.zeros(1, 5), (0, 4), -torch.inf),
    "padding of NaN": (as_bool_padding, torch.tensor([[0.0, 0.0, torch.nan, 0.0]]), (0, 2), 0.0),
    "causal attn_mask": (is_causal_mask, ~TRIANGLE, (0, 3), False),
    "causal attn_mask, float": (is_causal_mask, torch.zeros(6, 6).masked_fill(~TRIANGLE, -torch.inf), (2, 1), -1.0),
    "compacted": (compact, TRIANGLE.repeat(2, 1, 1, 1), (1, 0, 5, 0), False),
    "padding of pairs": (
        lambda mask: padding_of(mask, 2, 6),
        torch.ones(2, 1, 1, 6, dtype=torch.bool),
        (1, 0, 0, 5),
        False,
    ),
}


@pytest.mark.parametrize("write", [by_numpy, by_data, in_shared_memory])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_mask_that_is_written_to_behind_its_version_is_read_again(name: str, write: Callable) -> None:
    question, mask, index, value = WRITTEN[name]
    mask = mask.clone()
    before, version = question(mask), mask._version
    write(mask, index, value)
    assert mask._version == version
    after, want = question(mask), question(mask.clone())
    assert is_same(after, want) and not is_same(after, before)


def test_an_expanded_mask_is_compared_by_the_memory_that_it_has() -> None:
    pytest.importorskip("numpy")
    row = torch.zeros(1, 6)
    mask = row.expand(3, 6)
    assert not as_bool_padding(mask).any()
    row.numpy()[0, 4] = -torch.inf
    assert torch.equal(as_bool_padding(mask), mask < 0)


def test_padding_that_numpy_writes_is_heeded() -> None:
    pytest.importorskip("numpy")
    padding = torch.zeros(2, 40)
    ours = sb.MultiheadAttention(32, 2, batch_first=True, support=sb.Window(8), low_rank=sb.Centroid(4)).eval()
    x = rand(2, 40, 32)
    for length in (40, 25, 30):
        padding.numpy()[:] = 0
        padding.numpy()[:, length:] = -torch.inf
        out, want = (ours(x, x, x, mask, need_weights=False)[0] for mask in (padding, padding < 0))
        assert torch.equal(out, want)
