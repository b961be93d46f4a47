from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml
from testkit import ROOT, environment

from scatterbrain.cli import main
from scatterbrain.cli.train import parse_run_config
from scatterbrain.training.attention import is_exact
from scatterbrain.training.checkpoint import read_progress
from scatterbrain.training.config import SECTIONS, RunConfig

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


def wait_for(path: Path, size: int = 0) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > size) and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_where_its_checkpoint_is_and_how_to_continue(config, tmp_path, number, code):
    process = start(config)
    wait_for(tmp_path / "run" / "metrics.jsonl", 500)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    assert process.returncode == code, errors
    assert (
        str(checkpoint) in errors and f"scatterbrain train {tmp_path / 'run' / 'config.yaml'} --resume true" in errors
    )
    assert read_progress(checkpoint).step > 0


@pytest.mark.parametrize("resume", ["false", "true"])
def test_a_run_whose_output_nobody_reads_any_more_keeps_its_steps_and_says_how_to_go_on(config, tmp_path, resume):
    if resume == "true":
        assert main(["train", str(config), "--train.steps", "2"]) == 0
    process = start(config, "--train.validate_every", "5", "--resume", resume)
    assert process.stdout.readline() != ""
    wait_for(tmp_path / "run" / "metrics.jsonl", 1000)  # several steps
    process.stdout.close()  # as head does
    process.wait(timeout=60)
    errors = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE, errors
    last = errors.splitlines()[-1]
    assert "stopped by SIGPIPE: nobody reads what it prints any more. The checkpoint of step" in last
    assert last.endswith("--resume true") and "Broken pipe" not in errors and "Exception ignored" not in errors
    done = read_progress(tmp_path / "run" / "checkpoint.safetensors").step
    assert done == (tmp_path / "run" / "metrics.jsonl").read_text().count('"kind": "train"') > 2 * (resume == "true")


def test_a_run_whose_progress_nobody_reads_either_keeps_its_steps(config, tmp_path):
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-m", "scatterbrain", "train", str(config), "--train.validate_every", "5"]
    process = subprocess.Popen(command, env=environment(), **both)
    assert process.stdout.readline() != ""
    wait_for(tmp_path / "run" / "metrics.jsonl", 500)
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize("streams", ["stdout", "both"])
def test_a_run_that_outlives_its_terminal_keeps_its_steps(config, tmp_path, streams):
    reader, terminal = os.openpty()
    stderr = subprocess.PIPE if streams == "stdout" else terminal
    command = [sys.executable, "-m", "scatterbrain", "train", str(config), "--train.validate_every", "5"]
    process = subprocess.Popen(
        command, env=environment(), stdout=terminal, stderr=stderr, text=True, start_new_session=True
    )
    os.close(terminal)
    assert os.read(reader, 1) != b""
    wait_for(tmp_path / "run" / "metrics.jsonl", 500)
    os.close(reader)  # the window is closed; what is printed from now on is an I/O error
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    done = read_progress(tmp_path / "run" / "checkpoint.safetensors").step
    assert done == (tmp_path / "run" / "metrics.jsonl").read_text().count('"kind": "train"') > 0
    if streams == "stdout":
        errors = process.stderr.read()
        assert "stopped by SIGPIPE: nobody reads what it prints any more. The checkpoint of step" in errors
        assert "cannot write" not in errors and "Exception ignored" not in errors


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
        (["--train.device", "meta"], "train.device: expected a device that holds values"),
        (["--train.device", "vulkan"], "train.device: expected a device of this machine, got 'vulkan'"),
        (["--train.device", "hpu"], "train.device: expected a device of this machine, got 'hpu'"),
        (["--output", "~no_such_user_here/run"], "output: expected a folder, got '~no_such_user_here/run'"),
        (["--output", "./~no_such_user_here/run"], "home directory.; write the whole path\n"),
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


def keys_without_null() -> list[str]:
    """Every section, and every key that must have a value."""
    keys = [f"{name}." for name in SECTIONS]
    for prefix, section in (("", RunConfig), *((f"{name}.", section) for name, section in SECTIONS.items())):
        hints = typing.get_type_hints(section)
        keys += [f"{prefix}{key}" for key, hint in hints.items() if type(None) not in typing.get_args(hint)]
    return [key for key in keys if key not in SECTIONS]


