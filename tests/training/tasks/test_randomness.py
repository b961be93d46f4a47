from __future__ import annotations

import torch

from scatterbrain.training.tasks.randomness import generator_of, permutations


def draws(*key: int | str) -> list[int]:
    return torch.randint(1 << 40, (4,), generator=generator_of(*key)).tolist()


def test_a_generator_is_a_function_of_its_key_alone():
    before = draws(0, 7)
    torch.rand(5)
    assert draws(0, 7) == before
    state = torch.get_rng_state()
    draws(0, 7)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_keys_give_other_numbers():
    keys = [(0, 7), (7, 0), (0, 8), (1, 7), (0, 7, 0), (1, 23), (12, 3), ("0", 7), (0, "validation")]
    assert len({tuple(draws(*key)) for key in keys}) == len(keys)


def test_permutations_hold_every_number_once_and_every_order_is_as_likely():
    orders = permutations(6000, 3, generator_of(0))
    assert torch.equal(orders.sort(dim=1).values, torch.arange(3).expand(6000, 3))
    counts = torch.bincount((orders * torch.tensor([9, 3, 1])).sum(1))
    counts = counts[counts > 0]
    assert len(counts) == 6 and 850 < counts.min() and counts.max() < 1150
