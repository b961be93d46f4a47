from __future__ import annotations

import pytest

from scatterbrain.cli import COMMANDS, main


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_every_command(capsys, arguments):
    assert main(arguments) == (0 if arguments else 2)
    output = capsys.readouterr().out
    assert all(name in output for name in COMMANDS)


def test_an_unknown_command_is_named_with_those_there_are(capsys):
    assert main(["trian"]) == 2
    errors = capsys.readouterr().err
    assert "trian" in errors and all(name in errors for name in COMMANDS)
