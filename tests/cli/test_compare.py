"""scatterbrain compare: the models and inputs that it takes, its files, interruption, and what it refuses."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.analysis import models
from scatterbrain.cli import main, on_model
from scatterbrain.cli.command import CommandError, check_outputs

MODULE = """
import torch
from torch import nn

def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 40, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

def with_batch():
    return encoder(), torch.randn(1, 90, 32)

def with_batches():
    return encoder(), [(torch.randn(1, 90, 32),), (torch.randn(1, 300, 32),)]

def number():
    return 5

def of_argument(width):
    return encoder()

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.encoder = nn.Embedding(20, 32), encoder()

    def forward(self, words):
        return self.encoder(self.table(words))

def with_text():
    return encoder(), "text"

def with_other_names():
    return encoder(), {"source": torch.randn(1, 90, 32)}

def with_other_widths():
    return encoder(), (torch.randn(1, 90, 31),)

def with_unknown_words():
    return Words(), torch.arange(3, 25)[None]

def without_batches():
    return encoder(), []
"""
FEW = ("--configurations", "window-16+centroid", "routed-32", "--repeats", "1")


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    return path


def test_a_function_of_a_file_and_every_output(module: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("c.json", "c.png", "qkv.safetensors")]
    options = [x for name, file in zip(("--json", "--png", "--capture"), files) for x in (name, str(file))]
    assert main(["compare", f"{module}:with_batches", *FEW, *options]) == 0
    out = capsys.readouterr().out
    for word in (*map(str, files), "TransformerEncoder: 2 attention calls", "fitted on another batch", "entropy"):
        assert word in out, out
    assert json.loads(files[0].read_text())["layers"][1]["path"] == "layers.1.self_attn"
    assert main(["compare", f"{module}:with_batch", *FEW]) == 0
    assert "flattered" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["compare"], ["tune", "--max-error", "1"]])
def test_what_is_read_is_not_written_to(
    command: list[str], module: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """And of a folder that is read nothing is replaced: its files may be those of the model."""
    batch, folder = tmp_path / "batch.safetensors", tmp_path / "folder"
    save_file({"src": torch.randn(4, 90, 32)}, batch)
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "inner" / "1.png").write_text("an image")
    inputs, new = ["--inputs", str(batch)], str(tmp_path / "new")
    names = ["--json", "--capture"] if command == ["compare"] else ["--yaml", "--times"]
    cases = [
        ([f"{module}:encoder", *inputs, names[0], str(module)], "other than that of MODEL"),
        ([f"{module}:encoder", *inputs, names[1], str(batch)], "other than that of --inputs"),
        (["vit", "--checkpoint", str(batch), names[0], str(batch)], "other than that of --checkpoint"),
        ([f"{module}:encoder", *inputs, names[0], new, names[1], new], f"other than that of {names[0]}"),
        (
            [str(folder), names[0], str(folder / "config.json")],
            f"since {folder} is the folder that MODEL",
        ),
        (
            [f"{module}:encoder", "--inputs", str(folder), "--png", str(folder / "inner" / "1.png")],
            "that --inputs reads",
        ),
    ]
    for arguments, message in cases:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert main([command[0], arguments[0], *command[1:], *arguments[1:]]) == 1
        assert message in (errors := capsys.readouterr().err), errors
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_outputs_beside_a_model_are_written_again_but_nothing_else_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    earlier = {"json": tmp_path / "report.json", "yaml": tmp_path / "tuned.yaml"}
    earlier["json"].write_text('{"facts": {}, "layers": []}')
    sb.LayerSettings({"a": (sb.Window(16), None)}).save(earlier["yaml"])
    reads = [("MODEL", tmp_path)]
    for name, file in earlier.items():
        check_outputs(Namespace(**{name: file}), name, reads=reads)
    for name, other in (("json", "config.json"), ("yaml", "mine.yaml"), ("png", "mine.png")):
        (tmp_path / other).touch()
        with pytest.raises(CommandError, match="since .* is the folder that MODEL reads"):
            check_outputs(Namespace(**{name: tmp_path / other}), name, reads=reads)


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_pictures_and_captures_beside_a_model_are_written_again(command: str, module: Path, tmp_path: Path) -> None:
    """And the user's own are not, whatever they are called."""
    figure = pytest.importorskip("matplotlib.figure")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.py").write_text(MODULE)
    files = {"png": folder / "c.png", **({"capture": folder / "model.safetensors"} if command == "compare" else {})}
    options = [x for name, file in files.items() for x in (f"--{name}", str(file))]
    how = FEW if command == "compare" else ("--max-error", "9", "--times", str(tmp_path / "times.json"))
    assert main([command, f"{folder / 'mine.py'}:with_batches", *how, *options]) == 0
    reads = [("MODEL", folder)]
    for name, file in files.items():
        check_outputs(Namespace(**{name: file}), name, reads=reads)
    figure.Figure().savefig(files["png"])
    if command == "compare":
        save_file({"layer0.q": torch.ones(2)}, files["capture"])
    for name, file in files.items():
        for content in (file.read_bytes(), b"", file.read_bytes()[:20]):
            file.write_bytes(content)
            with pytest.raises(CommandError, match="since .* is the folder that MODEL reads"):
                check_outputs(Namespace(**{name: file}), name, reads=reads)


