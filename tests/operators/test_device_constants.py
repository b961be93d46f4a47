"""Small tensors that are kept on the device that reads them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from scatterbrain.low_rank.favor import random_projection
from scatterbrain.operators import device_constants
from scatterbrain.operators.device_constants import kept
from scatterbrain.supports.lsh import hash_directions

DEVICE = torch.device("meta")  # any but the CPU, whose calls nothing captures


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Arguments that :func:`make` was called with; nothing kept before."""
    monkeypatch.setattr(device_constants, "_kept", {})
    monkeypatch.setattr(device_constants, "_read_by_graphs", {})
    _calls.clear()
    yield _calls


_calls: list[int] = []


def make(size: int, device: torch.device) -> Tensor:
    _calls.append(size)
    return torch.empty(size, device=device)


def test_a_constant_is_made_once_for_each_stream(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept(make, DEVICE, 3)
    assert kept(make, DEVICE, 3) is first and kept(make, DEVICE, 4) is not first
    monkeypatch.setattr(device_constants, "_current_stream", lambda device: 7)
    assert kept(make, DEVICE, 3) is not first
    assert made == [3, 4, 3]


def test_a_graph_reads_what_was_kept_before_and_that_is_never_given_away(
    made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kept(make, DEVICE, 3)
    monkeypatch.setattr(device_constants, "_current_stream", lambda device: 7)
    monkeypatch.setattr(device_constants, "is_capturing", lambda device: True)
    assert kept(make, DEVICE, 3) is before
    assert list(device_constants._read_by_graphs.values()) == [before]
    inside = kept(make, DEVICE, 5)  # belongs to the graph's memory, so it is made anew outside
    monkeypatch.setattr(device_constants, "is_capturing", lambda device: False)
    assert kept(make, DEVICE, 5) is not inside


def test_the_oldest_constant_goes_where_there_are_too_many(made: list[int]) -> None:
    for size in range(device_constants._MOST + 1):
        kept(make, DEVICE, size)
    assert len(device_constants._kept) == device_constants._MOST
    kept(make, DEVICE, device_constants._MOST), kept(make, DEVICE, 0)
    assert made == [*range(device_constants._MOST + 1), 0]


def test_constants_of_inference_mode_can_be_trained_with(made: list[int]) -> None:
    with torch.inference_mode():
        constant = kept(make, DEVICE, 3)
    assert not constant.is_inference()


@pytest.mark.parametrize("draw", [lambda: random_projection(6, 8, True, True, 1), lambda: hash_directions(2, 8, 1)])
def test_writing_to_what_an_operator_drew_changes_no_later_draw(draw) -> None:
    first = draw()
    kept_values = first.clone()
    first.zero_()
    assert torch.equal(draw(), kept_values)
