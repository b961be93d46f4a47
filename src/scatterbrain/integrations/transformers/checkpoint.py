"""What from_pretrained makes of a checkpoint's entries of ours: a layer takes all that belong to it, or none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from scatterbrain.integrations.transformers.layers import CORE, LayerAttention, attention_layers, core_of
from scatterbrain.nn.attention import unused_entries
from scatterbrain.nn.warn import warn

OWNED = f".{CORE}."  # part of the name of every entry of ours in a model's state dict
_EXTRA = f"{OWNED}_extra_state"  # end of the name of an entry that checkpoints of earlier releases have


def settle(model: PreTrainedModel, info: LoadStateDictInfo) -> None:
    """Puts back to its start every layer for which a checkpoint held something else than all that it needs, warns of
    these layers in one sentence, in another of those that need nothing and for which it held something, and takes our
    entries out of transformers' report of what did not fit."""
    of_others = {key for key in info.unexpected_keys if OWNED in key}
    info.unexpected_keys -= of_others
    misfits = {entry[0] for entry in info.mismatched_keys if OWNED in entry[0]}
    info.mismatched_keys = {entry for entry in info.mismatched_keys if entry[0] not in misfits}
    left: list[tuple[str, LayerAttention]] = []
    unused: list[tuple[str, LayerAttention]] = []
    is_whole = True
    for path, core in _cores(model):
        has_other = any(_are_one(path, key[: key.index(OWNED)] + OWNED[:-1]) for key in of_others)
        if has_other and core.kernel_of_state is not None and not core.has_state:
            unused.append((path, core))
        names = {f"{path}.{name}" for name in core.state_dict()}
        wrong = names & (info.missing_keys | misfits)
        if not wrong:
            continue
        if wrong - misfits != names:
            core.restart()
        if wrong - misfits != names or has_other:
            left.append((path, core))
            is_whole = is_whole and (has_other or bool(misfits & names))
    if left:
        core = left[0][1]
        what = "is not whole" if not is_whole else f"is of another low-rank kernel than {core.kernel_of_state}"
        how = "new and uncalibrated (sb.calibrate)" if core.needs_calibration else "new"
        warn(f"{_named(left)} {'are' if len(left) > 1 else 'is'} {how}: what the checkpoint holds there {what}.", 5)
    if unused:
        entries = unused_entries(unused[0][1].low_rank)
        warn(f"the checkpoint's entries of scatterbrain for {_named(unused)} are {entries}", 5)


def _named(layers: list[tuple[str, LayerAttention]]) -> str:
    path = layers[0][0]
    return f"{len(layers)} attention layers ({path}, ...)" if len(layers) > 1 else f"attention layer {path}"


def take_extra_states(
    model: PreTrainedModel, info: LoadStateDictInfo, state_dict: dict[str, Any] | None, files: list[str] | None
) -> None:
    """Gives every layer its entry in a checkpoint of an earlier release."""
    names = {key for key in info.unexpected_keys if key.endswith(_EXTRA)}
    if not names:
        return
    cores = list(_cores(model))
    for name, extra in _read(names, state_dict, files):
        for path, core in cores:
            if not _are_one(path, name.rpartition(".")[0]):
                continue
            info.unexpected_keys.discard(name)
            made = {f"{path}.{entry}" for entry in core.made_from_extra_state}
            own = {f"{path}.{entry}" for entry in core.state_dict()}
            if not (own - made) & info.missing_keys and not any(tensor.is_meta for tensor in core.buffers()):
                core.load_extra_state(extra)
                info.missing_keys -= made


def _read(names: set[str], state_dict: dict[str, Any] | None, files: list[str] | None) -> Iterator[tuple[str, Tensor]]:
    """Entries of a checkpoint, given as a dictionary or as files."""
    if state_dict is not None:
        yield from ((name, state_dict[name]) for name in names & state_dict.keys())
        return
    for file in files or ():
        if str(file).endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(file, framework="pt") as entries:
                yield from ((name, entries.get_tensor(name)) for name in names.intersection(entries.keys()))
        else:
            entries = torch.load(file, map_location="cpu", weights_only=True)
            yield from ((name, entries[name]) for name in names & entries.keys())


def _cores(model: PreTrainedModel) -> Iterator[tuple[str, LayerAttention]]:
    for path, module in attention_layers(model):
        core = core_of(module)
        if core is not None:
            yield f"{path}.{CORE}" if path else CORE, core


def _are_one(path: str, other: str) -> bool:
    """Whether two paths are one, but for the name of a base model before one of them."""
    return path == other or path.endswith(f".{other}") or other.endswith(f".{path}")
