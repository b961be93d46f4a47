from __future__ import annotations

import pytest
import torch

from scatterbrain.training.tasks.documents import Document
from scatterbrain.training.tasks.retrieval_data import PassagePairs


def document(number: int, size: int) -> Document:
    """A document whose bytes say which it is and at which place: number * 64 + place."""
    return Document(f"{number}", bytes(number * 64 + place for place in range(size)))


TRAINING = [document(0, 24), document(1, 60), document(2, 24), Document("short", b"short")]


@pytest.fixture
def data() -> PassagePairs:
    return PassagePairs(TRAINING, [document(2, 30), document(3, 40)], tokens=12, batch=64, seed=0)


def test_a_pair_is_of_one_document_or_of_two_as_its_class_says(data):
    for number in range(6):
        batch = data.training_batch(number, 0.0)
        assert batch.inputs.shape == (64, 2, 12) and batch.inputs.dtype == torch.int64 and batch.mask is None
        assert torch.equal(batch.inputs[..., 1:], batch.inputs[..., :-1] + 1)  # consecutive bytes
        documents, places = batch.inputs[..., 0] // 64, batch.inputs[..., 0] % 64
        assert torch.equal((documents[:, 0] == documents[:, 1]).long(), batch.targets)
        assert (places.diff(dim=1).abs()[batch.targets == 1] >= 12).all()  # no overlap
        assert documents.unique().tolist() == [0, 1, 2]


def test_half_of_the_pairs_are_of_each_class(data):
    assert data.training_batch(0).targets.sum() == 32
    odd = PassagePairs(TRAINING, TRAINING, tokens=12, batch=3, seed=0)
    assert torch.cat([odd.training_batch(number).targets for number in range(4)]).sum() == 6


def test_a_single_passage_says_nothing_of_the_class(data):
    """Place and document of each passage have the same distribution in both classes: a pair of 0 is no other text."""
    batches = [data.training_batch(number) for number in range(60)]
    first = torch.cat([batch.inputs[..., 0] for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    for side in (0, 1):
        values = torch.stack([torch.bincount(first[targets == label, side], minlength=256) for label in (0, 1)])
        expected = values.sum(0) / 2
        used = expected > 0
        statistic = ((values - expected).square() / expected)[:, used].sum()
        freedom = int(used.sum()) - 1
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_both_orders_and_the_ends_of_a_document_occur(data):
    batches = [data.training_batch(number) for number in range(30)]
    first = torch.cat([batch.inputs[batch.targets == 1, :, 0] for batch in batches])
    assert {(0, 12), (12, 0)} <= set(map(tuple, first.tolist()))
    places = first[first[:, 0] // 64 == 1] % 64
    assert places.min() == 0 and places.max() == 48


def test_validation_pairs_are_of_their_own_documents_and_the_same_for_every_seed(data):
    other = PassagePairs(TRAINING, [document(2, 30), document(3, 40)], tokens=12, batch=64, seed=1)
    assert (data.validation_batch(1).inputs // 64 >= 2).all()
    assert torch.equal(data.validation_batch(1).inputs, other.validation_batch(1).inputs)
    assert not torch.equal(data.validation_batch(1).inputs, data.validation_batch(2).inputs)
    assert not torch.equal(data.training_batch(1).inputs, other.training_batch(1).inputs)
    assert torch.equal(data.training_batch(1, 0.0).inputs, data.training_batch(1, 0.9).inputs)


def test_too_few_long_documents_are_refused_by_part():
    with pytest.raises(ValueError, match="at least 2 training documents of 2 . task.tokens = 60 bytes .* got 1 of 4"):
        PassagePairs(TRAINING, TRAINING, tokens=30, batch=1, seed=0)
    with pytest.raises(ValueError, match="at least 2 validation documents .* got 0 of 1"):
        PassagePairs(TRAINING, TRAINING[3:], tokens=8, batch=1, seed=0)
