"""Real pretrained models with every attention layer replaced and nothing trained: how far are their outputs, how long
do they take?

    python benchmarks/pretrained.py                     all models, the default pair
    python benchmarks/pretrained.py minilm --low-rank centroid quadratic
    python benchmarks/pretrained.py whisper --keys 64 128 256 --block-q 16 32 --clusters 64 96

Every combination of the options is a row. The centroid kernel needs no calibration; the quadratic one is calibrated on
other inputs than those it is measured on. Times are CPU time of one thread, so that other processes count little:
medians of forwards with exact attention (transformers' sdpa) and with that of every row, taken in turn. The weights
come in Python packages (examples/pretrained_models.py); where one is not installed its model is left out, with the
reason.

minilm   sentence encoder on 512 tokens of English prose (the standard library's pydoc topics): cosine of token outputs
         and of sentence embeddings
whisper  tiny.en, encoder of 1500 frames, spoken by espeak-ng if it is installed, else chirps: cosine of encoder
         outputs, and the words that change in the transcript
"""

from __future__ import annotations

import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "examples"))

import argparse
import copy
import difflib
import io
import shutil
import statistics
import subprocess
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pretrained_models
import torch
import torch.nn.functional as F
from pairs import Pair, add_options, pairs_of
from torch import Tensor, nn

# One text a line.
TEXTS = """\
She opened the letter and read it twice before she answered. There was a train at seven, and if they hurried they \
could still reach the station in time. The driver smiled, turned the key, and drove through the empty streets of the \
city. On the platform a man in a grey coat was waiting with a suitcase and a newspaper under his arm.
Scientists have measured the temperature of the ocean for more than a century. Their records show slow changes over \
many years, and sudden changes in a few places. Satellites now watch the surface every day, while machines that \
float in deep water send their numbers to the laboratory once a week.
A small boat drifts along the river, and two old friends talk about the weather, the harvest, and the long road \
home. Nobody knows when the rain will come, but everyone agrees that it cannot be far away. In the morning the \
market will open, and the farmers will bring apples, bread, and honey.
The museum is open from nine in the morning until six in the evening. Tickets are sold at the entrance, and children \
under twelve may visit without paying. Please leave large bags at the desk, do not touch the paintings, and follow \
the signs to the garden when you have seen the last room.""".splitlines()


@dataclass
class Row:
    """One line of the table: a model, a pair, and what was measured with it."""

    model: str
    pair: Pair
    figures: dict[str, str]
    exact_ms: float
    ours_ms: float

    def __str__(self) -> str:
        figures = "  ".join(f"{name} {value}" for name, value in self.figures.items())
        times = f"{self.exact_ms:.0f} ms exact, {self.ours_ms:.0f} ms ours ({self.exact_ms / self.ours_ms:.2f} times)"
        return f"{self.model}  {self.pair}:  {figures}  {times}"


# -------------------- what all models share


def replaced(model: nn.Module, pair: Pair, calibration: Callable[[nn.Module], object]) -> nn.Module:
    """A copy of ``model`` whose attention layers are replaced, and calibrated where the pair needs it."""
    ours = copy.deepcopy(model)
    report = pair.swap_into(ours, lambda: calibration(ours))
    if report.skipped:
        raise SystemExit(f"not every layer was replaced:\n{report}")
    return ours


