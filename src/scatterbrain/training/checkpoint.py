"""Checkpoints: one safetensors file with everything that an exact continuation needs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from scatterbrain.training.files import write_atomically
from scatterbrain.training.train_step import TrainStep

FORMAT = "scatterbrain-train-1"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps done, seconds trained, and the configuration as nested dictionaries.

    The position in the data follows from the number of steps, since a batch is a function of its number.
    """

    step: int
    seconds: float
    config: dict[str, Any]


def save_checkpoint(path: Path, learner: TrainStep, progress: Progress) -> None:
    """Writes weights, optimizer, random number generators and progress, atomically.

    Raises:
        OSError: when it cannot be written; a checkpoint that was there stays whole.
    """
    tensors = {f"model/{name}": value.contiguous() for name, value in learner.model.state_dict().items()}
    for index, state in learner.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer/{index}/{name}"] = value.contiguous()
    tensors["rng/cpu"] = torch.get_rng_state()
    if learner.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(learner.device)
    metadata = {"format": FORMAT, "progress": json.dumps(dataclasses.asdict(progress))}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read_progress(path: Path) -> Progress:
    """What :func:`save_checkpoint` stored about the run.

    Raises:
        ValueError: if the file is not such a checkpoint.
    """
    return Progress(**json.loads(_metadata(path)["progress"]))


def load_checkpoint(path: Path, learner: TrainStep) -> None:
    """Puts ``learner`` and the random number generators into the stored state.

    Raises:
        ValueError: if the file is not a checkpoint of such a run.
        RuntimeError: if the weights do not fit the model.
    """
    tensors = safetensors.torch.load_file(path)
    model = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    learner.model.load_state_dict(model)
    optimizer = learner.optimizer.state_dict()
    optimizer["state"] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, field = name.split("/")
            optimizer["state"].setdefault(int(index), {})[field] = value
    learner.optimizer.load_state_dict(optimizer)
    torch.set_rng_state(tensors["rng/cpu"])
    if learner.device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], learner.device)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: expected a checkpoint of scatterbrain train, got a file that cannot be read: {error}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint in format {FORMAT}, got {metadata.get('format')!r}")
    return metadata
