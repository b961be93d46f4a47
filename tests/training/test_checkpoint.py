"""What a run refuses to continue from: files that someone, or another version, has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from scatterbrain.cli import main
from scatterbrain.training.tasks import Task

Files = tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]  # tensors, metadata, progress


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run of two steps, in whose folder "base" lie its files."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(f"line {number:04d}\n" for number in range(200)))
    settings = {
        "data": {"path": str(folder / "text.txt"), "validation_fraction": 0.2},
        "model": {"layers": 1, "width": 16, "heads": 1},
        "attention": {"keys": 32, "low_rank": {"kind": "quadratic", "rank": 3}},
        "train": {"steps": 2, "context": 48, "batch": 1, "threads": 1, "validation_batches": 1},
        "sample": {"length": 0},
        "output": str(folder / "base"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["train", str(path)]) == 0
    return path


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped.parent / "base", tmp_path / "run")


def go_on(config: Path, folder: Path, *options: str) -> int:
    return main(["train", str(config), "--output", str(folder), "--resume", "true", "--train.steps", "3", *options])


def assert_refused(config: Path, folder: Path, capsys: pytest.CaptureFixture, words: str) -> None:
    """Exit code 2 and one line, and all files as they were."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert go_on(config, folder) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("scatterbrain train: "), errors
    assert words in errors, errors
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def progress(**changes: object) -> Callable[[Files], None]:
    return lambda files: files[2].update(changes)


def tensor(name: str, value: object) -> Callable[[Files], None]:
    """Replaces a tensor by what ``value`` makes of it; by None without it."""

    def edit(files: Files) -> None:
        old = files[0].pop(name, None)
        if value is not None:
            files[0][name] = value if isinstance(value, Tensor) else value(old)

    return edit


def without(prefix: str) -> Callable[[Files], None]:
    return lambda files: [files[0].pop(name) for name in list(files[0]) if name.startswith(prefix)]


def setting(key: str, value: object) -> Callable[[Files], None]:
    section, name = key.split(".")
    return lambda files: files[2]["config"][section].update({name: value})


