"""Data parallelism with two gloo processes: DDP and FSDP2 train what one process trains, and ranks stay in step. The
scenarios are in worker.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from testkit import run_two_ranks
from torch import Tensor

import scatterbrain as sb

WORKER = Path(__file__).parent / "worker.py"
LOW_RANKS = ("stored", "ema", "learned", "favor")
SECONDS = 420  # two processes on a busy machine; they need about ten on a free one

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of each of the two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks(lambda rank: (WORKER, rank, folder), folder, SECONDS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("low_rank", LOW_RANKS)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_ranks_have_the_same_state_after_training(ranks: Results, wrapper: str, low_rank: str):
    a, b = (rank[f"{wrapper} {low_rank}"]["state"] for rank in ranks)
    assert_same(a, b)


@pytest.mark.parametrize("low_rank", LOW_RANKS)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_and_updates_are_those_of_the_whole_batch_in_one_process(ranks: Results, wrapper: str, low_rank: str):
    got, expected = ranks[0][f"{wrapper} {low_rank}"], ranks[0][f"single {low_rank}"]
    assert any(gradient.any() for gradient in expected["gradients"])
    torch.testing.assert_close(got["gradients"], expected["gradients"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got["state"], expected["state"], rtol=1e-4, atol=1e-5)


def test_every_projection_is_redrawn_alike(ranks: Results):
    states = [rank["ddp favor"]["state"] for rank in ranks]
    core = sb.ScatterbrainAttention(2, 16, support=sb.Window(8), low_rank=sb.Favor(8, redraw=2))
    name = "layers.0.self_attn.attention.projection"
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], core.projection)


def test_moving_averages_stay_in_step_where_ranks_have_nothing_to_add(ranks: Results):
    a, b = (rank["uneven"] for rank in ranks)
    assert a["calibrated"] == b["calibrated"] == [True, True]
    assert_same(a["buffers"], b["buffers"])
    tokens = a["buffers"]["layers.0.self_attn.attention.moment_tokens"]
    assert tokens.isfinite().all() and (tokens > 0).all()


def test_a_group_of_one_rank_calibrates_alone(ranks: Results):
    assert not torch.equal(ranks[0]["alone"]["mean"], ranks[1]["alone"]["mean"])


def test_the_tokens_of_all_ranks_are_counted_and_one_rank_speaks(ranks: Results):
    (message,) = ranks[0]["counted"][100]
    assert "fitted on 200 valid tokens (" in message
    assert ranks[1]["counted"][100] == ranks[0]["counted"][160] == ranks[1]["counted"][160] == []


@pytest.mark.parametrize("how", ["by collectives", "by ddp"])
def test_a_rank_that_gets_the_buffers_of_another_is_calibrated(ranks: Results, how: str):
    a, b = (rank[f"broadcast {how}"] for rank in ranks)
    assert all(a["before"]) and not any(b["before"]) and torch.equal(a["output"], b["output"])


@pytest.mark.parametrize("low_rank", ["ema", "favor"])
def test_two_forward_passes_before_one_backward_pass(ranks: Results, low_rank: str):
    assert all(rank[f"two forwards {low_rank}"]["finite"] for rank in ranks)


@pytest.mark.parametrize("low_rank", ["stored", "learned"])
def test_mixed_precision_leaves_statistics_alone(ranks: Results, low_rank: str):
    a, b = (rank[f"mixed {low_rank}"] for rank in ranks)
    assert a["output"] == torch.bfloat16 and a["finite"]
    assert set(a["buffers"].values()) <= {torch.float32, torch.float64, torch.int64}
    assert_same(a["state"], b["state"])


@pytest.mark.parametrize("low_rank", ["stored", "learned"])
def test_a_gathered_state_dict_gives_the_same_output_in_a_plain_model(ranks: Results, low_rank: str):
    result = ranks[0][f"checkpoint {low_rank}"]
    assert torch.equal(result["plain"], result["output"])


@pytest.mark.parametrize("low_rank", ["stored", "learned"])
def test_a_gathered_state_dict_fills_a_sharded_model_made_on_meta(ranks: Results, low_rank: str):
    for rank in ranks:
        result = rank[f"checkpoint {low_rank}"]
        assert torch.equal(result["reloaded"], result["output"])


def test_sharded_projections_are_reset_to_one_draw(ranks: Results):
    projection = ranks[0]["reset"]["projection"]
    assert_same(ranks[0]["reset"], ranks[1]["reset"])
    torch.testing.assert_close(projection @ projection.mT, torch.eye(4).expand(2, 4, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("wrapper", "name"), [("ddp", "DistributedDataParallel"), ("fsdp", "FSDPModule")])
def test_parameters_are_not_added_behind_the_back_of_a_wrapper(ranks: Results, wrapper: str, name: str):
    late = ranks[0]["late"]
    assert f"not yet in {name}" in late[wrapper] and "replace attention first" in late[wrapper]
    assert late[f"{wrapper} stored"] == 1
