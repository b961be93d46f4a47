"""The command line: ``scatterbrain COMMAND``, also ``python -m scatterbrain COMMAND``.

A command is a module of this package with a function of the same name, which takes the remaining arguments and returns
the exit code or raises :class:`CommandError`. It is imported when it is called, so that no command needs the
dependencies of another.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from scatterbrain.cli.command import CommandError
from scatterbrain.version import __version__

COMMANDS = {
    "info": "versions, instruction set in use, compiled architectures and devices",
    "train": "train a model on a task, by default a byte-level language model",
    "table": "train every method of a task with several seeds, and compare them",
    "compare": "error, time and entropy of a model's own attention layers, by configuration",
    "tune": "the cheapest setting for every layer of a model that keeps an error or a time",
    "bench": "time, error and memory of attention over sequence lengths, against exact attention and plain torch",
    "analyze": "error against softmax temperature and entropy: sparse, low-rank and both at equal cost, with an oracle",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name; None for those of the process.

    Returns:
        The exit code: 0 for success, 2 for a wrong command line or a run folder that cannot be used, others as the
        command says.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"scatterbrain {__version__}")
        return 0
    if name not in COMMANDS:
        print(
            f"scatterbrain: expected a command ({', '.join(COMMANDS)}), got {name!r}; see scatterbrain --help",
            file=sys.stderr,
        )
        return 2
    command = getattr(importlib.import_module(f"scatterbrain.cli.{name}"), name)
    try:
        return command(rest)
    except CommandError as error:
        print(f"scatterbrain {name}: {error}", file=sys.stderr)
        return error.exit_code


def _usage() -> str:
    lines = ["usage: scatterbrain COMMAND [options]", "       scatterbrain --version", "", "commands:"]
    lines += [f"  {name:<10}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join([*lines, "", "scatterbrain COMMAND --help explains a command."])
