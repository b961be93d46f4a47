"""``scatterbrain train CONFIG [--key value]``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from scatterbrain.cli.command import CommandError, HelpParser, asks_for_help, parse, readable_errors
from scatterbrain.training.config import SECTIONS, RunConfig, WrongType

USAGE = "scatterbrain train CONFIG [--key value ...]"
DESCRIPTION = """\
Trains a model: by default a byte-level language model on text, the Python standard library's source or any file or
folder; other tasks by the key task.

  scatterbrain train configs/lm/stdlib.yaml
  scatterbrain train configs/lm/stdlib.yaml --attention.support full       exact attention instead
  scatterbrain train configs/lm/stdlib.yaml --data.path FOLDER --data.glob '*.md' --output runs/notes
  scatterbrain train configs/lm/stdlib.yaml --train.minutes 10             stop after ten minutes
  scatterbrain train configs/lm/stdlib.yaml --resume true                  go on where a run stopped

CONFIG is a YAML file with the keys below, nested at the dots; without it their defaults hold. A file with the key
"extends: other.yaml" has the keys of the other one too, but for those of its own.
Ctrl-C finishes the step, saves a checkpoint and says how to continue.
If other programs use the same cores, set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait stall a run."""


def train(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code 0 when trained to the end.

    Raises:
        CommandError: with exit code 1 for a value out of range or a file that cannot be written, 2 for a value of the
            wrong type and for a folder or a checkpoint that cannot be used, and 128 plus the signal's number for a run
            that was interrupted, that of SIGPIPE for one whose output nobody reads any more.
    """
    with readable_errors():
        if asks_for_help(arguments):
            _help().exit_with_help()
        from scatterbrain.training.processes import FirstProcessFailed
        from scatterbrain.training.trainer import RunStopped, Trainer

        try:
            trainer = Trainer(parse_run_config(arguments))
        except FirstProcessFailed as failed:
            raise SystemExit(failed.exit_code) from failed
    try:
        trainer.run()
    except FirstProcessFailed as failed:  # of which the first process tells
        raise SystemExit(failed.exit_code) from failed
    except RunStopped as stopped:
        raise CommandError(str(stopped), stopped.exit_code) from stopped
    return 0


def parse_run_config(arguments: Sequence[str]) -> RunConfig:
    """A configuration from a YAML file, if the first argument is one or --config names one, and the options after it.

    Raises:
        ValueError: for a value out of range, a key that a file has twice, or a file that extends one that cannot be
            read.
        SystemExit: with code 2, after a message that names the key, for an unknown key or a value of the wrong type;
            with code 0 after --print_config.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

    parser = ArgumentParser(prog="scatterbrain train", usage=USAGE, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(RunConfig)
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    for index, argument in enumerate(arguments):
        name, equals, config = argument.partition("=")
        if name != "--config" or not (equals or index + 1 < len(arguments)):
            continue
        config = _with_extended(config if equals else arguments[index + 1])
        arguments[index if equals else index + 1] = f"--config={config}" if equals else config
        # By itself, since options put a mapping in the place of anything else.
        _check_sections(parse(parser, ["--config", config]), Namespace)
    namespace = parse(parser, arguments)
    _check_sections(namespace, Namespace)
    namespace = parser.instantiate(namespace)
    return RunConfig(**{field.name: namespace[field.name] for field in dataclasses.fields(RunConfig)})


def _with_extended(config: str) -> str:
    """The path of a file that extends no other as it is, and the settings of one that does, as YAML.

    Raises:
        ValueError: a key that is written twice, also where ``config`` is no path but YAML, or a file that extends one
            that cannot be read.
    """
    import yaml

    from scatterbrain.training.config_files import read_config
    from scatterbrain.yaml_text import read_yaml

    path, is_file = Path(config), Path(config).is_file()
    try:
        content = read_yaml(path.read_text("utf-8-sig") if is_file else config, config if is_file else "--config")
    except yaml.YAMLError:  # of which the parser tells
        return config
    except UnicodeDecodeError as error:
        raise ValueError(f"{config}: expected YAML, got what cannot be read: {error}") from error
    if not is_file or not isinstance(content, dict) or "extends" not in content:
        return config
    return yaml.safe_dump(read_config(path), sort_keys=False)


def _check_sections(namespace: Any, mapping: type) -> None:
    for name in SECTIONS:
        if not isinstance(namespace[name], mapping):
            raise WrongType(f"{name}: expected a mapping of keys, got {namespace[name]!r}")


def _help() -> HelpParser:
    parser = HelpParser("scatterbrain train", USAGE, DESCRIPTION)
    parser.add_argument("--config", metavar="CONFIG", help="The YAML file, as CONFIG.")
    parser.add_argument(
        "--print_config", metavar="FLAGS", nargs="?", help="Print the configuration that results, and exit."
    )
    _add_keys(parser.add_section("a training run"), RunConfig, "")
    for name, section in SECTIONS.items():
        title, _ = inspect.getdoc(section).split("\n", 1)
        _add_keys(parser.add_section(title.rstrip(".").lower()), section, f"{name}.")
    return parser


def _add_keys(group: Any, section: type, prefix: str) -> None:
    """The keys of a section, with what its docstring says of them."""
    hints, texts = get_type_hints(section), _texts(section)
    for field in dataclasses.fields(section):
        if prefix or field.name not in SECTIONS:
            group.add_argument(
                f"--{prefix}{field.name}",
                metavar=field.name.upper(),
                type=hints[field.name],
                default=field.default,
                help=texts[field.name],
            )


def _texts(section: type) -> dict[str, str]:
    """The paragraphs of a docstring's "Args:", by name."""
    _, arguments = inspect.getdoc(section).split("Args:\n", 1)
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", arguments, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
