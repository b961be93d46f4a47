"""What commands that run a model share: their parser, and the model with its inputs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scatterbrain.cli.command import CommandError, one_line

if TYPE_CHECKING:
    from torch import nn

    from scatterbrain.analysis.captured import Batch
    from scatterbrain.analysis.models import Loaded


def parser_of(command: str, usage: str, description: str) -> argparse.ArgumentParser:
    """With the model and the options of what it is run on. ``{ways}`` in the description stands for what a model may
    be."""
    from scatterbrain.analysis.models import WAYS

    ways = "\n".join(f"  {line}" for line in WAYS.splitlines())
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        f"scatterbrain {command}", usage, description.format(ways=ways), formatter_class=formatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, a timm name, or module:function")
    add(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="text, images (a file, a folder, or an array in .npz or .npy), or the model's arguments by name "
        "(.safetensors); a function may bring its own; default: random",
    )
    add("--checkpoint", type=Path, metavar="FILE", help="state dict of a timm model")
    add("--tokens", type=int, metavar="N", help="tokens of a text (default: the model's most, at most 1024)")
    add("--size", type=int, metavar="PIXELS", help="side of images (default: the model's)")
    add("--rows", type=int, metavar="N", help="sequences or images of a batch (default 1)")
    add("--threads", type=int, default=1, metavar="N", help="threads of torch (default 1)")
    add("--seed", type=int, metavar="N", help="of random inputs (default 0)")
    return parser


def load(options: argparse.Namespace, batches: int) -> Loaded:
    """The model and at most so many batches, or as many as ``--batches`` says. Prints what they are.

    Raises:
        ValueError: naming the option, or what the model was expected to be.
    """
    import torch

    from scatterbrain.analysis.models import Source

    if options.threads < 1:
        raise CommandError(f"--threads must be at least 1, got {options.threads}")
    names = ("model", "inputs", "checkpoint", "tokens", "size", "rows", "batches", "seed")
    source = Source(**{name: getattr(options, name, None) for name in names}, most_batches=batches)
    torch.set_num_threads(options.threads)
    loaded = source.load()
    loaded.batches = [_readable(batch) for batch in loaded.batches]
    print(loaded.about, flush=True)
    return loaded


def files_read(options: argparse.Namespace) -> list[tuple[str, Path | None]]:
    """The files and folders that :func:`load` reads, each after what the user calls it."""
    model = Path(options.model)
    if not model.exists():
        model = Path(options.model.rpartition(":")[0] or options.model)  # FILE.py:function
    return [("MODEL", model), ("--inputs", options.inputs), ("--checkpoint", options.checkpoint)]


_FAILURES = (TypeError, IndexError, KeyError, AttributeError, AssertionError, RuntimeError, MemoryError)
_OUT_OF_MEMORY = ("not enough memory", "out of memory")


def _readable(batch: Batch) -> Batch:
    """A batch with which the model's own errors end the command. Those of its first run, which is that with exact
    attention, are mostly of the inputs; once a model has taken them, later ones are of something else."""
    from scatterbrain.analysis.captured import run

    is_taken = False

    def run_model(model: nn.Module) -> object:
        nonlocal is_taken
        try:
            returned = run(model, batch)
        except _FAILURES as error:
            said = f"{type(error).__name__}: {one_line(error)}".rstrip(": ")
            if isinstance(error, MemoryError) or any(words in said for words in _OUT_OF_MEMORY):
                raise CommandError(
                    f"{type(model).__name__} ran out of memory on its inputs, {described(batch)}: {said}; give fewer "
                    "rows, shorter ones or smaller images"
                ) from error
            if is_taken:
                raise
            raise CommandError(
                f"{type(model).__name__} failed on its inputs, {described(batch)}: {said}; expected names, shapes "
                "and values that the model takes"
            ) from error
        is_taken = True
        return returned

    return run_model


def described(batch: Batch) -> str:
    """Names, types and shapes of what a batch holds; of integers, which may be ids, the range too where torch can find
    it."""
    from torch import Tensor

    if isinstance(batch, Tensor):
        kind = f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
        counts = batch.numel() and not batch.is_floating_point() and not batch.is_complex()
        try:
            return f"{kind} of {batch.min()} to {batch.max()}" if counts else kind
        except RuntimeError:  # of types such as uint16 it does not know the order
            return kind
    if isinstance(batch, Mapping):
        return ", ".join(f"{name}={described(value)}" for name, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(map(described, batch))})"
    return "a function that runs it" if callable(batch) else repr(batch)
