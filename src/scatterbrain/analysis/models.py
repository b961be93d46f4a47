"""Models and their inputs from a command line, for ``scatterbrain compare``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain.analysis.captured import Batch
from scatterbrain.analysis.input_files import files, images

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as most vision transformers take
WAYS = """\
a Hugging Face folder                   config.json and weights, as from_pretrained reads them; a text model also needs
                                        its tokenizer there
a run folder of scatterbrain train      its checkpoint; without --inputs on its own validation text
NAME of a timm model                    with --checkpoint FILE (a state dict), or pretrained weights in timm's cache
module:function, FILE.py:function       called without arguments; returns the model, or (model, batch), or (model,
                                        [batches]); a batch is a tensor, a mapping of arguments or a tuple of them"""


@dataclass
class Loaded:
    """A model with what to run it on.

    Args:
        model: in evaluation mode.
        batches: at least one.
        about: what the inputs are, a line.
    """

    model: nn.Module
    batches: list[Batch]
    about: str


@dataclass(frozen=True)
class Source:
    """Where a model and its inputs come from.

    Args:
        model: one of ``WAYS``.
        inputs: a file, or a folder of them: text, images, an array of images (.npz, .npy), or the model's own arguments
            by name (.safetensors); None: random inputs.
        checkpoint: a state dict of a timm model.
        tokens: of a text batch row; None: as many as the model takes, at most 1024.
        size: side of images in pixels; None: the model's.
        rows: of a batch; None: 1.
        batches: how many at most; inputs that last for one alone give one. None: ``most_batches``.
        most_batches: how many at most where nobody asked for a number.
        seed: of random inputs; None: 0.

    Options that say nothing for a model and its inputs are refused by name when it is loaded.
    """

    model: str
    inputs: Path | None = None
    checkpoint: Path | None = None
    tokens: int | None = None
    size: int | None = None
    rows: int | None = None
    batches: int | None = None
    most_batches: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "size", "rows", "batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        for name in ("inputs", "checkpoint"):
            path = getattr(self, name)
            if path is not None and not path.exists():
                raise ValueError(f"--{name}: expected a file or folder, got {path}, which does not exist")

    def load(self) -> Loaded:
        """
        Raises:
            ValueError: a model or inputs of no known kind: what was expected.
            ModuleNotFoundError: a package that the model or the inputs need.
        """
        if ":" in self.model and not Path(self.model).exists():
            loaded = self._by_function()
        elif (Path(self.model) / "config.json").is_file():
            loaded = self._of_transformers()
        elif (Path(self.model) / "checkpoint.safetensors").is_file():
            loaded = self._of_run()
        elif Path(self.model).exists():
            raise ValueError(
                f"{self.model}: expected a folder with config.json or checkpoint.safetensors, or one of\n{WAYS}"
            )
        else:
            loaded = self._of_timm()
        loaded.model.eval()
        return loaded

    @property
    def _row_count(self) -> int:
        return self.rows or 1

    @property
    def _batch_count(self) -> int:
        return self.batches or self.most_batches

    def _takes_only(self, what: str, *names: str) -> None:
        """Raises ValueError for an option besides ``names`` that was given: it would change nothing."""
        for name in ("checkpoint", "tokens", "size", "rows", "seed"):
            value = getattr(self, name)
            if value is None or (name in names and (name != "seed" or self.inputs is None)):
                continue
            if name == "seed":
                raise ValueError(f"--seed is of random inputs, got {value} for others; leave it out")
            raise ValueError(f"--{name}: {what} takes none, got {value}; leave it out")

    # -------------------- models

    def _by_function(self) -> Loaded:
        place, _, name = self.model.rpartition(":")
        function = getattr(_module(place), name, None)
        if not callable(function):
            raise ValueError(f"{self.model}: {place} has no function {name!r}")
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise ValueError(f"{self.model}: expected a function without arguments, got one with {error}") from None
        found = function()
        model, batches = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.model}: expected a model or (model, batch), got {type(found).__name__}")
        if batches is not None and self.inputs is None:
            batches = batches if isinstance(batches, list) else [batches]
            self._takes_only(f"{self.model}, which brings its own inputs,")
            if self.batches is not None:
                raise ValueError(f"--batches: {self.model} brings its own, got {self.batches}; leave it out")
            if not batches:
                raise ValueError(f"{self.model}: expected a batch or a list of batches, got an empty list")
            for batch in batches:
                if not (isinstance(batch, (Tensor, Mapping, tuple, list)) or callable(batch)):
                    raise ValueError(
                        f"{self.model}: expected a batch that is a tensor, a mapping of arguments, a tuple or list of "
                        f"them, or a function of the model, got {type(batch).__name__}"
                    )
            return Loaded(model, batches, f"inputs of {self.model}")
        if self.inputs is None or self.inputs.suffix == ".safetensors":
            return self._with_own_arguments(model, f"{self.model} returns a model without a batch")
        self._takes_only(f"{self.model}, a function of images,", "rows", "size")
        return self._with_images(model, self.size or 224, MEAN, DEVIATION)

    def _of_transformers(self) -> Loaded:
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(self.model, local_files_only=True)
        of_arguments = self.inputs is not None and self.inputs.suffix == ".safetensors"
        takes = _main_input(config)
        size = getattr(config, "image_size", None)
        is_vision = size is not None and takes in ("pixel_values", None)
        is_text = size is None and hasattr(config, "vocab_size") and takes in ("input_ids", None)
        if not of_arguments and (is_vision or is_text):
            kind, own = ("a model of images", "size") if is_vision else ("a model of text", "tokens")
            self._takes_only(f"{self.model}, {kind},", "rows", "seed", own)
        model = AutoModel.from_pretrained(self.model, local_files_only=True)
        if of_arguments:
            return self._with_own_arguments(model, "")
        if is_vision:
            size = self.size or (size if isinstance(size, int) else size[0])
            return self._with_images(model, size, *_normalisation(Path(self.model)))
        if not is_text:
            takes = takes or next(iter(inspect.signature(model.forward).parameters))
            name = type(model).__name__
            return self._with_own_arguments(model, f"{name} takes {takes}, not text or images alone", takes)
        return self._with_text(model, config)

    def _of_timm(self) -> Loaded:
        import timm

        if not timm.is_model(self.model):
            raise ValueError(f"{self.model}: expected one of\n{WAYS}")
        self._takes_only(f"{self.model}, a model of images,", "rows", "size", "checkpoint", "seed")
        size = {} if self.size is None else {"img_size": self.size}
        try:
            model = timm.create_model(self.model, pretrained=self.checkpoint is None, **size)
        except TypeError as error:
            if "img_size" not in size:
                raise
            raise ValueError(
                f"--size: expected a model that is made for a size of images, got {self.model}, which is not; leave it "
                "out"
            ) from error
        if self.checkpoint is not None:
            from timm.models import load_checkpoint

            # Of the model's own module: it knows other names of weights, and positions of other sizes.
            fitting = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
            try:
                load_checkpoint(model, str(self.checkpoint), filter_fn=fitting)
            except (RuntimeError, KeyError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"--checkpoint: {self.checkpoint} is no checkpoint of {self.model}: {reason}"
                ) from error
        data = timm.data.resolve_model_data_config(model)
        return self._with_images(model, self.size or data["input_size"][1], data["mean"], data["std"])

    # -------------------- inputs

    def _with_own_arguments(self, model: nn.Module, why: str, takes: str = "input_ids") -> Loaded:
        if self.inputs is None or self.inputs.suffix != ".safetensors":
            raise ValueError(
                f"{why}; give its arguments by name as tensors of a file: --inputs FILE.safetensors "
                f"(safetensors.torch.save_file({{'{takes}': ...}}, FILE)), or a function that returns (model, batch)"
            )
        self._takes_only(f"a file of arguments, {self.inputs},", "rows")
        from safetensors.torch import load_file

        arguments = load_file(self.inputs)
        for name, tensor in arguments.items():
            if tensor.dim() == 0:
                raise ValueError(
                    f"{self.inputs}: {name}: expected a tensor of rows, got a single number; give it a row"
                )
        starts = self._starts(min(t.shape[0] for t in arguments.values()), "rows")
        batches = [{k: t[i : i + self._row_count] for k, t in arguments.items()} for i in starts]
        return Loaded(model, batches, str(self.inputs))

    def _starts(self, available: int, what: str, sized_by: str | None = None) -> range:
        """The first rows of as many batches as there are, at least one. ``sized_by``: the option that says how much a
        row takes of the inputs."""
        if available < self._row_count:
            cures = [name for name in (sized_by, "rows" if self._row_count > 1 else None) if name is not None]
            raise ValueError(
                f"{self.inputs}: expected at least {self._row_count} {what}, got {available}; "
                f"{' or '.join(f'lower --{name}' for name in cures) or 'give more'}"
            )
        return range(0, min(self._batch_count, available // self._row_count) * self._row_count, self._row_count)

    def _with_text(self, model: nn.Module, config: Any) -> Loaded:
        longest = getattr(config, "max_position_embeddings", None) or 1024
        tokens = self._tokens(longest - _reserved_positions(model, longest))
        count = self._row_count * self._batch_count
        if self.inputs is None:
            generator = torch.Generator().manual_seed(self.seed or 0)
            rows, about = torch.randint(0, config.vocab_size, (count, tokens), generator=generator), _random("tokens")
        else:
            rows, about = self._tokenized(tokens, count)
        names = ("input_ids", "decoder_input_ids") if getattr(config, "is_encoder_decoder", False) else ("input_ids",)
        starts = self._starts(len(rows), f"rows of {tokens} tokens", "tokens")
        return Loaded(model, [{name: rows[i : i + self._row_count] for name in names} for i in starts], about)

    def _tokens(self, longest: int) -> int:
        tokens = self.tokens or min(longest, 1024)
        if tokens > longest:
            raise ValueError(f"--tokens: the model takes at most {longest}, got {tokens}")
        return tokens

    def _tokenized(self, tokens: int, count: int) -> tuple[Tensor, str]:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        text = "\n".join(path.read_text(errors="replace") for path in files(self.inputs, None))
        logging.set_verbosity_error()  # that the text is longer than one input is meant
        tokenizer = AutoTokenizer.from_pretrained(self.model, local_files_only=True)
        text = text[: 40 * tokens * count]
        ids = tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
        if ids and len(set(ids)) == 1:
            raise ValueError(
                f"{self.model}: expected the model's tokenizer in the folder, got one that makes all of {self.inputs} "
                "the same token; save it there (tokenizer.save_pretrained)"
            )
        before, behind = _special_tokens(tokenizer, text)
        of_text = tokens - len(before) - len(behind)
        if of_text < 1:
            raise ValueError(
                f"--tokens: expected more than the {tokens - of_text} special tokens of a row, got {tokens}; raise it"
            )
        rows = _rows(torch.tensor(ids, dtype=torch.long), of_text, count)
        # As the model was trained: attention often goes to these.
        around = [torch.tensor(some, dtype=torch.long).expand(len(rows), -1) for some in (before, behind)]
        return torch.cat((around[0], rows, around[1]), 1), f"rows of {tokens} tokens of {self.inputs}"

    def _of_run(self) -> Loaded:
        from scatterbrain.training.trained import load_trained

        self._takes_only(f"{self.model}, a run of scatterbrain train,", "rows", "tokens")
        run = load_trained(Path(self.model), reads_data=self.inputs is None)
        if self.inputs is None:
            rows, masks = self._validation_rows(run.data, self._row_count * self._batch_count)
            if rows.ndim < 4:
                about = f"rows of {rows.shape[1]} {run.task.inputs}"
            else:
                about = f"{len(rows)} of its validation images"
            about = f"{about}; task {run.task.kind}: {run.data.description}"
        else:
            if run.task.kind != "language":
                raise ValueError(
                    f"--inputs: the run in {self.model} has the task {run.task.kind}, whose own validation inputs are "
                    "measured; leave --inputs out"
                )
            content = bytearray(b"\n".join(path.read_bytes() for path in files(self.inputs, None)))
            text = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
            tokens = self._tokens(run.train.context)
            rows, masks = _rows(text.long(), tokens, self._row_count * self._batch_count), None
            about = f"rows of {tokens} bytes of {self.inputs}"
        unit = run.task.inputs if self.inputs is None else "bytes"
        what = f"rows of {rows.shape[1]} {unit}" if rows.ndim < 4 else "images"
        sized_by = None if self.inputs is None else "tokens"
        starts = [slice(i, i + self._row_count) for i in self._starts(len(rows), what, sized_by)]
        batches = [rows[part] if masks is None else (rows[part], masks[part]) for part in starts]
        return Loaded(run.model, batches, about)

    def _validation_rows(self, data: Any, count: int) -> tuple[Tensor, Tensor | None]:
        """Inputs of the first validation batches, and their masks; of causal tasks the first --tokens of them."""
        inputs, masks, number = [], [], 0
        while sum(map(len, inputs)) < count:
            batch = data.validation_batch(number)
            inputs.append(batch.inputs)
            masks.append(batch.mask)
            number += 1
        rows, mask = _joined(inputs, masks)
        rows, mask = rows[:count], None if mask is None else mask[:count]
        if rows.ndim >= 4:
            self._takes_only(f"{self.model}, a run on images,", "rows")
        if self.tokens is not None and rows.ndim < 4:  # of images all pixels
            tokens = self._tokens(rows.shape[1])
            rows, mask = rows[:, :tokens], None if mask is None else mask[:, :tokens]
        return rows, mask

    def _with_images(self, model: nn.Module, size: int, mean: Sequence[float], deviation: Sequence[float]) -> Loaded:
        count = self._row_count * self._batch_count
        if self.inputs is None:
            pixels, about = (
                torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(self.seed or 0)),
                _random("pixels"),
            )
        else:
            pixels = images(self.inputs, count, size)
            about = f"{len(pixels)} image{'s' * (len(pixels) > 1)} of {self.inputs}, {size} px"
        pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
        takes = "pixel_values" if type(model).__module__.startswith("transformers.") else None
        parts = [pixels[i : i + self._row_count] for i in self._starts(len(pixels), "images")]
        interpolates = {"interpolate_pos_encoding": True} if takes and _takes(model, "interpolate_pos_encoding") else {}
        return Loaded(model, [{takes: part} | interpolates if takes else part for part in parts], about)


def _main_input(config: Any) -> str | None:
    """The argument that a model of transformers takes first of all: by its class, or its forward where the class names
    one that it does not take. None for a model whose class is not known before it is made."""
    from transformers import MODEL_MAPPING

    classes = MODEL_MAPPING.get(type(config), None)
    model = classes[0] if isinstance(classes, (tuple, list)) else classes
    if model is None:
        return None
    arguments = [name for name in inspect.signature(model.forward).parameters if name != "self"]
    named = getattr(model, "main_input_name", None)
    return named if named in arguments or not arguments else arguments[0]


def _reserved_positions(model: nn.Module, longest: int) -> int:
    """How many of a table of positions no token has: models that number tokens from behind the padding's position on,
    as RoBERTa does, say so by the padding index of the table."""
    tables = (m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "position" in name)
    return max((t.padding_idx + 1 for t in tables if t.padding_idx is not None and len(t.weight) == longest), default=0)


def _special_tokens(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind a text, such as [CLS] and [SEP]. Seen around a short piece, and where the
    tokenizer makes nothing of that, around the text."""
    for piece in (text.lstrip()[:200], text):
        plain, whole = (tokenizer(piece, add_special_tokens=special)["input_ids"] for special in (False, True))
        for first in range(len(whole) - len(plain) + 1) if plain else ():
            if whole[first : first + len(plain)] == plain:
                return whole[:first], whole[first + len(plain) :]
    return [], []


