from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.training.config import DataConfig, ModelConfig, TrainConfig
from scatterbrain.training.models.blocks import ShortConvolution
from scatterbrain.training.models.encoder import Encoder, PairClassifier, SequenceClassifier
from scatterbrain.training.tasks.copy import Copy
from scatterbrain.training.tasks.majority import Majority
from scatterbrain.training.tasks.pathfinder import Pathfinder

CONFIG = ModelConfig(layers=2, width=16, heads=2, positions="learned", convolution=2)


def made(model: type[Encoder], has_features: bool = False, **changes: str) -> Encoder:
    def attention(heads: int, kv_heads: int, head_dim: int) -> nn.Module:
        return sb.ScatterbrainAttention(heads, head_dim, kv_heads, support=sb.Window(9), low_rank=sb.Centroid(8))

    size = 3 if has_features else 11
    config = dataclasses.replace(CONFIG, **changes)
    return model(config, size, 5, attention, torch.Generator().manual_seed(0), 60, has_features).eval()


def drawn(*shape: int, has_features: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(*shape, 3, generator=generator) if has_features else torch.randint(11, shape, generator=generator)
    )


@pytest.mark.parametrize("has_features", [False, True])
@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [(Encoder, (2, 50), (2, 50, 5)), (SequenceClassifier, (2, 50), (2, 5)), (PairClassifier, (2, 2, 50), (2, 5))],
)
def test_padding_changes_no_bit(model, inputs, outputs, has_features):
    encoder = made(model, has_features)
    tokens = drawn(*inputs, has_features=has_features)
    mask = torch.ones(inputs, dtype=torch.bool)
    mask[0, ..., 30:] = False
    mask[0, ..., 0] = True
    other = tokens.clone()
    other[~mask] = float("nan") if has_features else 7
    first, second = encoder(tokens, mask), encoder(other, mask)
    assert first.shape == outputs and not torch.equal(first, encoder(tokens, None))
    counts = mask if outputs == (2, 50, 5) else slice(None)
    assert torch.equal(first[counts], second[counts])


def test_a_pair_is_encoded_apart_and_in_its_order():
    encoder, tokens = made(PairClassifier), drawn(1, 2, 50)
    first, second = (encoder.pooled(tokens[:, index]) for index in range(2))
    features = torch.cat((first, second, first * second, (first - second).abs()), dim=-1)
    hidden, _, last = encoder.head
    torch.testing.assert_close(encoder(tokens), last(torch.nn.functional.gelu(hidden(features))))


@pytest.mark.parametrize("model", [SequenceClassifier, PairClassifier])
def test_the_first_token_that_counts_stands_for_the_sequence(model):
    encoder = made(model, pooling="first")
    tokens = drawn(2, 50)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, :3] = mask[1, 40:] = False
    pooled, features = encoder.pooled(tokens, mask), encoder.features(tokens, mask)
    assert torch.equal(pooled, torch.stack((features[0, 0], features[1, 3])))
    assert torch.equal(encoder.pooled(tokens), encoder.features(tokens)[:, 0])
    other = tokens.masked_fill(~mask, 7)
    assert torch.equal(pooled, encoder.pooled(other, mask))


def test_more_tokens_than_learned_positions_are_refused():
    with pytest.raises(ValueError, match="expected at most 60 tokens, which have a learned position, got 61"):
        made(Encoder)(drawn(1, 61))


def test_a_convolution_reads_fewer_tokens_than_it_has_taps():
    convolution = ShortConvolution(3, 4)
    torch.nn.init.normal_(convolution.weight, generator=torch.Generator().manual_seed(2))
    x = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(3))
    for tokens in (1, 2, 6):
        torch.testing.assert_close(convolution(x[:, :tokens]), convolution(x)[:, :tokens])


@pytest.mark.parametrize(("task", "positions"), [(Copy(tokens=5), "learned"), (Majority(), "none")])
def test_a_base_of_rotation_that_nothing_rotates_by_is_not_dropped_silently(task, positions):
    data = task.open(DataConfig(), TrainConfig(batch=2))
    config = ModelConfig(width=16, heads=2, positions=positions, rope_base=500.0)
    said = f"model.rope_base: 500.0 is not used, model.positions {positions} rotates nothing"
    assert task.check_unused(data, config) == [said]
    for used in ({"positions": "rotary"}, {"rope_base": 10000.0}):
        assert task.check_unused(data, dataclasses.replace(config, **used)) == []


def test_a_setting_that_a_model_has_no_use_for_is_not_dropped_silently():
    task = Pathfinder()
    data = task.open(DataConfig(), TrainConfig(batch=2))
    said = "model.embedding_std: expected the default 1.0, as path.*, got 2.0; leave it out, or set it to 1.0 where"
    with pytest.raises(ValueError, match=said):
        task.check_unused(data, ModelConfig(width=16, heads=2, embedding_std=2.0))


def test_a_model_of_ones_own_may_use_any_setting():
    class Own(Pathfinder):
        def build_model(self, *arguments: object) -> nn.Module:
            return nn.Linear(1, 2)

    data = Pathfinder().open(DataConfig(), TrainConfig(batch=2))
    assert Own().check_unused(data, ModelConfig(width=16, heads=2, embedding_std=2.0)) == []
