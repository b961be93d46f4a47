"""One of two processes that train together; what the scenarios have come to is judged by test_processes.py."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scatterbrain.training.checkpoint import read_progress
from scatterbrain.training.config import (
    AttentionConfig,
    CompareConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from scatterbrain.training.processes import FirstProcessFailed
from scatterbrain.training.train_step import TrainState
from scatterbrain.training.trainer import RunStopped, Trainer

STEPS = 5
EMA = {"kind": "quadratic", "statistics": "ema"}
RUNS: dict[str, dict[str, Any]] = {  # what one process and both train
    "batches": {"accumulate": 2},
    "rows": {"batch": 2},
    "ema": {"accumulate": 2, "low_rank": EMA},
}


def config(folder: Path, output: str, low_rank: Any = None, resume: bool | str = False, **train: Any) -> RunConfig:
    settings = {"steps": STEPS, "context": 40, "batch": 1, "warmup": 2, "threads": 1, "validate_every": 2}
    settings |= {"validation_batches": 3, "checkpoint_every": 2}
    return RunConfig(
        data=DataConfig(path=str(folder / "text.txt"), validation_fraction=0.1),
        model=ModelConfig(layers=2, width=16, heads=1),
        attention=AttentionConfig(keys=32, low_rank=low_rank),
        train=TrainConfig(**(settings | train)),
        sample=SampleConfig(prompt="line", length=2),
        compare=CompareConfig(steps=2),
        output=str(folder / output),
        resume=resume,
    )


def before_step(number: int, action: Any) -> None:
    """Calls ``action`` once, just before step ``number`` (from 1) of this process is taken."""
    original, count = TrainState.step, 0

    def step(self, *arguments):
        nonlocal count
        count += 1
        if count == number:
            TrainState.step = original
            action()
        return original(self, *arguments)

    TrainState.step = step


def outcome(settings: RunConfig) -> str:
    """What a run ends with."""
    try:
        Trainer(settings).run()
    except (RunStopped, FirstProcessFailed, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def scenarios(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, settings in RUNS.items():
        for mode in ("ddp", "fsdp"):
            results[f"{mode} {name}"] = outcome(config(folder, f"{mode} {name}", parallel=mode, **settings))
    options = {"fsdp recompute": {"recompute": True}, "ddp fp16": {"precision": "fp16"}}
    for name, settings in options.items():
        mode = name.split()[0]
        results[name] = outcome(config(folder, name, parallel=mode, accumulate=2, **settings))
    for mode in ("ddp", "fsdp"):  # one of the processes alone is asked to stop
        if rank == 1:
            before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        cut = config(folder, f"{mode} cut", parallel=mode, accumulate=2)
        results[f"{mode} stopped"] = outcome(cut)
        dist.barrier()
        results[f"{mode} stopped at"] = read_progress(folder / f"{mode} cut" / "checkpoint.safetensors").step
        dist.barrier()
        TrainState.step = STEP
        results[f"{mode} continued"] = outcome(dataclasses.replace(cut, resume=True))
    # a run of one process goes on in two, and one that was killed
    results["fsdp after one"] = outcome(config(folder, "one cut", parallel="fsdp", accumulate=2, resume=True))
    results["ddp killed"] = outcome(config(folder, "ddp killed", parallel="ddp", accumulate=2, resume=True))
    limited = config(folder, "fsdp minutes", parallel="fsdp", accumulate=2, steps=10**6, minutes=0.05, warmup=1)
    results["fsdp minutes"] = outcome(limited)
    results["minutes ended at"] = read_progress(folder / "fsdp minutes" / "checkpoint.safetensors").step
    results["occupied"] = outcome(config(folder, "ddp rows", parallel="ddp", batch=2))
    results["none"] = outcome(config(folder, "unused", accumulate=2))
    results["accumulate"] = outcome(config(folder, "unused", parallel="ddp", accumulate=3))
    results["batch"] = outcome(config(folder, "unused", parallel="ddp", batch=3))
    results["other options"] = outcome(config(folder, "unused", parallel="ddp", accumulate=2, seed=rank))
    return results


STEP = TrainState.step


def main(rank: int, folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if what == "all" and rank == 0:
        for name, settings in RUNS.items():
            outcome(config(folder, f"one {name}", **settings))
        outcome(config(folder, "one fp16", precision="fp16", accumulate=2))
        outcome(config(folder, "one cut", accumulate=2, steps=STEPS))
        cut_back(folder / "one cut", config(folder, "one cut", accumulate=2))
    store = dist.FileStore(str(folder / f"store {what}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=300))
    if what == "killed":
        before_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))
        print(outcome(config(folder, "ddp killed", parallel="ddp", accumulate=2)))
        return
    results = scenarios(rank, folder)
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(results))


def cut_back(output: Path, settings: RunConfig) -> None:
    """Makes the run one that was stopped after three steps."""
    before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome(dataclasses.replace(settings, overwrite=True))
    TrainState.step = STEP
    assert read_progress(output / "checkpoint.safetensors").step == 3


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
