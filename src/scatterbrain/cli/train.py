"""``scatterbrain train CONFIG [--key value]``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from scatterbrain.training.config import RunConfig

USAGE = "scatterbrain train CONFIG [--key value ...]"
DESCRIPTION = """\
Trains a byte-level language model on text: the Python standard library's source, or any file or folder.

  scatterbrain train configs/lm/stdlib.yaml
  scatterbrain train configs/lm/stdlib.yaml --attention.support full       exact attention instead
  scatterbrain train configs/lm/stdlib.yaml --data.path FOLDER --data.glob '*.md' --output runs/notes
  scatterbrain train configs/lm/stdlib.yaml --train.minutes 10             stop by the clock
  scatterbrain train configs/lm/stdlib.yaml --resume true                  go on where a run stopped

CONFIG is a YAML file with the keys below, nested at the dots; without it their defaults hold.
Ctrl-C finishes the step, saves a checkpoint and says how to continue.
Where other programs use the same cores, set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait stall a run."""


def train(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0 when trained to the end, 1 for bad input or a file that cannot be written, 2 for a wrong
        command line, and 128 plus the signal's number for a run that was interrupted.
    """
    try:
        from scatterbrain.training.trainer import RunStopped, Trainer

        config = parse_run_config(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("scatterbrain"):
            raise
        return _fail(f"needs the package {error.name}: pip install 'scatterbrain[train]'")
    except ValueError as error:
        return _fail(str(error))
    try:
        trainer = Trainer(config)
    except (ValueError, OSError) as error:
        return _fail(str(error))
    try:
        trainer.run()
    except RunStopped as stopped:
        return _fail(str(stopped), stopped.exit_code)
    return 0


def parse_run_config(arguments: Sequence[str]) -> RunConfig:
    """A configuration from a YAML file, if the first argument is one, and the options after it.

    Raises:
        ValueError: for a value out of range.
        SystemExit: with code 2, after a message that names the key, for an unknown key or a value of the wrong type;
            with code 0 after --help and --print_config.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Shows types and defaults, and leaves the lines of the description as they are."""

    parser = ArgumentParser(prog="scatterbrain train", usage=USAGE, description=DESCRIPTION, formatter_class=Formatter)
    parser.add_argument("--config", action=ActionConfigFile, help="The YAML file, as CONFIG.")
    parser.add_class_arguments(RunConfig)
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    namespace = parser.instantiate(parser.parse_args(arguments))
    return RunConfig(**{field.name: namespace[field.name] for field in dataclasses.fields(RunConfig)})


def _fail(message: str, exit_code: int = 1) -> int:
    print(f"scatterbrain train: {message}", file=sys.stderr)
    return exit_code
