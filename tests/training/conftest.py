from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from scatterbrain.training.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from scatterbrain.training.table_run import TableRun


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 4000 bytes in which no two lines are the same."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number:04d}: {number * number:08d}\n" for number in range(200)))
    return path


@pytest.fixture
def tiny(text: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes the configuration of a run of eight steps that takes a second; keywords replace fields of ``train``."""

    def make(attention: AttentionConfig | None = None, output: str = "run", resume: bool = False, **train) -> RunConfig:
        settings = {"steps": 8, "context": 48, "batch": 2, "warmup": 2, "threads": 1}
        settings |= {"validate_every": 4, "validation_batches": 1, "checkpoint_every": 3}
        return RunConfig(
            data=DataConfig(path=str(text), validation_fraction=0.1),
            model=ModelConfig(layers=2, width=32, heads=2),
            attention=attention or AttentionConfig(support="full"),
            train=dataclasses.replace(TrainConfig(), **(settings | train)),
            sample=SampleConfig(prompt="line", length=8),
            output=str(tmp_path / output),
            resume=resume,
        )

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., TableRun]:
    """Makes a run of four steps of a copy task that takes a second; keywords replace fields of ``train``."""

    def make(method: str = "full", seed: int = 0, attention: AttentionConfig | None = None, **train) -> TableRun:
        settings = {"steps": 4, "batch": 2, "warmup": 1, "threads": 1, "validate_every": 2, "validation_batches": 1}
        config = RunConfig(
            task={"kind": "copy", "tokens": 31, "symbols": 8},
            model=ModelConfig(layers=1, width=16, heads=2),
            attention=attention or AttentionConfig(support="full"),
            train=TrainConfig(**(settings | {"checkpoint_every": 2, "seed": seed} | train)),
            output=str(tmp_path / "table" / f"{method}-{seed}"),
        )
        return TableRun(method, seed, config)

    return make
