"""Settings of a training run: a frozen dataclass per section; each field is a key of the YAML file and an option."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class WrongType(ValueError):
    """A setting of another type than its key has."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where data come from, of tasks that read some.

    Args:
        path: "stdlib" for the source of the running Python's standard library, or any text file or folder; tasks of
            images, pairs or classes say what they expect there.
        glob: Which files of a folder are read; folders below it are searched too.
        exclude: Folder names that are skipped wherever they appear below the path.
        validation_fraction: Share kept for validation. Of language models it is a share of the bytes: the last ones
            when the files are ordered by a hash of their names and joined. Of tasks of documents (names, retrieval,
            text_classification) it is a share of the files. Nothing is used for both. Images bring their own.
    """

    path: str = "stdlib"
    glob: str = "*.py"
    exclude: tuple[str, ...] = ("site-packages", "dist-packages", "test", "tests", "__pycache__")
    validation_fraction: float = 0.05

    def __post_init__(self) -> None:
        check_types(self, "data.")
        require(
            0 < self.validation_fraction < 1, "data.validation_fraction", "between 0 and 1", self.validation_fraction
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Transformer of pre-norm blocks.

    Args:
        layers: Number of blocks.
        width: Features per token.
        heads: Attention heads; each has width / heads features, an even number.
        kv_heads: Key/value heads (grouped queries); null for as many as heads.
        mlp: "swiglu" (gated) or "gelu".
        mlp_width: Hidden features of the MLP; null for 8/3 of the width (rounded up to a multiple of 16) with swiglu
            and 4 times the width with gelu, 3 times in a T2T-ViT as published.
        norm: "rms" or "layer".
        positions: "rotary" (relative, by rotating queries and keys), "learned" (a vector added to each position) or
            "none".
        rope_base: Base of the rotary frequencies.
        convolution: Tokens that each feature of queries, keys and values is mixed over, its own and those before; 1 for
            none. Two let a key hold the token before it, which recall needs in small models.
        pooling: What a class for a whole sequence is read from: the "mean" of its tokens, or the "first" token, where
            the task has one that stands for all, as the outermost operator of a list.
        tied: Whether the output head of a causal model shares the embedding's weights.
        embedding_std: Standard deviation of the embedding at initialisation, in units of width ** -0.5.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    mlp_width: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rope_base: float = 10000.0
    convolution: int = 1
    pooling: Literal["mean", "first"] = "mean"
    tied: bool = True
    embedding_std: float = 1.0

    def __post_init__(self) -> None:
        check_types(self, "model.")
        for name in ("layers", "width", "heads", "convolution"):
            require(getattr(self, name) > 0, f"model.{name}", "positive", getattr(self, name))
        require(
            self.width % (2 * self.heads) == 0, "model.width", f"a multiple of 2 * heads = {2 * self.heads}", self.width
        )
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        require(
            kv_heads > 0 and self.heads % kv_heads == 0,
            "model.kv_heads",
            f"a divisor of heads = {self.heads}",
            kv_heads,
        )
        require(self.mlp_width is None or self.mlp_width > 0, "model.mlp_width", "positive or null", self.mlp_width)
        require(0 < self.rope_base < math.inf, "model.rope_base", "positive and finite", self.rope_base)
        require(0 <= self.embedding_std < math.inf, "model.embedding_std", "0 or more", self.embedding_std)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention of every layer.

    Args:
        preset: Support and low-rank part to start from. "train" has keys routed per query, a window and a learned
            quadratic part; the other presets of scatterbrain do not train a causal model from scratch.
        keys: Keys that each query attends to exactly, window and routed keys together.
        support: Replaces the preset's support. A name (full, empty, window, routed) or a mapping with the name as
            "kind" and its fields, such as {kind: routed, block_q: 1, block_k: 8, window: 16}; "keys" is the one above
            unless the mapping has its own. "full" is exact attention, which has no low-rank part. Tasks that are not
            causal take lsh too.
        low_rank: Replaces the preset's low-rank part. "none", a name (quadratic, favor) or a mapping with the name as
            "kind" and its fields, such as {kind: quadratic, rank: 9, statistics: ema}; the statistics are "learned"
            (the default) or "ema". Tasks that are not causal take centroid too.
    """

    preset: Literal["train"] = "train"
    keys: int = 64
    support: str | dict[str, Any] | None = None
    low_rank: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_types(self, "attention.")
        require(self.keys > 0, "attention.keys", "positive", self.keys)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation.

    Args:
        steps: Optimizer steps of the whole run.
        minutes: Time limit; null for none. The learning rate then follows the larger of the two shares that are used
            up, of the steps and of the minutes, so a run that the limit ends has completed its schedule. Such a run
            depends on time and does not resume bit-identically.
        context: Bytes per sequence of a language model; other tasks have a length of their own (task.tokens).
        batch: Sequences per forward pass.
        accumulate: Batches per optimizer step, of all processes together.
        learning_rate: Peak of AdamW's learning rate.
        schedule: The learning rate falls along half a "cosine" or along a line ("linear"), or stays at its peak
            ("constant"); the warm-up is multiplied with that. It is read at the share of the run that is done before a
            step: 0 at the first of n steps, (n - 1) / n at the last.
        final_learning_rate: Where cosine and line end, at a share of 1, as a share of the peak.
        warmup: Steps of linear warm-up.
        betas: AdamW's two momenta.
        weight_decay: AdamW's decay, of matrices only.
        clip: Largest norm of the gradient.
        precision: "float32", or autocast of the forward pass: "bf16", or "fp16" with a loss that is scaled so that
            small gradients do not vanish; steps whose gradients overflow are left out, and the scale is halved. Weights
            and optimizer stay in float32.
        bf16: true is short for precision "bf16".
        recompute: Whether the backward pass computes every block again in place of keeping what is inside it: less
            memory, a second forward pass. Statistics "ema" of a step then count its tokens twice, which changes no
            mean.
        compile: Whether torch.compile makes graphs of the model, of all but its attention, which is compiled code
            already. Rounding differs from that of a run without.
        initialize_from: Checkpoint of an earlier run (or its best.safetensors) whose weights this one starts from,
            as in fine-tuning; null to draw them. What attention itself keeps starts anew where it differs there.
        parallel: How several processes, started with torchrun, train one model: "ddp", each has all of it, or "fsdp",
            each has a part of every tensor (sharded data parallelism). They share out the batches of a step: its
            accumulate batches, or rows of them. So the number of processes changes nothing but rounding.
        tensorboard: Whether the records are written for TensorBoard too, in the folder tensorboard of the output. Needs
            the package tensorboard.
        seed: Of the initial weights and the order of the data.
        device: "cpu", "cuda" or any torch device.
        threads: CPU threads of this run; null for torch's own choice.
        validate_every: Steps between validations.
        validation_batches: Batches per validation, always the same ones.
        checkpoint_every: Steps between checkpoints; there is one at the end as well.
    """

    steps: int = 2000
    minutes: float | None = None
    context: int = 2048
    batch: int = 2
    accumulate: int = 1
    learning_rate: float = 3e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_learning_rate: float = 0.05
    warmup: int = 20
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    bf16: bool = False
    recompute: bool = False
    compile: bool = False
    initialize_from: str | None = None
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    tensorboard: bool = False
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    validate_every: int = 100
    validation_batches: int = 8
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        check_types(self, "train.")
        positive = ("steps", "context", "batch", "accumulate", "learning_rate", "clip", "validate_every")
        for name in (*positive, "validation_batches", "checkpoint_every"):
            require(getattr(self, name) > 0, f"train.{name}", "positive", getattr(self, name))
        for name in ("minutes", "threads"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}", "positive or null", value)
        require(self.learning_rate < math.inf, "train.learning_rate", "a finite number", self.learning_rate)
        for name in ("final_learning_rate", "warmup", "weight_decay"):
            require(0 <= getattr(self, name) < math.inf, f"train.{name}", "0 or more", getattr(self, name))
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", "numbers from 0 to below 1", self.betas)
        require(0 <= self.seed < 2**63, "train.seed", "0 or more, in 63 bits", self.seed)
        require(
            not (self.compile and self.parallel == "fsdp"),
            "train.compile",
            "false with train.parallel fsdp",
            self.compile,
        )
        require(
            not (self.precision == "fp16" and self.parallel == "fsdp"),
            "train.precision",
            "float32 or bf16 with train.parallel fsdp",
            self.precision,
        )
        require(
            not (self.bf16 and self.precision == "fp16"),
            "train.precision",
            "bf16 with train.bf16 true (leave one of them out)",
            self.precision,
        )


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text written by the trained model at the end of the run.

    Args:
        prompt: What the model continues.
        length: Bytes to add; 0 for no sample.
        temperature: 0 always takes the most likely byte; 1 draws from the model's distribution.
    """

    prompt: str = "import os\n\n\ndef "
    length: int = 300
    temperature: float = 0.7

    def __post_init__(self) -> None:
        check_types(self, "sample.")
        require(self.prompt != "", "sample.prompt", "at least one character", self.prompt)
        require(self.length >= 0, "sample.length", "0 or more", self.length)
        require(self.temperature >= 0, "sample.temperature", "0 or more", self.temperature)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Comparison with the same model trained with exact attention after the run.

    Args:
        steps: Steps with exact attention, with the run's initial weights, batches and learning rates; 0 for no
            comparison.
    """

    steps: int = 0

    def __post_init__(self) -> None:
        check_types(self, "compare.")
        require(self.steps >= 0, "compare.steps", "0 or more", self.steps)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run.

    Args:
        task: What is learned: the task's name ("kind"), or a mapping of it and the task's own fields, such as {kind:
            copy, tokens: 255}.
        data: Where data come from.
        model: Sizes and variants of the model.
        attention: Attention of every layer.
        train: Optimisation.
        sample: Text written at the end.
        compare: Comparison with exact attention.
        output: Folder for the checkpoint, the weights of the best validation, the metrics, the loss curve and the
            sample.
        resume: true continues from the checkpoint in the output folder, "auto" does so if there is one, false starts
            anew and refuses a folder that has one.
        overwrite: Whether a run that starts anew may replace the one in the output folder.
    """

    task: str | dict[str, Any] = "language"
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    compare: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    output: str = "runs/lm"
    resume: bool | Literal["auto"] = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_types(self, "")
        require(self.output != "", "output", "a folder", self.output)
        require(
            self.compare.steps <= self.train.steps,
            "compare.steps",
            f"at most train.steps = {self.train.steps}, the steps that there are to compare",
            self.compare.steps,
        )


