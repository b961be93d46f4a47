"""Models and their inputs from a command line, for ``scatterbrain compare``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain.analysis.captured import Batch

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
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
        rows: of a batch.
        batches: how many at most; inputs that last for one alone give one.
    """

    model: str
    inputs: Path | None = None
    checkpoint: Path | None = None
    tokens: int | None = None
    size: int | None = None
    rows: int = 1
    batches: int = 1
    seed: int = field(default=0)

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
            if not batches:
                raise ValueError(f"{self.model}: expected a batch or a list of batches, got an empty list")
            return Loaded(model, batches, f"inputs of {self.model}")
        if self.inputs is None or self.inputs.suffix == ".safetensors":
            return self._with_own_arguments(model, f"{self.model} returns a model without a batch")
        return self._with_images(model, self.size or 224, MEAN, DEVIATION)

    def _of_transformers(self) -> Loaded:
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(self.model, local_files_only=True)
        model = AutoModel.from_pretrained(self.model, local_files_only=True)
        if self.inputs is not None and self.inputs.suffix == ".safetensors":
            return self._with_own_arguments(model, "")
        size = getattr(config, "image_size", None)
        if size is not None:
            size = self.size or (size if isinstance(size, int) else size[0])
            return self._with_images(model, size, *_normalisation(Path(self.model)))
        if not hasattr(config, "vocab_size") or hasattr(config, "num_mel_bins"):
            return self._with_own_arguments(model, f"{type(model).__name__} takes neither text nor images")
        return self._with_text(model, config)

    def _of_timm(self) -> Loaded:
        import timm

        if not timm.is_model(self.model):
            raise ValueError(f"{self.model}: expected one of\n{WAYS}")
        size = {} if self.size is None else {"img_size": self.size}
        model = timm.create_model(self.model, pretrained=self.checkpoint is None, **size)
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

    def _with_own_arguments(self, model: nn.Module, why: str) -> Loaded:
        if self.inputs is None or self.inputs.suffix != ".safetensors":
            raise ValueError(
                f"{why}; give its arguments by name as tensors of a file: --inputs FILE.safetensors "
                "(safetensors.torch.save_file({'input_ids': ...}, FILE)), or a function that returns (model, batch)"
            )
        from safetensors.torch import load_file

        arguments = load_file(self.inputs)
        for name, tensor in arguments.items():
            if tensor.dim() == 0:
                raise ValueError(
                    f"{self.inputs}: {name}: expected a tensor of rows, got a single number; give it a row"
                )
        starts = self._starts(min(t.shape[0] for t in arguments.values()), "rows")
        batches = [{k: t[i : i + self.rows] for k, t in arguments.items()} for i in starts]
        return Loaded(model, batches, str(self.inputs))

    def _starts(self, available: int, what: str) -> range:
        """The first rows of as many batches as there are, at least one."""
        if available < self.rows:
            raise ValueError(f"{self.inputs}: expected at least {self.rows} {what}, got {available}; lower --rows")
        return range(0, min(self.batches, available // self.rows) * self.rows, self.rows)

    def _with_text(self, model: nn.Module, config: Any) -> Loaded:
        longest = getattr(config, "max_position_embeddings", None) or 1024
        tokens = self._tokens(longest)
        count = self.rows * self.batches
        if self.inputs is None:
            generator = torch.Generator().manual_seed(self.seed)
            rows, about = torch.randint(0, config.vocab_size, (count, tokens), generator=generator), _random("tokens")
        else:
            rows, about = self._tokenized(tokens, count)
        names = ("input_ids", "decoder_input_ids") if getattr(config, "is_encoder_decoder", False) else ("input_ids",)
        starts = self._starts(len(rows), f"rows of {tokens} tokens")
        return Loaded(model, [{name: rows[i : i + self.rows] for name in names} for i in starts], about)

    def _tokens(self, longest: int) -> int:
        tokens = self.tokens or min(longest, 1024)
        if tokens > longest:
            raise ValueError(f"--tokens: the model takes at most {longest}, got {tokens}")
        return tokens

    def _tokenized(self, tokens: int, count: int) -> tuple[Tensor, str]:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        text = "\n".join(path.read_text(errors="replace") for path in _files(self.inputs, None))
        logging.set_verbosity_error()  # that the text is longer than one input is meant
        tokenizer = AutoTokenizer.from_pretrained(self.model, local_files_only=True)
        ids = tokenizer(text[: 40 * tokens * count], add_special_tokens=False, truncation=False)["input_ids"]
        if ids and len(set(ids)) == 1:
            raise ValueError(
                f"{self.model}: expected the model's tokenizer in the folder, got one that makes all of {self.inputs} "
                "the same token; save it there (tokenizer.save_pretrained)"
            )
        return _rows(torch.tensor(ids), tokens, count), f"rows of {tokens} tokens of {self.inputs}"

    def _of_run(self) -> Loaded:
        from scatterbrain.training.trained import load_trained

        run = load_trained(Path(self.model))
        if self.inputs is None:
            rows, masks = self._validation_rows(run.data, self.rows * self.batches)
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
            content = b"\n".join(path.read_bytes() for path in _files(self.inputs, None))
            text, tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8), self._tokens(run.train.context)
            rows, masks = _rows(text.long(), tokens, self.rows * self.batches), None
            about = f"rows of {tokens} bytes of {self.inputs}"
        starts = [slice(i, i + self.rows) for i in self._starts(len(rows), "rows")]
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
        rows, mask = torch.cat(inputs)[:count], None if masks[0] is None else torch.cat(masks)[:count]
        if self.tokens is not None and rows.ndim < 4:  # of images all pixels
            tokens = self._tokens(rows.shape[1])
            rows, mask = rows[:, :tokens], None if mask is None else mask[:, :tokens]
        return rows, mask

    def _with_images(self, model: nn.Module, size: int, mean: Sequence[float], deviation: Sequence[float]) -> Loaded:
        count = self.rows * self.batches
        if self.inputs is None:
            pixels, about = (
                torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(self.seed)),
                _random("pixels"),
            )
        else:
            pixels, about = _images(self.inputs, count, size), f"{count} images of {self.inputs}, {size} px"
        pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
        takes = "pixel_values" if type(model).__module__.startswith("transformers.") else None
        parts = [pixels[i : i + self.rows] for i in self._starts(len(pixels), "images")]
        interpolates = {"interpolate_pos_encoding": True} if takes and _takes(model, "interpolate_pos_encoding") else {}
        return Loaded(model, [{takes: part} | interpolates if takes else part for part in parts], about)


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


