"""``scatterbrain compare MODEL [options]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scatterbrain.cli.command import CommandError, readable_errors

DESCRIPTION = """\
Shows how a model's attention looks on real inputs, and what configurations make of it, layer by layer: entropy of the
softmax weights, their share in the lists, the share of weight that the low-rank part carries, error and time against
exact attention. The model runs once, exactly; nothing is trained or changed.

  scatterbrain compare FOLDER --inputs text.txt                       a Hugging Face model on its own text
  scatterbrain compare FOLDER --inputs images/ --size 518 --png compare.png
  scatterbrain compare vit_small_patch16_224 --checkpoint vit.pth --inputs images.npz
  scatterbrain compare mine.py:model_and_batch --json compare.json
  scatterbrain compare FOLDER --inputs text.txt --configurations window-64 routed-96+centroid

MODEL is
{ways}

How to read it: where entropy is low, few keys have the weight, and the share in the lists should be near 1; where it is
high, the low-rank part carries the rest. exp(entropy) keys would share the weight evenly. Ctrl-C shows the layers so
far."""


def compare(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0 when compared to the end, 130 after Ctrl-C.

    Raises:
        CommandError: with exit code 1, for bad input or a file that cannot be written.
    """
    options = _parser().parse_args(list(arguments))
    with readable_errors():
        import torch

        from scatterbrain.analysis.captured import capture
        from scatterbrain.analysis.comparison import checked_configurations, comparing
        from scatterbrain.analysis.models import Source

        chosen = None if options.configurations is None else checked_configurations(options.configurations)
        if options.png is not None:
            import matplotlib  # noqa: F401  (before minutes of measuring, not after)
        source = Source(
            options.model,
            options.inputs,
            options.checkpoint,
            options.tokens,
            options.size,
            options.rows,
            batches=1 if options.calibrate_on_itself else 2,
            seed=options.seed,
        )
        torch.set_num_threads(options.threads)
        loaded = source.load()
        print(loaded.about, flush=True)
        batch, calibration = loaded.batches[0], loaded.batches[1] if len(loaded.batches) > 1 else None
        if options.capture is not None:
            entries = capture(loaded.model, batch, options.capture, calibration)
            print(f"written: {options.capture}, {len(entries)} layers from {entries[0]} on", flush=True)
        comparison, interrupted = None, False
        try:
            for comparison in comparing(loaded.model, batch, chosen, calibration, options.repeats):
                done = len(comparison.layers)
                if sys.stderr.isatty():
                    end = "\n" if done == comparison.total else ""
                    print(f"\r{done} of {comparison.total} attention calls", end=end, file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            interrupted = True
            if comparison is None or not comparison.layers:
                raise CommandError("stopped before the first layer was compared", 130) from None
        print(comparison)
        if options.json is not None:
            comparison.write_json(options.json)
            print(f"written: {options.json}")
        if options.png is not None:
            comparison.draw(options.png)
            print(f"written: {options.png}")
        if interrupted:
            print("stopped before the end: these are the layers so far", file=sys.stderr)
    return 130 if interrupted else 0


def _parser() -> argparse.ArgumentParser:
    from scatterbrain.analysis.models import WAYS

    ways = "\n".join(f"  {line}" for line in WAYS.splitlines())
    parser = argparse.ArgumentParser(
        "scatterbrain compare",
        "scatterbrain compare MODEL [--inputs FILE] [options]",
        DESCRIPTION.format(ways=ways),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, a timm name, or module:function")
    add_inputs(parser)
    add(
        "--configurations",
        nargs="+",
        metavar="NAME",
        help="methods of scatterbrain bench, such as routed-64+centroid; default: the presets, a window alone and the "
        "low-rank part alone",
    )
    add("--repeats", type=int, default=3, metavar="N", help="timed calls of each (default 3)")
    add(
        "--calibrate-on-itself",
        action="store_true",
        help="fit statistics of Quadratic on the measured tokens, not on a second batch",
    )
    add("--json", type=Path, metavar="FILE", help="write every figure of every head group")
    add("--png", type=Path, metavar="FILE", help="draw error, shares and entropy by layer")
    add("--capture", type=Path, metavar="FILE", help="also write the layers' queries, keys and values (safetensors)")
    return parser


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """The options of what a model is run on."""
    add = parser.add_argument
    add(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="text, images (a file, a folder, or an array in .npz or .npy), or the model's arguments by name "
        "(.safetensors); a function may bring its own; default: random",
    )
    add("--checkpoint", type=Path, metavar="FILE", help="state dict of a timm model")
    add("--tokens", type=int, metavar="N", help="tokens of a text (default: the model's most, at most 1024)")
    add("--size", type=int, metavar="PIXELS", help="side of images (default: the model's)")
    add("--rows", type=int, default=1, metavar="N", help="sequences or images of a batch (default 1)")
    add("--threads", type=int, default=1, metavar="N", help="threads of torch (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="of random inputs (default 0)")
