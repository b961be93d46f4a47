"""A pretrained vision transformer whose attention is replaced, nothing trained: how much attention memory is saved, and
how much accuracy is lost?

    python benchmarks/headline.py images.npz                                         DINOv2-S at 518 pixels
    python benchmarks/headline.py images.npz --pixels 518 896 --train 400 150 --test 200 60
    python benchmarks/headline.py images.npz --pixels 896 --probe-pixels 518         a probe of smaller, cheaper images
    python benchmarks/headline.py images.npz --model FOLDER --pixels 224             another model of transformers
    python benchmarks/headline.py images.npz --dtype bfloat16                        twice as fast on many processors
    python benchmarks/headline.py images.npz --pixels 896 --report                   what an unfinished run has so far

The npz file holds x_train, x_test (uint8, images x height x width x 3), y_train and y_test. Images are enlarged by
bicubic interpolation and normalised as the model was trained. Two probes learn from the features of training images
under EXACT attention and then judge those of test images under every setting: k nearest neighbours (cosine of class
tokens, votes weighted by exp(cosine / 0.07), as DINO is judged), and ridge regression on class token and mean patch
token, its penalty chosen by leaving one training image out.

Attention memory is counted as the Scatterbrain paper does: entries of the attention matrix that are kept per query and
head over the N of exact attention,

    (listed keys + clusters of the centroid kernel, or features of another one) / N.

A block's list counts in full, so what patches list is never more. The class token, which attends to every key exactly,
is left out of it: it adds 1 / N at most. Differences to exact attention are paired: a standard
error is that of the mean over images of (right under the setting) - (right under exact attention), and where no
prediction changed, the true share of changed ones is below 3 / images at 95 %.

Features are kept in the --out folder, where an interrupted call and one with more images go on. They say which weights,
images and settings they are from, but not which version of this package: after a change of it, name another folder.
Images of all classes alternate. Needs numpy, safetensors, tqdm and transformers, and matplotlib for --picture; the
weights of the default model come in a package (examples/pretrained_models.py).
"""

from __future__ import annotations

import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "examples"))

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import scatterbrain as sb
from scatterbrain.low_rank import LowRankKernel
from scatterbrain.supports import Support

EXACT = "exact"
# By name: what replaces exact attention. "low-rank" and "window" keep as many entries as the paper's recipe.
SETTINGS: dict[str, tuple[Support, LowRankKernel | None]] = {
    "paper": sb.presets.paper(),
    "window": (sb.Window(128), None),
    "favor": (sb.Empty(), sb.Favor(128)),
    "low-rank": (sb.Empty(), sb.Centroid(128)),
    "lean": (sb.Routed(48, block_q=32), sb.Centroid(72)),
    "drop_in": sb.presets.drop_in(),
    "quality": sb.presets.quality(),
}
SAVE_EVERY = 60  # seconds
TEMPERATURE = 0.07  # of the neighbours' votes
PENALTIES = 10.0 ** torch.arange(-4, 3, 0.5, dtype=torch.float64)  # of ridge regression, over the mean squared feature
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def entries(support: Support, low_rank: LowRankKernel | None) -> int:
    """Entries of the attention matrix that are kept per query."""
    listed = getattr(support, "keys", 0)
    if low_rank is None:
        return listed
    for size in ("clusters", "features"):
        if hasattr(low_rank, size):
            return listed + getattr(low_rank, size)
    rank = low_rank.rank
    return listed + (rank + 1) * (rank + 2) // 2


# -------------------- images and models


