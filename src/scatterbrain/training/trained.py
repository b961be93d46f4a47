"""The model of a run's folder, with its task and data."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from scatterbrain.training.attention import attention_of_layers
from scatterbrain.training.checkpoint import load_checkpoint, read_progress
from scatterbrain.training.config import AttentionConfig, DataConfig, ModelConfig, TrainConfig
from scatterbrain.training.files import RunFolder
from scatterbrain.training.same_run import check_same_data
from scatterbrain.training.tasks import Task, TaskData, build_task, open_data
from scatterbrain.training.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has come to.

    Args:
        model: with the weights of the last checkpoint, on the CPU.
        task: what it was trained on. data: opened again.
        train: the run's optimisation.
    """

    model: nn.Module
    task: Task
    data: TaskData
    train: TrainConfig


def load_trained(folder: Path, reads_data: bool = True) -> Trained:
    """Reads the last checkpoint of a run.

    Args:
        folder: of the run.
        reads_data: whether batches will be asked for; else the data need not be those that the run was trained on.

    Raises:
        UnusableRun: no checkpoint of ``scatterbrain train``, or a changed one, or data that have changed since: their
            tokens need not be those that the model was trained on.
        ValueError: the data of the run, which say how large its model is, are not where they were.
    """
    files = RunFolder(folder)
    stored = read_progress(files.checkpoint).config
    task = build_task(stored["task"])
    train = dataclasses.replace(_section(TrainConfig, stored["train"]), device="cpu", compile=False, parallel="none")
    data = open_data(task, _section(DataConfig, stored["data"]), train)
    if reads_data:
        check_same_data(files, data, _OTHER_INPUTS if task.kind == "language" else _NO_OTHER_INPUTS)
    build = partial(task.build_model, data, _section(ModelConfig, stored["model"]))
    section = _section(AttentionConfig, stored["attention"])
    attention = attention_of_layers(section, task.is_causal, train.seed)
    state = TrainState(build, train, attention)
    load_checkpoint(files.checkpoint, state)
    return Trained(state.model.eval(), task, data, train)


_OTHER_INPUTS = "measure the model on another text with --inputs FILE"
_NO_OTHER_INPUTS = "train the task anew: it is measured on its own validation inputs alone"


def _section(section: type, stored: dict[str, Any]) -> Any:
    """A section from YAML's or JSON's types."""
    return section(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
