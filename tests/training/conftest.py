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
