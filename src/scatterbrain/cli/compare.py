"""``scatterbrain compare MODEL [options]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scatterbrain.cli.command import CommandError, check_outputs, readable_errors
from scatterbrain.cli.on_model import files_read, load, parser_of

DESCRIPTION = """\
Shows how a model's attention looks on real inputs, and what configurations make of it, layer by layer: entropy of the
softmax weights, their share in the lists, the share of weight that the low-rank part carries, error and time against
exact attention. The model runs exactly, once on every batch (and once more for --capture); nothing is trained or
changed.

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
        from scatterbrain.analysis.captured_file import capture
        from scatterbrain.analysis.comparison import checked_configurations, comparing

        chosen = None if options.configurations is None else checked_configurations(options.configurations)
        check_outputs(options, "json", "png", "capture", reads=files_read(options))
        loaded = load(options, batches=1 if options.calibrate_on_itself else 2)
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
    parser = parser_of("compare", "scatterbrain compare MODEL [--inputs FILE] [options]", DESCRIPTION)
    add = parser.add_argument
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