def test_arguments_by_name(module: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "batch.safetensors"
    save_file({"src": torch.randn(4, 90, 32)}, file)
    assert main(["compare", f"{module}:encoder", "--inputs", str(file), "--rows", "2", *FEW]) == 0
    assert "fitted on another batch" in capsys.readouterr().out
    assert main(["compare", f"{module}:encoder", "--inputs", str(file), "--rows", "5", *FEW]) == 1
    assert "expected at least 5 rows, got 4; lower --rows" in capsys.readouterr().err


def test_a_text_model_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hf, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    sizes = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
    hf.BertModel(hf.BertConfig(**sizes, max_position_embeddings=64)).save_pretrained(tmp_path / "bert")
    words = {word: i for i, word in enumerate(["[UNK]", *"abcdefgh"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path / "bert")
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 40)
    arguments = ["compare", str(tmp_path / "bert"), "--inputs", str(text), "--tokens", "60", *FEW]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"rows of 60 tokens of {text}" in out and "another batch" in out
    assert main([*arguments[:-5], "--rows", "9", *FEW]) == 1
    assert "expected at least 9 rows of 60 tokens, got 5; lower --tokens or lower --rows" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("a b c d e f g h " * 5)
    assert main([*arguments[:3], str(tmp_path / "short.txt"), *arguments[4:]]) == 1
    assert "expected at least 1 rows of 60 tokens, got 0; lower --tokens\n" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "bert"), "--tokens", "65"]) == 1
    assert "--tokens: the model takes at most 64, got 65" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "bert"), "--tokens", "40", *FEW]) == 0
    assert "RANDOM tokens" in capsys.readouterr().out
    text.write_text("none of these is known " * 40)
    assert main(arguments) == 1
    assert "expected the model's tokenizer in the folder" in capsys.readouterr().err


def test_every_row_of_a_text_has_the_models_special_tokens(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hf, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    sizes = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
    hf.BertModel(hf.BertConfig(**sizes, max_position_embeddings=64)).save_pretrained(tmp_path / "bert")
    words = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *"abcdefgh"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    made.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    hf.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "bert")
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 40)
    loaded = models.Source(str(tmp_path / "bert"), text, tokens=20, batches=50).load()
    rows = torch.cat([batch["input_ids"] for batch in loaded.batches])
    assert rows.shape == (320 // 18, 20) and (rows[:, 0] == 1).all() and (rows[:, -1] == 2).all()
    assert rows[:, 1:-1].flatten().tolist() == [3 + i % 8 for i in range(rows[:, 1:-1].numel())]
    assert main(["compare", str(tmp_path / "bert"), "--inputs", str(text), "--tokens", "2"]) == 1
    assert "--tokens: expected more than the 2 special tokens of a row, got 2; raise it" in capsys.readouterr().err
    for blank in (" \n" * 250, "\u200b" * 250):  # the tokenizer makes nothing of either
        text.write_text(blank + "a b c d e f g h " * 40, encoding="utf-8")
        again = models.Source(str(tmp_path / "bert"), text, tokens=20, batches=50).load()
        assert torch.equal(torch.cat([batch["input_ids"] for batch in again.batches]), rows)


@pytest.mark.parametrize(
    ("kind", "takes"), [("Wav2Vec2", "input_values"), ("Speech2Text", "input_features"), ("Vilt", "input_ids")]
)
def test_a_folder_that_takes_neither_text_nor_images_says_what_it_takes(
    kind: str, takes: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Their configurations have a vocabulary, or a size of images, as those of text and images do."""
    hf = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, d_model=32)
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**sizes, **layers)).save_pretrained(tmp_path / "model")
    assert main(["compare", str(tmp_path / "model"), *FEW]) == 1
    said = capsys.readouterr().err
    assert f"{kind}Model takes {takes}, not text or images alone; give its arguments by name" in said
    assert f"save_file({{'{takes}': ...}}, FILE)" in said


def test_positions_that_no_token_has_are_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """RoBERTa numbers its tokens from behind the padding's position on."""
    hf = pytest.importorskip("transformers")
    sizes = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
    config = hf.RobertaConfig(**sizes, max_position_embeddings=66, pad_token_id=1)
    hf.RobertaModel(config).save_pretrained(tmp_path / "roberta")
    assert main(["compare", str(tmp_path / "roberta"), *FEW]) == 0
    assert " 64 " in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "roberta"), "--tokens", "65", *FEW]) == 1
    assert "--tokens: the model takes at most 64, got 65" in capsys.readouterr().err


