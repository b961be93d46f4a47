"""``scatterbrain train CONFIG [--key value]``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from scatterbrain.cli.command import CommandError, help_formatter, readable_errors
from scatterbrain.training.config import RunConfig

USAGE = "scatterbrain train CONFIG [--key value ...]"
DESCRIPTION = """\
Trains a byte-level language model on text: the Python standard library's source, or any file or folder.

  scatterbrain train configs/lm/stdlib.yaml
  scatterbrain train configs/lm/stdlib.yaml --attention.support full       exact attention instead
  scatterbrain train configs/lm/stdlib.yaml --data.path FOLDER --data.glob '*.md' --output runs/notes
  scatterbrain train configs/lm/stdlib.yaml --train.minutes 10             stop after ten minutes
  scatterbrain train configs/lm/stdlib.yaml --resume true                  go on where a run stopped

CONFIG is a YAML file with the keys below, nested at the dots; without it their defaults hold.
Ctrl-C finishes the step, saves a checkpoint and says how to continue.
If other programs use the same cores, set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait stall a run."""


def train(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code 0 when trained to the end.

    Raises:
        CommandError: with exit code 1 for bad input or a file that cannot be written, and 128 plus the signal's number
            for a run that was interrupted.
    """
    with readable_errors():
        from scatterbrain.training.trainer import RunStopped, Trainer

        trainer = Trainer(parse_run_config(arguments))
    try:
        trainer.run()
    except RunStopped as stopped:
        raise CommandError(str(stopped), stopped.exit_code) from stopped
    return 0


def parse_run_config(arguments: Sequence[str]) -> RunConfig:
    """A configuration from a YAML file, if the first argument is one, and the options after it.

    Raises:
        ValueError: for a value out of range.
        SystemExit: with code 2, after a message that names the key, for an unknown key or a value of the wrong type;
            with code 0 after --help and --print_config.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(
        prog="scatterbrain train", usage=USAGE, description=DESCRIPTION, formatter_class=help_formatter()
    )
    parser.add_argument("--config", action=ActionConfigFile, help="The YAML file, as CONFIG.")
    parser.add_class_arguments(RunConfig)
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    namespace = parser.instantiate(parser.parse_args(arguments))
    return RunConfig(**{field.name: namespace[field.name] for field in dataclasses.fields(RunConfig)})
