"""A model with its optimizer: the training step and the evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.training.attention_timer import AttentionTimer, TimedAttention, now
from scatterbrain.training.batch import Batch
from scatterbrain.training.config import TrainConfig
from scatterbrain.training.metrics import Evaluation
from scatterbrain.training.model_options import apply_options
from scatterbrain.training.models.blocks import AttentionFactory
from scatterbrain.training.precision import Precision
from scatterbrain.training.processes import Processes, whole

ModelBuilder = Callable[[AttentionFactory, torch.Generator], nn.Module]
"""Makes a model from the attention of a layer and what draws all other weights. The model maps inputs and mask of a
:class:`Batch` to logits (..., classes), one for each target."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Figures of one optimizer step.

    Args:
        loss: mean, in nats per target.
        accuracy: share of targets that the largest logit names.
        gradient_norm: before clipping.
        tokens: read by the step.
        seconds: of the whole step. attention_seconds: of these, spent in attention.
    """

    loss: float
    accuracy: float
    gradient_norm: float
    tokens: int
    seconds: float
    attention_seconds: float


class Sums(NamedTuple):
    """Of the targets of a batch that are scored: their cross-entropy, those that the largest logit names, how many."""

    loss: Tensor
    correct: Tensor
    scored: int


class TrainState:
    """A model and its AdamW optimizer, with the step that trains it.

    Args:
        build: Makes the model.
        train: Optimisation.
        attention: Makes the attention of a layer.
        processes: Those that train the model together, all of which make it and call every method alike. Each works on
            its share, and figures are those of all.

    ``model`` is the model itself; with ``train.parallel`` fsdp its tensors are sharded.
    """

    def __init__(
        self,
        build: ModelBuilder,
        train: TrainConfig,
        attention: AttentionFactory,
        processes: Processes = Processes(),
    ) -> None:
        self.config, self.processes = train, processes
        self.device = _device(processes.device(train.device))
        self.timer = AttentionTimer()
        torch.manual_seed(train.seed)
        generator = torch.Generator().manual_seed(train.seed)

        def timed_attention(*sizes: int) -> nn.Module:
            return TimedAttention(attention(*sizes), self.timer)

        self.model = build(timed_attention, generator).to(self.device)
        apply_options(self.model, train, self.device)
        self._shared = processes.share_model(self.model, self.device)
        self.precision = Precision(train, self.device)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in trained if parameter.ndim == 2]
        others = [parameter for parameter in trained if parameter.ndim != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=train.learning_rate,
            betas=train.betas,
        )

    def step(self, batches: Iterable[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over the mean gradient of all targets that are scored in ``batches``: those of
        :meth:`Processes.own_batches`, of which every process takes its rows."""
        started = now(self.device)
        parts = [self.processes.own_rows(batch, self.config.accumulate) for batch in batches]
        scored = self._scored(parts)
        own_mean = scored / self.processes.count  # gradients become their mean over the processes
        self.timer.reset()
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total, correct, tokens = 0.0, 0, 0
        for index, part in enumerate(parts):
            with self._exchange(is_last=index == len(parts) - 1):
                sums = self._sums(part, self._shared)
                loss = sums.loss / own_mean
                self.precision.scaled(loss).backward()
            total += loss.item()
            correct, tokens = correct + int(sums.correct), tokens + part.tokens
        total, correct, tokens = self.processes.sums(total / self.processes.count, correct, tokens)
        self.precision.unscale(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)).item()
        if not math.isfinite(total) or not (math.isfinite(norm) or self.precision.scales_loss):
            raise FloatingPointError(
                f"expected a finite loss and gradient, got loss {total} and gradient norm {norm}; "
                "lower train.learning_rate or lengthen train.warmup"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.precision.step(self.optimizer)
        sb.update_statistics(self.model)
        return StepResult(total, correct / scored, norm, int(tokens), now(self.device) - started, self.timer.seconds)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Means over all targets of ``batches`` that are scored; the batches are shared out among the processes."""
        self.model.eval()
        total, correct, scored = 0.0, 0, 0
        batches, count = list(batches), self.processes.count
        for first in range(0, len(batches), count):
            index = first + self.processes.rank
            is_own = index < len(batches)  # else the first one again: processes take the same number of forward passes
            sums = self._sums(batches[index if is_own else 0], self.model)
            if is_own:
                total += sums.loss.item()
                correct, scored = correct + int(sums.correct), scored + sums.scored
        total, correct, scored = self.processes.sums(total, correct, scored)
        _require_scored(scored)
        return Evaluation(total / scored, correct / scored)

    def _sums(self, batch: Batch, model: nn.Module) -> Sums:
        batch = batch.to(self.device)
        with self.precision.autocast():
            logits = model(batch.inputs, batch.mask)
        logits, targets = logits.float().flatten(0, -2), batch.targets.flatten()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        correct = (logits.detach().argmax(dim=-1) == targets).sum()
        return Sums(loss, correct, _scored(batch))

    def _scored(self, parts: list[Batch]) -> float:
        """Targets that a step scores, those of all processes together."""
        [scored] = self.processes.sums(sum(map(_scored, parts)))
        _require_scored(scored)
        return scored

    def _exchange(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Around the passes of a batch: processes that each have the whole model exchange gradients once a step."""
        if is_last or self.processes.mode != "ddp":
            return contextlib.nullcontext()
        return self._shared.no_sync()


def _scored(batch: Batch) -> int:
    return int((batch.targets != -100).sum())


def _require_scored(scored: float) -> None:
    if scored == 0:
        raise ValueError(
            "expected batches with at least one target that is scored, got none: a target of -100 is not; choose "
            "settings of the task that leave something to learn"
        )


def scheduled_learning_rate(config: TrainConfig, step: int, fraction: float) -> float:
    """Learning rate of step ``step``, counted from 0, when ``fraction`` of the run is done: linear warm-up times the
    schedule."""
    fraction = min(fraction, 1.0)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * fraction)), "linear": 1 - fraction, "constant": 1.0}[
        config.schedule
    ]
    share = config.final_learning_rate + (1 - config.final_learning_rate) * left
    return config.learning_rate * share * min(1.0, (step + 1) / max(config.warmup, 1))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device: expected cpu, cuda or another torch device, got {name!r}") from error
    if device.type == "meta":
        raise ValueError("train.device: expected a device that holds values, such as cpu or cuda, got 'meta'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"train.device: expected a device of this machine, got {name!r}, and torch finds no GPU; use cpu"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # by the kind of device
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"train.device: expected a device of this machine, got {name!r}, which torch cannot use: {reason}; use cpu"
        ) from error
    return device
