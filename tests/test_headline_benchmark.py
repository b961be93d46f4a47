"""benchmarks/headline.py: counts entries, goes on where it was, and its probes are what they are called."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from testkit import ROOT

import scatterbrain as sb

np = pytest.importorskip("numpy")
safe_open = pytest.importorskip("safetensors").safe_open
for needed in ("tqdm", "transformers"):
    pytest.importorskip(needed)
SCRIPT = ROOT / "benchmarks" / "headline.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree, not only the installed package")
TOKENS = 1 + 15**2  # of 60 pixels in patches of 4


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    spec = importlib.util.spec_from_file_location("headline", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "headline", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The images, sorted by class as files often are, and a tiny model."""
    from transformers import Dinov2Config, Dinov2Model

    folder, draw = tmp_path_factory.mktemp("headline"), np.random.default_rng(0)
    arrays = {f"x_{part}": draw.integers(0, 256, (n, 12, 12, 3), np.uint8) for part, n in (("train", 9), ("test", 6))}
    labels = {f"y_{part}": np.arange(n, dtype=np.uint8) // (n // 3) for part, n in (("train", 9), ("test", 6))}
    np.savez(folder / "images.npz", **arrays, **labels)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    size["initializer_range"] = 0.3
    Dinov2Model(Dinov2Config(image_size=60, patch_size=4, **size)).save_pretrained(folder / "model")
    pixels = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(pixels))
    return str(folder / "images.npz"), str(folder / "model")


def call(files: tuple[str, str], out: Path, *more: str) -> list[str]:
    counts = ["--train", "9", "--test", "6", "-k", "3", "--settings", "window", "drop_in", "quality"]
    return [files[0], "--model", files[1], "--pixels", "60", "--out", str(out), *counts, *more]


def test_the_table_has_the_entries_of_every_setting_and_a_second_call_runs_no_model(
    script: ModuleType, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    pytest.importorskip("matplotlib")
    script.main(call(files, tmp_path, "--picture", str(tmp_path / "picture.png")))
    first = capsys.readouterr().out
    lines = [line.split(" | ") for line in first.splitlines() if line.startswith("| ")][2:]
    assert [line[0][2:] for line in lines] == ["exact", "window", "drop_in", "quality"]
    assert [int(line[1]) for line in lines] == [TOKENS, 128, 72 + 64, 128 + 96]
    assert [line[2] for line in lines] == ["100 %", *(f"{100 * e / TOKENS:.2f} %" for e in (128, 136, 224))]
    with safe_open(tmp_path / "features-60.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    exact = found.pop("test exact")
    assert found.pop("train exact").shape == (9, 2, 32) and exact.shape == (6, 2, 32) and len(found) == 3
    for name, features in found.items():
        assert 1e-5 < (features - exact).norm() / exact.norm() < 0.7, name
    assert (tmp_path / "picture.png").stat().st_size > 1000
    monkeypatch.setattr(sb, "replace_attention", lambda *_: pytest.fail("all features are there"))
    script.main(call(files, tmp_path))
    assert capsys.readouterr().out == first[: first.rindex("\n\n") + 1]


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(
    script: ModuleType, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    script.main(call(files, tmp_path / "whole"))
    whole = capsys.readouterr().out
    forwards, enlarged = [0], script.Images.enlarged

    def stop(*arguments: object) -> torch.Tensor:
        forwards[0] += 1
        if forwards[0] == 20:
            raise KeyboardInterrupt
        return enlarged(*arguments)

    monkeypatch.setattr(script.Images, "enlarged", stop)
    with pytest.raises(SystemExit, match="the same command goes on from here"):
        script.main(call(files, tmp_path / "stopped"))
    script.main(call(files, tmp_path / "stopped", "--report"))
    assert "2 test images" in capsys.readouterr().out and forwards[0] == 20
    script.main(call(files, tmp_path / "stopped"))
    assert capsys.readouterr().out == whole and forwards[0] == 20 + 9 + 4 * 6 - 19


def test_probes_of_another_size_are_trained_on_images_of_that_size(
    script: ModuleType, files: tuple[str, str], tmp_path: Path, capsys
):
    script.main(call(files, tmp_path, "--probe-pixels", "32", "--test", "1", "--settings", "window"))
    assert "trained on 9 images of 32 pixels under exact attention, 1 test images" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["features-32.safetensors", "features-60.safetensors"]


def test_features_of_another_model_are_refused(script: ModuleType, tmp_path: Path):
    features = script.Features(tmp_path / "none.safetensors", "one")
    features.of("train", "exact").append(torch.zeros(2, 4))
    features.save()
    with pytest.raises(SystemExit, match="found those of others; name another folder with --out"):
        script.Features(tmp_path / "none.safetensors", "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pixels", "61"), "expected sides that are multiples of the model's patches, 4 pixels, got 61"),
        (("--train", "10"), "--train: expected at most 9, the file's, got 10"),
    ],
)
def test_what_cannot_be_run_is_refused(
    script: ModuleType, files: tuple[str, str], tmp_path: Path, arguments: tuple[str, ...], message: str
):
    with pytest.raises(SystemExit, match=message):
        script.main(call(files, tmp_path, *arguments))


