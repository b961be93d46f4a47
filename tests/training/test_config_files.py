from __future__ import annotations

from pathlib import Path

import pytest

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
        ({"run": "extends: list.yaml", "list": "a: [1"}, "list.yaml: expected YAML, got what cannot be read"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, **files))
