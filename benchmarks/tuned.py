"""Do the settings that ``sb.tune`` chooses for a sentence encoder hold on texts that it has not seen?

    python benchmarks/tuned.py TEXT [TEXT ...]

TEXT are files of plain text. MiniLM's sentence embedding, the mean over its tokens, is tuned on eight passages of 512
tokens of the first file, of which four judge; then its error is measured on others of every file, with the settings
read back from their file by ``sb.replace_attention``. The weights come in a Python package
(examples/pretrained_models.py). Times are CPU time of one thread.
"""

from __future__ import annotations

import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "examples"))

import argparse
import tempfile
from pathlib import Path

import pretrained_models
import torch
from torch import Tensor, nn

import scatterbrain as sb

TOKENS = 512


def passages(file: Path, count: int) -> Tensor:
    """(count, 512) tokens of MiniLM, each passage between the [CLS] and [SEP] that it was trained with."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(pretrained_models.minilm_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text = file.read_text(errors="replace")[: 40 * TOKENS * count]
    words = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    if len(words) < (TOKENS - 2) * count:
        raise SystemExit(f"{file}: expected at least {(TOKENS - 2) * count} tokens of text, got {len(words)}")
    words = words[: (TOKENS - 2) * count].view(count, TOKENS - 2)
    first, last = (torch.full((count, 1), tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]"))
    return torch.cat([first, words, last], 1)


def embedding(returned: object) -> Tensor:
    return returned.last_hidden_state.mean(1)


@torch.no_grad()
def errors(model: nn.Module, ids: Tensor, settings: Path) -> Tensor:
    """Of every passage's embedding."""
    exact = embedding(model(ids))
    report = sb.replace_attention(model, layers=settings)
    ours = embedding(model(ids))
    report.restore()
    return (ours - exact).norm(dim=1) / exact.norm(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="a file of plain text")
    parser.add_argument("--max-error", type=float, default=0.05, help="the bound; default .05")
    parser.add_argument("--unseen", type=int, default=16, help="passages of every file to measure on; default 16")
    parser.add_argument("--png", type=Path, help="draw error against time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = pretrained_models.minilm()
    batches = [{"input_ids": ids[None]} for ids in passages(options.texts[0], 8)]
    tuning = sb.tune(
        model, batches, options.max_error, output=embedding, progress=lambda what: print(what, file=sys.stderr)
    )
    print(tuning, end="\n\n")
    if options.png is not None:
        tuning.draw(options.png)
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "tuned.yaml")
        tuning.save(settings)
        for file in options.texts:
            found = errors(model, passages(file, 8 + options.unseen)[8:], settings)
            print(f"{file.name}: {len(found)} other passages, mean {found.mean():.4f}, largest {found.max():.4f}")


if __name__ == "__main__":
    main()
