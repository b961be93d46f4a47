"""One attention matrix, and what takes its place: exact pairs, one representative key per cluster, and the rest.

    python benchmarks/picture.py FILE --model minilm --layer 2 --head 5 --out docs/images/centroid.png

FILE holds queries, keys and values of real models, as benchmarks/quality.py describes it. The weights are those of the
reference, dense and in float64; rows are queries and add up to 1. Needs matplotlib, Pillow and
safetensors.
"""

from __future__ import annotations

import argparse
import io
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import scatterbrain as sb
from scatterbrain.hilbert import hilbert_order


def load(path: str, model: str, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, 1, tokens, head_dim) of one head; vision models in Hilbert order."""
    with safe_open(path, "pt") as file:
        found = [
            name[:-1] for name in file.keys() if name.startswith(f"{model}.N") and name.endswith(f"layer{layer}.q")
        ]
        if not found:
            layers = sorted(name[:-2] for name in file.keys() if name.endswith(".q"))
            raise SystemExit(f"{path}: expected a layer {layer} of {model!r}; it has {', '.join(layers)}")
        q, k, v = (file.get_tensor(found[0] + part).double() for part in "qkv")
    if head >= len(q):
        raise SystemExit(f"--head: expected 0 to {len(q) - 1}, got {head}")
    if model.startswith("dino"):
        side = math.isqrt(q.shape[1] - 1)
        order = torch.cat([1 + hilbert_order(side, side), torch.tensor([0])])
        q, k, v = q[:, order], k[:, order], v[:, order]
    return tuple(t[None, head : head + 1] for t in (q, k, v))


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float(((out - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="safetensors file of queries, keys and values")
    parser.add_argument("--model", default="minilm", help="its name in the file (default minilm)")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--keys", type=int, default=64, help="exact keys per query (default 64)")
    parser.add_argument("--clusters", type=int, default=64, help="representative keys (default 64)")
    parser.add_argument("--out", default="centroid.png", help="picture to write (default centroid.png)")
    options = parser.parse_args()

    query, key, value = load(options.file, options.model, options.layer, options.head)
    support, low_rank = sb.Routed(options.keys, block_q=32), sb.Centroid(options.clusters)
    found = sb.cluster(query, key, options.clusters)
    lists = sb.route(query, key, support, low_rank, statistics=found)
    # Of values that are unit vectors attention returns its weights.
    units = torch.eye(len(key[0, 0]), dtype=torch.float64)[None, None]
    exact = sb.reference.attention(query, key, units, sb.Full(), None)[0, 0]
    ours = sb.reference.attention(query, key, units, lists, low_rank, statistics=found)[0, 0]
    listed = sb.reference.mask(lists, query, key)[0, 0]

    # The part of each cluster in a row: what its representative stands for there.
    rest = ours.masked_fill(listed, 0)
    member = found.index[0, 0, :, None] == torch.arange(options.clusters)
    of_cluster = rest @ member.to(rest.dtype)
    share = float(rest.sum(-1).mean())
    error = relative_error(ours @ value[0, 0], exact @ value[0, 0])
    alone = exact.masked_fill(~listed, 0)
    sparse_error = relative_error((alone / alone.sum(-1, keepdim=True)) @ value[0, 0], exact @ value[0, 0])

    tokens = len(key[0, 0])
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.4), width_ratios=(1, 1, 0.32, 1), layout="constrained")
    least = 1e-2 / tokens

    def show(axis: Axes, weights: Tensor, title: str, label: str) -> AxesImage:
        image = axis.imshow(
            weights.clamp_min(least), norm=LogNorm(least, 0.3), cmap="magma", aspect="auto", interpolation="nearest"
        )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label)
        return image

    show(axes[0], exact, f"exact attention\n{tokens} x {tokens} weights", "key")
    axes[0].set_ylabel("query")
    show(
        axes[1],
        ours.masked_fill(~listed, 0),
        f"exact pairs: {options.keys} keys for each 32 queries\n{1 - share:.0%} of the weight",
        "key",
    )
    show(axes[2], of_cluster, f"{options.clusters} representatives\n{share:.0%}", "cluster")
    image = show(
        axes[3], ours, f"both, one normaliser\noutput error {error:.3f} ({sparse_error:.3f} without the rest)", "key"
    )
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("weight")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80, format="png")
    Image.open(drawn).quantize(96).save(options.out, optimize=True)  # a third of the size
    print(f"{options.out}: error {error:.4f}, of the listed pairs alone {sparse_error:.4f}; rest {share:.3f}")


if __name__ == "__main__":
    main()