def test_options_that_would_change_nothing_are_refused_by_name(
    module: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hf = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
    hf.BertModel(hf.BertConfig(**sizes, vocab_size=30, max_position_embeddings=64)).save_pretrained(tmp_path / "text")
    hf.ViTModel(hf.ViTConfig(**sizes, patch_size=4, image_size=32)).save_pretrained(tmp_path / "vit")
    (tmp_path / "weights.pth").write_bytes(b"")
    save_file({"src": torch.randn(4, 90, 32)}, tmp_path / "batch.safetensors")
    np.savez(tmp_path / "images.npz", x=np.zeros((3, 8, 8, 3), np.uint8))
    of_file = [f"{module}:encoder", "--inputs", str(tmp_path / "batch.safetensors")]
    of_images = [str(tmp_path / "vit"), "--inputs", str(tmp_path / "images.npz")]
    text, vision, own = [str(tmp_path / "text")], [str(tmp_path / "vit")], [f"{module}:with_batch"]
    weights = ["--checkpoint", str(tmp_path / "weights.pth")]
    for arguments, kinds in (
        (weights, [own, of_file, text, vision]),
        (["--tokens", "20"], [own, of_file, vision]),
        (["--size", "32"], [own, of_file, text]),
        (["--rows", "2"], [own]),
        (["--seed", "1"], [own, of_file, of_images]),
    ):
        for model in kinds:
            assert main(["compare", *model, *arguments, *FEW]) == 1, (model, arguments)
            error = capsys.readouterr().err
            assert arguments[0] in error and arguments[1] in error and "leave it out" in error, error


def test_images_of_a_folder_are_read_as_far_as_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    hf, image = pytest.importorskip("transformers"), pytest.importorskip("PIL.Image")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, patch_size=4)
    hf.ViTModel(hf.ViTConfig(**sizes, image_size=32)).save_pretrained(tmp_path / "vit")
    (tmp_path / "images").mkdir()
    for i in range(9):
        image.new("RGB", (20, 20), (i, i, i)).save(tmp_path / "images" / f"{i}.png")
    opened, open_image = [], image.open
    monkeypatch.setattr(image, "open", lambda path: opened.append(path) or open_image(path))
    arguments = ["compare", str(tmp_path / "vit"), "--inputs", str(tmp_path / "images"), "--rows", "2", *FEW]
    assert main(arguments) == 0
    assert len(opened) == 4 and "4 images of" in capsys.readouterr().out
    assert main([*arguments, "--rows", "6"]) == 0
    assert "9 images of" in capsys.readouterr().out


