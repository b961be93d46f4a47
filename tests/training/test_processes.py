"""Two gloo processes train what one process trains, stop and continue together. The scenarios are in
processes_worker.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from testkit import environment, run_two_ranks
from torch import Tensor

from scatterbrain.training.batch import Batch
from scatterbrain.training.checkpoint import read_progress
from scatterbrain.training.config import TrainConfig
from scatterbrain.training.interrupt import StopRequest
from scatterbrain.training.processes import Processes, join

WORKER = Path(__file__).parent / "processes_worker.py"
SECONDS = 600  # two processes on a busy machine; they need about twenty on a free one

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the runs of all scenarios, and what they ended with by rank."""
    folder = tmp_path_factory.mktemp("processes")
    lines = "".join(f"line {number:04d}: {number * number:08d}\n" for number in range(200))
    (folder / "text.txt").write_text(lines)
    kill_both(folder)
    run_two_ranks(lambda rank: (WORKER, rank, folder, "all"), folder, SECONDS)
    return folder


def kill_both(folder: Path) -> None:
    """Starts a run in two processes that are killed in step 4, after the checkpoint of step 2."""
    processes = []
    try:
        for rank in range(2):
            command = [sys.executable, str(WORKER), str(rank), str(folder), "killed"]
            with (folder / f"killed {rank}.log").open("w") as log:
                alone = environment(OMP_NUM_THREADS="1")
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=alone))
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [-signal.SIGKILL] * 2, (folder / "killed 0.log").read_text()
    assert read_progress(folder / "ddp killed" / "checkpoint.safetensors").step == 2


