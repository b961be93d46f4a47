"""Checkpoints: one safetensors file with everything that an exact continuation needs."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from scatterbrain.training.config import SECTIONS
from scatterbrain.training.files import UnusableRun, write_atomically
from scatterbrain.training.precision import Precision
from scatterbrain.training.processes import Processes, like, whole
from scatterbrain.training.train_step import TrainState

FORMAT = "scatterbrain-train-1"
WEIGHTS = "scatterbrain-weights-1"
UNTRAINED = "untrained"  # in place of the optimizer's state of a parameter, where no step has had a gradient for it


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
    """Writes weights, optimizer, random number generators and progress, atomically. Of several processes all must call
    it; the first one writes, whole tensors, so any number of processes can go on.

    Raises:
        OSError: if it cannot be written; an earlier checkpoint stays whole.
    """
    processes = train_state.processes
    sources = {f"model/{name}": value for name, value in train_state.model.state_dict().items()}
    for index, state in train_state.optimizer.state_dict()["state"].items():
        sources |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    tensors = _gathered(sources, processes)
    if processes.is_first:
        tensors |= {f"optimizer/{index}/{UNTRAINED}": torch.empty(0) for index in _untrained(train_state.optimizer)}
    tensors |= {f"scaler/{name}": value for name, value in train_state.precision.state().items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if train_state.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(train_state.device)
    metadata = {"format": FORMAT, "progress": json.dumps(dataclasses.asdict(progress))}
    processes.first(lambda: write_atomically(path, safetensors.torch.save(tensors, metadata)))


def save_weights(path: Path, train_state: TrainState, step: int, metric: str, value: float) -> None:
    """Writes the weights alone, atomically, with what they are worth as metadata. As :func:`save_checkpoint`, all
    processes must call it.

    Raises:
        OSError: if they cannot be written; an earlier file stays whole.
    """
    sources = {f"model/{name}": value for name, value in train_state.model.state_dict().items()}
    tensors = _gathered(sources, train_state.processes)
    metadata = {"format": WEIGHTS, "step": str(step), metric: repr(value)}
    train_state.processes.first(lambda: write_atomically(path, safetensors.torch.save(tensors, metadata)))


def read_worth(path: Path, metric: str) -> tuple[int, float] | None:
    """The step and the metric of a file of :func:`save_weights`; None where there is none that can be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return int(metadata["step"]), float(metadata[metric])
    except (safetensors.SafetensorError, OSError, KeyError, ValueError):
        return None


def _untrained(optimizer: torch.optim.Optimizer) -> list[int]:
    """Numbers of the parameters that have had no gradient so far, beside others that have."""
    known = optimizer.state_dict()
    numbers = [number for group in known["param_groups"] for number in group["params"]]
    return [number for number in numbers if number not in known["state"]] if known["state"] else []


