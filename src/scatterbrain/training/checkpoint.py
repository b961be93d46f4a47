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
from scatterbrain.training.train_step import TrainState

FORMAT = "scatterbrain-train-1"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come. The position in the data follows from the number of steps, since a batch is a function of
    its number.

    Args:
        step: optimizer steps done.
        seconds: trained so far.
        config: the run's configuration as nested dictionaries.
    """

    step: int
    seconds: float
    config: dict[str, Any]


def save_checkpoint(path: Path, train_state: TrainState, progress: Progress) -> None:
    """Writes weights, optimizer, random number generators and progress, atomically.

    Raises:
        OSError: if it cannot be written; an earlier checkpoint stays whole.
    """
    tensors = {f"model/{name}": value.contiguous() for name, value in train_state.model.state_dict().items()}
    for index, state in train_state.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer/{index}/{name}"] = value.contiguous()
    tensors["rng/cpu"] = torch.get_rng_state()
    if train_state.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(train_state.device)
    metadata = {"format": FORMAT, "progress": json.dumps(dataclasses.asdict(progress))}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read_progress(path: Path) -> Progress:
    """The progress that :func:`save_checkpoint` stored.

    Raises:
        ValueError: if the file is not a checkpoint of it.
    """
    return Progress(**json.loads(_metadata(path)["progress"]))


def load_checkpoint(path: Path, train_state: TrainState) -> None:
    """Restores the weights, the optimizer and the random number generators.

    Raises:
        ValueError: if the file is not a checkpoint of :func:`save_checkpoint`.
        RuntimeError: if the weights do not fit the model.
    """
    tensors = safetensors.torch.load_file(path)
    model = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    train_state.model.load_state_dict(model)
    optimizer = train_state.optimizer.state_dict()
    optimizer["state"] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, field = name.split("/")
            optimizer["state"].setdefault(int(index), {})[field] = value
    train_state.optimizer.load_state_dict(optimizer)
    torch.set_rng_state(tensors["rng/cpu"])
    if train_state.device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], train_state.device)


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
