"""The configuration and the data that a checkpoint was made with against those it is continued with."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from scatterbrain.training.config import RunConfig, misfit
from scatterbrain.training.files import RunFolder, UnusableRun
from scatterbrain.training.tasks.base import TaskData

# A continued run may differ in these. Every other setting of data, model, attention and train affects what is learned.
FREE_TRAIN_KEYS = ("steps", "minutes", "device", "threads", "validate_every", "validation_batches", "checkpoint_every")
FREE_TRAIN_KEYS += ("parallel", "recompute", "compile", "tensorboard")  # how the same model is computed


_ANEW = "start anew in another folder with --output"


def as_plain_data(config: RunConfig) -> dict[str, Any]:
    """The configuration in the types of YAML and JSON, without the settings of a single start of the run."""
    plain = _with_lists(dataclasses.asdict(config))
    return {name: value for name, value in plain.items() if name not in ("resume", "overwrite")}


def _with_lists(value: Any) -> Any:
    """Lists in place of tuples, however deep, as in the fields of a user's own task."""
    if isinstance(value, dict):
        return {name: _with_lists(one) for name, one in value.items()}
    return [_with_lists(one) for one in value] if isinstance(value, (list, tuple)) else value


def check_same_run(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UnusableRun for a setting that affects what is learned and has changed, and for unknown ones."""
    before, now = (_flat(settings) for settings in (stored, current))
    for key in before.keys() | now.keys():
        section, _, name = key.partition(".")
        is_free = section in ("sample", "compare", "output") or (section == "train" and name in FREE_TRAIN_KEYS)
        if key not in now:
            what = f"the checkpoint was made with {before[key]!r}, and this version has no such setting"
        elif is_free:
            continue
        elif key not in before:
            what = f"the checkpoint does not say what it was made with, got {now[key]!r}"
        elif expected := misfit(key, before[key]):
            what = f"expected {expected}, and the checkpoint was made with {before[key]!r}"
        elif _is_same(before[key], now[key]):
            continue
        else:
            what = f"the checkpoint was made with {before[key]!r}, got {now[key]!r}"
        raise UnusableRun(
            f"{key}: {what}; continue with the same setting, or start anew in another folder with --output"
        )


def data_text(data: TaskData) -> str:
    """What the data are, as a run's folder keeps it: two lines where they were read from files, else one."""
    fingerprint = getattr(data, "fingerprint", "")
    return f"{data.description}\n" + (f"sha256 {fingerprint}\n" if fingerprint else "")


def data_difference(folder: RunFolder, data: TaskData) -> str | None:
    """In what the data of the run in the folder differ from these; None where they are the same, and for runs of
    earlier versions, which do not tell."""
    if not folder.data.exists():
        return None
    before, now = folder.data.read_text(encoding="utf-8").splitlines(), data_text(data).splitlines()
    if before == now:
        return None
    is_about_content = before[:1] == now[:1]
    told = f"{before[0] if before else 'nothing'!r} there, {now[0]!r} now"
    return "the content of the files has changed" if is_about_content else told


def check_same_data(folder: RunFolder, data: TaskData, otherwise: str = _ANEW) -> None:
    """
    Args:
        folder: of the run.
        data: that there are now.
        otherwise: the way out for who cannot restore them.

    Raises:
        UnusableRun: the data of the run in the folder, or what they were read with, such as a tokenizer, are not these.
    """
    changed = data_difference(folder, data)
    for name, content in getattr(data, "files", {}).items():
        path = folder.path / name
        before = path.read_bytes() if path.exists() else content
        if before != content and (changed or not _differ_in_padding(name, before, content)):
            raise UnusableRun(
                f"{path}: expected what the data of this run are read with now, got another one, with which the "
                f"checkpoint was trained; restore what makes it, the training text or the file that the task names, or "
                f"{otherwise}"
            )
    if changed:
        raise UnusableRun(f"data: {changed}; restore the files, or {otherwise}")


def _differ_in_padding(name: str, before: bytes, now: bytes) -> bool:
    """Whether two tokenizers are the same but for what fills short texts, which earlier versions stored unused."""
    if name != "tokenizer.json":
        return False
    try:
        one, other = (json.loads(content) | {"padding": None} for content in (before, now))
    except (ValueError, TypeError):
        return False
    return one == other


def _is_same(before: object, now: object) -> bool:
    """Whether two settings of the right type are one: 1 and 1.0 are one number, but not inside a mapping, whose types
    nothing has looked at."""
    if isinstance(now, dict):
        return json.dumps(before, sort_keys=True) == json.dumps(now, sort_keys=True)
    return before == now


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by section.key."""
    flat = {}
    for section, value in settings.items():
        flat |= (
            {f"{section}.{name}": one for name, one in value.items()}
            if isinstance(value, dict) and value
            else {section: value}
        )
    return flat
