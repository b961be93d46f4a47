"""A run from its configuration to its files: steps, validation, checkpoints, resuming and stopping."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from tqdm import tqdm

from scatterbrain.training.attention import build_attention, describe_attention, is_exact
from scatterbrain.training.batch import Batch
from scatterbrain.training.checkpoint import Progress, load_checkpoint, read_progress, save_checkpoint
from scatterbrain.training.compare import compare_with_exact, comparison_table
from scatterbrain.training.config import AttentionConfig, RunConfig, misfit
from scatterbrain.training.curves import draw_curves
from scatterbrain.training.files import FolderLock, RunFolder, UnusableRun, write_atomically
from scatterbrain.training.initial_weights import initialize_from
from scatterbrain.training.interrupt import StopRequest
from scatterbrain.training.low_rank_share import low_rank_shares
from scatterbrain.training.metrics import Evaluation
from scatterbrain.training.models.blocks import AttentionFactory
from scatterbrain.training.run_log import RunLog, read_records
from scatterbrain.training.tasks import build_task, described_task
from scatterbrain.training.train_step import StepResult, TrainState, scheduled_learning_rate

# A continued run may differ in these. Every other setting of data, model, attention and train affects what is learned.
FREE_TRAIN_KEYS = ("steps", "minutes", "device", "threads", "validate_every", "validation_batches", "checkpoint_every")
FREE_TRAIN_KEYS += ("recompute", "compile")  # how it is computed; of the same model


class RunStopped(Exception):
    """The run ended early; the message says why, where the checkpoint is and how to continue."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Trainer:
    """A training run.

    Args:
        config: All its settings.

    Raises:
        ValueError: for settings that do not fit together, missing data, or an output folder whose checkpoint the
            configuration neither continues nor replaces.
        UnusableRun: a ValueError, for an output folder that another run is writing to, or whose files are not those of
            this run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = RunFolder(Path(config.output))
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        self.task = build_task(config.task)
        self.data = self.task.open(config.data, config.train)
        self.train_state = self._train_state(config.attention)
        self.steps_done, self._seconds_before = 0, 0.0
        self._checkpointed_step: int | None = None
        self._open()

    def run(self) -> None:
        """Trains to the end of the schedule, then writes the sample.

        Raises:
            RunStopped: after SIGINT or SIGTERM, once the current step is finished and saved, or if a file cannot be
                written; the last checkpoint is whole in both cases.
        """
        try:
            self._run()
        finally:
            self._lock.release()

    def _run(self) -> None:
        self._introduce()
        with StopRequest() as stop:
            try:
                self._fit(stop)
                if stop.signal is None:
                    self._write_sample()
                if stop.signal is None:
                    self._compare(stop)
            except FloatingPointError as error:
                raise RunStopped(f"{error}. {self._whereabouts()}", 1) from error
            except OSError as error:
                raise RunStopped(f"cannot write to {self.folder.path}: {error}. {self._whereabouts()}", 1) from error
        if stop.signal is not None:
            raise RunStopped(f"stopped by {stop.signal.name}. {self._whereabouts()}", 128 + stop.signal)

    def training_batches(self, step: int, fraction: float | None = None) -> list[Batch]:
        """The batches of step ``step``, counted from 0, when ``fraction`` of the run is done: by default the share of
        the steps."""
        accumulate = self.config.train.accumulate
        fraction = min(step / self.config.train.steps, 1.0) if fraction is None else fraction
        return [self.data.training_batch(step * accumulate + index, fraction) for index in range(accumulate)]

    def validation_batches(self) -> list[Batch]:
        """The batches of every validation."""
        return [self.data.validation_batch(index) for index in range(self.config.train.validation_batches)]

    def _train_state(self, attention: AttentionConfig) -> TrainState:
        def build(factory: AttentionFactory, generator: torch.Generator) -> nn.Module:
            return self.task.build_model(self.data, self.config.model, factory, generator)

        return TrainState(build, self.config.train, partial(build_attention, attention, is_causal=self.task.is_causal))

    def _open(self) -> None:
        """Starts the output folder, or continues the run in it."""
        checkpoint, resume = self.folder.checkpoint, self.config.resume
        if resume is True and not checkpoint.exists():
            raise ValueError(f"resume: expected a checkpoint at {checkpoint}, found none; leave resume out to start")
        try:
            self.folder.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UnusableRun(
                f"output: expected a folder, or a path where one can be made, got {self.folder.path}, where a file is "
                "in the way; choose another with --output"
            ) from error
        self._lock = FolderLock(self.folder.path)
        found = checkpoint.exists()
        if not resume and found and not self.config.overwrite:
            raise ValueError(
                f"output: {self.folder.path} already has a checkpoint; continue it with --resume true, replace it with "
                "--overwrite true, or choose another folder with --output"
            )
        self._description = _as_plain_data(dataclasses.replace(self.config, task=described_task(self.config.task)))
        records = []
        if resume and found:
            progress = read_progress(checkpoint)
            _check_same_run(progress.config, self._description)
            load_checkpoint(checkpoint, self.train_state)
            self.steps_done, self._seconds_before = progress.step, progress.seconds
            self._checkpointed_step = progress.step
            records = read_records(self.folder.metrics, progress.step)
            known = sum(record["kind"] == "train" for record in records)
            if known < progress.step:
                print(
                    f"{self.folder.metrics} has records of {known} of {progress.step} steps; the others are not drawn"
                )
        else:
            self._initialize(self.train_state)
        if found and self._checkpointed_step is None:
            self.folder.checkpoint.unlink()
        self._write_data_files(continues=self._checkpointed_step is not None)
        write_atomically(self.folder.config, yaml.safe_dump(self._description, sort_keys=False).encode())
        self.log = RunLog(self.folder.metrics, records)

    def _write_data_files(self, continues: bool) -> None:
        """Writes what the data are read with, such as a tokenizer. A run that is continued must have the same."""
        for name, content in getattr(self.data, "files", {}).items():
            path = self.folder.path / name
            if continues and path.exists() and path.read_bytes() != content:
                raise UnusableRun(
                    f"{path}: expected what the data of this run are read with now, got another one, with which the "
                    "checkpoint was trained; restore the data, or start anew in another folder with --output"
                )
            write_atomically(path, content)

    def _initialize(self, train_state: TrainState) -> None:
        """Puts the weights in that the run starts from, if they are those of an earlier one."""
        if self.config.train.initialize_from is not None:
            print(initialize_from(self.config.train.initialize_from, train_state.model))

    def _introduce(self) -> None:
        parameters = sum(parameter.numel() for parameter in self.train_state.model.parameters())
        print(f"{self.data.description}; {parameters:,} parameters; {self._attention()}")
        print(
            f"output in {self.folder.path}" + (f", continuing after step {self.steps_done}" if self.steps_done else "")
        )

    def _fit(self, stop: StopRequest) -> None:
        train = self.config.train
        self._started = time.perf_counter()
        with _progress_bar(self._fraction()) as bar:
            while self._fraction() < 1 and stop.signal is None:
                rate = scheduled_learning_rate(train, self.steps_done, self._fraction())
                result = self.train_state.step(self.training_batches(self.steps_done, self._fraction()), rate)
                self.steps_done += 1
                self._record(result, rate)
                if self.steps_done % train.validate_every == 0 or self.steps_done == self.config.compare.steps:
                    self._validate()
                if self.steps_done % train.checkpoint_every == 0:
                    self._save()
                self._show(bar, result)
            if stop.signal is None and not self._validated():
                self._validate()
        if self._checkpointed_step != self.steps_done:
            self._save()
        self._draw({})
        print(f"step {self.steps_done}: checkpoint in {self.folder.checkpoint}, curves in {self.folder.loss_curve}")

    def _fraction(self) -> float:
        """Share of the run that is done, by steps or by minutes, whichever is larger."""
        train = self.config.train
        fraction = self.steps_done / train.steps
        if train.minutes is not None:
            fraction = max(fraction, self._seconds() / (60 * train.minutes))
        return min(fraction, 1.0)

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def _record(self, result: StepResult, learning_rate: float) -> None:
        record = {"kind": "train", "step": self.steps_done, "learning_rate": learning_rate}
        metric = {self.task.metric.name: self.task.metric.of(Evaluation(result.loss, result.accuracy))}
        self.log.append(record | metric | dataclasses.asdict(result))

    def _validate(self) -> None:
        batches = self.validation_batches()
        found = self.train_state.evaluate(batches)
        with low_rank_shares(self.train_state.model) as shares, torch.compiler.set_stance("force_eager"):
            self.train_state.evaluate(batches[:1])  # compiled graphs do not know the hooks that measure
        metric = self.task.metric
        record = {"kind": "validation", "step": self.steps_done, "seconds": self._trained_seconds()}
        record |= {metric.name: metric.of(found)} | dataclasses.asdict(found)
        self.log.append(record | ({"low_rank_shares": shares} if shares else {}))
        carried = f", low-rank share of weight by layer {' '.join(f'{share:.2f}' for share in shares)}" * bool(shares)
        tqdm.write(f"step {self.steps_done}: validation {metric.show(metric.of(found))}{carried}")

    def _trained_seconds(self) -> float:
        """Seconds that the steps so far took."""
        return sum(record["seconds"] for record in self.log.of_kind("train"))

    def _validated(self) -> bool:
        return any(record["step"] == self.steps_done for record in self.log.of_kind("validation"))

    def _save(self) -> None:
        save_checkpoint(
            self.folder.checkpoint, self.train_state, Progress(self.steps_done, self._seconds(), self._description)
        )
        self._checkpointed_step = self.steps_done

    def _write_sample(self) -> None:
        config, train = self.config.sample, self.config.train
        if config.length == 0:
            return
        text = self.task.sample(
            self.train_state.model, config.prompt, config.length, config.temperature, train.context, train.seed
        )
        if text is not None:
            write_atomically(self.folder.sample, text.encode())
            print(f"sample, in {self.folder.sample}:\n{text}")

    def _compare(self, stop: StopRequest) -> None:
        if self.config.compare.steps == 0:
            return
        if is_exact(self.config.attention):
            print("compare.steps: nothing to compare, the run itself used exact attention")
            return
        steps, train = self.config.compare.steps, self.config.train
        if [record["step"] for record in self.log.of_kind("train")[:steps]] != list(range(1, steps + 1)):
            print(f"compare.steps: nothing to compare, {self.folder.metrics} lacks records of the first {steps} steps")
            return
        exact = RunLog(self.folder.exact_metrics, [])
        train_state = self._train_state(AttentionConfig(support="full"))
        self._initialize(train_state)
        batches = (self.training_batches, self.validation_batches())
        if compare_with_exact(self.log, exact, steps, train_state, *batches, train.validate_every, stop):
            table = comparison_table(self.log, exact, self.task.metric)
            write_atomically(self.folder.comparison, (table + "\n").encode())
            print(table)
            self._draw({"exact attention": exact})

    def _draw(self, others: dict[str, RunLog]) -> None:
        attention = self._attention()
        name = "exact attention" if is_exact(self.config.attention) else "scatterbrain"
        draw_curves(self.folder.loss_curve, {name: self.log} | others, self.task.metric, attention)

    def _attention(self) -> str:
        return describe_attention(self.config.attention, self.task.is_causal)

    def _whereabouts(self) -> str:
        if self._checkpointed_step is None:
            return "No checkpoint had been written yet."
        command = f"scatterbrain train {shlex.quote(str(self.folder.config))} --resume true"
        where = f"The checkpoint of step {self._checkpointed_step} is whole, in {self.folder.checkpoint}"
        return f"{where}; continue with: {command}"

    def _show(self, bar: tqdm, result: StepResult) -> None:
        metric = self.task.metric
        found = metric.show(metric.of(Evaluation(result.loss, result.accuracy)))
        text = (
            f"step {self.steps_done}, loss {result.loss:.3f}, {found}, {result.tokens / result.seconds:,.0f} tokens/s"
        )
        bar.set_postfix_str(text, refresh=False)
        bar.update(self._fraction() - bar.n)


def _as_plain_data(config: RunConfig) -> dict[str, Any]:
    """The configuration in the types of YAML and JSON, without the settings of a single start of the run."""
    plain = dataclasses.asdict(config, dict_factory=_with_lists)
    return {name: value for name, value in plain.items() if name not in ("resume", "overwrite")}


def _with_lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}


def _check_same_run(stored: dict[str, Any], current: dict[str, Any]) -> None:
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


def _progress_bar(fraction: float) -> tqdm:
    """A bar over the share of the run that is done, for limits in steps and in minutes."""
    layout = "{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    interval = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(total=1.0, initial=fraction, bar_format=layout, mininterval=interval, dynamic_ncols=True)
