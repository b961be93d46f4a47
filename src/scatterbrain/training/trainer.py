"""A run from its configuration to its files: steps, validation, checkpoints, resuming and stopping."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm import tqdm

from scatterbrain.training import board
from scatterbrain.training.attention import attention_of_layers, describe_attention, is_exact
from scatterbrain.training.batch import Batch
from scatterbrain.training.checkpoint import Progress, load_checkpoint, read_worth, save_checkpoint, save_weights
from scatterbrain.training.closed_output import Result, shown
from scatterbrain.training.compare import compare_with_exact, comparison_table
from scatterbrain.training.config import AttentionConfig, RunConfig, SampleConfig
from scatterbrain.training.curves import draw_curves
from scatterbrain.training.files import FolderLock, RunFolder, UnusableRun, output_folder, write_atomically
from scatterbrain.training.initial_weights import initialize_from
from scatterbrain.training.interrupt import StopRequest, stopped_by
from scatterbrain.training.low_rank_share import low_rank_shares
from scatterbrain.training.metrics import Evaluation
from scatterbrain.training.models.blocks import AttentionFactory
from scatterbrain.training.processes import FirstProcessFailed, join, lost_a_process
from scatterbrain.training.run_log import RunLog
from scatterbrain.training.run_start import lock_folder, progress_in, write_first_files
from scatterbrain.training.same_run import as_plain_data, data_text
from scatterbrain.training.tasks import build_task, described_task, open_data
from scatterbrain.training.train_step import StepResult, TrainState, scheduled_learning_rate


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
        self.folder = RunFolder(output_folder(config.output))
        self._is_unread, self._stop = False, None  # whether nobody reads what is printed; what asks for a stop then
        threads_before = torch.get_num_threads()
        self._threads = config.train.threads or threads_before
        self.processes = join(config.train)
        try:
            torch.set_num_threads(self._threads)
            self.task = build_task(config.task)
            self.data = open_data(self.task, config.data, config.train)
            self._description = as_plain_data(dataclasses.replace(config, task=described_task(config.task)))
            self.processes.require_same("options", self._description)
            if config.train.tensorboard:
                self.processes.first(board.check_installed)
            self.processes.require_same("data", data_text(self.data))
            self.data.validation_batch(0)  # what cannot be drawn is found now, not after hundreds of steps
            starts_anew = self.processes.first(lambda: not (config.resume and self.folder.checkpoint.exists()))
            for line in self.task.check_unused(self.data, config.model) if starts_anew else []:
                self._say(line)
            self.train_state = self._train_state(config.attention, starts_anew)
            self.steps_done, self._seconds_before = 0, 0.0
            self._checkpointed_step: int | None = None
            self._kept_value: float | None = None
            self._lock: FolderLock | None = None
            self._open()
        except BaseException as error:
            is_lost = lost_a_process(error)
            self.processes.leave()
            if is_lost:
                raise ConnectionError(f"another process of the run has ended, see what it said: {error}") from error
            raise
        finally:
            torch.set_num_threads(threads_before)

    def run(self) -> None:
        """Trains to the end of the schedule, then writes the sample.

        Raises:
            RunStopped: after SIGINT or SIGTERM, or when nobody reads what it prints any more, once the current step is
                finished and saved; if a file cannot be written; for a loss that is not finite; and for data or settings
                that a later step finds unusable, once the steps before are saved. The last checkpoint is whole in all
                cases.
        """
        try:
            with self.own_threads():
                self._run()
        finally:
            if self._board is not None:
                self._board.close()
            if self._lock is not None:
                self._lock.release()
            self.processes.leave()

    @contextlib.contextmanager
    def own_threads(self) -> Iterator[None]:
        """Inside, torch has the threads of this run. Their number is the process's: another run that is made or done in
        it, as of a table, is not to have this one's."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _run(self) -> None:
        with StopRequest(self.processes) as self._stop:
            stop = self._stop
            if self._is_unread:
                stop.ask_as_unread()
            try:
                self._introduce()
                self._do_everything(stop)
            except RunStopped:
                raise
            except FloatingPointError as error:
                raise self._stopped(str(error), 1) from error
            except OSError as error:
                raise self._stopped(f"cannot write to {self.folder.path}: {error}", 1) from error
            except Exception as error:
                if not lost_a_process(error):
                    raise
                raise self._stopped(f"another process of the run has ended, see what it said: {error}", 1) from error
        if stop.signal is not None:
            raise self._stopped(stopped_by(stop.signal), 128 + stop.signal)

    def _do_everything(self, stop: StopRequest) -> None:
        try:
            self._fit(stop)
            if not stop.check():
                self._write_sample()
            if not stop.check():
                self._compare(stop)
            stop.check()
        except ValueError as error:
            is_alone = not self.processes.are_several  # else this may be the only process with the error
            if is_alone and self.steps_done > 0 and self._checkpointed_step != self.steps_done:
                self._save()
            self._write_table()
            reason = " ".join(str(error).split()).rstrip(".")
            raise RunStopped(f"{reason}. {self._whereabouts()}", getattr(error, "exit_code", 1)) from error

    def _stopped(self, reason: str, exit_code: int) -> Exception:
        """The end of the run, of which the first process tells."""
        self._write_table()
        message = f"{reason}. {self._whereabouts()}"
        return (RunStopped if self.processes.is_first else FirstProcessFailed)(message, exit_code)

    def training_batches(self, step: int, fraction: float | None = None) -> list[Batch]:
        """The batches of step ``step``, counted from 0, when ``fraction`` of the run is done: by default the share of
        the steps. Of those of all processes, the ones that this one works on."""
        accumulate = self.config.train.accumulate
        fraction = min(step / self.config.train.steps, 1.0) if fraction is None else fraction
        return [self.data.training_batch(step * accumulate + index, fraction) for index in self._own_batches()]

    def _own_batches(self) -> range:
        return self.processes.own_batches(self.config.train.accumulate)

    def validation_batches(self) -> list[Batch]:
        """The batches of every validation."""
        return [self.data.validation_batch(index) for index in range(self.config.train.validation_batches)]

    def _train_state(self, attention: AttentionConfig, starts_anew: bool = True) -> TrainState:
        source = self.config.train.initialize_from if starts_anew else None

        def build(factory: AttentionFactory, generator: torch.Generator) -> nn.Module:
            model = self.task.build_model(self.data, self.config.model, factory, generator)
            if source is not None:
                self._say(initialize_from(source, model))
            return model

        factory = attention_of_layers(attention, self.task.is_causal, self.config.train.seed)
        return TrainState(build, self.config.train, factory, self.processes)

    def _open(self) -> None:
        """Starts the output folder, or continues the run in it. The first process alone reads and writes there."""
        progress = self.processes.first(self._look_into_folder)
        if progress is not None:
            try:
                load_checkpoint(self.folder.checkpoint, self.train_state)
            except UnusableRun as error:  # which all processes find
                if self.processes.is_first:
                    raise
                raise FirstProcessFailed(str(error), error.exit_code) from error
            self.steps_done, self._seconds_before = progress.step, progress.seconds
            self._checkpointed_step = progress.step
            kept = self.processes.first(lambda: read_worth(self.folder.best, self.task.metric.name))
            # Of a run that was killed the best weights may be those of a validation that its log has no more.
            self._kept_value = kept[1] if kept is not None and kept[0] > progress.step else None
        records = self.processes.first(
            lambda: write_first_files(self.folder, self.config, self._description, self.data, progress, self._say)
        )
        self._board = None
        if self.config.train.tensorboard and self.processes.is_first:
            self._board = board.Board(self.folder.board, self.steps_done)
        self.log = RunLog(self.folder.metrics if self.processes.is_first else None, records, self._board)

    def _look_into_folder(self) -> Progress | None:
        """Makes and locks the folder; what the run in it has come to, if it is to be continued."""
        self._lock = lock_folder(self.folder, self.config)
        return progress_in(self.folder, self.config, self._description)

    def _say(self, text: str) -> None:
        if self.processes.is_first:
            self._shown(lambda: (tqdm.write(text), sys.stdout.flush()))

    def _shown(self, show: Callable[[], Result]) -> Result:
        """As :func:`shown`; a run whose output is not read any more stops after its step, as other programs end."""
        return shown(show, self._note_unread)

    def _note_unread(self) -> None:
        self._is_unread = True
        if self._stop is not None:
            self._stop.ask_as_unread()

    def _introduce(self) -> None:
        parameters = sum(parameter.numel() for parameter in self.train_state.model.parameters())
        self._say(f"{self.data.description}; {parameters:,} parameters; {self._attention()}")
        if self.processes.are_several:
            self._say(f"{self.processes.count} processes, train.parallel {self.processes.mode}")
        continues = f", continuing after step {self.steps_done}" if self.steps_done else ""
        self._say(f"output in {self.folder.path}{continues}")

    def _fit(self, stop: StopRequest) -> None:
        train = self.config.train
        self._started = time.perf_counter()
        bar = self._shown(lambda: _progress_bar(self._fraction(), self.processes.is_first))
        try:
            while (fraction := self._agreed_fraction()) < 1 and not stop.check():
                rate = scheduled_learning_rate(train, self.steps_done, fraction)
                result = self.train_state.step(self.training_batches(self.steps_done, fraction), rate)
                self.steps_done += 1
                self._record(result, rate, fraction)
                if self.steps_done % train.validate_every == 0 or self.steps_done == self.config.compare.steps:
                    self._validate()
                if self.steps_done % train.checkpoint_every == 0:
                    self._save()
                self._show(bar, result)
            if stop.signal is None and not self._validated():
                self._validate()
        finally:
            self._shown(bar.close)
        if self._checkpointed_step != self.steps_done:
            self._save()
        self._draw({})
        self._say(f"step {self.steps_done}: checkpoint in {self.folder.checkpoint}, curves in {self.folder.loss_curve}")

    def _agreed_fraction(self) -> float:
        """The share of the run that is done by the clock of the first process."""
        fraction = self._fraction()
        if self.config.train.minutes is None:
            return fraction
        return self.processes.largest(fraction if self.processes.is_first else 0.0)[0]

    def _fraction(self) -> float:
        """Share of the run that is done, by steps or by minutes, whichever is larger."""
        train = self.config.train
        fraction = self.steps_done / train.steps
        if train.minutes is not None:
            fraction = max(fraction, self._seconds() / (60 * train.minutes))
        return min(fraction, 1.0)

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def _record(self, result: StepResult, learning_rate: float, fraction: float) -> None:
        # The step alone does not tell the batch: train.steps may change when the run goes on.
        record = {"kind": "train", "step": self.steps_done, "learning_rate": learning_rate, "fraction": fraction}
        metric = {self.task.metric.name: self.task.metric.of(Evaluation(result.loss, result.accuracy))}
        self.log.append(record | metric | dataclasses.asdict(result))

    def _validate(self) -> None:
        batches = self.validation_batches()
        found = self.train_state.evaluate(batches)
        with low_rank_shares(self.train_state.model) as shares, torch.compiler.set_stance("force_eager"):
            self.train_state.evaluate(batches[:1])  # compiled graphs do not know the hooks that measure
        metric, value = self.task.metric, self.task.metric.of(found)
        is_best = math.isfinite(value) and not any(
            before == value or metric.better(before, value) for before in self.log.metric("validation", metric)
        )
        if self._kept_value is not None and metric.better(self._kept_value, value):
            is_best = False
        if is_best:
            save_weights(self.folder.best, self.train_state, self.steps_done, metric.name, value)
        record = {"kind": "validation", "step": self.steps_done, "seconds": self._trained_seconds()}
        record |= {metric.name: value} | dataclasses.asdict(found) | {"best": is_best}
        self.log.append(record | ({"low_rank_shares": shares} if shares else {}))
        carried = f", low-rank share of weight by layer {' '.join(f'{share:.2f}' for share in shares)}" * bool(shares)
        self._say(f"step {self.steps_done}: validation {metric.show(value)}{', the best' * is_best}{carried}")

    def _trained_seconds(self) -> float:
        """Seconds that the steps so far took."""
        return sum(record["seconds"] for record in self.log.of_kind("train"))

    def _validated(self) -> bool:
        return any(record["step"] == self.steps_done for record in self.log.of_kind("validation"))

    def _save(self) -> None:
        self.processes.first(self.log.sync)
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
        if text is None and config != SampleConfig():
            self._say(f"sample: not written, the task {self.task.kind} writes no text")
        if text is not None and self.processes.is_first:
            write_atomically(self.folder.sample, text.encode())
            self._say(f"sample, in {self.folder.sample}:\n{text}")

    def _compare(self, stop: StopRequest) -> None:
        if self.config.compare.steps == 0:
            return
        if is_exact(self.config.attention):
            self._say("compare.steps: nothing to compare, the run itself used exact attention")
            return
        train = self.config.train
        steps = min(self.config.compare.steps, self.steps_done)  # train.minutes may have ended the run before
        if not steps or [record["step"] for record in self.log.of_kind("train")[:steps]] != list(range(1, steps + 1)):
            self._say(
                f"compare.steps: nothing to compare, {self.folder.metrics} lacks records of the first {steps} steps"
            )
            return
        exact = RunLog(self.folder.exact_metrics if self.processes.is_first else None, [])
        batches = (self.training_batches, self.validation_batches())
        try:
            train_state = self._train_state(AttentionConfig(support="full"))
            is_whole = compare_with_exact(self.log, exact, steps, train_state, *batches, train.validate_every, stop)
        except FloatingPointError as error:
            self._say(f"compare.steps: exact attention diverged at step {len(exact.of_kind('train')) + 1}: {error}")
            return
        except ValueError as error:
            self._say(f"compare.steps: no comparison, exact attention cannot be trained: {error}")
            return
        if is_whole and self.processes.is_first:
            table = comparison_table(self.log, exact, self.task.metric)
            write_atomically(self.folder.comparison, (table + "\n").encode())
            self._say(table)
            self._draw({"exact attention": exact})

    def _draw(self, others: dict[str, RunLog]) -> None:
        if not self.processes.is_first:
            return
        write_atomically(self.folder.table, self.log.table().encode())
        attention = self._attention()
        name = "exact attention" if is_exact(self.config.attention) else "scatterbrain"
        draw_curves(self.folder.loss_curve, {name: self.log} | others, self.task.metric, attention)

    def _write_table(self) -> None:
        """The records so far as a table, also where the run ends by an error; on a full disk without it."""
        if self.processes.is_first:
            with contextlib.suppress(OSError):
                write_atomically(self.folder.table, self.log.table().encode())

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
        self._shown(lambda: bar.update(self._fraction() - bar.n))


def _progress_bar(fraction: float, is_shown: bool) -> tqdm:
    """A bar over the share of the run that is done, for limits in steps and in minutes."""
    layout = "{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    interval = 0.2 if sys.stderr.isatty() else 20.0
    options = {"bar_format": layout, "mininterval": interval, "dynamic_ncols": True, "disable": not is_shown}
    return tqdm(total=1.0, initial=fraction, **options)
