"""Accuracy after the swap: an nn.TransformerEncoder classifier is trained with exact attention, its attention is
replaced, and both are trained on for a few hundred steps from the same checkpoint, on the same batches.

    python benchmarks/finetune.py images cifar10.npz         256 tokens: a convolutional stem, then 16 x 16 patches
    python benchmarks/finetune.py text movie_reviews.zip     1024 tokens: the bytes of a review

Routed lists run with each kernel of --low-rank: centroid clusters the keys of every call, quadratic is calibrated on
training samples first.

The npz file holds x_train, x_test (uint8, images x 32 x 32 x 3), y_train and y_test. The zip file holds texts whose
folder is their label, pos/ or neg/; every fifth of either is for testing. What is finished is kept in the --out folder,
and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import scatterbrain as sb
from scatterbrain.hilbert import hilbert_order
from scatterbrain.low_rank import LowRankKernel
from scatterbrain.supports import Support

PATCHES, TEXT = 16, 1024  # patches of a side, bytes of a text
PAD = 256  # the token after the 256 bytes
RUNS, PRIME = 2**14, 2**31 - 1  # rows for runs of bytes, modulus of their hash
SAVE_EVERY = 25  # steps


@dataclass
class Data:
    """Training and test samples; ``train_batch`` augments, ``test_batch`` does not."""

    x_train: Tensor | list[Tensor]
    y_train: Tensor
    x_test: Tensor | list[Tensor]
    y_test: Tensor
    train_batch: Callable[[list[int], torch.Generator], Tensor]
    test_batch: Callable[[list[int]], Tensor]


# -------------------- images


def load_images(path: Path) -> Data:
    arrays = np.load(path)
    x_train, x_test = (
        torch.from_numpy(arrays[name]).permute(0, 3, 1, 2).float().div(127.5).sub(1) for name in ("x_train", "x_test")
    )
    y_train, y_test = (torch.from_numpy(arrays[name]).long() for name in ("y_train", "y_test"))

    def train_batch(rows: list[int], generator: torch.Generator) -> Tensor:
        """Shifted by up to 4 pixels, and every other one mirrored."""
        padded = F.pad(x_train[rows], (4, 4, 4, 4))
        top, left, flip = torch.randint(9, (3, len(rows)), generator=generator).tolist()
        crops = [image[:, t : t + 32, s : s + 32] for image, t, s in zip(padded, top, left)]
        return torch.stack([crop.flip(-1) if f % 2 else crop for crop, f in zip(crops, flip)])

    return Data(x_train, y_train, x_test, y_test, train_batch, lambda rows: x_test[rows])


class ImageStem(nn.Module):
    """(B, 3, 32, 32) to (B, 256, width): one token for every 2 x 2 pixels and their surroundings, in Hilbert order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(3, half, 3, padding=1), nn.BatchNorm2d(half), nn.GELU()),
            *(nn.Conv2d(half, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.GELU()),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.position = nn.Parameter(0.02 * torch.randn(PATCHES**2, width))
        self.register_buffer("order", hilbert_order(PATCHES, PATCHES))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.convolutions(images).flatten(2).transpose(1, 2)[:, self.order] + self.position, None


# -------------------- text


def load_texts(path: Path) -> Data:
    texts: dict[str, list[Tensor]] = {"neg": [], "pos": []}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            label = Path(name).parent.name
            if label in texts and name.endswith(".txt"):
                texts[label].append(torch.frombuffer(bytearray(archive.read(name)), dtype=torch.uint8).long())
    samples = [(text, label, i) for label, key in enumerate(texts) for i, text in enumerate(texts[key])]
    parts = [[s for s in samples if (s[2] % 5 == 4) == test] for test in (False, True)]
    (x_train, y_train), (x_test, y_test) = (([s[0] for s in p], torch.tensor([s[1] for s in p])) for p in parts)

    def crop(text: Tensor, start: int) -> Tensor:
        text = text[start : start + TEXT]
        return F.pad(text, (0, TEXT - len(text)), value=PAD)

    def train_batch(rows: list[int], generator: torch.Generator) -> Tensor:
        draw = torch.rand(len(rows), generator=generator).tolist()
        return torch.stack([crop(x_train[r], int(d * max(1, len(x_train[r]) - TEXT + 1))) for r, d in zip(rows, draw)])

    def test_batch(rows: list[int]) -> Tensor:
        """The end of a review, where it concludes."""
        return torch.stack([crop(x_test[r], max(0, len(x_test[r]) - TEXT)) for r in rows])

    return Data(x_train, y_train, x_test, y_test, train_batch, test_batch)


class TextStem(nn.Module):
    """int64 (B, 1024) bytes to (B, 1024, width), with the padding mask. A byte is embedded with the runs of 3 to 6
    bytes that end at it, each by a row of a shared table chosen by hash: 1,600 texts are too few to learn spelling
    from."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(PAD + 1, width, padding_idx=PAD)
        self.runs = nn.Embedding(RUNS, width)
        nn.init.normal_(self.runs.weight, std=0.1)
        self.position = nn.Parameter(0.02 * torch.randn(TEXT, width))

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bytes(text) + self.position
        code = torch.zeros_like(text)
        for back in range(6):
            code = (code + (F.pad(text, (back, 0), value=PAD)[:, :TEXT] + 1) * 257**back) % PRIME
            if back >= 2:
                x = x + self.runs((code * 31 + back) % RUNS)
        return x, text == PAD


# -------------------- model and training


@dataclass(frozen=True)
class Task:
    load: Callable[[Path], Data]
    stem: type[nn.Module]
    classes: int
    width: int
    layers: int
    batch: int
    steps: int
    learning_rate: float
    keys: int


TASKS = {
    "images": Task(load_images, ImageStem, 10, width=64, layers=3, batch=32, steps=800, learning_rate=3e-3, keys=32),
    "text": Task(load_texts, TextStem, 2, width=64, layers=2, batch=16, steps=400, learning_rate=3e-3, keys=64),
}


class Classifier(nn.Module):
    """A stem, torch's own encoder, and a linear head on the mean of the tokens."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        width = task.width
        self.stem = task.stem(width)
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 2 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        layer.self_attn.dropout = 0.0  # dropout on attention weights would need every weight
        self.encoder = nn.TransformerEncoder(layer, task.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, task.classes)

    def forward(self, inputs: Tensor) -> Tensor:
        x, padding = self.stem(inputs)
        x = self.encoder(x, src_key_padding_mask=padding)
        if padding is None:
            return self.head(x.mean(1))
        valid = ~padding[..., None]
        return self.head(x.where(valid, 0).sum(1) / valid.sum(1))


def train(
    model: nn.Module, data: Data, steps: int, batch: int, learning_rate: float, seed: int, name: str, state: Path
) -> None:
    """AdamW with a cosine from ``learning_rate`` to 0; goes on from ``state`` if there is one."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    done = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    model.train()
    bar = tqdm(range(done, steps), name, total=steps, initial=done, mininterval=1.0)
    for step in bar:
        torch.manual_seed(seed * 1_000_003 + step)  # dropout
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(data.y_train), (batch,), generator=generator).tolist()
        warmup = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = F.cross_entropy(model(data.train_batch(rows, generator)), data.y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            partial = state.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, partial)
            partial.replace(state)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, batch: int) -> float:
    """Share of test samples that are classified rightly, in percent."""
    model.eval()
    rows = list(range(len(data.y_test)))
    guesses = [model(data.test_batch(rows[i : i + batch])).argmax(-1) for i in range(0, len(rows), batch)]
    return (torch.cat(guesses) == data.y_test).float().mean().item() * 100


# -------------------- table


@dataclass(frozen=True)
class Swap:
    """What replaces exact attention: routed lists of ``keys``, with a low-rank kernel."""

    keys: int
    low_rank: str

    def __str__(self) -> str:
        return f"{self.keys} keys + {self.low_rank}"

    def pair(self) -> tuple[Support, LowRankKernel]:
        presets = {"centroid": sb.presets.drop_in, "quadratic": sb.presets.quadratic}
        return presets[self.low_rank](self.keys)


@dataclass
class Comparison:
    """Exact attention and swaps, from one trained model; results that are in ``out`` are not computed again."""

    task: Task
    data: Data
    options: argparse.Namespace

    def model(self, swap: Swap | None, alone: bool = False) -> Classifier:
        """The trained model, with exact attention (None) or ``swap``; without its low-rank part if ``alone``."""
        model = Classifier(self.task)
        model.load_state_dict(torch.load(self.options.out / "exact.pt", weights_only=True)["model"])
        if swap is None:
            return model
        support, kernel = swap.pair()
        sb.replace_attention(model, support, None if alone else kernel)
        if swap.low_rank == "quadratic" and not alone:
            self._calibrate(model)
        return model

    def _calibrate(self, model: Classifier) -> None:
        """On training samples."""
        generator = torch.Generator().manual_seed(0)
        model.eval()
        with sb.calibrate(model), torch.no_grad():
            for _ in range(4):
                rows = torch.randint(len(self.data.y_train), (self.task.batch,), generator=generator).tolist()
                model(self.data.train_batch(rows, generator))

    def before(self, swap: Swap | None, alone: bool = False) -> float:
        """Accuracy without fine-tuning."""
        name = name_of(swap) + (", alone" if alone else "")
        return self._once(f"{name}, before", lambda: self._accuracy(self.model(swap, alone)))

    def after(self, swap: Swap | None, seed: int) -> float:
        """Accuracy after fine-tuning."""
        steps, name = self.options.finetune_steps, f"{name_of(swap)}, seed {seed}, rate {self.options.rate:g}"

        def tune() -> float:
            model, state = self.model(swap), self.options.out / f"{name.replace(' ', '-')}-{steps}.pt"
            rate = self.task.learning_rate * self.options.rate
            train(model, self.data, steps, self.task.batch, rate, 1 + seed, name, state)
            return self._accuracy(model)

        return self._once(f"{name}, after {steps} steps", tune)

    def _accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.data, self.task.batch)

    def _once(self, name: str, measure: Callable[[], float]) -> float:
        file = self.options.out / "results.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        if name not in results:
            results[name] = round(measure(), 2)
            file.write_text(json.dumps(results, indent=1))
        return results[name]


def name_of(swap: Swap | None) -> str:
    return "exact" if swap is None else str(swap)


def digest(file: Path) -> str:
    return f"{file.name}, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"


def check_folder(folder: Path, now: dict[str, object]) -> None:
    """That the model and the results in a folder are of the same task, data and training steps; writes what they are
    of. All of them come from one trained model."""
    file = folder / "options.json"
    unknown = [name for name in ("results.json", "exact.pt") if (folder / name).exists() and not file.exists()]
    if unknown:
        raise SystemExit(
            f"{folder}: expected options.json beside {unknown[0]}, which says what it is of, found none; remove the "
            "folder, or choose another --out"
        )
    before = json.loads(file.read_text()) if file.exists() else now
    for name, value in now.items():
        if before.get(name) != value:
            raise SystemExit(
                f"{folder}: expected results of the same {name}, {before.get(name)}, got {value}; choose another --out"
            )
    file.write_text(json.dumps(now, indent=1))


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    task = TASKS[options.task]
    data = task.load(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    steps = options.steps or task.steps
    check_folder(options.out, {"task": options.task, "data": digest(options.data), "steps": steps})
    torch.manual_seed(0)
    train(Classifier(task), data, steps, task.batch, task.learning_rate, 0, "train", options.out / "exact.pt")

    comparison = Comparison(task, data, options)
    print(f"{options.task}: {len(data.y_train)} training and {len(data.y_test)} test samples, accuracy in percent")
    swaps = [Swap(keys, low_rank) for keys in options.keys or [task.keys] for low_rank in options.low_rank]
    for swap in (None, *swaps):
        before, after = comparison.before(swap), [comparison.after(swap, seed) for seed in options.seeds]
        each = " ".join(f"{a:.2f}" for a in after)
        mean = sum(after) / len(after)
        print(
            f"{name_of(swap):19s}  before {before:.2f}   after {options.finetune_steps} steps {mean:.2f} ({each})",
            flush=True,
        )
        if swap is not None:
            print(f"{'  its lists alone':19s}  before {comparison.before(swap, alone=True):.2f}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", type=Path, help="the npz file of images or the zip file of texts")
    parser.add_argument("--out", type=Path, help="folder of checkpoints and results (default runs/finetune-TASK)")
    parser.add_argument("--steps", type=int, help="steps of training with exact attention (default: the task's)")
    parser.add_argument("--finetune-steps", type=int, default=200, help="steps after the swap (default 200)")
    parser.add_argument("--rate", type=float, default=0.2, help="their learning rate, of training's (default 0.2)")
    parser.add_argument("--keys", type=int, nargs="+", help="exact keys per query (default: 32 images, 64 text)")
    parser.add_argument(
        "--low-rank",
        nargs="+",
        choices=("centroid", "quadratic"),
        default=["centroid", "quadratic"],
        help="kernel beside the lists: those of scatterbrain.presets.drop_in and .quadratic (default both)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="fine-tunings (default 0 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args()
    options.out = options.out or Path("runs") / f"finetune-{options.task}"
    return options


if __name__ == "__main__":
    main()
