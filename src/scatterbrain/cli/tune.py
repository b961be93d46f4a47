"""``scatterbrain tune MODEL [options]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scatterbrain.cli.command import CommandError, check_outputs, readable_errors
from scatterbrain.cli.on_model import files_read, load, parser_of

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = """\
Chooses for every attention layer of a model the cheapest of exact attention, windows and routed lists with a low-rank
kernel, such that the model's output stays within a bound, and writes the choice to a YAML file. Half of the inputs are
held out to judge it. Nothing is trained.

  scatterbrain tune FOLDER --inputs text.txt --max-error .05 --yaml tuned.yaml
  scatterbrain tune FOLDER --inputs text.txt --max-error .05 --of mean         errors of the mean over tokens
  scatterbrain tune FOLDER --inputs images/ --budget .2 --png tuned.png        a fifth of exact attention's time
  scatterbrain tune mine.py:model_and_batches --max-error .02

then, in Python:

  sb.replace_attention(model, layers="tuned.yaml")

MODEL is
{ways}

Errors are ||y - y*|| / ||y*|| of the model's output against that with exact attention, the mean over batch rows. Times
are measured once for every shape and kept (--times), so that the same machine decides the same again. A looser bound
never costs more."""


def tune(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code 0.

    Raises:
        CommandError: with exit code 1, for bad input or a file that cannot be written, 130 after Ctrl-C.
    """
    options = _parser().parse_args(list(arguments))
    with readable_errors():
        from scatterbrain.analysis.tuning import tune as choose

        check_outputs(options, "yaml", "png", "times", reads=files_read(options))
        loaded = load(options, 8)
        bounds = {"max_error": options.max_error, "budget": options.budget}
        try:
            tuning = choose(
                loaded.model, loaded.batches, output=_output(options.of), times=options.times, progress=_show, **bounds
            )
        except KeyboardInterrupt:
            raise CommandError(
                "stopped before a choice was made; the times measured so far are kept, and the next run goes on with "
                "them",
                130,
            ) from None
        _show("")
        print(tuning)
        if options.yaml is not None:
            tuning.save(options.yaml)
            print(f'written: {options.yaml}, for sb.replace_attention(model, layers="{options.yaml}")')
        if options.png is not None:
            tuning.draw(options.png)
            print(f"written: {options.png}")
    return 0


def _show(what: str) -> None:
    """One line on a terminal that the next one takes the place of."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def _output(of: str) -> Callable[[Any], Tensor]:
    """Of what a model returns, the tensor that errors are of."""
    from scatterbrain.analysis.tuning import output_of

    def take(returned: Any) -> Tensor:
        try:
            out = output_of(returned)
        except TypeError as error:
            raise CommandError(
                f"expected a model that returns a tensor, last_hidden_state or logits, got {type(returned).__name__}; "
                "let module:function return one that does, or call sb.tune with output="
            ) from error
        if out.dim() == 0:
            raise CommandError(
                "expected a model that returns a tensor (rows, ...), got a single number, such as a loss; let "
                "module:function return a model that does"
            )
        if of == "output":
            return out
        if out.dim() < 3:
            raise CommandError(
                f"--of {of}: expected a model whose output is (rows, tokens, ...), got shape {tuple(out.shape)}; "
                "leave it out"
            )
        return out.mean(1) if of == "mean" else out[:, 0]

    return take


def _parser() -> argparse.ArgumentParser:
    usage = "scatterbrain tune MODEL --inputs FILE (--max-error E | --budget SHARE) [options]"
    parser = parser_of("tune", usage, DESCRIPTION)
    add = parser.add_argument
    add("--max-error", type=float, metavar="E", help="largest error of the model's output, such as .05")
    add("--budget", type=float, metavar="SHARE", help="largest share of exact attention's time, such as .2")
    add(
        "--of",
        default="output",
        choices=["output", "mean", "first"],
        help="what errors are of: the whole output (default), its mean over tokens, or its first token",
    )
    add("--batches", type=int, metavar="N", help="batches, of which the second half judges (default 8)")
    add("--yaml", type=Path, metavar="FILE", help="write the settings there")
    add("--png", type=Path, metavar="FILE", help="draw error against time")
    add("--times", type=Path, metavar="FILE", help="JSON file of measured times (default: in the user's cache)")
    return parser