NORM = "model/norm.weight"
TAMPERED: dict[str, tuple[Callable[[Files], object], str]] = {
    "unknown progress": (progress(colour=1), "expected the progress step, seconds, config, got"),
    "progress without a step": (lambda files: files[2].pop("step"), "expected the progress step"),
    "a step in words": (progress(step="two"), "step must be an int from 0, got 'two'"),
    "half a step": (progress(step=1.5), "step must be an int from 0, got 1.5"),
    "a step before the first": (progress(step=-1), "step must be an int from 0, got -1"),
    "a true step": (progress(step=True), "step must be an int from 0, got True"),
    "another step": (progress(step=1), "step must be from 1 to the run's step 1, got 2.0"),
    "time in words": (progress(seconds="long"), "seconds must be a number from 0, got 'long'"),
    "no time at all": (progress(seconds=float("nan")), "seconds must be a number from 0, got nan"),
    "a list of settings": (progress(config=[1]), "config must be the sections data, model"),
    "no settings": (progress(config=None), "config must be the sections data, model"),
    "settings without a model": (lambda files: files[2]["config"].pop("model"), "config must be the sections"),
    "settings without a width": (
        lambda files: files[2]["config"]["model"].pop("width"),
        "model.width: the checkpoint does not say what it was made with, got 16",
    ),
    "an unknown setting": (
        lambda files: files[2]["config"]["model"].update(depth=3),
        "model.depth: the checkpoint was made with 3, and this version has no such setting",
    ),
    "an unknown section": (lambda files: files[2]["config"].update(extra={"a": 1}), "extra.a: the checkpoint was made"),
    "an unknown empty section": (lambda files: files[2]["config"].update(extra={}), "extra: the checkpoint was made"),
    "another setting": (
        lambda files: files[2]["config"]["train"].update(clip=2.0),
        "train.clip: the checkpoint was made with 2.0, got 1.0",
    ),
    **{
        f"{key}: {json.dumps(value)}": (setting(key, value), f"{key}: {words}")
        for key, value, words in (
            ("train.seed", 0.0, "expected an int, and the checkpoint was made with 0.0; continue with"),
            ("train.seed", False, "expected an int, and the checkpoint was made with False; continue with"),
            ("train.bf16", 0, "expected true or false, and the checkpoint was made with 0; continue with"),
            ("train.clip", True, "expected a number, and the checkpoint was made with True; continue with"),
            ("train.betas", [0.9, "0.95"], "expected a list of 2 numbers, and the checkpoint was made with [0.9, '0.9"),
            ("model.kv_heads", 1.0, "expected an int or null, and the checkpoint was made with 1.0; continue with"),
            ("data.exclude", "site", "expected a list of strings, and the checkpoint was made with 'site'"),
            (
                "attention.low_rank",
                {"kind": "quadratic", "rank": 3.0},
                "the checkpoint was made with {'kind': 'quadratic', 'rank': 3.0}, got {'kind': 'quadratic', 'rank': 3}",
            ),
        )
    },
    "progress that is no JSON": (lambda files: files[1].update(progress="{"), "expected the progress"),
    "progress without an end": (lambda files: files[1].update(progress="[" * 10**5), "expected the progress"),
    "a step of many digits": (lambda files: files[1].update(progress="1" * 5000), "expected the progress"),
    "progress that is a list": (lambda files: files[1].update(progress="[1]"), "expected the progress"),
    "no progress": (lambda files: files[1].update(progress=None), "expected the progress"),
    "another format": (lambda files: files[1].update(format="x"), "expected a checkpoint in format"),
    "unknown metadata": (lambda files: files[1].update(colour="red"), "metadata format and progress, got 'colour' too"),
    "an unknown tensor": (
        tensor("colour", torch.zeros(1)),
        "expected tensors model/, optimizer/, scaler/ and rng/, got 'colour'",
    ),
    "an unknown weight": (tensor("model/colour", torch.zeros(1)), "colour"),
    "a missing weight": (tensor(NORM, None), "norm.weight"),
    "a weight of another shape": (
        tensor(NORM, torch.zeros(3)),
        f"{NORM} must be float32 of shape (16,), got float32 of",
    ),
    "a weight of integers": (tensor(NORM, Tensor.int), f"{NORM} must be float32 of shape (16,), got int32"),
    "a weight of NaN": (tensor(NORM, lambda t: t * float("nan")), f"{NORM} holds NaN"),
    "no optimizer state": (without("optimizer/"), "optimizer/0/exp_avg is missing"),
    "no state of a parameter": (without("optimizer/1/"), "optimizer/1/exp_avg is missing"),
    "no average": (tensor("optimizer/0/exp_avg_sq", None), "optimizer/0/exp_avg_sq is missing"),
    "an average that broadcasts": (
        tensor("optimizer/0/exp_avg", torch.zeros(1, 1)),
        "optimizer/0/exp_avg must be float32",
    ),
    "an average of integers": (tensor("optimizer/0/exp_avg", Tensor.int), "optimizer/0/exp_avg must be float32"),
    "an average of infinity": (
        tensor("optimizer/0/exp_avg", lambda t: t + float("inf")),
        "optimizer/0/exp_avg holds NaN",
    ),
    "an average of squares below zero": (
        tensor("optimizer/0/exp_avg_sq", lambda t: -1 - t),
        "optimizer/0/exp_avg_sq must be an average of squares, 0 or more, got -",
    ),
    "an unknown average": (tensor("optimizer/0/colour", torch.zeros(1)), "optimizer/0/colour belongs to no parameter"),
    "an unknown parameter": (tensor("optimizer/99/step", torch.zeros(1)), "optimizer/99/step belongs to no parameter"),
    "a parameter without a number": (tensor("optimizer/a/step", torch.zeros(1)), "optimizer/a/step belongs to no"),
    "other steps of a parameter": (
        tensor("optimizer/0/step", torch.tensor(9.0)),
        "must be from 1 to the run's step 2, got 9.0",
    ),
    "no steps of a parameter": (
        tensor("optimizer/0/step", torch.tensor(0.0)),
        "must be from 1 to the run's step 2, got 0.0",
    ),
    "no generator": (tensor("rng/cpu", None), "rng/cpu is missing"),
    "a short generator": (tensor("rng/cpu", lambda t: t[:16]), "rng/cpu must be uint8 of shape (5056,), got uint8 of"),
    "a float generator": (tensor("rng/cpu", Tensor.float), "rng/cpu must be uint8"),
    "an empty generator": (tensor("rng/cpu", torch.zeros_like), "rng: Invalid"),
    "an unknown generator": (tensor("rng/dice", torch.zeros(1)), "rng/dice is unknown"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_changed_checkpoint_is_refused_in_one_line(name: str, stopped: Path, copied: Path, capsys) -> None:
    edit, words = TAMPERED[name]
    checkpoint = copied / "checkpoint.safetensors"
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    state, stored = json.loads(metadata["progress"]), metadata["progress"]
    edit((tensors, metadata, state))
    if metadata["progress"] == stored:
        metadata["progress"] = json.dumps(state)
    metadata = {key: value for key, value in metadata.items() if value is not None}
    safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, checkpoint, metadata)
    assert_refused(stopped, copied, capsys, words)


def with_unused(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Models with two parameters that no loss depends on."""

    def build_model(self: Task, *arguments: Any) -> nn.Module:
        model = original(self, *arguments)
        model.unused = nn.ParameterList([torch.full((3,), 1.0), torch.full((2, 2), 2.0)])
        return model

    return build_model


def test_a_run_with_parameters_that_have_no_gradient_goes_on(
    stopped: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(Task, "build_model", with_unused(Task.build_model))
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert main(["train", str(stopped), "--output", str(cut), "--train.schedule", "constant"]) == 0
    assert go_on(stopped, cut, "--train.schedule", "constant") == 0
    options = ["--train.schedule", "constant", "--train.steps", "3"]
    assert main(["train", str(stopped), "--output", str(whole), *options]) == 0
    expected, found = (safetensors.torch.load_file(path / "checkpoint.safetensors") for path in (whole, cut))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    untrained = [name for name in found if name.endswith("/untrained")]
    assert len(untrained) == 2 and not any(name.rpartition("/")[0] + "/step" in found for name in untrained)

    checkpoint = cut / "checkpoint.safetensors"
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    number = untrained[0].split("/")[1]
    for change, words in (
        ({f"optimizer/{number}/step": torch.tensor(3.0)}, f"optimizer/{number}/step belongs to no parameter"),
        ({untrained[0]: None}, f"optimizer/{number}/exp_avg is missing"),
        ({untrained[0]: torch.zeros(2)}, f"{untrained[0]} must be float32 of shape (0,), got float32 of shape (2,)"),
    ):
        edited = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        safetensors.torch.save_file(edited, checkpoint, metadata)
        capsys.readouterr()
        assert main(["train", str(stopped), "--output", str(cut), "--resume", "true", *options[:2]]) == 2
        assert words in capsys.readouterr().err


def test_a_run_with_a_parameter_that_a_later_step_uses_first_goes_on(
    stopped: Path, tmp_path: Path, monkeypatch
) -> None:
    original, passes = Task.build_model, 0

    def build_model(self: Task, *arguments: Any) -> nn.Module:
        model = original(self, *arguments)
        model.late = nn.Parameter(torch.zeros(1))

        def add_late(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            nonlocal passes
            passes += module.training
            return output + module.late if passes > 1 else output

        model.register_forward_hook(add_late)
        return model

    monkeypatch.setattr(Task, "build_model", build_model)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert main(["train", str(stopped), "--output", str(cut), "--train.schedule", "constant"]) == 0
    assert go_on(stopped, cut, "--train.schedule", "constant") == 0
    passes = 0
    options = ["--train.schedule", "constant", "--train.steps", "3"]
    assert main(["train", str(stopped), "--output", str(whole), *options]) == 0
    expected, found = (safetensors.torch.load_file(path / "checkpoint.safetensors") for path in (whole, cut))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert {float(value) for name, value in found.items() if name.endswith("/step")} == {2.0, 3.0}


def test_a_number_may_be_written_as_one_with_a_point_or_without(stopped: Path, copied: Path) -> None:
    checkpoint = copied / "checkpoint.safetensors"
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    progress = json.loads(metadata["progress"])
    progress["config"]["train"]["clip"] = 1
    safetensors.torch.save_file(tensors, checkpoint, metadata | {"progress": json.dumps(progress)})
    assert go_on(stopped, copied) == 0


@pytest.mark.parametrize("cut", [0, 500, -5])
def test_a_cut_checkpoint_is_refused_in_one_line(cut: int, stopped: Path, copied: Path, capsys) -> None:
    checkpoint = copied / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:cut])
    assert_refused(stopped, copied, capsys, "checkpoint.safetensors: expected a checkpoint of scatterbrain train")


LINES = {
    "a list": "[1, 2]",
    "a number": "3",
    "nothing known": "{}",
    "no step": '{"kind": "validation", "loss": 1, "bits_per_byte": 1}',
    "a step in words": '{"kind": "validation", "step": "1", "loss": 1, "bits_per_byte": 1}',
    "no kind": '{"step": 1, "loss": 1, "bits_per_byte": 1}',
    "a kind that is a list": '{"kind": [], "step": 1, "loss": 1, "bits_per_byte": 1}',
    "an unknown kind": '{"kind": "test", "step": 1, "loss": 1, "bits_per_byte": 1}',
    "no loss": '{"kind": "validation", "step": 1, "bits_per_byte": 1}',
    "a loss in words": '{"kind": "validation", "step": 1, "loss": "low", "bits_per_byte": 1}',
    "no JSON": "nonsense",
    "a list without an end": "[" * 10**5,
    "a number of many digits": "1" * 5000,
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_of_the_metrics_that_is_no_record_is_refused(name: str, stopped: Path, copied: Path, capsys) -> None:
    metrics = copied / "metrics.jsonl"
    first, *others = metrics.read_text().splitlines()
    metrics.write_text("\n".join([first, LINES[name], *others]) + "\n")
    assert_refused(stopped, copied, capsys, "metrics.jsonl, line 2: expected a record with kind (train or validation)")


def test_records_out_of_order_or_twice_are_refused(stopped: Path, copied: Path, capsys) -> None:
    metrics = copied / "metrics.jsonl"
    first, *others = metrics.read_text().splitlines()
    for lines in ([first, first, *others], [*others, first]):
        metrics.write_text("\n".join(lines) + "\n")
        assert_refused(stopped, copied, capsys, "expected a train record of a step after")


def test_a_last_line_that_was_cut_short_is_dropped(stopped: Path, copied: Path) -> None:
    metrics = copied / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"kind": "train", "st')
    assert go_on(stopped, copied) == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 2, 3, 3]


def test_records_that_are_gone_are_said_to_be(stopped: Path, copied: Path, capsys) -> None:
    (copied / "metrics.jsonl").unlink()
    assert go_on(stopped, copied, "--compare.steps", "2") == 0
    out = capsys.readouterr().out
    assert "metrics.jsonl has records of 0 of 2 steps; the others are not drawn" in out
    assert "metrics.jsonl lacks records of the first 2 steps" in out