@dataclass
class Images:
    """One part of the file, the classes in turn: a longer run begins with the images of a shorter one."""

    pixels: np.ndarray
    labels: Tensor

    @classmethod
    def load(cls, path: Path, part: str) -> Images:
        with np.load(path) as arrays:
            missing = [name for name in (f"x_{part}", f"y_{part}") if name not in arrays]
            if missing:
                raise SystemExit(f"{path}: expected arrays x_train, y_train, x_test, y_test; {missing[0]} is missing")
            x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or len(x) != len(y):
            raise SystemExit(
                f"{path}: expected x_{part} uint8 (images, height, width, 3) and a label each, got {x.dtype} {x.shape} "
                f"and {len(y)} labels"
            )
        place = np.zeros(len(y), dtype=np.int64)  # of an image among those of its class
        for label in np.unique(y):
            place[y == label] = np.arange((y == label).sum())
        order = np.lexsort((y, place))
        return cls(x[order], torch.from_numpy(y[order].astype(np.int64)))

    def enlarged(self, row: int, pixels: int, mean: Tensor, deviation: Tensor) -> Tensor:
        """(1, 3, pixels, pixels), normalised."""
        image = torch.from_numpy(self.pixels[row]).permute(2, 0, 1)[None].float() / 255
        image = F.interpolate(image, (pixels, pixels), mode="bicubic", antialias=True, align_corners=False)
        return (image.clamp(0, 1) - mean[:, None, None]) / deviation[:, None, None]


def load_model(folder: str | None, dtype: torch.dtype) -> nn.Module:
    if folder is None:
        from pretrained_models import dinov2_small

        return dinov2_small(attn_implementation="sdpa").to(dtype)
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True, dtype=dtype).eval()


