"""sb.tune: the bound holds, looser bounds cost no more, the same inputs give the same settings."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import testkit
import torch
from testkit import randomized
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import scatterbrain as sb
from scatterbrain import prepared
from scatterbrain.analysis import calls_of, output_files, times, trade, tuning
from scatterbrain.analysis.tuning import Tuning

E, H, L = 64, 4, 120
EXACT = tuning.EXACT
# From the slowest and most accurate on.
CANDIDATES = [(sb.Routed(48, block_q=16), sb.Centroid(32)), (sb.Window(16), sb.Centroid(8)), (sb.Window(16), None)]


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return randomized(testkit.encoder(E, H)).eval()


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, L, E, generator=generator) for _ in range(count)]


@pytest.fixture(autouse=True)
def _times_as_on_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact attention is the fastest of all on these few tokens."""
    known = {str(pair): 1.0 - 0.2 * i for i, pair in enumerate(CANDIDATES, 1)}

    def seconds(name: str) -> float:
        keys = [int(number) for number in re.findall(r"\d+", name.split("block_q")[0])]
        return known.get(name, 0.1 + 0.8 * sum(keys) / len(keys) / 128 if keys and "Routed" in name else 0.9)

    monkeypatch.setattr(
        tuning, "medians", lambda timed, repeats: {name: seconds(name) for name in timed} | {str(EXACT): 1.0}
    )


@pytest.fixture
def tuned(tmp_path: Path) -> Callable[..., Tuning]:
    def tune(**arguments: object) -> Tuning:
        arguments = {"candidates": CANDIDATES, "times": tmp_path / "times.json"} | arguments
        return sb.tune(encoder(), batches(), **arguments)

    return tune


def error_with(model: nn.Module, settings: object, some: list[Tensor]) -> float:
    """Of the model's output with the settings, by replace_attention."""
    with torch.no_grad():
        exact = [model(x) for x in some]
        report = sb.replace_attention(model, layers=settings)
        out = [model(x) for x in some]
    report.restore()
    return sum(float((a - b).norm() / b.norm()) for a, b in zip(out, exact)) / len(some)


BOUNDS = (1e-9, 0.01, 0.03, 0.1, 0.3, 1.0)


def test_the_bound_holds_in_the_model_that_takes_the_settings(tuned: Callable[..., Tuning], tmp_path: Path) -> None:
    found = next(t for t in (tuned(max_error=bound) for bound in BOUNDS) if 0 < t.chosen.error)
    bound = float(found.bound.split()[-1])
    assert found.chosen.error <= bound and found.chosen.seconds < found.exact_seconds
    model = encoder()
    assert error_with(model, found.settings, batches()[2:]) == pytest.approx(found.chosen.held_out, rel=1e-3)
    assert error_with(model, found.settings, batches()[:2]) <= bound * 1.001
    found.save(tmp_path / "new" / "tuned.yaml")
    assert error_with(model, tmp_path / "new" / "tuned.yaml", batches()[2:]) == pytest.approx(
        found.chosen.held_out, rel=1e-3
    )


def test_a_looser_bound_never_costs_more(tuned: Callable[..., Tuning]) -> None:
    chosen = [tuned(max_error=bound).chosen for bound in BOUNDS]
    assert all(a.seconds >= b.seconds for a, b in zip(chosen, chosen[1:])) and len({c.seconds for c in chosen}) > 2
    assert all(step.error <= bound for step, bound in zip(chosen, BOUNDS)) and chosen[0].error == 0
    kept = [tuned(budget=share) for share in (0.5, 0.7, 0.9)]
    assert all(t.chosen.seconds <= share * t.exact_seconds for t, share in zip(kept, (0.5, 0.7, 0.9)))


