"""Configurations of copy: each trains for 20 small steps and costs what its folder says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from testkit import ROOT

pytest.importorskip("jsonargparse")
from scatterbrain.analysis.cost import Shape, cost
from scatterbrain.cli import main
from scatterbrain.training.attention import build_support_and_low_rank
from scatterbrain.training.config import AttentionConfig
from scatterbrain.training.config_files import read_config

FOLDERS = {"copy": 255, "masked_copy": 255, "copy_long": 2047}  # tokens
UNEQUAL = {"masked_copy/routed-32-keys", "masked_copy/routed-80-keys"}
FILES = {
    f"{folder}/{path.stem}": path
    for folder in FOLDERS
    for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))
    if path.stem != "task"
}
METHODS = {"full", "window", "favor", "quadratic", "routed", "window-favor", "window-quadratic", "routed-quadratic"}
pytestmark = pytest.mark.skipif(not FILES, reason="needs the source tree, not only the installed package")


def run(name: str, folder: Path, steps: int = 20, resume: bool = False) -> list[dict]:
    changes = {
        "extends": str(FILES[name]),
        "task": {"tokens": 127},
        "model": {"layers": 1, "width": 64, "mlp_width": 32},
        "train": {"batch": 1, "warmup": 2, "validate_every": 10, "validation_batches": 1, "checkpoint_every": 7},
        "output": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(changes))
    options = ["--train.steps", str(steps), "--resume", str(resume).lower()]
    assert main(["train", str(folder / "run.yaml"), *options]) == 0
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", FILES)
def test_it_trains(name: str, tmp_path: Path):
    records = run(name, tmp_path)
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 20 and losses[-1] < losses[0]
    shares = records[-1].get("low_rank_shares", [])
    has_low_rank = read_config(FILES[name])["attention"].get("low_rank", "none") != "none"
    assert len(shares) == (1 if has_low_rank else 0) and all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("name", FILES)
def test_methods_of_a_folder_cost_the_same(name: str):
    folder, _, method = name.partition("/")
    if method == "full" or name in UNEQUAL:
        return
    shape = Shape(FOLDERS[folder], FOLDERS[folder], 64, 64)
    costs = []
    for one in (name, f"{folder}/routed-quadratic"):
        config = read_config(FILES[one])
        assert (config["task"]["tokens"], config["model"]["width"] // config["model"]["heads"]) == (shape.keys, 64)
        masked = config["task"].get("masked", False)
        costs.append(cost(*build_support_and_low_rank(AttentionConfig(**config["attention"]), not masked), shape).total)
    assert costs[0] == pytest.approx(costs[1], rel=0.1)


@pytest.mark.parametrize("folder", FOLDERS)
def test_there_is_a_file_for_every_method(folder: str):
    bidirectional = {"lsh", "lsh-favor", "centroid", "routed-centroid"} if folder == "masked_copy" else set()
    extra = {name.partition("/")[2] for name in UNEQUAL if name.startswith(f"{folder}/")}
    extra |= {"routed-quadratic-ema"} if folder == "copy" else set()
    assert {
        name.partition("/")[2] for name in FILES if name.startswith(f"{folder}/")
    } == METHODS | bidirectional | extra


def test_every_folder_of_configurations_has_a_test():
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*_configs.py"))
    folders = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    assert {folder for folder in folders if f'"{folder}"' not in tested} == set()