def _files(path: Path, suffixes: Sequence[str] | None) -> list[Path]:
    """The file, or the files of a folder, in the order of their names."""
    if path.is_file():
        return [path]
    found = [p for p in sorted(path.rglob("*")) if p.is_file() and (suffixes is None or p.suffix.lower() in suffixes)]
    if not found:
        raise ValueError(f"{path}: expected a folder with {' or '.join(suffixes or ['files'])}, found none")
    return found


def _images(path: Path, count: int, size: int) -> Tensor:
    """At most (count, 3, size, size) in [0, 1], resized bicubically; evenly spread over what there is."""
    if path.suffix in (".npz", ".npy"):
        pixels = _array(path)
    else:
        pixels = [_read_image(p) for p in _files(path, IMAGES)]
    count = min(count, len(pixels))
    chosen = [pixels[i * len(pixels) // count] for i in range(count)]
    resized = [
        torch.nn.functional.interpolate(image[None], (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        for image in chosen
    ]
    return torch.cat(resized)


def _array(path: Path) -> list[Tensor]:
    import numpy as np

    content = np.load(path)
    arrays = [content] if isinstance(content, np.ndarray) else [content[name] for name in content.files]
    for array in arrays:
        if array.ndim == 4 and array.dtype == np.uint8 and 3 in (array.shape[1], array.shape[3]):
            pixels = torch.from_numpy(array)
            return list((pixels if array.shape[1] == 3 else pixels.permute(0, 3, 1, 2)).float() / 255)
    raise ValueError(
        f"{path}: expected an array of images, uint8 (count, height, width, 3) or (count, 3, height, width)"
    )


def _read_image(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