def test_a_single_pair_is_chosen_where_it_is_faster(
    tuned: Callable[..., Tuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions of combinations err: here they promise nothing."""
    best = tuned(max_error=0.3).uniform
    slow = {f"layers.{i}.self_attn": CANDIDATES[0] for i in (0, 1)}
    monkeypatch.setattr(tuning._Search, "combinations", lambda self: [(slow, 0.0)])
    found = tuned(max_error=0.3)
    assert found.chosen == found.uniform == best and best.seconds < 1.6 and best in found.steps
    assert found.settings.about["error"] == float(f"{best.error:.3g}") and "it was chosen" in str(found)
    assert [step.seconds for step in found.steps] == sorted((step.seconds for step in found.steps), reverse=True)
    chosen = [tuned(max_error=bound).chosen for bound in BOUNDS]
    assert all(a.seconds >= b.seconds and b.error <= bound for a, b, bound in zip(chosen, chosen[1:], BOUNDS[1:]))
    found = tuned(budget=0.8)
    assert found.chosen.seconds <= 1.6 and found.chosen.error <= tuned(max_error=10).steps[1].error


def test_the_same_inputs_give_the_same_file(tuned: Callable[..., Tuning], tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.yaml" for i in range(2)]
    for file in files:
        tuned(max_error=0.2).save(file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert all(second > 0 for second in json.loads((tmp_path / "times.json").read_text()).values())


def test_a_budget_is_kept_and_both_are_refused(tuned: Callable[..., Tuning]) -> None:
    for share in (0.3, 0.7):
        found = tuned(budget=share)
        fastest = min(step.seconds for step in tuned(budget=1e-9).steps)
        assert found.chosen.seconds <= max(share * found.exact_seconds, fastest)
        assert ("nothing is" in str(found)) == (fastest > share * found.exact_seconds)
    unmet = tuned(budget=1e-9)
    share = f"{unmet.chosen.seconds / unmet.exact_seconds:.3g}"
    said = f"at most 1e-09 of exact attention's time; nothing is, the fastest takes {share} of it"
    assert said in str(unmet) and unmet.settings.about["bound"] == said
    for arguments in ({}, {"max_error": 0.1, "budget": 0.5}):
        with pytest.raises(ValueError, match="give either max_error or budget"):
            tuned(**arguments)


def test_what_is_printed_and_drawn(tuned: Callable[..., Tuning], tmp_path: Path) -> None:
    found = tuned(max_error=1.0)
    text = str(found)
    for word in ("TransformerEncoder", "error at most 1", "exact", "layer by layer", "one pair for all", "held-out"):
        assert word in text
    assert found.uniform is not None and found.uniform.error <= 1.0
    pytest.importorskip("matplotlib")
    found.draw(tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_layers_stay_exact_where_nothing_else_keeps_the_bound(tuned: Callable[..., Tuning]) -> None:
    found = tuned(max_error=1e-12)
    assert set(found.settings.values()) == {EXACT} and found.chosen.error == 0
    assert "exact" in str(found)


def test_causal_models_get_causal_pairs(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    model = hf.LlamaModel(hf.LlamaConfig(**sizes, num_key_value_heads=2)).eval()
    words = torch.randint(1, 60, (3, 1, 150), generator=torch.Generator().manual_seed(1))
    found = sb.tune(model, [{"input_ids": w} for w in words], max_error=1.0, times=tmp_path / "times.json")
    assert any(not pair[0].is_full for pair in found.settings.values())
    assert all(pair[1] is None or pair[1].is_calibrated_from_data for pair in found.settings.values())


def test_layers_that_no_candidate_runs_in_say_why(tuned: Callable[..., Tuning]) -> None:
    found = tuned(budget=0.5, candidates=[(sb.Window(16), sb.Quadratic(99))])
    assert set(found.settings.values()) == {EXACT} and list(found.left) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert "no candidate runs there: " in str(found) and "99" in str(found)
    assert tuned(budget=0.5, candidates=[*CANDIDATES, (sb.Window(16), sb.Quadratic(99))]).left == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_error": 0}, "max_error must be a positive number, got 0"),
        ({"budget": True}, "budget must be a positive number, got True"),
        ({"max_error": 0.1, "output": lambda out: 5}, "output must return a tensor"),
    ],
)
def test_wrong_arguments_are_named(tuned: Callable[..., Tuning], arguments: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tuned(**arguments)


def test_too_few_batches_and_a_file_that_is_none(tmp_path: Path) -> None:
    for wrong, got in ((batches(1), "a list of 1"), (batches(1)[0], "Tensor"), ("text", "str")):
        with pytest.raises(ValueError, match=f"batches must be a list of two or more.*, got {got}"):
            sb.tune(encoder(), wrong, max_error=0.1)
    (tmp_path / "times.json").write_text("nothing")
    with pytest.raises(ValueError, match="is not a file of times"):
        sb.tune(encoder(), batches(), max_error=0.1, times=tmp_path / "times.json")


@pytest.mark.parametrize(
    "candidates, message",
    [
        ([sb.Window(8)], "candidates: expected pairs .support, low-rank kernel., got Window"),
        (sb.Window(8), "candidates must be a list of pairs.*got Window"),
        ([], "candidates must be a list of pairs"),
        ([(sb.Window(8), 3)], "low_rank"),
    ],
    ids=["no pair", "no list", "none", "no kernel"],
)
def test_candidates_that_are_no_pairs_are_refused_before_the_model_runs(candidates: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sb.tune(nn.Identity(), batches(), max_error=0.1, candidates=candidates)


def test_a_folder_for_times_is_refused_and_one_number_a_row_is_an_output(tuned: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="times must be a JSON file, got the folder"):
        tuned(max_error=0.1, times=tmp_path)
    assert tuned(max_error=1e-9, output=lambda returned: returned.mean((1, 2))).chosen.error == 0


def test_heads_that_err_more_get_more_keys() -> None:
    few, more, most = ((sb.Routed(keys), sb.Centroid(8)) for keys in (16, 32, 64))
    other = sb.Routed(64, pools=2), sb.Centroid(8)
    seconds = {EXACT: 100.0, few: 10.0, more: 20.0, most: 40.0, other: 45.0}
    squares = {EXACT: [0, 0, 0], few: [9, 1, 4], more: [3, 0.9, 1], most: [0.1, 0.8, 0.9], other: [9, 9, 9]}
    found = trade.by_head(seconds, {pair: torch.tensor(s, dtype=torch.float64) for pair, s in squares.items()})
    assert (sb.Routed((64, 16, 32)), sb.Centroid(8)) in found
    for support, low_rank in found:
        assert low_rank == sb.Centroid(8) and support.keys[0] >= support.keys[2] >= support.keys[1] == 16
    alike = {pair: torch.tensor([s[0]] * 3, dtype=torch.float64) for pair, s in squares.items()}
    assert trade.by_head(seconds, alike) == []


def test_a_layer_whose_heads_differ_is_tuned_head_by_head(tmp_path: Path) -> None:
    """One head sees far, three are nearly constant."""
    model = encoder()
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.in_proj_weight[:E] *= torch.tensor([6.0, 0.2, 0.2, 0.2]).repeat_interleave(E // H)[:, None]
    candidates = [(sb.Routed(keys), sb.Centroid(8)) for keys in (16, 32, 64)]
    chosen = sb.tune(model, batches(), budget=0.28, candidates=candidates, times=tmp_path / "times.json")
    of_heads = [support.keys for support, _ in chosen.chosen.pairs.values() if isinstance(support.keys, tuple)]
    assert of_heads and all(keys[0] == max(keys) > min(keys[1:]) for keys in of_heads)
    assert "by head, mean" in str(chosen)
    chosen.save(tmp_path / "tuned.yaml")
    assert dict(sb.LayerSettings.load(tmp_path / "tuned.yaml")) == chosen.chosen.pairs
    assert error_with(model, tmp_path / "tuned.yaml", batches()[2:]) == pytest.approx(chosen.chosen.held_out, rel=1e-3)


def test_padding_does_not_dilute_the_error(tmp_path: Path) -> None:
    """A row errs as much with padding behind it as without."""

    def tuned(some: list[object]) -> Tuning:
        candidates = [(sb.Window(16), sb.Centroid(8))]
        return sb.tune(encoder(), some, budget=0.5, candidates=candidates, times=tmp_path / "times.json")

    plain = [{"src": x} for x in batches(2)]
    more = torch.randn(1, 4 * L, E, generator=torch.Generator().manual_seed(7))
    mask = (torch.arange(5 * L) >= L)[None]
    padded = [{"src": torch.cat([x, more], 1), "src_key_padding_mask": mask} for x in batches(2)]
    want, got = tuned(plain).chosen, tuned(padded).chosen
    assert got.pairs == want.pairs and want.error > 0.01
    assert got.error == pytest.approx(want.error, rel=1e-3) and got.held_out == pytest.approx(want.held_out, rel=1e-3)


def test_a_layer_that_runs_several_times_costs_as_often(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = encoder().layers

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(self.one(self.one(x)[:, : L // 2])))

    arguments = dict(budget=0.5, candidates=CANDIDATES[1:], times=tmp_path / "times.json")
    found = sb.tune(Shared().eval(), batches(2), **arguments)
    assert found.exact_seconds == 4.0  # by the times above every exact call takes one second
    seconds = {CANDIDATES[1]: 0.6, CANDIDATES[2]: 0.4, EXACT: 1.0}
    calls = {"one.self_attn": 3, "other.self_attn": 1}
    want = sum(calls[path] * seconds[pair] for path, pair in found.chosen.pairs.items())
    assert found.chosen.seconds == pytest.approx(want) and want < 4


def test_exact_attention_is_timed_beside_every_few_candidates(tmp_path: Path) -> None:
    """Fewer at a time than calls are kept prepared; a machine that gets slower is slower for both."""
    groups = []

    def slower_every_time(timed: dict[str, object], repeats: int) -> dict[str, float]:
        groups.append(list(timed))
        return {name: len(groups) * (2.0 if name == str(EXACT) else 1.0) for name in timed}

    (call, *_) = calls_of(encoder(), batches(1)[0])
    pairs = [(sb.Window(16 + i), None) for i in range(88)]
    found = times.Times(tmp_path / "times.json", slower_every_time).of(call, dict.fromkeys(pairs, lambda: None))
    assert all(str(EXACT) in group and len(group) < prepared._MOST - 8 for group in groups) and len(groups) > 1
    assert found == dict.fromkeys(pairs, 1.0) | {EXACT: 2.0}
    assert times.Times(tmp_path / "times.json", lambda *_: pytest.fail("again")).of(call, dict.fromkeys(pairs)) == found


def test_of_a_step_of_time_the_faster_combination_comes_first() -> None:
    some = [(0.203, 1.0, ("a",)), (0.201, 1.1, ("b",)), (0.1, 2.0, ("c",))]
    assert trade.best_of_every_step(some, 0.01) == [some[2], some[1], some[0]]


def test_the_front_and_the_hull_keep_what_nothing_beats() -> None:
    names = [EXACT, *((sb.Window(keys), None) for keys in (1, 2, 3, 4))]
    seconds = dict(zip(names, (10.0, 8.0, 4.0, 3.0, 5.0)))
    errors = dict(zip(names, (0.0, 0.29, 0.3, 0.5, 0.4)))
    assert trade.front(seconds, errors) == [names[0], names[1], names[2], names[3]]
    assert trade.hull(seconds, errors) == [names[0], names[2], names[3]]


@pytest.mark.parametrize("how", ["whole", "a layer", "in place"])
def test_what_was_compiled_runs_as_it_did(how: str, tmp_path: Path) -> None:
    """Layers' forwards change with every run, which would soon reach the compiler's limit."""
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, examples: object) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain, model, x = encoder(), encoder(), batches()[0]
    if how == "whole":
        model = torch.compile(model, backend=backend)
    elif how == "a layer":
        model.layers[0] = torch.compile(model.layers[0], backend=backend)
    else:
        model.compile(backend=backend)
    with torch.no_grad():
        want = model(x)
        before = len(compiled)
        compared = sb.compare(model, x, {"window": (sb.Window(16), None)}, repeats=1)
        found = sb.tune(model, batches(), max_error=0.3, candidates=CANDIDATES, times=tmp_path / "times.json")
        assert len(compiled) == before > 0
        assert torch.equal(model(x), want) and len(compiled) == before
    assert compared.model == found.model == "TransformerEncoder" and found.left == compared.left == {}
    assert (
        list(found.chosen.pairs)
        == [layer.path for layer in compared.layers]
        == [f"layers.{i}.self_attn" for i in (0, 1)]
    )
    assert len(sb.replace_attention(plain, layers=found.settings).replaced) == len(
        sb.replace_attention(model, layers=found.settings).replaced
    )


class Dropping(nn.Module):
    """An encoder that sees a random half of the tokens, also in evaluation mode, as ViTMAE does."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.encoder, self.generator = encoder(), generator

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x[:, torch.randperm(x.shape[1], generator=self.generator)[: L // 2]])


WIDE = [(sb.Window(4 * L), None)]  # exact, and faster by the times above


def test_what_a_model_draws_is_the_same_in_every_run(tmp_path: Path) -> None:
    arguments = dict(max_error=1e-4, candidates=WIDE, times=tmp_path / "times.json")
    model, state = Dropping().eval(), torch.get_rng_state()
    found = sb.tune(model, batches(), **arguments)
    assert set(found.chosen.pairs.values()) == set(WIDE) and found.chosen.error < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"returns the same when it runs on a batch again, .* differ by \d.*generator"):
        sb.tune(Dropping(torch.Generator()).eval(), batches(), **arguments)


def llama() -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2)).eval()


def test_every_run_gets_its_own_copy_of_a_cache(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    model = llama()
    some = [
        {"input_ids": torch.randint(1, 60, (1, 50)), "past_key_values": hf.DynamicCache(config=model.config)}
        for _ in range(2)
    ]
    with torch.no_grad():
        for batch in some:
            model(**batch)
    found = sb.tune(model, some, max_error=1e-4, candidates=WIDE, times=tmp_path / "times.json")
    assert set(found.chosen.pairs.values()) == set(WIDE) and found.chosen.error < 1e-5
    compared = sb.compare(model, some[0], {"wide": WIDE[0]}, calibration=some[1], repeats=1)
    assert [layer.keys for layer in compared.layers] == [100, 100]
    assert [batch["past_key_values"].get_seq_length() for batch in some] == [50, 50]
    model(**some[0])  # with gradients: what is copied has a history then
    compared = sb.compare(model, some[0], {"wide": WIDE[0]}, repeats=1)
    assert [layer.keys for layer in compared.layers] == [150, 150] and some[0][
        "past_key_values"
    ].get_seq_length() == 100


class Counting(dict):
    pass


class Listing(list):
    pass


@pytest.mark.parametrize(
    "make", [OrderedDict, lambda: defaultdict(list), Counting, UserDict, Listing], ids=lambda make: make.__name__
)
def test_containers_of_every_kind_are_as_before_in_every_run(make: Callable[[], Any], tmp_path: Path) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()

        def forward(self, x: Tensor, kept: Any, inner: Any) -> Tensor:
            assert type(kept) is type(inner[0]) and kept is inner[0] and len(kept) == 0
            kept.append(x) if isinstance(kept, list) else kept.update(x=x)
            return self.encoder(x)

    some = [(x, kept, [kept]) for x, kept in ((x, make()) for x in batches())]
    sb.tune(Keeping().eval(), some, max_error=1.0, candidates=CANDIDATES, times=tmp_path / "times.json")
    assert not any(kept for _, kept, _ in some)


def test_outputs_are_kept_in_the_models_type_and_compared_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = times.Times(tmp_path / "times.json", tuning.medians)
    some = [torch.randint(1, 60, (1, 50)) for _ in range(2)]
    search = tuning._Search(llama().bfloat16(), some[:1], some[1:], tuning.output_of, WIDE, known, print)
    assert {out.dtype for out in search.exact.values()} == {torch.bfloat16}
    out, target = (testkit.rand(2, 7, 12, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    padded = torch.arange(7)[None, :, None] >= torch.tensor([7, 3])[:, None, None]
    want = []
    for row, count in ((0, 7), (1, 3)):
        a, b = (t[row, :count].double() for t in (out, target))
        want.append(float((a - b).norm() / b.norm()))
    for part in (1, 30, 1000):
        monkeypatch.setattr(tuning, "PART", part)
        assert tuning._row_errors(out, target, padded) == pytest.approx(want, rel=1e-12)
    assert tuning._row_errors(out[0, 0], target[0, 0])[3] == pytest.approx(
        float((out[0, 0, 3].double() - target[0, 0, 3].double()).abs() / target[0, 0, 3].double().abs())
    )
    with pytest.raises(ValueError, match=r"outputs of one shape .* got \(1, 7, 12\) and \(2, 7, 12\); give output="):
        tuning._row_errors(out[:1], target)


def test_many_short_rows_are_compared_at_once() -> None:
    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal count
            count += 1
            return operator(*args, **(kwargs or {}))

    counts = []
    for rows in (2, 5000):
        count, out, target = 0, testkit.rand(rows, 6), testkit.rand(rows, 6, seed=1)
        with Counted():
            errors = tuning._row_errors(out, target)
            tuning._check_numbers(out, None)
        counts.append(count)
        want = (out.double() - target.double()).norm(dim=1) / target.double().norm(dim=1)
        torch.testing.assert_close(torch.tensor(errors, dtype=torch.float64), want)
    assert counts[0] == counts[1]


class Filling(nn.Module):
    """An encoder whose output has a filled-in part, as logits of words that cannot be."""

    def __init__(self, fill: float, dtype: torch.dtype = torch.float32, begin: int = 3 * E // 4) -> None:
        super().__init__()
        self.encoder, self.fill, self.dtype, self.begin = encoder(), fill, dtype, begin

    def forward(self, x: Tensor) -> Tensor:
        out = self.encoder(x).to(self.dtype)
        out[..., self.begin :] = self.fill
        return out


@pytest.mark.parametrize("fill", [-torch.inf, *(torch.finfo(t).min for t in (torch.float32, torch.float16))])
def test_filled_in_values_do_not_count(fill: float, tmp_path: Path) -> None:
    def tuned(model: nn.Module, some: list[object]) -> Tuning:
        candidates = [(sb.Window(16), None)]
        return sb.tune(model.eval(), some, budget=0.95, candidates=candidates, times=tmp_path / "times.json")

    want = tuned(Filling(0.0), batches()).chosen
    assert want.error > 0.01
    for dtype in (torch.float32, torch.float64):
        got = tuned(Filling(fill, dtype), batches()).chosen
        assert got.pairs == want.pairs and got.error == pytest.approx(want.error, rel=1e-5)
    with pytest.raises(ValueError, match="numbers that count, got padding and filled-in values alone .*give output="):
        tuned(Filling(fill, begin=0), batches())


def test_filled_in_values_are_seen_beside_padding_that_is_no_number() -> None:
    out, target = (testkit.rand(2, 7, 12, seed=seed) for seed in (0, 1))
    padded = torch.arange(7)[None, :, None] >= torch.tensor([7, 3])[:, None, None]
    want = tuning._row_errors(out[..., 1:], target[..., 1:], padded)
    for t in (out, target):
        t[..., 0] = -torch.inf
        t.masked_fill_(padded, torch.nan)
    assert tuning._row_errors(out, target, padded) == pytest.approx(want, rel=1e-12)
    tuning._check_numbers(target, padded)


@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_an_output_that_is_no_number_is_refused(fill: float, tuned: Callable[..., Tuning]) -> None:
    with pytest.raises(
        ValueError, match="outputs that are numbers with exact attention, got NaN or infinity; .*output="
    ):
        tuned(max_error=0.1, output=lambda out: out.index_fill(2, torch.tensor([3]), fill))


def test_two_that_measure_at_once_keep_each_others_times(tmp_path: Path) -> None:
    file, (call, *_) = tmp_path / "times.json", calls_of(encoder(), batches(1)[0])
    (other, *_) = calls_of(encoder(), batches(1)[0][:, :50])
    a, b, c = ((sb.Window(16 + i), None) for i in range(3))

    def opened(speed: float) -> times.Times:
        seconds = {str(EXACT): 2.0, str(a): 1.0, str(b): 0.5, str(c): 0.25}
        return times.Times(file, lambda timed, repeats: {name: speed * seconds[name] for name in timed})

    one, two, three = opened(1.0), opened(1.0), opened(3.0)
    one.of(call, {a: None})
    two.of(other, {a: None})
    assert len(json.loads(file.read_text())) == 4
    # A machine that was slower for a while is slower for exact attention too.
    assert three.of(call, {b: None}) == {EXACT: 2.0, b: 0.5} and three.of(call, {a: None, c: None})[c] == 0.25
    assert opened(1.0).of(call, dict.fromkeys((a, b, c))) == {EXACT: 2.0, a: 1.0, b: 0.5, c: 0.25}
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]


def test_threads_that_measure_at_once_keep_each_others_times(tmp_path: Path) -> None:
    (call, *_) = calls_of(encoder(), batches(1)[0])
    pairs = [(sb.Window(16 + i), None) for i in range(24)]
    some = [times.Times(tmp_path / "t.json", lambda timed, repeats: dict.fromkeys(timed, 1.0)) for _ in pairs]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda known, pair: known.of(call, {pair: None}), some, pairs))
    assert len(json.loads((tmp_path / "t.json").read_text())) == 25


def test_times_that_cannot_be_written_are_refused_before_the_model_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"got .*t.json: .*file is no folder; give another one .*--times\)"):
        sb.tune(nn.Identity(), batches(), max_error=0.1, times=tmp_path / "file" / "t.json")
    with pytest.raises(ValueError, match=r"File name too long; give another one .*--times\)"):
        sb.tune(nn.Identity(), batches(), max_error=0.1, times=tmp_path / ("t" * 300))


def test_times_that_turn_out_not_to_be_written_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (call, *_) = calls_of(encoder(), batches(1)[0])
    known = times.Times(tmp_path / "t.json", lambda timed, repeats: dict.fromkeys(timed, 1.0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(times.os, "replace", full)
    with pytest.raises(ValueError, match=r"got .*t.json: No space left on device; give another one"):
        known.of(call, {(sb.Window(16), None): None})


@pytest.mark.parametrize("what", ["file", "folder"])
def test_times_that_may_not_be_written_serve_where_they_know_all(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are refused before anything is measured where they do not: the file is replaced, from its folder."""
    file, (call, *_) = tmp_path / "t.json", calls_of(encoder(), batches(1)[0])
    a, b = ((sb.Window(16 + i), None) for i in range(2))
    times.Times(file, lambda timed, repeats: dict.fromkeys(timed, 1.0)).of(call, {a: None})
    before = file.read_text()
    locked = file if what == "file" else tmp_path
    monkeypatch.setattr(output_files.os, "access", lambda path, mode: Path(path) != locked or not mode & os.W_OK)
    known = times.Times(file, lambda timed, repeats: pytest.fail("measured"))
    assert known.of(call, {a: None}) == {EXACT: 1.0, a: 1.0}
    with pytest.raises(ValueError, match=r"can be written, got .*t.json: .*may not be written to; give another one"):
        known.of(call, {a: None, b: None})
    assert file.read_text() == before
    with (
        pytest.raises(ValueError, match=r"folder .* may not be written to; give another")
        if what == "folder"
        else (nullcontext())
    ):
        times.Times(tmp_path / "new.json", known.measure)


def test_times_are_written_whatever_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``flock FOLDER scatterbrain tune``, or where a process that holds the lock has stopped."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(times, "PATIENCE", 0.2)
    file, (call, *_) = tmp_path / "t.json", calls_of(encoder(), batches(1)[0])
    for i, path in enumerate((tmp_path, tmp_path / "t.json.lock")):
        (tmp_path / "t.json.lock").touch()  # left by a process that was killed
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = times.Times(file, lambda timed, repeats: dict.fromkeys(timed, 1.0))
        writing = Thread(target=known.of, args=(call, {(sb.Window(16 + i), None): None}), daemon=True)
        writing.start()
        writing.join(10)
        is_written = not writing.is_alive()
        os.close(lock)
        assert is_written and len(json.loads(file.read_text())) == 2 + i
        assert (tmp_path / "t.json.lock").exists() == (path != tmp_path)