def medians(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of this thread in each, run in turn after one run of each that is not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, taken in zip(functions, times):
            start = time.thread_time()
            function()
            if repeat:
                taken.append(1e3 * (time.thread_time() - start))
    return [statistics.median(taken) for taken in times]


def spread(cosines: Tensor) -> str:
    """Mean and lowest of some cosines."""
    return f"{float(cosines.mean()):.4f} (lowest {float(cosines.min()):.4f})"


# -------------------- MiniLM


def prose(tokens: int, passages: int) -> Tensor:
    """(passages, tokens) token ids of MiniLM, from the documentation that Python brings along."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(pretrained_models.minilm_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    longest = sorted(topics.values(), key=len, reverse=True)
    rows = [tokenizer.encode(text).ids for text in longest[: 2 * passages]]
    rows = [row[: tokens - 1] + row[-1:] for row in rows if len(row) >= tokens]
    return torch.tensor(rows[:passages])


def minilm(options: argparse.Namespace) -> Iterator[Row]:
    """Sentence encoder, 6 layers of 12 heads of 32, at its full length of 512 tokens."""
    ids = prose(512, 16)
    measured, calibration = ids[::2], ids[1::2]
    one = measured[:1]
    model = pretrained_models.minilm()
    exact = model(measured).last_hidden_state
    pairs = pairs_of(options)
    models = [replaced(model, pair, lambda m: m(calibration)) for pair in pairs]
    exact_ms, *our_ms = medians([partial(m, one) for m in (model, *models)], options.repeats)
    for pair, ours, ms in zip(pairs, models, our_ms):
        out = ours(measured).last_hidden_state
        figures = {
            "tokens": spread(F.cosine_similarity(out, exact, dim=-1)),
            "sentences": spread(F.cosine_similarity(out.mean(1), exact.mean(1), dim=-1)),
        }
        yield Row("minilm, 512 tokens", pair, figures, exact_ms, ms)


# -------------------- Whisper


def speech(text: str) -> np.ndarray:
    """float32 samples at 16 kHz: ``text`` spoken by espeak-ng, or, without it, chirps in the rhythm of its words."""
    if shutil.which("espeak-ng"):
        command = ["espeak-ng", "-v", "en-us", "-s", "150", "--stdout", text]
        data = subprocess.run(command, capture_output=True, check=True).stdout
        with wave.open(io.BytesIO(data)) as file:
            rate = file.getframerate()
            header = len(data) % 2 + 44
        samples = np.frombuffer(data[header:], dtype=np.int16).astype(np.float64) / 32768
        # Resampling by the spectrum: what lies above 8 kHz is dropped, not folded down.
        count = len(samples) * 16000 // rate
        spectrum = np.fft.rfft(samples)[: count // 2 + 1]
        return (np.fft.irfft(spectrum, count) * count / len(samples)).astype(np.float32)
    pieces = []
    for word in text.split():
        t = np.arange(1600 * min(len(word), 6) // 2) / 16000
        tone = sum(np.sin(2 * np.pi * (120 + 7 * len(word)) * k * t * (1 + 0.2 * t)) / k for k in range(1, 12))
        pieces += [0.1 * tone * np.hanning(len(t)), np.zeros(800)]
    return np.concatenate(pieces).astype(np.float32)


def transcribe(model: nn.Module, encoded: Tensor) -> list[str]:
    """Words of each row, decoded greedily."""
    from tokenizers import Tokenizer
    from transformers.modeling_outputs import BaseModelOutput

    tokenizer = Tokenizer.from_file(str(pretrained_models.whisper_tokenizer_file()))
    start = torch.tensor([[50257, 50362]])  # start of transcript, no time stamps
    texts = []
    for row in encoded:
        out = model.generate(
            encoder_outputs=BaseModelOutput(row[None]), decoder_input_ids=start, max_new_tokens=120, do_sample=False
        )
        texts.append(tokenizer.decode(out[0].tolist(), skip_special_tokens=True))
    return texts


def changed_words(ours: str, exact: str) -> int:
    """Words of ``exact`` that ``ours`` has replaced, dropped or added to."""
    matcher = difflib.SequenceMatcher(a=exact.split(), b=ours.split(), autojunk=False)
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal")


def whisper(options: argparse.Namespace) -> Iterator[Row]:
    """tiny.en: the encoder's 4 layers of 6 heads of 64 replaced, 1500 frames; the decoder stays exact."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor()
    spoken = torch.cat(
        [extractor(speech(text), sampling_rate=16000, return_tensors="pt").input_features for text in TEXTS]
    )
    print("speech: espeak-ng" if shutil.which("espeak-ng") else "speech: chirps, espeak-ng is not installed")
    model = pretrained_models.whisper_tiny_en()
    encoder = model.model.encoder
    exact = encoder(spoken).last_hidden_state
    words = transcribe(model, exact)
    halves = spoken.split(len(TEXTS) // 2)
    pairs = pairs_of(options)
    encoders = [
        [replaced(encoder, pair, lambda m, other=other: m(other)) for other in reversed(halves)] for pair in pairs
    ]
    one = spoken[:1]
    exact_ms, *our_ms = medians([partial(e, one) for e in (encoder, *(e[0] for e in encoders))], options.repeats)
    for pair, ours, ms in zip(pairs, encoders, our_ms):
        encoded = torch.cat([one_half(half).last_hidden_state for one_half, half in zip(ours, halves)])
        changed = sum(map(changed_words, transcribe(model, encoded), words))
        figures = {
            "frames": spread(F.cosine_similarity(encoded, exact, dim=-1)),
            "changed words": f"{changed} of {sum(len(text.split()) for text in words)}",
        }
        yield Row("whisper tiny.en encoder, 1500 frames", pair, figures, exact_ms, ms)


# -------------------- command line

MODELS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {"minilm": minilm, "whisper": whisper}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"any of {', '.join(MODELS)}; default all")
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=9, help="timed forwards of each kind; default 9")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}, expected any of {', '.join(MODELS)}")
    torch.set_num_threads(1)
    for name in options.models or MODELS:
        try:
            for row in MODELS[name](options):
                print(row, flush=True)
        except ModuleNotFoundError as error:
            print(f"{name}: left out, {error}")


if __name__ == "__main__":
    main()
