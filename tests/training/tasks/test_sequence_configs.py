"""Configurations of sequences of symbols and pixels: each trains for 20 small steps and costs what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from testkit import ROOT

np = pytest.importorskip("numpy")
pytest.importorskip("jsonargparse")
from scatterbrain.analysis.cost import Shape, cost
from scatterbrain.cli import main
from scatterbrain.training.attention import build_support_and_low_rank
from scatterbrain.training.config import AttentionConfig, DataConfig, TrainConfig
from scatterbrain.training.config_files import read_config
from scatterbrain.training.tasks import build_task

SMALL = {
    "recall": {"pairs": 4, "tokens": 12, "keys": 6, "values": 3, "first_pairs": 2},
    "recall_long": {"pairs": 4, "tokens": 12, "keys": 6, "values": 3, "first_pairs": 2},
    "majority": {"votes": 8, "tokens": 24, "keys": 2, "values": 3, "right": 0.9},
    "majority_long": {"votes": 8, "tokens": 24, "keys": 2, "values": 3, "right": 0.9},
    "listops": {"tokens": 24, "shortest": 8, "depth": 3, "arguments": 4, "first_tokens": 8},
    "pathfinder": {"size": 24, "dashes": 3, "distractors": 0},
    "pathfinder128": {"size": 24, "dashes": 3, "distractors": 0},
    "cifar": {"side": 6},
}
FILES = {
    f"{task}/{path.stem}": path
    for task in SMALL
    for path in sorted((ROOT / "configs" / task).glob("*.yaml"))
    if path.stem != "task"
}
CAUSAL = {"full", "window", "favor", "quadratic", "routed", "window-favor", "window-quadratic", "routed-quadratic"}
BIDIRECTIONAL = CAUSAL | {"lsh", "lsh-favor", "centroid", "routed-centroid"}
pytestmark = pytest.mark.skipif(not FILES, reason="needs the source tree, not only the installed package")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes, dark and bright."""
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    labels = np.arange(40) % 2
    pixels = np.random.default_rng(0).integers(0, 100, (40, 12, 12, 3), np.uint8)
    pixels[labels == 1] += 150
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[:20], y_test=labels[:20])
    return path


@pytest.mark.parametrize("name", FILES)
def test_it_trains(name: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    task = name.partition("/")[0]
    train = {"steps": 20, "batch": 4, "warmup": 2, "threads": 1, "validate_every": 20, "validation_batches": 1}
    changes = {
        "extends": str(FILES[name]),
        "task": SMALL[task],
        "model": {"layers": 1, "width": 64},  # heads as wide as the ranks of quadratic
        "train": train | {"checkpoint_every": 20},
        "output": str(tmp_path / "run"),
    } | ({"data": {"path": str(pictures)}} if task == "cifar" else {})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changes))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 21))
    assert records[-1]["kind"] == "validation" and 0 <= records[-1]["accuracy"] <= 1


@pytest.mark.parametrize("task", SMALL)
def test_there_is_a_file_for_every_method(task: str):
    found = {name.partition("/")[2] for name in FILES if name.startswith(f"{task}/")}
    wanted = CAUSAL if task.startswith("recall") else BIDIRECTIONAL
    wanted = wanted | ({"routed-quadratic-ema"} if task == "recall" else set())
    assert found - {"routed-32-keys"} == wanted


@pytest.mark.parametrize("name", [name for name in FILES if name.partition("/")[2] != "routed-32-keys"])
def test_a_file_costs_what_it_says_and_methods_the_same(name: str):
    task = name.partition("/")[0]
    shared = (ROOT / "configs" / task / "task.yaml").read_text()
    wanted, tokens, head_dim, exact = numbers_after(
        shared, r"routed-quadratic's ([\d,]+) .* at ([\d,]+) tokens and head_dim (\d+) .* attention takes ([\d,]+)"
    )
    settings = read_config(FILES[name])
    kind = build_task(settings["task"])
    found = kind.open(DataConfig(), TrainConfig(batch=1)).tokens if task != "cifar" else 32 * 32
    assert found == tokens and settings["model"]["width"] // settings["model"]["heads"] == head_dim
    support, low_rank = build_support_and_low_rank(AttentionConfig(**settings["attention"]), kind.is_causal)
    total = exact if support.is_full else cost(support, low_rank, Shape(tokens, tokens, head_dim, head_dim)).total
    [stated] = numbers_after(FILES[name].read_text(), r": ([\d,]+) multiply-adds")
    assert stated == pytest.approx(total, abs=1)
    assert exact == 2 * tokens * head_dim
    assert support.is_full or total == pytest.approx(wanted, rel=0.1)
    assert settings["output"] == f"runs/{name}-0"


def numbers_after(text: str, pattern: str) -> list[int]:
    text = re.sub(r"\n# ", " ", text)
    return [int(number.replace(",", "")) for number in re.search(pattern, text).groups()]
