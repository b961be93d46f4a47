"""sb.compare: every figure against the definition, and its files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import testkit
import torch
from testkit import padding, randomized
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.analysis import LayerCall, comparison
from scatterbrain.analysis.comparison import attention_of, compare_call
from scatterbrain.analysis.exact import exact
from scatterbrain.analysis.tables import short_labels, spread, tokens_of

E, H, L = 64, 4, 90
PAIRS = {
    "window": (sb.Window(16), sb.Centroid(6)),
    "routed": (sb.Routed(24, block_q=16), sb.Quadratic(4)),
    "sparse": (sb.Window(16), None),
    "low rank": (sb.Empty(), sb.Quadratic(4)),
}


def encoder() -> nn.TransformerEncoder:
    return randomized(testkit.encoder(E, H)).eval()


def call(is_causal: bool, padded: bool, queries: int = 90, offset: int = 0, exact_queries: int = 0) -> LayerCall:
    q, k, v = testkit.qkv(queries, 90, heads=4, kv_heads=2, head_dim=16, seed=3)
    mask = padding(90, (11, 0)) if padded else None
    return LayerCall("layer", 2 * q, k, v, mask, None, is_causal, 0.4, offset, exact_queries)


def weights(of: LayerCall) -> tuple[Tensor, Tensor]:
    """Softmax weights (B, Hq, N, M) in float64, one query and key at a time in spirit: dense, and which rows count."""
    key = of.key.double().repeat_interleave(2, 1)
    scores = of.scale * of.query.double() @ key.transpose(-1, -2)
    n, m = scores.shape[-2:]
    if of.is_causal:
        scores[..., torch.ones(n, m, dtype=torch.bool).triu(1 + of.query_offset)] = -torch.inf
    rows = torch.ones(2, n, dtype=torch.bool)
    if of.key_padding_mask is not None:
        scores = scores.masked_fill(of.key_padding_mask[:, None, None], -torch.inf)
        rows = ~of.key_padding_mask
    return torch.softmax(scores, -1), rows


def by_group(values: Tensor, rows: Tensor) -> list[float]:
    """Means over rows that count, then over batch rows and the two query heads of a key/value head."""
    of_heads = torch.stack([values[b, :, rows[b]].mean(-1) for b in range(2)]).mean(0)
    return [float(of_heads[2 * g : 2 * g + 2].mean()) for g in range(2)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_figure_is_that_of_the_definition(is_causal: bool, padded: bool) -> None:
    of = call(is_causal, padded)
    pairs = {name: pair for name, pair in PAIRS.items() if not is_causal or name != "window"}
    found = compare_call(of, pairs, of, repeats=1)
    p, rows = weights(of)
    want = by_group(-torch.special.xlogy(p, p).sum(-1), rows)
    assert found.entropy == pytest.approx(want, rel=1e-5)
    seen = (p > 0).sum(-1).clamp(min=1).double().log()
    assert found.uniform_entropy == pytest.approx(sum(by_group(seen, rows)) / 2, rel=1e-5)
    assert found.counted_keys == found.counted_queries == ((79, 90) if padded else (90, 90))
    for name, (support, low_rank) in pairs.items():
        figures = found.figures[name]
        assert figures.note == "" and figures.seconds > 0
        statistics = None
        if low_rank == sb.Quadratic(4):
            statistics = sb.reference.fit_statistics(of.query, of.key, 4, of.key_padding_mask, of.scale)
        arguments = of.masks() | {"statistics": statistics}
        out, lse = sb.reference.attention(of.query, of.key, of.value, support, low_rank, return_lse=True, **arguments)
        target = p @ of.value.double().repeat_interleave(2, 1)
        lost = [(out - target)[b, :, rows[b]].flatten(1).norm(dim=1) for b in range(2)]
        norms = [target[b, :, rows[b]].flatten(1).norm(dim=1) for b in range(2)]
        error = torch.stack([a / b for a, b in zip(lost, norms)]).mean(0).view(2, 2).mean(1)
        assert figures.error == pytest.approx(error.tolist(), rel=1e-3, abs=1e-6)
        listed = torch.zeros_like(p)
        if name != "low rank":
            mask = sb.reference.mask(support, of.query, of.key, low_rank, **arguments)
            listed = torch.where(mask, p, 0.0)
        assert figures.in_lists == pytest.approx(by_group(listed.sum(-1), rows), rel=1e-4, abs=1e-6)
        scores = of.scale * of.query.double() @ of.key.double().repeat_interleave(2, 1).transpose(-1, -2)
        exact_weight = (listed > 0).double() * (scores - lse[..., None]).exp()
        assert figures.low_rank == pytest.approx(by_group(1 - exact_weight.sum(-1), rows), abs=2e-5)


def test_calls_behind_a_prefix_and_first_exact_queries_count_as_they_run() -> None:
    of = call(True, False, queries=30, offset=60)
    p, rows = weights(of)
    found = compare_call(of, {"full": (sb.Full(), None)}, of, 1)
    assert found.entropy == pytest.approx(by_group(-torch.special.xlogy(p, p).sum(-1), rows), rel=1e-5)
    assert found.uniform_entropy == pytest.approx(sum(math.log(n) for n in range(61, 91)) / 30)
    assert max(found.figures["full"].error) < 1e-5 and found.figures["full"].in_lists == pytest.approx([1, 1])
    torch.testing.assert_close(
        exact(of).out.double(), p @ of.value.double().repeat_interleave(2, 1), rtol=1e-3, atol=1e-5
    )
    plain, with_first = (
        compare_call(call(False, False, exact_queries=n), {"w": PAIRS["sparse"]}, of, 1).figures["w"] for n in (0, 90)
    )
    assert max(with_first.error) == 0 and with_first.in_lists == pytest.approx([1, 1]) and min(plain.error) > 0.1


@pytest.mark.parametrize("padded", [False, True])
def test_first_exact_queries_are_timed_as_the_module_computes_them(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = call(False, padded, exact_queries=5)
    run = attention_of(of, PAIRS["sparse"], of)
    module = sb.ScatterbrainAttention(4, 16, 2, *PAIRS["sparse"], exact_queries=5)
    with torch.no_grad():
        want = module(of.query, of.key, of.value, of.key_padding_mask, scale=of.scale, return_lse=True)
        for got in (run.whole(return_lse=True), (run.whole(), want[1])):
            for one, other in zip(got, want):
                torch.testing.assert_close(one, other)
    timed = []
    monkeypatch.setattr(comparison, "medians", lambda some, repeats: timed.append(some) or dict.fromkeys(some, 1.0))
    compare_call(of, {"sparse": PAIRS["sparse"]}, of, 1)
    torch.testing.assert_close(timed[0]["sparse"](), want[0])


def test_batch_rows_without_tokens_count_for_nothing() -> None:
    one, two = call(False, False), call(False, False)
    one = replace(one, query=one.query[:1], key=one.key[:1], value=one.value[:1])
    two = replace(two, key_padding_mask=torch.tensor([[False], [True]]).expand(2, 90))
    want, got = (compare_call(of, {"sparse": PAIRS["sparse"]}, of, 1) for of in (one, two))
    assert got.entropy == pytest.approx(want.entropy, rel=1e-5)
    for figures in ("error", "in_lists", "low_rank"):
        of = getattr(want.figures["sparse"], figures)
        assert getattr(got.figures["sparse"], figures) == pytest.approx(of, rel=1e-5, abs=1e-6)


def test_tokens_that_are_padding_are_not_counted() -> None:
    def shown(lengths: tuple[int, ...], **change: object) -> str:
        mask = torch.arange(90) >= torch.tensor(lengths)[:, None]
        of = replace(call(False, False), key_padding_mask=mask, **change)
        return tokens_of(compare_call(of, {"sparse": PAIRS["sparse"]}, of, 1))

    assert shown((90, 90)) == "90" and shown((30, 30), is_causal=True) == "30 causal"
    assert shown((30, 70)) == "30-70" and shown((0, 70)) == "70"
    assert shown((30, 70), query=torch.randn(2, 4, 20, 16)) == "20 to 30-70"


def test_what_is_no_number_is_shown_as_none(tmp_path: Path) -> None:
    tokens = torch.randn(1, L, E)
    tokens[:, 50] = torch.nan
    comparison = sb.compare(encoder(), tokens, {"sparse": PAIRS["sparse"]}, repeats=1)
    figures = comparison.layers[0].figures["sparse"]
    assert all(math.isnan(value) for value in (*comparison.layers[0].entropy, *figures.error, *figures.in_lists))
    assert "nan" in str(comparison)
    comparison.write_json(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert content["layers"][0]["figures"]["sparse"]["error"] == [None] * H


@pytest.mark.parametrize("shape", [(1, 0, E), (0, L, E)], ids=["tokens", "rows"])
def test_a_batch_of_nothing_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one row and one token, got queries .* in layers.0.self_attn"):
        sb.compare(encoder(), torch.randn(shape), PAIRS)


def test_cross_attention_runs_query_by_query() -> None:
    of = replace(call(False, False, queries=20), is_query_by_query=True)
    found = compare_call(of, {"drop_in": sb.presets.drop_in(), "lsh": sb.presets.paper(16)}, of, 1)
    assert found.figures["drop_in"].note == "" and found.queries == 20 and found.keys == 90
    assert "LSH" in found.figures["lsh"].note


def test_a_model_is_compared_layer_by_layer_and_written(tmp_path: Path) -> None:
    comparison = sb.compare(encoder(), torch.randn(1, L, E), PAIRS, calibration=torch.randn(1, 300, E), repeats=1)
    assert comparison.total == len(comparison.layers) == 2 and comparison.configurations() == list(PAIRS)
    assert comparison.fitted_on == "another batch"
    assert comparison.error("window") < comparison.error("sparse") and comparison.times_faster("window") > 0
    text = str(comparison)
    for word in ("TransformerEncoder", *PAIRS, "entropy", "all ", "share of the softmax weights"):
        assert word in text
    comparison.write_json(tmp_path / "new" / "c.json")
    content = json.loads((tmp_path / "new" / "c.json").read_text())
    assert len(content["layers"][0]["figures"]["window"]["error"]) == H and "torch" in content["facts"]
    pytest.importorskip("matplotlib")
    comparison.draw(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_configurations_may_be_names_and_what_cannot_run_says_why() -> None:
    comparison = sb.compare(encoder(), torch.randn(1, L, E), ["window-16+centroid", "routed-32"], repeats=1)
    assert comparison.configurations() == ["window-16+centroid", "routed-32"]
    assert "flattered" in comparison.fitted_on
    of = call(True, False)
    refused = compare_call(of, {"drop_in": sb.presets.drop_in(), "learned": sb.presets.train()}, of, 1)
    assert "bidirectional" in refused.figures["drop_in"].note or "causal" in refused.figures["drop_in"].note
    assert refused.figures["learned"].note and refused.figures["learned"].seconds is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("window-16", "configurations must be pairs"),
        ([], "configurations must be pairs"),
        ({"a": sb.Window(8)}, r"configurations\['a'\] must be a pair"),
        ({"a": (sb.Window(8), 9)}, "low_rank must be"),
        (["windw-16"], "unknown method 'windw-16'"),
        (["sdpa"], "got the baseline 'sdpa'"),
    ],
)
def test_wrong_configurations_are_named_before_the_model_runs(wrong: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        sb.compare(encoder(), lambda model: pytest.fail("it ran"), wrong)


def test_samples_of_short_calls_are_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a call alone between two events is timed with the gaps before it."""

    class FakeClock:
        name = "a clock"
        now = 0.0

        def seconds(self, calls: list) -> float:
            before, counted = FakeClock.now, [call() for call in calls]
            samples.append(len(counted))
            return FakeClock.now - before + 1e-5  # what starting and stopping costs

    def taking(seconds: float) -> object:
        def call() -> Tensor:
            FakeClock.now += seconds
            return torch.zeros(1)

        return call

    samples: list[int] = []
    monkeypatch.setattr("scatterbrain.bench.clock.clock_of", lambda *_: FakeClock())
    found = comparison.medians({"short": taking(5e-5), "long": taking(0.02)}, 3)
    assert sorted(samples) == [1] * 5 + [83] * 3
    assert found == pytest.approx({"short": 5e-5, "long": 0.02}, rel=1e-2)