def test_classes_alternate_so_that_a_longer_run_begins_with_a_shorter_one(script: ModuleType, files: tuple[str, str]):
    images = script.Images.load(Path(files[0]), "train")
    assert images.labels.tolist() == [0, 1, 2] * 3
    with np.load(files[0]) as arrays:
        assert (images.pixels[1] == arrays["x_train"][3]).all()


def test_pixels_are_those_that_the_model_was_trained_with(script: ModuleType, files: tuple[str, str]):
    mean, deviation = script.normalisation(files[1])
    white = script.Images(np.full((1, 12, 12, 3), 255, np.uint8), torch.zeros(1))
    expected = (1 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    torch.testing.assert_close(white.enlarged(0, 60, mean, deviation).mean((0, 2, 3)), expected)
    assert script.normalisation(None)[0].tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_the_entries_are_listed_keys_and_clusters_or_features(script: ModuleType):
    assert script.entries(sb.Window(64), None) == 64
    assert script.entries(sb.Empty(), sb.Centroid(48)) == 48
    assert script.entries(*sb.presets.paper(32, features=16)) == 48
    assert script.entries(sb.Routed(64), sb.Quadratic(9)) == 64 + 55


def test_ridge_is_the_regression_whose_penalty_leaves_one_out_best(script: ModuleType):
    torch.manual_seed(0)
    labels = torch.arange(24) % 3
    train = torch.randn(24, 2, 5) + torch.nn.functional.one_hot(labels, 5)[:, None]
    test = torch.randn(30, 2, 5) + torch.nn.functional.one_hot(torch.arange(30) % 3, 5)[:, None]
    flat, flat_test = train.flatten(1).double(), test.flatten(1).double()
    mean, deviation = flat.mean(0), flat.std(0)
    x, x_test = (flat - mean) / deviation, (flat_test - mean) / deviation
    targets = torch.nn.functional.one_hot(labels, 3).double()
    centre = targets.mean(0)

    def fitted(rows: torch.Tensor, penalty: float) -> torch.Tensor:
        own = x[rows]
        gram = own.T @ own + penalty * 10 * torch.eye(10, dtype=torch.float64)
        return torch.linalg.solve(gram, own.T @ (targets - centre)[rows])

    losses = []
    for penalty in script.PENALTIES * 24:
        others = [torch.arange(24) != i for i in range(24)]
        left = torch.stack([x[i] @ fitted(rows, penalty) for i, rows in enumerate(others)])
        losses.append(float((left - targets + centre).square().sum()))
    penalty = script.PENALTIES[int(np.argmin(losses))] * 24
    expected = (x_test @ fitted(torch.ones(24, dtype=torch.bool), penalty)).add(centre).argmax(-1)
    assert (script.ridge(train, labels, test, 20, 3) == expected).all()


def test_neighbours_vote_by_their_cosine(script: ModuleType):
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])[:, None].expand(3, 2, 2)
    test = torch.tensor([[5.0, 0.1], [0.1, 1.0]])[:, None].expand(2, 2, 2)
    assert script.nearest(train, torch.tensor([0, 1, 1]), test, 20, 2).tolist() == [0, 1]
    assert script.nearest(train, torch.tensor([0, 1, 2]), test, 1, 3).tolist() == [0, 2]