def normalisation(folder: str | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the model's pixels: those of its folder, or ImageNet's."""
    file = Path(folder or "", "preprocessor_config.json")
    known = json.loads(file.read_text()) if folder is not None and file.is_file() else {}
    mean, deviation = (known.get(name, usual) for name, usual in zip(("image_mean", "image_std"), IMAGENET))
    return torch.tensor(mean), torch.tensor(deviation)


def fingerprint(model: nn.Module, normal: tuple[Tensor, Tensor], images: Path) -> str:
    """Of all that features depend on, apart from this package."""
    digest = hashlib.sha256(images.read_bytes())
    if model.dtype != torch.float32:
        digest.update(str(model.dtype).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().numpy().data)
    for tensor in normal:
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


# -------------------- features


class Features:
    """(images, 2, width) of every part and setting, class token and mean patch token, kept in a file."""

    def __init__(self, file: Path, made_from: str) -> None:
        self.file, self.made_from = file, made_from
        self.rows: dict[str, list[Tensor]] = {}
        self.saved = time.monotonic()
        if file.is_file():
            with safe_open(file, "pt") as stored:
                if (stored.metadata() or {}).get("made_from") != made_from:
                    raise SystemExit(
                        f"{file}: expected features of this model and these images, found those of others; name another"
                        " folder with --out, or remove the file"
                    )
                self.rows = {name: list(stored.get_tensor(name)) for name in stored.keys()}

    def of(self, part: str, setting: str) -> list[Tensor]:
        return self.rows.setdefault(f"{part} {setting}", [])

    def save(self) -> None:
        """All or nothing: the file is replaced when the new one is complete."""
        new = self.file.with_suffix(".new")
        tensors = {name: torch.stack(rows) for name, rows in self.rows.items() if rows}
        save_file(tensors, new, metadata={"made_from": self.made_from})
        os.replace(new, self.file)
        self.saved = time.monotonic()

    def save_now_and_then(self) -> None:
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()


def named(setting: str) -> str:
    """The setting with all that it stands for, as the file of features knows it."""
    return setting if setting == EXACT else " + ".join(map(str, SETTINGS[setting]))


def gather(
    features: Features,
    part: str,
    count: int,
    models: dict[str, Callable[[], nn.Module]],
    image: Callable[[int], Tensor],
    title: str,
) -> None:
    """Features of the first ``count`` images with every model, image after image: a run that is stopped has the same
    images of all of them. Models whose features are all there are not made."""
    todo = {name: make() for name, make in models.items() if len(features.of(part, named(name))) < count}
    had = sum(min(count, len(features.of(part, named(name)))) for name in models)
    progress = tqdm(total=count * len(models), initial=had, unit="forward", desc=title, smoothing=0.05)
    with progress:
        for row in range(count):
            for name, model in todo.items():
                rows = features.of(part, named(name))
                if len(rows) > row:
                    continue
                tokens = model(image(row).to(model.dtype)).last_hidden_state[0].float()
                registers = getattr(model.config, "num_register_tokens", 0)
                rows.append(torch.stack([tokens[0], tokens[1 + registers :].mean(0)]).clone())
                features.save_now_and_then()
                progress.update()


# -------------------- probes


def nearest(train: Tensor, labels: Tensor, test: Tensor, k: int, classes: int) -> Tensor:
    """Labels of test images by the votes of their k nearest training images."""
    train, test = (F.normalize(t[:, 0].double(), dim=-1) for t in (train, test))
    cosine, index = (test @ train.T).topk(min(k, len(train)))
    votes = torch.zeros(len(test), classes, dtype=torch.float64)
    votes.scatter_add_(1, labels[index], (cosine / TEMPERATURE).exp())
    return votes.argmax(-1)


def ridge(train: Tensor, labels: Tensor, test: Tensor, k: int, classes: int) -> Tensor:
    """Labels of test images by one linear function of the features per class."""
    train, test = (t.flatten(1).double() for t in (train, test))
    mean, deviation = train.mean(0), train.std(0).clamp_min(1e-6)
    x, x_test = (train - mean) / deviation, (test - mean) / deviation
    targets = F.one_hot(labels, classes).double()
    centre = targets.mean(0)
    values, vectors = torch.linalg.eigh(x @ x.T / x.shape[1])
    values = values.clamp_min(0)
    best = None
    for penalty in PENALTIES * len(x):
        shrunk = vectors * (values / (values + penalty))
        hat = shrunk @ vectors.T
        residual = (targets - centre - hat @ (targets - centre)) / (1 - hat.diagonal()).clamp_min(1e-9)[:, None]
        loss = residual.square().sum()
        if best is None or loss < best[0]:
            best = loss, penalty
    weights = vectors @ ((vectors.T @ (targets - centre)) / (values + best[1])[:, None])
    return (x_test @ x.T / x.shape[1] @ weights + centre).argmax(-1)


PROBES = {"k-NN": nearest, "ridge": ridge}


# -------------------- the table


@dataclass
class Figures:
    """One line of the table. Of every probe: the accuracy and its standard error, the paired difference to exact
    attention and its standard error, all in per cent, and how many predictions are those under exact attention."""

    setting: str
    entries: int
    share: float
    images: int
    probes: dict[str, tuple[float, float, float, float, int]]
    class_cosines: Tensor
    patch_cosines: Tensor

    HEAD = ("setting", "entries", "attention memory", *PROBES, "cosine of class tokens", "of mean patches")

    def cells(self) -> Iterator[str]:
        yield self.setting
        yield str(self.entries)
        yield "100 %" if self.share == 1 else f"{self.share:.2%}".replace("%", " %")
        for accuracy, error, difference, paired, same in self.probes.values():
            cell = f"{accuracy:.1f} ± {error:.1f}"
            if self.setting != EXACT:
                changed = self.images - same
                cell += f"; {difference:+.1f} ± {paired:.1f}, {changed} changed" if changed else "; none changed"
            yield cell
        for cosines in (self.class_cosines, self.patch_cosines):
            yield f"{cosines.mean():.4f} (lowest {cosines.min():.3f})"


def spread(values: Tensor) -> float:
    """Standard error of a mean, in per cent."""
    return 100 * float(values.std(correction=0)) / len(values) ** 0.5


def table(
    trained: Features,
    features: Features,
    labels: dict[str, Tensor],
    settings: list[str],
    k: int,
    tokens: int,
    most: tuple[int, int],
) -> tuple[int, list[Figures]]:
    """The number of training images, and a line for exact attention and each setting, on the images that all have, of
    the first ``most`` for training and for testing."""
    train = trained.of("train", EXACT)[: most[0]]
    test = {name: features.of("test", named(name))[: most[1]] for name in (EXACT, *settings)}
    count = min(map(len, test.values()))
    if not train or not count:
        file = features.file if train else trained.file
        without = "training images" if not train else next(name for name, rows in test.items() if not rows)
        raise SystemExit(f"{file}: no features of {without} yet; run the command without --report")
    rows, classes = [], int(torch.cat(list(labels.values())).max()) + 1
    seen, truth = torch.stack(train), labels["test"][:count]
    expected, reference = {}, torch.stack(test[EXACT][:count])
    for setting, own in test.items():
        own = torch.stack(own[:count])
        probes = {}
        for probe, predict in PROBES.items():
            predicted = predict(seen, labels["train"][: len(train)], own, k, classes)
            before = expected.setdefault(probe, predicted)
            right, was_right = (predicted == truth).double(), (before == truth).double()
            difference = right - was_right
            probes[probe] = (
                *(100 * float(right.mean()), spread(right)),
                *(100 * float(difference.mean()), spread(difference)),
                int((predicted == before).sum()),
            )
        cosines = F.cosine_similarity(own, reference, dim=-1)
        kept = tokens if setting == EXACT else min(tokens, entries(*SETTINGS[setting]))
        rows.append(Figures(setting, kept, kept / tokens, count, probes, *cosines.T))
    return len(train), rows


def print_table(pixels: int, tokens: int, probe_pixels: int, train: int, rows: list[Figures]) -> None:
    print(
        f"\n{pixels} pixels, {tokens} tokens: probes trained on {train} images of {probe_pixels} pixels under exact "
        f"attention, {rows[0].images} test images; accuracies in per cent ± standard error\n"
    )
    print("| " + " | ".join(Figures.HEAD) + " |")
    print("| " + " | ".join("---" for _ in Figures.HEAD) + " |")
    for row in rows:
        print("| " + " | ".join(row.cells()) + " |", flush=True)


def draw(tables: dict[int, tuple[int, list[Figures]]], path: str) -> None:
    """Of every setting, by attention memory: the accuracies against those of exact attention, and the cosines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(tables), figsize=(6 * len(tables), 6.6), layout="constrained", squeeze=False)
    for (above, below), (pixels, (train, rows)) in zip(axes.T, tables.items()):
        shown = sorted(rows[1:], key=lambda row: row.entries)
        places = np.arange(len(shown))
        for shift, marker, probe in zip((-0.12, 0.12), "os", PROBES):
            differences, errors = zip(*(row.probes[probe][2:4] for row in shown))
            label = f"{probe}, exact {rows[0].probes[probe][0]:.1f} %"
            above.errorbar(places + shift, differences, errors, fmt=marker, capsize=3, label=label)
        for shift, marker, part in zip((-0.12, 0.12), "os", ("class token", "mean patch")):
            cosines = [float((row.class_cosines if marker == "o" else row.patch_cosines).mean()) for row in shown]
            below.plot(places + shift, [max(1 - cosine, 1e-7) for cosine in cosines], marker, label=part)
        above.set_title(f"{pixels} pixels: {train} training, {rows[0].images} test images", fontsize=10)
        above.axhline(0, color="grey", linewidth=0.8)
        above.set_ylabel("accuracy minus that of exact\nattention, points (paired s.e.)")
        below.set_yscale("log")
        below.set_ylabel("1 - cosine with the features\nof exact attention")
        below.set_xlabel("attention memory, % of the entries of exact attention")
        for axis in (above, below):
            axis.set_xticks(places, [f"{row.setting}\n{100 * row.share:.1f}" for row in shown], fontsize=8)
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    print(f"\n{path}")


