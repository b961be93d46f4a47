"""Every configuration of texts trains for 20 steps on a small text, and costs what its task.yaml says."""

from __future__ import annotations

import json
import re
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
from scatterbrain.training.tasks import build_task

CAUSAL = {"full", "window", "favor", "quadratic", "routed", "window-favor", "window-quadratic", "routed-quadratic"}
METHODS = {
    **dict.fromkeys(("text", "retrieval"), CAUSAL | {"lsh", "centroid", "lsh-favor", "routed-centroid"}),
    "names": CAUSAL,
    **dict.fromkeys(("lm", "lm_2048", "words"), CAUSAL | {"window-32-keys"}),
}
TEXT_MODELS = ("lm", "lm_2048", "words")  # of which train.context says how long sequences are
UNEQUAL = {"window-32-keys"}  # methods that cost less on purpose
SMALL = {
    "text": {"tokens": 200, "classes": 2},
    "retrieval": {"tokens": 200},
    "names": {"tokens": 256, "distance": 16},
    "lm": {"first_tokens": 64},
    "lm_2048": {"first_tokens": 64},
    "words": {"vocabulary": 300, "first_tokens": 64},
}
CASES = [(task, method) for task, methods in METHODS.items() for method in sorted(methods)]
pytestmark = pytest.mark.skipif(
    not (ROOT / "configs").exists(), reason="needs the source tree, not only the installed package"
)


def config_path(task: str, method: str) -> Path:
    return ROOT / "configs" / task / f"{method}.yaml"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files of source in two folders."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(8):
        path = folder / ("reading" if number % 2 else "writing") / f"module{number}.py"
        path.parent.mkdir(exist_ok=True)
        verb = ("load", "store")[number % 2]
        lines = (
            f"def {verb}_{line}(path, size={line * number}):\n    return path.{verb}(size)\n" for line in range(60)
        )
        path.write_text("".join(lines))
    return folder


@pytest.mark.parametrize("task, method", CASES)
def test_it_trains(task: str, method: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changes = {
        "extends": str(config_path(task, method)),
        "task": SMALL[task],
        "data": {"path": str(source), "validation_fraction": 0.25},
        "model": {"layers": 1},
        "train": {"steps": 20, "batch": 2, "warmup": 2, "validate_every": 20, "validation_batches": 2},
        "output": str(tmp_path / "run"),
    }
    if task in TEXT_MODELS:
        changes["train"]["context"] = 200
        changes["task"] = read_config(config_path(task, method))["task"] | SMALL[task]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changes))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 20
    if task in ("names", *TEXT_MODELS):
        assert sum(losses[-5:]) < sum(losses[:5])
    metric = build_task(read_config(config_path(task, method))["task"]).metric.name
    assert records[-1]["kind"] == "validation" and records[-1][metric] >= 0


@pytest.mark.parametrize("task", METHODS)
def test_methods_cost_the_same(task: str):
    folder = ROOT / "configs" / task
    found = {path.stem for path in folder.glob("*.yaml") if "extends" in yaml.safe_load(path.read_text())}
    assert found == METHODS[task]
    stated = int(re.search(r"routed-quadratic's ([\d,]+)", (folder / "task.yaml").read_text())[1].replace(",", ""))
    for method in METHODS[task]:
        config = read_config(config_path(task, method))
        tokens = config["train"]["context"] if task in TEXT_MODELS else config["task"]["tokens"]
        head_dim = config["model"]["width"] // config["model"]["heads"]
        is_causal = build_task(config["task"]).is_causal
        parts = build_support_and_low_rank(AttentionConfig(**config["attention"]), is_causal)
        total = cost(*parts, Shape(tokens, tokens, head_dim, head_dim)).total
        assert re.search(rf": {total:,.0f} multiply-adds", config_path(task, method).read_text()), (method, total)
        assert method in {"full", *UNEQUAL} or abs(total / stated - 1) <= 0.1, (method, total, stated)
        assert config["output"] == f"runs/{task}/{method}-0"


@pytest.mark.parametrize("task", METHODS)
def test_it_needs_no_data_but_pythons_own(task: str):
    config = read_config(ROOT / "configs" / task / "task.yaml")
    assert config["data"]["path"] == "stdlib"