def test_the_defaults_fit_narrow_heads() -> None:
    q, k, v = testkit.qkv(90, 90, heads=4, kv_heads=2, head_dim=6, seed=3)
    for is_causal in (False, True):
        narrow = LayerCall("layer", q, k, v, None, None, is_causal, 0.4, 0)
        found = compare_call(narrow, comparison.defaults(narrow), narrow, 1)
        assert [figures.note for figures in found.figures.values()] == [""] * len(found.figures)
    wide = replace(narrow, **{name: torch.zeros(1, 2, 8, 32) for name in ("query", "key", "value")})
    assert comparison.defaults(wide) == comparison.CAUSAL


@pytest.mark.parametrize("repeats", [0, 1.5, True])
def test_repeats_are_a_count(repeats: object) -> None:
    with pytest.raises(ValueError, match="repeats must be an int of at least 1"):
        sb.compare(encoder(), torch.randn(1, L, E), repeats=repeats)


def test_labels_are_what_tells_layers_apart() -> None:
    assert short_labels(["encoder.layer.0.attention.self", "encoder.layer.11.attention.self"]) == ["0", "11"]
    assert short_labels(["model.encoder.layers.0.attn", "model.decoder.layers.0.attn"]) == ["encoder", "decoder"]
    assert short_labels(["attn"]) == ["attn"] and short_labels(["a.b", "a.b"]) == ["a.b call 1", "a.b call 2"]
    assert spread([0.5, 0.5], ".1f") == "0.5" and spread([0.0, 1.0], ".1f") == "0.5 [0.0 1.0]"


