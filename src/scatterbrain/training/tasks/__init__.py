"""Training tasks, a file each: data, model and metric. :mod:`base` says what one defines."""

from __future__ import annotations

import dataclasses
from typing import Any

from scatterbrain.registry import Registry
from scatterbrain.training.config import DataConfig, TrainConfig, WrongType
from scatterbrain.training.tasks.base import Task, TaskData
from scatterbrain.training.tasks.copy import Copy
from scatterbrain.training.tasks.image_classification import ImageClassification
from scatterbrain.training.tasks.image_sequence import ImageSequence
from scatterbrain.training.tasks.language import Language
from scatterbrain.training.tasks.listops import ListOps
from scatterbrain.training.tasks.majority import Majority
from scatterbrain.training.tasks.names import Names
from scatterbrain.training.tasks.pathfinder import Pathfinder
from scatterbrain.training.tasks.recall import Recall
from scatterbrain.training.tasks.retrieval import Retrieval
from scatterbrain.training.tasks.text_classification import TextClassification
from scatterbrain.training.tasks.words import Words

__all__ = ["TASKS", "Task", "TaskData", "build_task", "described_task", "open_data", "register"]

TASKS = Registry(Task)
register = TASKS.register
for _task in (
    Language,
    Words,
    Copy,
    Recall,
    Majority,
    ListOps,
    TextClassification,
    Retrieval,
    ImageSequence,
    ImageClassification,
    Pathfinder,
    Names,
):
    register(_task)


def build_task(given: str | dict[str, Any]) -> Task:
    """The task that a configuration names, by its kind or as a mapping of its kind and fields. "module:Class" names one
    of the user's own.

    Raises:
        ValueError: naming the key, for a kind or a field that does not exist, and for a value that the task refuses.
    """
    try:
        cls = TASKS.class_of(given, "task", imports=True)
    except TypeError as error:
        raise WrongType(str(error)) from error
    try:
        return cls(**TASKS.fields_of(cls, given, "task"))
    except TypeError as error:
        raise WrongType(f"task: {error}") from error


def described_task(given: str | dict[str, Any]) -> dict[str, Any]:
    """A configuration's task as a mapping with every field."""
    kind = given["kind"] if isinstance(given, dict) else given
    return {"kind": kind} | dataclasses.asdict(build_task(given))


def open_data(task: Task, data: DataConfig, train: TrainConfig) -> TaskData:
    """Opens a task's data.

    Raises:
        ValueError: as :meth:`Task.open`; what is wrong with ``data.path`` is followed by the layout that is expected.
    """
    try:
        return task.open(data, train)
    except ValueError as error:
        if not (task.layout and str(error).startswith("data.path")):
            raise
        raise ValueError(f"{error}. {task.layout}") from error
