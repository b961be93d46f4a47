"""DistributedDataParallel without find_unused_parameters goes on whatever a call uses, and with every form of
checkpointing. The scenarios are in paths_worker.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from testkit import run_two_ranks

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
    ),
]
WORKER = Path(__file__).parent / "paths_worker.py"
SECONDS = 420  # two processes on a busy machine; they need about fifteen on a free one
Errors = dict[str, str]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Errors, Errors]]:
    """The errors of each of the two processes by scenario, "" for none: where projections are unused, and elsewhere."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks(lambda rank: (WORKER, rank, folder), folder, SECONDS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_training_goes_on_where_calls_leave_learned_projections_out(errors: list[tuple[Errors, Errors]]):
    for unused, _ in errors:
        assert unused and not any(unused.values()), "\n".join(unused.values())


def test_every_form_of_checkpointing_has_the_gradients_of_one_process(errors: list[tuple[Errors, Errors]]):
    for _, checkpointed in errors:
        assert checkpointed and not any(checkpointed.values()), "\n".join(checkpointed.values())
