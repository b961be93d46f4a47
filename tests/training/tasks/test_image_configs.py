"""Every configuration of images trains for 20 steps on small pictures, and costs what its task.yaml says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from testkit import ROOT

np = pytest.importorskip("numpy")
pytest.importorskip("jsonargparse")
from scatterbrain.analysis.cost import Shape, cost
from scatterbrain.cli import main
from scatterbrain.training.attention import build_support_and_low_rank
from scatterbrain.training.config import AttentionConfig
from scatterbrain.training.config_files import read_config

FILES = {
    f"{task}/{path.stem}": path
    for task in ("vit", "t2t_vit", "vit_finetune")
    for path in sorted((ROOT / "configs" / task).glob("*.yaml"))
    if path.stem != "task"
}
# Tokens of the longest sequence, width of a head, multiply-adds per query and head as task.yaml states them.
COSTS = {"vit": (1024, 32, 12_000), "vit_finetune": (1024, 32, 12_000), "t2t_vit": (1024, 64, 25_600)}
METHODS = {
    *("full", "window", "lsh", "favor", "quadratic", "centroid", "routed", "window-favor", "lsh-favor"),
    *("window-quadratic", "routed-quadratic", "routed-centroid"),
}
pytestmark = pytest.mark.skipif(not FILES, reason="needs the source tree, not only the installed package")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three classes: a bright top, a bright left side, or neither."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    draw, parts = np.random.default_rng(0), {}
    for part in ("train", "test"):
        pixels, labels = draw.integers(0, 100, (30, 16, 16, 3), np.uint8), np.arange(30) % 3
        pixels[labels == 0, :8] += 150
        pixels[labels == 1, :, :8] += 150
        parts |= {f"x_{part}": pixels, f"y_{part}": labels}
    np.savez(path, **parts)
    return path


def run(name: str, images: Path, folder: Path, **train: object) -> list[dict]:
    """Records of a run of 20 steps of one layer."""
    settings = {"steps": 20, "batch": 6, "warmup": 2, "threads": 1, "validate_every": 20, "validation_batches": 5}
    changes = {
        "extends": str(FILES[name]),
        "task": {"image_size": 32 if name.startswith("t2t_vit/") else 16},
        "data": {"path": str(images)},
        "model": {"layers": 1},
        "train": settings | train,
        "output": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(changes))
    assert main(["train", str(folder / "run.yaml")]) == 0
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def exact(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that fine-tuning starts from."""
    folder = tmp_path_factory.mktemp("exact")
    run("vit/full", images, folder)
    return folder / "run" / "checkpoint.safetensors"


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("vit_finetune/")])
def test_it_trains(name: str, images: Path, tmp_path: Path):
    records = run(name, images, tmp_path)
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
    assert records[-1]["kind"] == "validation" and 0 <= records[-1]["accuracy"] <= 1


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("vit_finetune/")])
def test_it_goes_on_from_exact_attention(name: str, images: Path, exact: Path, tmp_path: Path):
    """The first loss is near that of the run before and not near log 3, that of new weights."""
    records = run(name, images, tmp_path, initialize_from=str(exact))
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 20 and max(losses) < 0.9


def test_a_model_with_fixed_parameters_goes_on_from_its_checkpoint(images: Path, tmp_path: Path):
    """T2T-ViT's positions and random features take no part in training, so the optimizer knows nothing of them."""
    changes = {
        "extends": str(FILES["t2t_vit/window"]),
        "task": {"image_size": 32, "tokens": "performer"},
        "data": {"path": str(images)},
        "model": {"layers": 1},
        "train": {"steps": 2, "batch": 2, "threads": 1, "validation_batches": 1},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changes))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert main(["train", str(tmp_path / "run.yaml"), "--resume", "true", "--train.steps", "3"]) == 0


@pytest.mark.parametrize("task", COSTS)
def test_there_is_a_file_for_every_method(task: str):
    assert {name.partition("/")[2] for name in FILES if name.startswith(f"{task}/")} == METHODS


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("/full")])
def test_methods_cost_the_same(name: str):
    tokens, head_dim, stated = COSTS[name.partition("/")[0]]
    settings = read_config(FILES[name])
    pair = build_support_and_low_rank(AttentionConfig(**settings["attention"]), is_causal=False)
    assert cost(*pair, Shape(tokens, tokens, head_dim, head_dim)).total == pytest.approx(stated, rel=0.05)