# -------------------- command line


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", type=Path, help="npz file of images and labels")
    add("--model", metavar="FOLDER", help="of a vision model that transformers saved; default DINOv2-S of a package")
    add("--pixels", type=at_least_one, nargs="+", default=[518], help="sides of the enlarged images; default 518")
    add("--train", type=at_least_one, nargs="+", default=[400], help="training images, one number or one for each side")
    add("--test", type=at_least_one, nargs="+", default=[200], help="test images, likewise")
    add("--probe-pixels", type=at_least_one, metavar="PIXELS", help="side of training images; default as test images'")
    add("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS), help="default all")
    add("-k", type=at_least_one, default=20, help="neighbours; default 20")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model; default float32")
    add("--threads", type=at_least_one, default=1, help="of the processor; default 1")
    add("--out", type=Path, default=Path("headline"), metavar="FOLDER", help="for features; default headline")
    add("--picture", metavar="FILE", help="PNG to write")
    add("--report", action="store_true", help="only the tables of the features that are there")
    options = parser.parse_args(arguments)
    for name in ("train", "test"):
        counts = getattr(options, name)
        if len(counts) not in (1, len(options.pixels)):
            parser.error(f"--{name}: expected 1 or {len(options.pixels)} numbers, as --pixels has, got {len(counts)}")
        setattr(options, name, counts * len(options.pixels) if len(counts) == 1 else counts)
    if not options.images.is_file():
        parser.error(f"expected an npz file of images, got {options.images}, which is no file")
    return options


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    images = {part: Images.load(options.images, part) for part in ("train", "test")}
    for part, asked in (("train", options.train), ("test", options.test)):
        if max(asked) > len(images[part].labels):
            raise SystemExit(f"--{part}: expected at most {len(images[part].labels)}, the file's, got {max(asked)}")
    dtype = getattr(torch, options.dtype)
    exact, normal = load_model(options.model, dtype), normalisation(options.model)
    patch = exact.config.patch_size
    made_from = fingerprint(exact, normal, options.images)
    options.out.mkdir(parents=True, exist_ok=True)

    def swapped(setting: str) -> nn.Module:
        model = load_model(options.model, dtype)
        report = sb.replace_attention(model, *SETTINGS[setting])
        if report.skipped:
            raise SystemExit(f"not every layer was replaced:\n{report}")
        return model

    def features_of(pixels: int) -> Features:
        if pixels % patch:
            raise SystemExit(f"expected sides that are multiples of the model's patches, {patch} pixels, got {pixels}")
        return Features(options.out / f"features-{pixels}.safetensors", made_from)

    models: dict[str, Callable[[], nn.Module]] = {EXACT: lambda: exact}
    both = models | {name: lambda name=name: swapped(name) for name in options.settings}
    tables = {}
    for pixels, train, test in zip(options.pixels, options.train, options.test):
        features, probe_pixels = features_of(pixels), options.probe_pixels or pixels
        seen = features if probe_pixels == pixels else features_of(probe_pixels)
        tokens = 1 + getattr(exact.config, "num_register_tokens", 0) + (pixels // patch) ** 2
        if not options.report:
            for part, side, own, count, of_part in (
                ("train", probe_pixels, seen, train, models),
                ("test", pixels, features, test, both),
            ):

                def image(row: int, part: str = part, side: int = side) -> Tensor:
                    return images[part].enlarged(row, side, *normal)

                try:
                    gather(own, part, count, of_part, image, f"{side} pixels, {part}")
                except KeyboardInterrupt:
                    raise SystemExit(
                        "stopped; the same command goes on from here, --report prints what is there"
                    ) from None
                finally:
                    own.save()
        labels = {part: found.labels for part, found in images.items()}
        tables[pixels] = table(seen, features, labels, options.settings, options.k, tokens, (train, test))
        print_table(pixels, tokens, probe_pixels, *tables[pixels])
    if options.picture:
        draw(tables, options.picture)


if __name__ == "__main__":
    main()