def test_containers_with_attributes_of_their_own_are_passed_as_they_are() -> None:
    class Named(dict):
        def __init__(self, **items: object) -> None:
            super().__init__(**items)
            self.__dict__ = self

    class Box(tuple):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()

        def forward(self, named: Named, box: Box) -> Tensor:
            named.hidden = named.x * box.factor
            return self.encoder(named["hidden"])

    box = Box(([1], torch.ones(1)))
    box.factor = 2
    batch = {"named": Named(x=torch.randn(1, L, E)), "box": box}
    assert sb.compare(Model().eval(), batch, {"window": (sb.Window(16), None)}, repeats=1).layers[0].keys == L


def test_a_cache_for_whose_copy_there_is_no_memory_is_not_shared() -> None:
    class Cache:
        def __deepcopy__(self, memo: dict) -> None:
            raise torch.OutOfMemoryError("no memory")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()

        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            return self.encoder(x)

    with pytest.raises(torch.OutOfMemoryError):
        sb.compare(Model().eval(), (torch.randn(1, L, E), Cache()), {"window": (sb.Window(16), None)}, repeats=1)


def test_objects_that_hold_what_is_not_copied_reach_the_model() -> None:
    """The model's modules, tensors with a history of gradients, and what nothing can copy."""

    class Held:
        def __init__(self, **parts: object) -> None:
            self.__dict__ |= parts

    class Uncopied(Held):
        def __deepcopy__(self, memo: dict) -> None:
            raise AssertionError("no copies")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.first = encoder(), nn.Linear(E, E)

        def forward(self, held: Held, uncopied: Uncopied) -> Tensor:
            assert uncopied is self.uncopied and not held.of_module[self.first].requires_grad
            assert held.weight is self.first.weight and held.of_module is not self.held.of_module
            assert held.view.untyped_storage().data_ptr() == held.of_module[self.first].untyped_storage().data_ptr()
            return self.encoder(held.of_module[self.first])

    model = Model().eval()
    x = model.first(torch.randn(1, L, E))
    model.held = Held(of_module={model.first: x}, weight=model.first.weight, view=x[:, 0])
    model.uncopied = Uncopied()
    compared = sb.compare(model, (model.held, model.uncopied), {"window": (sb.Window(16), None)}, repeats=1)
    assert compared.layers[0].keys == L and x.requires_grad
