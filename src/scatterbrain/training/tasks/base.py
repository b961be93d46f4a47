"""What a training task is: data, model, metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, Protocol

import torch
from torch import nn

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import DataConfig, ModelConfig, TrainConfig, check_types, require, require_defaults
from scatterbrain.training.metrics import Metric
from scatterbrain.training.models.blocks import AttentionFactory
from scatterbrain.training.models.decoder import Decoder
from scatterbrain.training.models.encoder import Encoder, PairClassifier, SequenceClassifier


class TaskData(Protocol):
    """The data of a task, opened for one run. Batches are functions of their number, so a checkpoint has no state of
    the data, and processes can share them out.

    Args:
        description: what there is, in one line.
        input_size: tokens of the vocabulary or, with ``has_features``, features of a token.
        classes: of a target.
        tokens: of the longest sequence.
        has_features: whether tokens are vectors rather than numbers of a vocabulary.
        fingerprint: of the content that was read from files, by which a run that goes on knows its data; "" where
            nothing was read.
        files: by name, what is stored in the run's folder, such as the tokenizer that made the tokens.
    """

    description: str
    input_size: int
    classes: int
    tokens: int
    has_features: bool = False
    fingerprint: str = ""
    files: Mapping[str, bytes] = MappingProxyType({})

    def training_batch(self, number: int, fraction: float) -> Batch:
        """Batch ``number``, from 0, of training, when ``fraction`` of the run is done: only curricula read it."""
        ...

    def validation_batch(self, number: int) -> Batch:
        """Batch ``number`` of every validation; nothing in it is trained on."""
        ...


class Task(ABC):
    """A task: a frozen dataclass whose fields are the keys of the section ``task`` beside ``kind``. It checks them when
    it is made, with errors that begin with their key.

    Args:
        kind: its name in configuration files.
        metric: what a model is judged by.
        head: one class for the token after each ("next", causal), for each token ("token"), for a sequence or for a
            pair of sequences.
        is_configurable: whether numbers and names make it.
        inputs: what the rows are of that a model is measured on.
        layout: what ``data.path`` has to hold and where to get it, for errors; "" where the task's own errors say it.
    """

    kind: ClassVar[str]
    metric: ClassVar[Metric]
    head: Literal["next", "token", "sequence", "pair"]
    is_configurable: ClassVar[bool] = True
    inputs: ClassVar[str] = "tokens of its validation inputs"
    layout: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_types(self, "task.")

    @property
    def is_causal(self) -> bool:
        """Whether a token reads only itself and those before it."""
        return self.head == "next"

    def head_dim(self, config: ModelConfig) -> int:
        """Of the attention that reads the longest sequences."""
        return config.width // config.heads

    @abstractmethod
    def open(self, data: DataConfig, train: TrainConfig) -> TaskData:
        """Reads or draws the data.

        Raises:
            ValueError: naming the key: data that are missing, with the layout that is expected, or too few.
        """

    def build_model(
        self, data: TaskData, config: ModelConfig, attention: AttentionFactory, generator: torch.Generator
    ) -> nn.Module:
        """The model, which maps inputs and mask of a batch to logits (..., classes), one for each target.

        Args:
            data: what is trained on, which says how wide inputs and outputs are.
            config: the section ``model``.
            attention: makes the attention of a layer.
            generator: draws every other weight.

        Raises:
            ValueError: naming the key, for a setting that such a model has no use for.
        """
        has_pool = self.head in ("sequence", "pair")
        require(
            has_pool or config.pooling == "mean", "model.pooling", f"mean, as {self.kind} pools nothing", config.pooling
        )
        if self.head == "next":
            return Decoder(config, data.input_size, attention, generator, data.tokens)
        model = {"token": Encoder, "sequence": SequenceClassifier, "pair": PairClassifier}[self.head]
        sizes = (data.input_size, data.classes)
        return model(config, *sizes, attention, generator, data.tokens, getattr(data, "has_features", False))

    def check_unused(self, data: TaskData, config: ModelConfig) -> list[str]:
        """Looks for settings that the model makes no use of. Asked of a run that starts anew alone: one that goes on,
        or is only read, has the settings of its checkpoint, which nobody can leave out any more.

        Args:
            data: what is trained on.
            config: the section ``model``.

        Returns:
            A line for each that is merely left out: files that others extend set it for every form of the model.

        Raises:
            ValueError: naming the key and the way out, for any other one that is not at its default.
        """
        if type(self).build_model is not Task.build_model:  # a model of its own, which may use all of them
            return []
        if getattr(data, "has_features", False) and config.positions != "learned":
            why = f"{self.kind} embeds no vocabulary and model.positions {config.positions} no positions"
            require_defaults(config, ["embedding_std"], "model.", why)
        if config.positions == "rotary" or config.rope_base == ModelConfig.rope_base:
            return []
        return [f"model.rope_base: {config.rope_base} is not used, model.positions {config.positions} rotates nothing"]

    def sample(
        self, model: nn.Module, prompt: str, length: int, temperature: float, context: int, seed: int
    ) -> str | None:
        """Text that the model writes after a prompt; None where it writes none.

        Args:
            model: that :meth:`build_model` made.
            prompt: what the text begins with.
            length: tokens to add.
            temperature: 0 takes the most likely token.
            context: the longest sequence that is read.
            seed: of the draws.
        """
        return None
