from __future__ import annotations

import dataclasses

import pytest
from testkit import run_python

import scatterbrain
from scatterbrain.cli import COMMANDS, main
from scatterbrain.training.config import SECTIONS


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_every_command(capsys, arguments):
    assert main(arguments) == (0 if arguments else 2)
    output = capsys.readouterr().out
    assert all(name in output for name in COMMANDS)


def test_an_unknown_command_is_named_with_those_there_are(capsys):
    assert main(["trian"]) == 2
    errors = capsys.readouterr().err
    assert "trian" in errors and all(name in errors for name in COMMANDS)


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"scatterbrain {scatterbrain.__version__}\n"
    assert main(["--help"]) == 0 and "scatterbrain --version" in capsys.readouterr().out


EXTRAS = ("jsonargparse", "matplotlib", "safetensors", "tqdm", "yaml")
WORDS = {
    (): list(COMMANDS),
    ("info",): ["instruction set"],
    ("train",): [f"--{name}.{key.name}" for name, section in SECTIONS.items() for key in dataclasses.fields(section)]
    + ["--output", "--resume", "--config", "2000)", "Peak of AdamW's"],
    ("compare",): ["--inputs FILE", "a Hugging Face folder", "How to read it", "--png FILE", "Ctrl-C"],
    ("analyze",): [
        "--temperatures T [T ...]",
        "--support KIND",
        "default: 128)",
        "How to read it",
        "--resume",
        "--config",
    ],
    ("tune",): ["--max-error E", "--budget SHARE", "a Hugging Face folder", "layers=", "--png FILE", "--times FILE"],
    ("bench",): ["\n  sdpa  ", "\n  torch-window-64, ", "--suite {quick", "--resume", "default: [F, F+B]", "Ctrl-C"],
}


@pytest.mark.parametrize("command", WORDS, ids=" ".join)
def test_help_needs_no_extra(command):
    """The whole help, where torch is the only package there is."""
    program = (
        "import sys; sys.modules |= dict.fromkeys(sys.argv[1].split(',')); from scatterbrain.cli import main;"
        "sys.exit(main(sys.argv[2:]))"
    )
    shown = run_python("-W", "error", "-c", program, ",".join(EXTRAS), *command, "--help")
    assert shown.returncode == 0, shown.stderr
    assert [word for word in WORDS[command] if word not in shown.stdout] == []
    assert shown.stderr == ""


def test_help_of_a_command_leaves_with_code_0_in_any_place(capsys):
    for arguments in (["train", "no.yaml", "--help"], ["bench", "--suite", "short", "-h"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0 and f"usage: scatterbrain {arguments[0]}" in capsys.readouterr().out