def test_a_vision_model_of_a_folder_on_an_array_and_on_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hf, image = pytest.importorskip("transformers"), pytest.importorskip("PIL.Image")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, patch_size=4)
    hf.ViTModel(hf.ViTConfig(**sizes, image_size=32)).save_pretrained(tmp_path / "vit")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 20, 3), np.uint8)
    np.savez(tmp_path / "images.npz", labels=np.arange(5), x=pixels)
    (tmp_path / "images").mkdir()
    for i, some in enumerate(pixels):
        image.fromarray(some).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "._0.png").write_bytes(b"\x00\x05\x16\x07")  # as macOS writes them
    for inputs in ("images.npz", "images"):
        arguments = ["compare", str(tmp_path / "vit"), "--inputs", str(tmp_path / inputs), "--size", "40", *FEW]
        assert main(arguments) == 0
        assert " 101 " in capsys.readouterr().out  # 10 x 10 patches and a class token
    from scatterbrain.analysis import input_files

    chosen = [input_files.images(tmp_path / inputs, 3, 16) for inputs in ("images", "images.npz")]
    assert torch.equal(*chosen) and chosen[0].shape == (3, 3, 16, 16) and 0 <= chosen[0].min() < chosen[0].max() <= 1
    np.save(tmp_path / "floats.npy", np.zeros((2, 3)))
    assert main(["compare", str(tmp_path / "vit"), "--inputs", str(tmp_path / "floats.npy")]) == 1
    assert "expected an array of images, uint8 (count, height, width, 3)" in capsys.readouterr().err


def test_a_timm_model_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "vit.pth")
    assert main(["compare", name, "--checkpoint", str(tmp_path / "vit.pth"), *FEW]) == 0
    out = capsys.readouterr().out
    assert "VisionTransformer: 12 attention calls" in out and "RANDOM pixels" in out
    small = [name, "--checkpoint", str(tmp_path / "vit.pth"), "--size", "64"]
    assert main(["compare", *small, "--configurations", "window-16", "--repeats", "1"]) == 0
    assert " 17 " in capsys.readouterr().out  # 4 x 4 patches and a class token
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert main(["compare", name, "--checkpoint", str(tmp_path / "other.pth")]) == 1
    assert "other.pth is no checkpoint of vit_tiny_patch16_224" in capsys.readouterr().err


def test_a_run_folder_of_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 120)) * 60)
    sizes = {"model.layers": 1, "model.width": 32, "model.heads": 2, "train.context": 100, "train.steps": 2}
    sizes |= {"data.path": text, "data.glob": "*", "sample.length": 0, "output": tmp_path / "run"}
    assert main(["train", *(str(x) for name, value in sizes.items() for x in (f"--{name}", value))]) == 0
    capsys.readouterr()
    few = ("--configurations", "window-16", "--repeats", "1")
    assert main(["compare", str(tmp_path / "run"), *few]) == 0
    out = capsys.readouterr().out
    assert "rows of 100 bytes of its validation text" in out and "causal" in out
    assert main(["compare", str(tmp_path / "run"), "--inputs", str(text), "--tokens", "80", *few]) == 0
    assert f"rows of 80 bytes of {text}" in capsys.readouterr().out
    short = tmp_path / "short.txt"
    for content in (b"", b"hello world"):
        short.write_bytes(content)
        assert main(["compare", str(tmp_path / "run"), "--inputs", str(short), *few]) == 1
        assert f"{short}: expected at least 1 rows of 100 bytes, got 0" in capsys.readouterr().err


def test_what_is_no_model_or_no_input_says_what_was_expected(
    module: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"src": torch.tensor(1.0)}, tmp_path / "b.safetensors")
    importing = tmp_path / "importing.py"
    importing.write_text("import no_such_package\n")
    for arguments, words in (
        (["no_such_model"], ["no_such_model: expected one of", "a Hugging Face folder", "module:function"]),
        ([str(tmp_path)], ["expected a folder with config.json or checkpoint.safetensors"]),
        ([f"{module}:nothing"], ["has no function 'nothing'"]),
        ([f"{module}:number"], ["expected a model or (model, batch), got int"]),
        ([f"{module}:of_argument"], ["expected a function without arguments", "'width'"]),
        ([f"{module}:without_batches"], ["expected a batch or a list of batches, got an empty list"]),
        ([f"{importing}:f"], ["its import of no_such_package failed"]),
        (
            [f"{module}:encoder", "--inputs", str(tmp_path / "b.safetensors")],
            ["b.safetensors: src: expected a tensor of"],
        ),
        ([f"{module}:encoder"], ["returns a model without a batch", "--inputs FILE.safetensors"]),
        (["no_such_module:f"], ["no_such_module: no such module"]),
        (["gone.py:f"], ["gone.py: expected a Python file"]),
        ([f"{module}:with_batch", "--inputs", "gone.txt"], ["--inputs: expected a file or folder, got gone.txt"]),
        ([f"{module}:with_batch", "--rows", "0"], ["--rows must be at least 1, got 0"]),
        ([f"{module}:with_batch", "--threads", "0"], ["--threads must be at least 1, got 0"]),
        ([f"{module}:with_batch", "--json", str(tmp_path)], ["--json: expected a file to write", "is a folder"]),
        ([f"{module}:with_batch", "--configurations", "windw-3"], ["unknown method 'windw-3'"]),
    ):
        assert main(["compare", *arguments]) == 1, arguments
        errors = capsys.readouterr().err
        assert all(word in errors for word in words) and "Traceback" not in errors, errors


