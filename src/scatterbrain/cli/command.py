"""Parts that the commands share: errors that end them with a message, and the layout of their help."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """Ends a command; the message is printed without a traceback."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turns a package that is not installed, bad input and files that cannot be read or written into a
    :class:`CommandError`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("scatterbrain"):
            raise
        raise CommandError(f"needs the package {error.name}: pip install 'scatterbrain[train]'") from error
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


def help_formatter() -> type[argparse.HelpFormatter]:
    """A formatter that shows types and defaults, and keeps the line breaks of the description."""
    from jsonargparse import DefaultHelpFormatter

    return type("Formatter", (DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter), {})
