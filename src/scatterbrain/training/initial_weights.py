"""Weights of an earlier run as those that a run starts from: training with exact attention, then fine-tuning with
another, for one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from scatterbrain.nn.attention import ScatterbrainAttention

KEY = "train.initialize_from"
MODEL = "model/"  # before the names of weights in a checkpoint


def initialize_from(path: str | Path, model: nn.Module) -> str:
    """Copies the weights of a checkpoint of ``scatterbrain train`` into ``model``, all but what attention itself keeps
    (projections and statistics of a low-rank kernel). Of that a layer takes the checkpoint's where names, shapes and
    dtypes are its own; otherwise it keeps what it has.

    Returns:
        A line that says where the weights come from, and what starts anew or was left out.

    Raises:
        ValueError: naming the key ``train.initialize_from``: no checkpoint, or weights of another model.
    """
    stored, own = _read(Path(path).expanduser()), model.state_dict()
    taken, fresh, left_out = {}, [], []
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ScatterbrainAttention))
    for prefix in inside:
        mine, theirs = (_below(prefix, tensors) for tensors in (own, stored))
        if mine.keys() == theirs.keys() and all(_is_like(mine[name], theirs[name]) for name in mine):
            taken |= theirs
        else:
            fresh += mine
            left_out += theirs
    outside = own.keys() - {name for name in own if name.startswith(inside)}
    theirs = {name for name in stored if not name.startswith(inside)}
    if outside != theirs:
        lacking, unknown = (_listed(names) for names in (outside - theirs, theirs - outside))
        raise ValueError(
            f"{KEY}: expected a checkpoint of the same model, got {path}, which lacks {lacking or 'nothing'} and has "
            f"{unknown or 'nothing'} besides; use the sections task and model that it was trained with"
        )
    for name in sorted(outside):
        if not _is_like(own[name], stored[name]):
            raise ValueError(
                f"{KEY}: expected {name} of {_description(own[name])}, got {_description(stored[name])} in {path}; use "
                "the sections task and model that it was trained with"
            )
        if not bool(torch.isfinite(stored[name]).all()):
            raise ValueError(
                f"{KEY}: expected finite weights, got NaN or infinity in {name} of {path}; use another run"
            )
        taken[name] = stored[name]
    model.load_state_dict(own | taken)
    line = f"initial weights from {path}"
    if fresh:
        line += f"; new: {_listed(fresh)}"
    if left_out:
        line += f"; left out: {_listed(left_out)}"
    return line


def initial_fingerprint(path: str | Path) -> str:
    """The SHA-256 of a file of weights; "" where it cannot be read, of weights that are not there any more."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, by their names in the model."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{KEY}: expected the checkpoint.safetensors of a run of scatterbrain train, got {str(path)!r}: {error}"
        ) from error
    weights = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    if not weights:
        raise ValueError(
            f"{KEY}: expected a checkpoint of scatterbrain train, got {str(path)!r}, whose tensors have no names that "
            f"begin with {MODEL}"
        )
    return weights


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(prefix)}


def _is_like(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and mine.dtype == theirs.dtype


def _description(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}, shape {tuple(tensor.shape)}"


def _listed(names: Iterable[str], most: int = 6) -> str:
    """The first names, and how many there are besides."""
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
