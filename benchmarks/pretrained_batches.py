"""Pretrained models with inputs, for ``scatterbrain compare benchmarks/pretrained_batches.py:minilm`` and the like.

    minilm          sentence encoder on 512 tokens of English prose
    dinov2          DINOv2-S/14 on a photograph of 518 x 518 pixels, 1370 tokens
    whisper         tiny.en, encoder of 1500 frames and decoder of 60 tokens, on speech (benchmarks/pretrained.py)

Each gives two batches: one to look at, one to fit statistics on. The weights come in Python packages
(examples/pretrained_models.py says which).
"""

from __future__ import annotations

import os
import sys

sys.path[:0] = [
    os.path.dirname(os.path.abspath(__file__)),
    os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "examples"),
]

from typing import Any

import pretrained
import pretrained_models
import torch
from torch import nn

WithBatches = tuple[nn.Module, list[dict[str, Any]]]


def minilm() -> WithBatches:
    ids = pretrained.prose(512, 2)
    return pretrained_models.minilm(), [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]


def dinov2() -> WithBatches:
    import dinov2

    pictures = dinov2.PICTURES["photographs"]["china"], dinov2.CALIBRATION[0]
    return pretrained_models.dinov2_small(), [{"pixel_values": dinov2.photograph(parts, 518)} for parts in pictures]


def whisper() -> WithBatches:
    from tokenizers import Tokenizer
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor()
    tokenizer = Tokenizer.from_file(str(pretrained_models.whisper_tokenizer_file()))
    batches = []
    for text in pretrained.TEXTS[:2]:
        sound = extractor(pretrained.speech(text), sampling_rate=16000, return_tensors="pt")
        words = torch.tensor([[50257, 50362, *tokenizer.encode(text, add_special_tokens=False).ids][:60]])
        batches.append({"input_features": sound.input_features, "decoder_input_ids": words})
    return pretrained_models.whisper_tiny_en(), batches