def _joined(inputs: list[Tensor], masks: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """The rows of batches of one task, the shorter ones padded, and the mask of what is no padding; None where no batch
    has any."""
    widest = max(part.shape[1] for part in inputs)
    if all(mask is None for mask in masks) and all(part.shape[1] == widest for part in inputs):
        return torch.cat(inputs), None
    rows, known = [], []
    for part, mask in zip(inputs, masks, strict=True):
        mask = part.new_ones(part.shape[:2], dtype=torch.bool) if mask is None else mask
        missing = widest - part.shape[1]
        rows.append(torch.cat((part, part.new_zeros(len(part), missing, *part.shape[2:])), dim=1))
        known.append(torch.cat((mask, mask.new_zeros(len(mask), missing)), dim=1))
    return torch.cat(rows), torch.cat(known)


def _rows(tokens: Tensor, length: int, count: int) -> Tensor:
    """The first ``count`` rows, or as many as there are."""
    count = min(count, len(tokens) // length)
    return tokens[: count * length].view(count, length)


def _random(what: str) -> str:
    return f"RANDOM {what}: attention to them is not that to real inputs; give --inputs"


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _module(place: str) -> Any:
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise ValueError(f"{place}: expected a Python file, which does not exist")
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        try:
            spec.loader.exec_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"{place}: its import of {error.name} failed: no such package") from error
        return module
    sys.path.insert(0, "")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and place.split(".")[0] == error.name.split(".")[0]:
            raise ValueError(f"{place}: no such module; expected one of\n{WAYS}") from error
        raise ValueError(f"{place}: its import of {error.name} failed: no such package") from error


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    import json

    file = folder / "preprocessor_config.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    return known.get("image_mean", MEAN), known.get("image_std", DEVIATION)
