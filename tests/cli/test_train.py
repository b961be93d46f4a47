from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from testkit import ROOT, environment

from scatterbrain.cli import main
from scatterbrain.cli.train import parse_run_config
from scatterbrain.training.attention import is_exact
from scatterbrain.training.checkpoint import read_progress

STDLIB = ROOT / "configs" / "lm" / "stdlib.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The YAML of a run that would last for hours in steps of milliseconds."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number:04d}\n" for number in range(400)))
    settings = {
        "data": {"path": str(text), "validation_fraction": 0.1},
        "model": {"layers": 1, "width": 32, "heads": 2},
        "attention": {"support": "full"},
        "train": {"steps": 10**6, "context": 64, "batch": 1, "threads": 1, "validation_batches": 1},
        "sample": {"length": 4},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "scatterbrain", "train", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **pipes, **options)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_where_its_checkpoint_is_and_how_to_continue(config, tmp_path, number, code):
    process = start(config)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size > 500) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    assert process.returncode == code, errors
    assert (
        str(checkpoint) in errors and f"scatterbrain train {tmp_path / 'run' / 'config.yaml'} --resume true" in errors
    )
    assert read_progress(checkpoint).step > 0


def test_a_file_system_that_takes_no_more_keeps_the_last_checkpoint(config, tmp_path):
    assert main(["train", str(config), "--train.steps", "2"]) == 0
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    before = checkpoint.read_bytes()

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

    process = start(config, "--resume", "true", "--train.steps", "4", preexec_fn=limit_file_size)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert str(checkpoint) in errors and "step 2" in errors and os.strerror(27) in errors
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--modle.layers", "4"], "modle.layers"),
        (["--model.layesr", "4"], "model.layesr"),
        (["--model.layers", "four"], "model.layers"),
        (["--train.resume", "true"], "train.resume"),
    ],
)
def test_a_bad_option_is_named(config, capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(config), *arguments])
    assert stopped.value.code == 2 and named in capsys.readouterr().err


def test_a_bad_key_of_the_file_is_named(config, capsys):
    config.write_text(config.read_text().replace("layers", "layesr"))
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(config)])
    assert stopped.value.code == 2 and "layesr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--train.batch", "0"], "train.batch"),
        (["--data.path", "nowhere"], "data.path"),
        (["--attention.support", "none"], "attention.support"),
        (["--sample.prompt", ""], "sample.prompt"),
        (["--train.device", "gpu"], "train.device"),
    ],
)
def test_a_bad_value_is_named_in_one_line(config, capsys, arguments, named):
    assert main(["train", str(config), "--train.steps", "1", *arguments]) == 1
    errors = capsys.readouterr().err
    assert named in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named", "code"),
    [
        (["--attention.preset", "drop_in"], "attention.preset", 2),
        (["--attention.preset", "paper"], "attention.preset", 2),
        (["--attention.support", "lsh"], "attention.support", 1),
        (["--attention.low_rank", "{kind: quadratic, statistics: stored}"], "attention.low_rank.statistics", 1),
        (["--attention.low_rank", "{kind: quadratic, statistics: input}"], "attention.low_rank.statistics", 1),
        (["--attention.keys", "20"], "attention.keys", 1),
    ],
)
def test_attention_that_cannot_train_is_refused_before_anything_is_created(tmp_path, capsys, arguments, named, code):
    assert run_to_its_exit_code("train", str(STDLIB), "--output", str(tmp_path / "run"), *arguments) == code
    streams = capsys.readouterr()
    assert named in streams.err and streams.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("support", ["full", "empty", "window", "routed", "{kind: window, keys: 32}"])
@pytest.mark.parametrize("low_rank", ["null", "none", "quadratic", "favor", "{kind: quadratic, statistics: ema}"])
def test_what_the_help_offers_trains_or_is_refused_by_name(config, tmp_path, capsys, support, low_rank):
    options = ["--attention.support", support, "--attention.low_rank", low_rank, "--train.steps", "1"]
    code = main(["train", str(config), *options])
    assert (tmp_path / "run" / "sample.txt").exists() == (code == 0)
    assert code == 0 or "attention" in capsys.readouterr().err


def run_to_its_exit_code(*arguments: str) -> int:
    """The exit code, also where the parser of options leaves by SystemExit."""
    try:
        return main(arguments)
    except SystemExit as stopped:
        return stopped.code


def test_the_shipped_configuration_trains_routed_attention_and_one_option_makes_it_exact():
    shipped = parse_run_config([str(STDLIB)])
    assert not is_exact(shipped.attention) and shipped.train.context >= 2048
    assert is_exact(parse_run_config([str(STDLIB), "--attention.support", "full"]).attention)


def test_options_override_the_file():
    config = parse_run_config([str(STDLIB), "--attention.keys", "48", "--model.layers", "3", "--data.path", "notes"])
    assert (config.attention.keys, config.model.layers, config.data.path) == (48, 3, "notes")


@pytest.mark.parametrize("package", ["jsonargparse", "tqdm", "matplotlib", "safetensors"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, capsys, package):
    for name in list(sys.modules):
        if name.startswith("scatterbrain.training.") or name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["train", str(STDLIB)]) == 1
    assert package in (errors := capsys.readouterr().err) and "pip install 'scatterbrain[train]'" in errors