SECTIONS = {
    name: hint for name, hint in get_type_hints(RunConfig).items() if dataclasses.is_dataclass(hint)
}  # of RunConfig, by name


def require(condition: bool, key: str, expected: str, got: object) -> None:
    """Raises ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{key}: expected {expected}, got {got!r}")


def require_defaults(section: Any, names: Iterable[str], prefix: str, why: str) -> None:
    """Raises ValueError for a setting that has no use here and is not left at its default: it would be dropped."""
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    for name in names:
        got, default = getattr(section, name), defaults[name]
        if got != default:
            raise ValueError(
                f"{prefix}{name}: expected the default {default!r}, as {why}, got {got!r}; leave it out, or set it to "
                f"{json.dumps(default)} where a file sets it"
            )


def check_types(section: Any, prefix: str) -> None:
    """Raises WrongType for a field whose value is not of its type: what reads YAML lets null pass everywhere."""
    hints = get_type_hints(type(section))
    for name in (field.name for field in dataclasses.fields(section)):
        hint = hints[name]
        if not _is(getattr(section, name), hint):
            raise WrongType(f"{prefix}{name}: expected {_expected(hint)}, got {getattr(section, name)!r}")


def misfit(key: str, value: object) -> str:
    """What the setting ``key``, a section and a name, must be, if ``value`` is of another type; else ""."""
    section, _, name = key.partition(".")
    if section not in SECTIONS:  # a task's fields, which it checks itself
        return ""
    hint = get_type_hints(SECTIONS[section])[name]
    return "" if _is(value, hint) else _expected(hint)


def _is(value: object, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(kinds) == len(value) and all(map(_is, value, kinds))
    if hint in (int, float):
        numbers = (int, float) if hint is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _expected(hint: Any) -> str:
    names = {int: "an int", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_expected, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return "a list of strings" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} numbers"
    return "a mapping"