@pytest.mark.parametrize("command", [["compare", *FEW], ["tune", "--max-error", "1"]], ids=["compare", "tune"])
def test_what_the_model_does_not_take_is_named(
    module: Path, tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture
) -> None:
    name, *options = command
    file = tmp_path / "batch.safetensors"
    save_file({"source": torch.randn(2, 90, 32)}, file)
    cases = (
        ([f"{module}:with_text"], "expected a batch that is a tensor, .* got str"),
        ([f"{module}:with_other_names"], r"failed on its inputs, source=float32 \(1, 90, 32\): TypeError: .*'source'"),
        ([f"{module}:encoder", "--inputs", str(file)], r"source=float32 \(1, 90, 32\): TypeError: .*'source'"),
        ([f"{module}:with_other_widths"], r"inputs, \(float32 \(1, 90, 31\)\): "),
        ([f"{module}:with_unknown_words"], r"inputs, int64 \(1, 22\) of 3 to 24: IndexError"),
    )
    for arguments, words in cases:
        if name == "tune" and "--inputs" not in arguments and "with_text" not in arguments[0]:
            continue  # two batches are needed
        assert main([name, *arguments, *options]) == 1
        assert re.search(words, capsys.readouterr().err)


class FailsLater(nn.Module):
    """Runs once, then raises."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.runs = error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.runs > 1:
            raise self.error
        return x


def test_an_error_after_the_model_took_its_inputs_is_not_blamed_on_them() -> None:
    model, run = FailsLater(RuntimeError("of an operator")), on_model._readable(torch.ones(2, 3))
    assert run(model).shape == (2, 3)
    with pytest.raises(RuntimeError, match="^of an operator$"):
        run(model)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")])
def test_a_model_that_runs_out_of_memory_is_said_to(error: Exception) -> None:
    model, run = FailsLater(error), on_model._readable(torch.ones(2, 3))
    for runs in (1, 2):
        model.runs = runs
        with pytest.raises(
            CommandError, match=r"ran out of memory on its inputs, float32 \(2, 3\): .*; give fewer rows"
        ):
            run(model)


def test_inputs_without_an_order_are_described_all_the_same() -> None:
    found = on_model.described({"ids": torch.arange(3).to(torch.uint16), "mask": torch.tensor([2, 5])})
    assert found == "ids=uint16 (3,), mask=int64 (2,) of 2 to 5"


def test_a_timm_model_that_has_no_size_of_images_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("timm")
    (tmp_path / "weights.pth").write_bytes(b"")
    options = ["--checkpoint", str(tmp_path / "weights.pth"), "--size", "64"]
    assert main(["compare", "resnet18", *options]) == 1
    assert "--size: expected a model that is made for a size of images, got resnet18" in capsys.readouterr().err


def test_ctrl_c_shows_the_layers_so_far(module: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from scatterbrain.analysis import comparison

    calls, of_call = [], comparison.compare_call

    def stopping(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return of_call(*arguments)

    monkeypatch.setattr(comparison, "compare_call", stopping)
    assert main(["compare", f"{module}:with_batch", *FEW]) == 130
    shown = capsys.readouterr()
    assert "1 attention calls" in shown.out and "stopped before the end" in shown.err
    assert main(["compare", f"{module}:with_batch", *FEW]) == 0
