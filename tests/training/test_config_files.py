from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scatterbrain.cli.train import parse_run_config
from scatterbrain.training.config_files import read_config


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "run.yaml"


def test_a_file_has_the_keys_of_those_it_extends_and_its_own_win(tmp_path):
    path = write(
        tmp_path,
        task="task: {kind: copy, tokens: 15}\ntrain: {steps: 3, batch: 4}\nattention: {support: {kind: window}}",
        long="extends: task.yaml\ntask: {tokens: 31}\n",
        run="extends: [long.yaml]\ntrain: {steps: 5}\nattention: {support: {kind: routed, keys: 32}}\n",
    )
    config = parse_run_config([str(path), "--train.warmup", "1"])
    assert config.task == {"kind": "copy", "tokens": 31}
    assert (config.train.steps, config.train.batch, config.train.warmup) == (5, 4, 1)
    assert config.attention.support == {"kind": "routed", "keys": 32}, "another kind replaces the fields of the first"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"run": "extends: other.yaml"},
            "other.yaml, which does not exist or is a folder, named by extends in .*run.yaml",
        ),
        ({"run": "extends: run.yaml"}, "extends: expected files that end somewhere, got a circle: .*run.yaml -> "),
        ({"run": "extends: 3"}, "run.yaml: extends: expected a path or a list of paths, got 3"),
        ({"run": "extends: list.yaml", "list": "[1, 2]"}, r"list.yaml: expected a mapping of keys, got \[1, 2\]"),
        (
            {"run": "extends: list.yaml", "list": "a: {b: 1}\n'a': 2"},
            "list.yaml: expected every key once, got a twice, in lines 1 and 2; keep one of them",
        ),
        ({"run": "extends: list.yaml", "list": "a: [1"}, "list.yaml: expected YAML, got what cannot be read"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, **files))


@pytest.mark.parametrize("shared", ["", "extends: other.yaml\n"], ids=["alone", "extending"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 3}\nmodel: {layers: 1}\ntrain: {batch: 2}\n", "got train twice, in lines 1 and 3"),
        ("train:\n  steps: 3\n  batch: 2\n  steps: 4\n", "got train.steps twice, in lines 2 and 4"),
        ("attention: {support: {kind: window, keys: 8, keys: 9}}\n", "got attention.support.keys twice"),
    ],
)
def test_a_key_that_is_written_twice_is_refused(tmp_path, shared, text, message):
    path = write(tmp_path, other="train: {warmup: 1}", run=text + shared)
    with pytest.raises(ValueError, match=f"run.yaml: expected every key once, {message}"):
        parse_run_config([str(path)])
    with pytest.raises(ValueError, match=f"--config: expected every key once, {message}"):
        parse_run_config(["--config", text])


def test_a_key_may_stand_in_several_mappings_and_be_merged(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, {x: 1}]\n1: {}\n'1': {}\n"
    path = write(tmp_path, run=text)
    assert read_config(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}, {"x": 1}]} | {
        1: {},
        "1": {},
    }


def test_a_mapping_may_be_merged_with_several_by_a_key_each(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc:\n  <<: *a\n  <<: *b\n  x: 5\n"
    assert read_config(write(tmp_path, run=text))["c"] == yaml.safe_load(text)["c"]
    with pytest.raises(ValueError, match="expected every key once, got c.x twice, in lines 6 and 7"):
        read_config(write(tmp_path, run=text + "  x: 6\n"))
    with pytest.raises(ValueError, match="expected every key once, got c.<< twice"):
        read_config(write(tmp_path, run="c: {'<<': 1, '<<': 2}\n"))