@pytest.fixture(scope="module")
def ended(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def records(folder: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def figures(folder: Path, run: str, *names: str) -> list[float]:
    return [record[name] for record in records(folder, run) for name in names if name in record]


def tensors(folder: Path, run: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / run / "checkpoint.safetensors")


@needs_gloo
@pytest.mark.parametrize("run", ["batches", "rows", "ema"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(folder: Path, ended, mode: str, run: str):
    one, both = f"one {run}", f"{mode} {run}"
    assert [rank[both] for rank in ended] == ["done", "done"]
    for name in ("step", "tokens", "learning_rate"):
        assert figures(folder, both, name) == figures(folder, one, name)
    for name in ("loss", "accuracy", "gradient_norm"):
        assert figures(folder, both, name) == pytest.approx(figures(folder, one, name), rel=1e-3), name
    expected, got = tensors(folder, one), tensors(folder, both)
    assert expected.keys() == got.keys()
    for name in (name for name in expected if name.startswith("model/")):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-2, atol=2e-4, equal_nan=True, msg=name)


@needs_gloo
@pytest.mark.parametrize(("run", "one"), [("ddp fp16", "fp16"), ("fsdp recompute", "batches")])
def test_options_of_a_run_hold_for_several_processes(folder: Path, ended, run: str, one: str):
    assert [rank[run] for rank in ended] == ["done", "done"]
    tolerance = 2e-2 if one == "fp16" else 1e-3
    assert figures(folder, run, "loss") == pytest.approx(figures(folder, f"one {one}", "loss"), rel=tolerance)
    assert tensors(folder, run).keys() == tensors(folder, f"one {one}").keys()


@needs_gloo
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_all_processes_stop_after_the_step_in_which_one_was_asked_to(folder: Path, ended, mode: str):
    stopped = [rank[f"{mode} stopped"] for rank in ended]
    assert stopped[0].startswith("RunStopped: stopped by SIGTERM. The checkpoint of step 3 is whole")
    assert stopped[1].startswith("FirstProcessFailed: stopped by SIGTERM")
    assert [rank[f"{mode} stopped at"] for rank in ended] == [3, 3]


@needs_gloo
@pytest.mark.parametrize("run", ["ddp cut", "fsdp cut", "ddp killed"])
def test_a_run_of_two_processes_that_was_cut_continues_bit_for_bit(folder: Path, ended, run: str):
    mode = run.split()[0]
    key = run if run == "ddp killed" else f"{mode} continued"
    assert [rank[key] for rank in ended] == ["done", "done"]
    for name in ("step", "loss", "gradient_norm"):
        assert figures(folder, run, name) == figures(folder, f"{mode} batches", name)
    expected, got = tensors(folder, f"{mode} batches"), tensors(folder, run)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@needs_gloo
def test_a_run_of_one_process_continues_in_two(folder: Path, ended):
    assert [rank["fsdp after one"] for rank in ended] == ["done", "done"]
    assert figures(folder, "one cut", "step") == figures(folder, "one batches", "step")
    assert figures(folder, "one cut", "loss") == pytest.approx(figures(folder, "one batches", "loss"), rel=1e-3)


@needs_gloo
def test_a_time_limit_ends_all_processes_after_the_same_step(folder: Path, ended):
    assert [rank["fsdp minutes"] for rank in ended] == ["done", "done"]
    assert ended[0]["minutes ended at"] == ended[1]["minutes ended at"] > 0
    rates = figures(folder, "fsdp minutes", "learning_rate")
    assert rates[-1] < max(rates)


@needs_gloo
def test_the_first_process_says_what_it_cannot_do_and_the_others_end_too(ended):
    first, second = (rank["occupied"] for rank in ended)
    assert first.startswith("ValueError: output: ") and "already has a checkpoint" in first
    assert second.startswith("FirstProcessFailed: output: ")


@needs_gloo
@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("none", "train.parallel: expected ddp or fsdp, for 2 processes, got 'none'"),
        ("accumulate", "train.accumulate: expected a multiple or a divisor of the 2 processes"),
        ("batch", "train.batch: expected a multiple of 2, since 2 processes share 1 batches"),
        ("other options", "options: expected the same in all processes"),
    ],
)
def test_settings_that_processes_cannot_share_are_refused_by_their_key(folder: Path, ended, run: str, words: str):
    assert all(words in rank[run] for rank in ended)
    assert not (folder / "unused").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compile": True}, "train.compile: expected false with train.parallel fsdp, got True"),
        ({"precision": "fp16"}, "train.precision: expected float32 or bf16 with train.parallel fsdp, got 'fp16'"),
    ],
)
def test_options_that_sharded_models_do_not_have_are_refused_by_their_key(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        TrainConfig(parallel="fsdp", **options)


def test_every_batch_of_a_step_is_one_processs_or_shared_by_rows():
    whole = range(6)
    assert [list(Processes(rank, 3).own_batches(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    shared = [list(Processes(rank, 6).own_batches(3)) for rank in range(6)]
    assert shared == [[number // 2] for number in whole] and Processes(0, 6).parts(3) == 2


def test_what_torchrun_sends_again_is_one_request_of_several_processes(monkeypatch: pytest.MonkeyPatch):
    """And what comes later acts as usual."""
    alone = Processes(count=2)
    monkeypatch.setattr(Processes, "largest", lambda self, *values: list(values))
    before, seconds = signal.getsignal(signal.SIGTERM), 0.0
    monkeypatch.setattr("scatterbrain.training.interrupt.time.monotonic", lambda: seconds)
    with StopRequest(alone) as stop:
        assert not stop.check()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.check() and stop.signal == signal.SIGTERM
        seen = []
        stop._previous[signal.SIGTERM] = lambda number, frame: seen.append(number)
        seconds = 6.0
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, before)


def test_torchruns_variables_have_to_be_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="expected the environment variable RANK beside WORLD_SIZE"):
        join(TrainConfig(parallel="ddp"))


def test_rows_that_do_not_divide_are_shared_out_to_all():
    batch = Batch(torch.arange(18).view(9, 2), torch.arange(9))
    shares = [Processes(rank, 4, rank, "ddp").own_rows(batch, 1) for rank in range(4)]
    assert [len(share.targets) for share in shares] == [3, 2, 2, 2]
    assert torch.equal(torch.cat([share.inputs for share in shares]), batch.inputs)
    with pytest.raises(ValueError, match="train.batch: .* a row for each of 4 processes, got a batch of 3"):
        Processes(0, 4, 0, "ddp").own_rows(Batch(batch.inputs[:3], batch.targets[:3]), 1)


def test_more_processes_than_gpus_are_refused_by_the_key_of_the_device(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ValueError,
        match="train.device: expected a GPU for each process of a machine, which has 2, got "
        "'cuda:3'; start 2 processes there at most",
    ):
        join(TrainConfig(device="cuda", parallel="ddp", accumulate=4))