def _gathered(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Whole tensors on the first process, nothing on the others."""
    result = {}
    for name, value in tensors.items():
        value = whole(value)
        if processes.is_first:
            result[name] = value.contiguous()
    return result


def read_progress(path: Path) -> Progress:
    """The progress that :func:`save_checkpoint` stored.

    Raises:
        UnusableRun: if the file is not a checkpoint of it.
    """
    metadata = _metadata(path)
    if unknown := sorted(metadata.keys() - {"format", "progress"}):
        raise UnusableRun(f"{path}: expected the metadata format and progress, got {unknown[0]!r} too; {_CURE}")
    text = metadata.get("progress", "")
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        stored = None
    fields = [field.name for field in dataclasses.fields(Progress)]
    if not isinstance(stored, dict) or sorted(stored) != sorted(fields):
        got = ", ".join(stored) if isinstance(stored, dict) else repr(text[:40])
        raise UnusableRun(f"{path}: expected the progress {', '.join(fields)}, got {got}; {_CURE}")
    progress = Progress(**stored)
    _require(path, type(progress.step) is int and progress.step >= 0, "step", "an int from 0", progress.step)
    seconds = progress.seconds
    is_time = type(seconds) in (int, float) and 0 <= seconds < math.inf
    _require(path, is_time, "seconds", "a number from 0", seconds)
    is_nested = isinstance(progress.config, dict) and all(
        isinstance(progress.config.get(name), dict) for name in SECTIONS
    )
    _require(path, is_nested, "config", f"the sections {', '.join(SECTIONS)}", progress.config)
    return progress


def load_checkpoint(path: Path, train_state: TrainState) -> None:
    """Restores the weights, the optimizer and the random number generators, all of them: a run that goes on without
    some of its state is another run. Of several processes all must call it; the first one reads.

    Raises:
        UnusableRun: if the file is not a checkpoint of :func:`save_checkpoint` for this model, whole and unchanged.
    """
    processes = train_state.processes
    step = processes.first(lambda: read_progress(path).step)
    tensors = processes.tensors(lambda: safetensors.torch.load_file(path))
    groups = {"model": {}, "optimizer": {}, "scaler": {}, "rng": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind not in groups or not rest:
            raise UnusableRun(f"{path}: expected tensors model/, optimizer/, scaler/ and rng/, got {name!r}; {_CURE}")
        groups[kind][rest] = value
    _load_model(path, groups["model"], train_state.model)
    _load_optimizer(path, groups["optimizer"], train_state, step)
    _load_scaler(path, groups["scaler"], train_state.precision)
    _load_generators(path, groups["rng"], train_state.device)


_CURE = "the file was changed, or comes from another version; start anew in another folder with --output"


def _require(path: Path, condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UnusableRun(f"{path}: {name} must be {expected}, got {reprlib.repr(got)}; {_CURE}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _require_like(path: Path, name: str, tensor: Tensor, own: Tensor) -> None:
    """A finite tensor of the shape and dtype of another."""
    same = tensor.shape == own.shape and tensor.dtype == own.dtype
    if not same:
        raise UnusableRun(f"{path}: {name} must be {_describe(own)}, got {_describe(tensor)}; {_CURE}")
    if bool(torch.isfinite(whole(own)).all()) and not bool(torch.isfinite(tensor).all()):
        raise UnusableRun(f"{path}: {name} holds NaN or infinity; {_CURE}")


def _load_model(path: Path, tensors: dict[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    for name in sorted(own.keys() & tensors.keys()):  # the same order in all processes, which gather sharded ones
        _require_like(path, f"model/{name}", tensors[name], own[name])
    tensors = {name: like(value, own[name]) if name in own else value for name, value in tensors.items()}
    try:
        model.load_state_dict(tensors)  # which knows the names of earlier versions too
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnusableRun(f"{path}: {error}; {_CURE}") from error


def _load_optimizer(path: Path, tensors: dict[str, Tensor], train_state: TrainState, step: int) -> None:
    """AdamW's state of every parameter: its number of steps, and two averages of the parameter's shape, or the note
    that no step had a gradient for it. Only steps that had one are counted, so a parameter may have fewer than the run,
    and with float16, which leaves steps out, the run none."""
    skips = train_state.precision.scales_loss
    has_steps = bool(tensors) if skips else step > 0
    optimizer = train_state.optimizer.state_dict()
    parameters = [parameter for group in train_state.optimizer.param_groups for parameter in group["params"]]
    likes = {
        f"{index}/{field}": own
        for index, parameter in enumerate(parameters if has_steps else [])
        for field, own in (
            ((UNTRAINED, torch.empty(0)),)
            if f"{index}/{UNTRAINED}" in tensors
            else (("step", torch.tensor(0.0)), ("exp_avg", parameter), ("exp_avg_sq", parameter))
        )
    }
    for name in sorted(likes.keys() ^ tensors.keys()):
        expected = "is missing" if name in likes else "belongs to no parameter"
        raise UnusableRun(f"{path}: optimizer/{name} {expected}; {_CURE}")
    optimizer["state"] = {}
    for name, own in likes.items():
        _require_like(path, f"optimizer/{name}", tensors[name], own.detach())
        index, field = name.split("/")
        if field == UNTRAINED:
            continue
        if field == "step":
            taken = tensors[name].item()
            _require(path, 0 < taken <= step, f"optimizer/{name}", f"from 1 to the run's step {step}", taken)
        if field == "exp_avg_sq":
            least = float(tensors[name].min())
            _require(path, least >= 0, f"optimizer/{name}", "an average of squares, 0 or more", least)
        optimizer["state"].setdefault(int(index), {})[field] = like(tensors[name], own.detach())
    train_state.optimizer.load_state_dict(optimizer)


def _load_scaler(path: Path, tensors: dict[str, Tensor], precision: Precision) -> None:
    likes = precision.state()
    for name in sorted(likes.keys() ^ tensors.keys()):
        expected = "is missing" if name in likes else "belongs to no setting of train.precision"
        raise UnusableRun(f"{path}: scaler/{name} {expected}; {_CURE}")
    for name, own in likes.items():
        _require_like(path, f"scaler/{name}", tensors[name], own)
        least = float(tensors[name])
        _require(path, least > 0 or name != "scale" and least == 0, f"scaler/{name}", "positive", least)
    precision.load(tensors)


def _load_generators(path: Path, tensors: dict[str, Tensor], device: torch.device) -> None:
    """A run on the CPU may go on elsewhere, so the state of another device's generator may be there or not."""
    unknown = sorted(tensors.keys() - {"cpu", "cuda"})
    if unknown or "cpu" not in tensors:
        what = f"rng/{unknown[0]} is unknown" if unknown else "rng/cpu is missing"
        raise UnusableRun(f"{path}: {what}; {_CURE}")
    _require_like(path, "rng/cpu", tensors["cpu"], torch.get_rng_state())
    try:
        torch.set_rng_state(tensors["cpu"])
        if device.type == "cuda" and "cuda" in tensors:
            torch.cuda.set_rng_state(tensors["cuda"], device)
    except (RuntimeError, TypeError) as error:
        raise UnusableRun(f"{path}: rng: {error}; {_CURE}") from error


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise UnusableRun(
            f"{path}: expected a checkpoint of scatterbrain train, got a file that cannot be read: {error}; {_CURE}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise UnusableRun(f"{path}: expected a checkpoint in format {FORMAT}, got {metadata.get('format')!r}; {_CURE}")
    return metadata
