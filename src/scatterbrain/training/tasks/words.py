"""A language model of words or word pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from tokenizers import Tokenizer

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import DataConfig, TrainConfig, require
from scatterbrain.training.data import Batches, GrowingBatches
from scatterbrain.training.metrics import PERPLEXITY, Metric
from scatterbrain.training.tasks.curriculum import GrowingSequences
from scatterbrain.training.tasks.fingerprint import fingerprint_of
from scatterbrain.training.tasks.tokenized_text import (
    KINDS,
    Tokens,
    encode,
    read_text_parts,
    read_tokenizer,
    token_count,
    train_tokenizer,
)


@dataclass(frozen=True)
class Words(GrowingSequences):
    """Each token of a text from those before it. Sequences have ``train.context`` tokens. They grow with the run
    as in :class:`GrowingSequences`.

    ``data.path`` is a folder with wiki.train.tokens and wiki.valid.tokens, as WikiText-2 and WikiText-103 have them
    (https://huggingface.co/datasets/Salesforce/wikitext), or any text: a file, a folder or "stdlib".

    The tokenizer is written to the run's folder as tokenizer.json.

    Args:
        tokenizer: "words" (the most frequent words; the others are <unk>), "bpe" (byte-pair encoding), both made from
            the training text, or the path of a tokenizer.json of the tokenizers library.
        vocabulary: entries at most of a tokenizer that is made here; WikiText-2 has 33,278 words in all.
    """

    kind: ClassVar[str] = "words"
    layout: ClassVar[str] = (
        "Expected is a folder with wiki.train.tokens and wiki.valid.tokens, as WikiText has them "
        "(https://huggingface.co/datasets/Salesforce/wikitext), or any text file or folder of them. 'stdlib' needs no "
        "data"
    )
    metric: ClassVar[Metric] = PERPLEXITY
    head: ClassVar[str] = "next"

    tokenizer: str = "words"
    vocabulary: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokenizer != "", "task.tokenizer", f"{', '.join(KINDS)} or a path", self.tokenizer)
        require(self.vocabulary > 0, "task.vocabulary", "positive", self.vocabulary)

    def open(self, data: DataConfig, train: TrainConfig) -> TokenizedText:
        self.require_first_tokens(train.context, "train.context")
        if self.tokenizer in KINDS:
            training, validation = read_text_parts(data)
            tokenizer = train_tokenizer(training, self.tokenizer, self.vocabulary)
        else:
            tokenizer = read_tokenizer(self.tokenizer)  # first, since texts can be long
            training, validation = read_text_parts(data)
        return TokenizedText(
            tokenizer,
            encode(tokenizer, training),
            encode(tokenizer, validation),
            train,
            partial(self.tokens_at, tokens=train.context),
        )


class TokenizedText:
    """Sequences of tokens of a training and a validation text.

    Args:
        tokenizer: That made them.
        training: Tokens to learn from. validation: Those of the validation part.
        train: Sizes of a batch, and the seed.
        tokens_at: Tokens of a training sequence when a share of the run is done. Shorter ones are more in a batch.

    ``files`` are stored with the run.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        training: Tokens,
        validation: Tokens,
        train: TrainConfig,
        tokens_at: Callable[[float], int],
    ) -> None:
        sizes = (train.context, train.batch, train.seed)
        self.training = GrowingBatches(training.tokens, *sizes, tokens_at, unit="tokens")
        self.validation = Batches(validation.tokens, *sizes, name="validation", unit="tokens")
        self.input_size = self.classes = token_count(tokenizer)
        self.tokens = train.context
        self.fingerprint = fingerprint_of([training.tokens, validation.tokens])
        self.files = {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
        count = validation.tokens.numel()
        self.description = (
            f"{training.tokens.numel():,} tokens to train on, {count:,} to validate on, of {self.classes:,}; in "
            f"validation {validation.bytes / count:.3f} bytes and {validation.words / count:.3f} words a token, "
            f"{validation.unknown / count:.1%} unknown"
        )

    def training_batch(self, number: int, fraction: float) -> Batch:
        """Consecutive tokens from random places, each pass over the text in another order."""
        return Batch(*self.training.at(number, fraction))

    def validation_batch(self, number: int) -> Batch:
        """Sequences of the validation part."""
        return Batch(*self.validation[number])