@pytest.mark.parametrize("key", keys_without_null())
def test_null_where_a_value_is_needed_is_refused_by_its_key(config, tmp_path, capsys, key):
    settings = yaml.safe_load(config.read_text())
    settings["train"]["steps"] = 1
    section, _, name = key.partition(".")
    if name:
        settings.setdefault(section, {})[name] = None
    else:
        settings[section] = None
    config.write_text(yaml.safe_dump(settings))
    assert_one_line_and_code_2(config, tmp_path, capsys, f"scatterbrain train: {key.rstrip('.')}: expected ")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"support": {"kind": None}}, "attention.support: expected one of full"),
        ({"support": {"kind": "window", "keys": None}}, "attention.support: Window: keys must be an int, got None"),
        ({"support": {"kind": "window", "block_q": None}}, "Window: block_q must be an int, got None"),
        ({"low_rank": {"kind": "quadratic", "rank": None}}, "attention.low_rank: Quadratic: rank must be an int, got"),
        ({"low_rank": {"kind": "quadratic", "statistics": None}}, "Quadratic: statistics must be a string, got None"),
        ({"low_rank": {"kind": "favor", "orthogonal": None}}, "Favor: orthogonal must be a bool, got None"),
    ],
    ids=str,
)
def test_null_inside_attention_is_refused_by_its_key(config, tmp_path, capsys, settings, words):
    everything = yaml.safe_load(config.read_text()) | {"attention": settings}
    everything["train"]["steps"] = 1
    config.write_text(yaml.safe_dump(everything))
    assert_one_line_and_code_2(config, tmp_path, capsys, words)


@pytest.mark.parametrize("text", ["", "null", "[1, 2]", "words", "train: [", "train: {steps: [1]}", "model: 3"])
def test_a_file_of_something_else_is_refused_in_one_line(config, tmp_path, capsys, text):
    config.write_text(text)
    assert_one_line_and_code_2(config, tmp_path, capsys, "scatterbrain train: ")


@pytest.mark.parametrize("value", [None, [], "words"])
@pytest.mark.parametrize("option", ["--model.layers=1", "--train.steps=1"])
def test_an_option_makes_no_section_of_something_else(config, tmp_path, capsys, option, value):
    section = option.removeprefix("--").split(".")[0]
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {section: value}))
    assert_one_line_and_code_2(config, tmp_path, capsys, f"{section}", option)


@pytest.mark.parametrize("path", ["taken", "taken/run"])
def test_a_file_in_the_way_of_the_output_is_refused(config, tmp_path, capsys, path):
    (tmp_path / "taken").touch()
    options = "--train.steps=1", f"--output={tmp_path / path}"
    assert_one_line_and_code_2(config, tmp_path, capsys, "output: expected a folder", *options)


def assert_one_line_and_code_2(config, folder, capsys, words, *options):
    """And nothing was created."""
    before = sorted(folder.iterdir())
    assert run_to_its_exit_code("train", str(config), *options) == 2
    streams = capsys.readouterr()
    assert streams.err.count("\n") == 1 and words in streams.err, streams.err
    assert streams.out == "" and sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.rope_base", 0.0),
        ("model.embedding_std", -1.0),
        ("model.mlp_width", 0),
        ("train.learning_rate", math.inf),
        ("train.final_learning_rate", -0.1),
        ("train.warmup", -1),
        ("train.weight_decay", -1.0),
        ("train.betas", [0.9, 1.0]),
        ("train.seed", -1),
        ("train.seed", 2**64),
    ],
)
def test_a_value_that_would_change_or_break_the_training_is_refused_by_its_key(config, capsys, key, value):
    settings = yaml.safe_load(config.read_text())
    section, name = key.split(".")
    settings[section][name] = value
    config.write_text(yaml.safe_dump(settings))
    assert main(["train", str(config), "--train.steps", "1"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"scatterbrain train: {key}: expected ") and errors.count("\n") == 1


def test_a_folder_takes_one_run_at_a_time_and_a_killed_run_leaves_it_free(config, tmp_path, capsys):
    first = start(config, "--train.checkpoint_every", "1")
    try:
        wait_for(tmp_path / "run" / "checkpoint.safetensors")
        for resume in ("false", "true", "auto"):
            assert main(["train", str(config), "--resume", resume, "--train.steps", "1"]) == 2
            errors = capsys.readouterr().err
            assert f"output: another run is writing to {tmp_path / 'run'}; wait" in errors and errors.count("\n") == 1
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate(timeout=60)
    done = read_progress(tmp_path / "run" / "checkpoint.safetensors").step
    assert main(["train", str(config), "--resume", "true", "--train.steps", str(done + 1)]) == 0


@pytest.mark.parametrize("support", ["full", "empty", "window", "routed", "{kind: window, keys: 32}"])
@pytest.mark.parametrize("low_rank", ["null", "none", "quadratic", "favor", "{kind: quadratic, statistics: ema}"])
def test_what_the_help_offers_trains_or_is_refused_by_name(config, tmp_path, capsys, support, low_rank):
    options = ["--attention.support", support, "--attention.low_rank", low_rank, "--train.steps", "1"]
    code = main(["train", str(config), *options])
    assert (tmp_path / "run" / "sample.txt").exists() == (code == 0)
    assert code == 0 or "attention" in capsys.readouterr().err


def test_a_field_that_a_kernel_does_not_have_is_named_with_those_it_has(config, capsys):
    low_rank = ["--attention.support", "window", "--attention.low_rank", "{kind: favor, balanced: false}"]
    assert main(["train", str(config), "--train.steps", "1", *low_rank]) == 1
    expected = (
        "attention.low_rank.balanced: favor has no such field; it has features, orthogonal, hyperbolic, redraw, seed, "
        "centred"
    )
    assert expected in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["CONFIG", "--train.warmup", "3"],
        ["--config", "CONFIG", "--train.warmup", "3"],
        ["--config=CONFIG", "--train.warmup", "3"],
        ["--train.warmup", "3", "--config", "CONFIG"],
        ["--train.warmup", "3", "--config=CONFIG"],
        ["SHARED", "--train.warmup", "3", "--config=CONFIG"],
    ],
    ids=" ".join,
)
def test_a_file_extends_another_wherever_it_is_named(config, tmp_path, arguments):
    extending = tmp_path / "extending.yaml"
    extending.write_text("extends: config.yaml\nmodel: {layers: 2}\n")
    paths = {"CONFIG": str(extending), "SHARED": str(config)}
    found = parse_run_config(
        [argument.replace("CONFIG", paths["CONFIG"]).replace("SHARED", paths["SHARED"]) for argument in arguments]
    )
    assert (found.model.layers, found.model.width, found.train.context, found.train.warmup) == (2, 32, 64, 3)


