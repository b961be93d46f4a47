"""Parts that the commands share: errors that end them with a message, and their options and help."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    import jsonargparse


# What to install for a package that a command imports, where that is not the package itself.
INSTALLS = {name: f"'scatterbrain[{name}]'" for name in ("transformers", "timm", "diffusers")} | {"PIL": "pillow"}
INSTALLS |= dict.fromkeys(
    ("jsonargparse", "matplotlib", "numpy", "yaml", "safetensors", "tokenizers", "tqdm"), "'scatterbrain[train]'"
)


class CommandError(Exception):
    """Ends a command; the message is printed without a traceback."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turns a package that is not installed, bad input and files that cannot be read or written into a
    :class:`CommandError` of one line. Its exit code is 1, or what the error itself has as ``exit_code``."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("scatterbrain"):
            raise
        package = error.name.partition(".")[0]
        raise CommandError(f"needs the package {package}: pip install {INSTALLS.get(package, package)}") from error
    except (ValueError, OSError) as error:
        raise CommandError(one_line(error), getattr(error, "exit_code", 1)) from error


def check_outputs(options: object, *names: str, reads: Iterable[tuple[str, Path | None]] = ()) -> None:
    """Before minutes of measuring, not after: whether the files that options name can be written, each without another
    or what the command reads being lost.

    Args:
        options: with the files as attributes; None: not written.
        names: of those options, without dashes.
        reads: what the user calls a file or folder that the command reads, and the path; None: it reads none there.

    Raises:
        CommandError: naming the option.
        ModuleNotFoundError: a package that writes them.
    """
    taken: dict[str, Path] = {}
    for name in names:
        file = getattr(options, name)
        if file is None:
            continue
        file = Path(file)
        if file.is_dir():
            raise CommandError(f"--{name}: expected a file to write, got {file}, which is a folder")
        for what, path in reads:
            if path is not None:
                _check_not_read(name, file, what, path)
        for other, path in taken.items():
            if _are_one(file, path):
                raise CommandError(
                    f"--{name}: expected a file other than that of --{other}, which it would replace, got {file}; give "
                    "another name"
                )
        taken[name] = file
        if name == "png":
            import matplotlib  # noqa: F401
        if name == "yaml":
            import yaml  # noqa: F401


def _check_not_read(name: str, file: Path, what: str, path: Path) -> None:
    if _are_one(file, path):
        raise CommandError(
            f"--{name}: expected a file other than that of {what}, which it would replace, got {file}; give another "
            "name"
        )
    # Times are added to those that a file has, and a file of anything else is refused.
    if name == "times" or not file.exists() or not path.is_dir() or _real(path) not in _real(file).parents:
        return
    if not _is_earlier_output(file):
        raise CommandError(
            f"--{name}: expected a file that is not there yet or an earlier one of such a command, since {path} is the "
            f"folder that {what} reads, got {file}; remove it, or write elsewhere"
        )


def _is_earlier_output(file: Path) -> bool:
    """Whether what compare or tune wrote is there, by what is in it: beside a model it is written again, and the user's
    own files are not."""
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            return isinstance(content, dict) and {"facts", "layers"} <= content.keys()
        if file.suffix in (".yaml", ".yml"):
            from scatterbrain.layer_settings import LayerSettings

            LayerSettings.load(file)
            return True
        if file.suffix == ".png":
            from scatterbrain.analysis.output_files import is_own_picture

            return is_own_picture(file)
        if file.suffix == ".safetensors":
            from scatterbrain.analysis.captured_file import is_capture

            return is_capture(file)
    except (ValueError, TypeError, OSError):
        pass
    return False


def _are_one(file: Path, other: Path) -> bool:
    """Through links of either kind too."""
    return _real(file) == _real(other) or (file.exists() and other.exists() and file.samefile(other))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises where links go round in a circle


def one_line(error: object) -> str:
    return " ".join(str(error).split())


# -------------------- options


def parse(parser: jsonargparse.ArgumentParser, arguments: Sequence[str]) -> jsonargparse.Namespace:
    """The options of a command line, by a parser made with ``exit_on_error=False``.

    Raises:
        SystemExit: with code 2, after a message of one line, for an unknown option or a value of the wrong type.
    """
    try:
        return parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        print(f"{parser.prog}: {one_line(error)}; see {parser.prog} --help", file=sys.stderr)
        raise SystemExit(2) from error


def asks_for_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


class HelpParser(argparse.ArgumentParser):
    """Takes the options of a command as jsonargparse's parser does and prints them, with types and defaults. That
    package need not be there for it. The line breaks of the description stay."""

    def __init__(self, prog: str, usage: str, description: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, usage, description.replace("%", "%%"), formatter_class=formatter)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        return super().add_argument(*names, **_for_help(options))

    def add_section(self, title: str) -> Any:
        """A group of options, with the same ``add_argument``."""
        group = self.add_argument_group(title)
        add = group.add_argument
        group.add_argument = lambda *names, **options: add(*names, **_for_help(options))
        return group

    def exit_with_help(self) -> None:
        """Prints the help and leaves with code 0."""
        self.print_help()
        raise SystemExit(0)


def _for_help(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("action") == "help":
        return options
    shown = {name: value for name, value in options.items() if name in ("metavar", "nargs", "choices")}
    facts = [f"type: {_type_name(options['type'])}"] if "type" in options else []
    facts.append(f"default: {_plain(options.get('default'))}")
    return shown | {"help": f"{options.get('help', '')} ({', '.join(facts)})".replace("%", "%%")}


def _plain(default: object) -> str:
    """A default as YAML writes it."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return f"[{', '.join(map(_plain, default))}]" if isinstance(default, (list, tuple)) else str(default)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is None and get_args(hint) == ():
        return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
    if get_origin(hint) in (tuple, list, dict):
        return str(hint)
    return " or ".join(map(_type_name, get_args(hint)))
