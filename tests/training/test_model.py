from __future__ import annotations

from functools import partial

import pytest
import torch

from scatterbrain.training.attention import build_attention
from scatterbrain.training.config import AttentionConfig, ModelConfig
from scatterbrain.training.models.blocks import rotary_angles, rotate
from scatterbrain.training.models.decoder import Decoder
from scatterbrain.training.sample import generate

ATTENTIONS = {"full": AttentionConfig(support="full"), "train": AttentionConfig(preset="train", keys=32)}
VARIANTS = {
    "default": ModelConfig(layers=2, width=32, heads=2),
    "grouped": ModelConfig(layers=2, width=64, heads=4, kv_heads=2, tied=False),
    "classic": ModelConfig(layers=2, width=32, heads=2, mlp="gelu", norm="layer", rope_base=1000.0),
}


def make(variant: str, attention: str) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    return Decoder(VARIANTS[variant], 256, partial(build_attention, ATTENTIONS[attention]), generator)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_future_bytes_do_not_change_a_bit_of_earlier_logits(variant, attention):
    model = make(variant, attention)
    tokens = torch.randint(256, (2, 150), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 101:] = (changed[:, 101:] + 77) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :101], after[:, :101])
    assert not torch.equal(before[:, 101:], after[:, 101:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_but_the_attentions_own_starts_the_same_whatever_the_attention(variant):
    exact, routed = (dict(make(variant, attention).named_parameters()) for attention in ("full", "train"))
    assert set(exact) <= set(routed)
    assert all(torch.equal(value, routed[name]) for name, value in exact.items())


def test_scores_of_rotated_queries_and_keys_depend_on_their_distance_only():
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    rotation = rotary_angles(20, 8, 100.0, torch.device("cpu"))
    scores = rotate(query.expand(20, 8), rotation) @ rotate(key.expand(20, 8), rotation).T
    torch.testing.assert_close(scores[5:, 3:18].diagonal(), scores[2, 0].expand(15), rtol=0, atol=1e-5)


def test_a_sample_repeats_with_its_seed_and_has_the_length_asked_for():
    model = make("default", "full")
    arguments = {"prompt": b"def ", "length": 12, "temperature": 1.0, "context": 8}
    first, again, other = (generate(model, seed=seed, **arguments) for seed in (0, 0, 1))
    assert len(first) == 12 and first == again != other


def test_temperature_zero_takes_the_most_likely_byte():
    model = make("default", "full")
    added = generate(model, b"ab", 1, temperature=0.0, context=8, seed=0)
    with torch.no_grad():
        assert added[0] == int(model(torch.tensor([list(b"ab")]))[0, -1].argmax())


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"width": 30, "heads": 4}, "model.width"),
        ({"heads": 4, "kv_heads": 3}, "model.kv_heads"),
        ({"layers": 0}, "model.layers"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_name(settings, key):
    with pytest.raises(ValueError, match=key):
        ModelConfig(**settings)
