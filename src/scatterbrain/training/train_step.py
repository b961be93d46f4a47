"""A model with its optimizer: the training step and the evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.training.attention_timer import AttentionTimer, TimedAttention, now
from scatterbrain.training.config import ModelConfig, TrainConfig
from scatterbrain.training.model import AttentionFactory, Decoder

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, int64 (batch, context); a target of -100 is not scored."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Figures of one optimizer step.

    Args:
        loss: mean, in nats per token.
        gradient_norm: before clipping.
        tokens: read by the step.
        seconds: of the whole step. attention_seconds: of these, spent in attention.
    """

    loss: float
    gradient_norm: float
    tokens: int
    seconds: float
    attention_seconds: float


class TrainState:
    """A decoder and its AdamW optimizer, with the step that trains it.

    Args:
        model: Sizes of the decoder.
        train: Optimisation.
        attention: Makes the attention of a layer.
        vocabulary: Number of tokens.
    """

    def __init__(
        self, model: ModelConfig, train: TrainConfig, attention: AttentionFactory, vocabulary: int = 256
    ) -> None:
        self.config = train
        self.device = _device(train.device)
        self.timer = AttentionTimer()
        torch.manual_seed(train.seed)
        generator = torch.Generator().manual_seed(train.seed)

        def timed_attention(*sizes: int) -> nn.Module:
            return TimedAttention(attention(*sizes), self.timer)

        self.model = Decoder(model, vocabulary, timed_attention, generator).to(self.device)
        decayed = [parameter for parameter in self.model.parameters() if parameter.ndim == 2]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=train.learning_rate,
            betas=train.betas,
        )

    def step(self, batches: Iterable[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over the mean gradient of ``batches``."""
        batches = list(batches)
        started = now(self.device)
        self.timer.reset()
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            loss = self._loss(batch) / len(batches)
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise FloatingPointError(
                f"expected a finite loss and gradient, got loss {total} and gradient norm {norm}; "
                "lower train.learning_rate or lengthen train.warmup"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        sb.update_statistics(self.model)
        tokens = sum(inputs.numel() for inputs, _ in batches)
        return StepResult(total, norm, tokens, now(self.device) - started, self.timer.seconds)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss over ``batches`` in nats per token."""
        self.model.eval()
        losses = [self._loss(batch).item() for batch in batches]
        return sum(losses) / len(losses)

    def _loss(self, batch: Batch) -> Tensor:
        inputs, targets = (tokens.to(self.device) for tokens in batch)
        with self._autocast():
            logits = self.model(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.bf16 else contextlib.nullcontext()


def scheduled_learning_rate(config: TrainConfig, step: int, fraction: float) -> float:
    """Learning rate of step ``step``, counted from 0, when ``fraction`` of the run is done: linear warm-up times a
    cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
    share = config.final_learning_rate + (1 - config.final_learning_rate) * cosine
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
    return device