@pytest.mark.parametrize("key", ['"extends"', "'extends' ", "\ufeffextends"], ids=["quoted", "in single quotes", "BOM"])
def test_a_file_extends_another_however_yaml_has_the_key(config, tmp_path, key):
    extending = tmp_path / "extending.yaml"
    extending.write_text(f"{key}: config.yaml\nmodel: {{layers: 2}}\n", encoding="utf-8")
    found = parse_run_config([str(extending)])
    assert (found.model.layers, found.model.width) == (2, 32)


@pytest.mark.parametrize(
    "text",
    [
        "{extends: config.yaml, model: {layers: 2}}",
        '{"extends": ["config.yaml"], "model": {"layers": 2}}',
        "  extends: config.yaml\n  model: {layers: 2}\n",
        "? extends\n: config.yaml\n? model\n: {layers: 2}\n",
    ],
    ids=["in braces", "JSON", "indented", "with question marks"],
)
def test_a_file_extends_another_wherever_in_it_the_key_stands(config, tmp_path, text):
    extending = tmp_path / "extending.json"
    extending.write_text(text)
    found = parse_run_config([str(extending)])
    assert (found.model.layers, found.model.width) == (2, 32)


def test_what_looks_like_the_key_and_is_text_extends_nothing(tmp_path):
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text('sample:\n  prompt: "a\n\nextends: of text"\n')
    assert parse_run_config([str(prompt)]).sample.prompt == "a\nextends: of text"


def test_a_file_that_is_no_text_is_named(config, capsys):
    config.write_bytes(b"model: \xff\xfe\n")
    assert main(["train", str(config)]) == 1
    assert f"{config}: expected YAML, got what cannot be read: 'utf-8' codec" in capsys.readouterr().err


def test_a_section_of_something_else_is_refused_wherever_its_file_is_named(config, tmp_path, capsys):
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"model": "words"}))
    assert run_to_its_exit_code("train", "--train.steps=1", f"--config={config}", "--model.layers=1") == 2
    assert "model" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_output_may_be_in_the_user_s_own_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config), "--train.steps", "1", "--output", "~/run"]) == 0
    assert (tmp_path / "home" / "run" / "checkpoint.safetensors").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("package", ["jsonargparse", "tqdm", "matplotlib", "safetensors"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, capsys, package):
    for name in list(sys.modules):
        if name.startswith("scatterbrain.training.") or name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["train", str(STDLIB)]) == 1
    assert package in (errors := capsys.readouterr().err) and "pip install 'scatterbrain[train]'" in errors
