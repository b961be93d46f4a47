"""Features of transformers' models that this library's attention lacks: exact attention with a warning, or refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")
import hf_models as hf
import transformers
from testkit import cores

import scatterbrain as sb
from scatterbrain.integrations.transformers import SETTINGS, register, set_attention_dropout

INPUT = register("scatterbrain:limits", sb.Window(16, block_q=8), sb.Quadratic(5, "input"))
LEARNED = register("scatterbrain:limits-learned", sb.Window(16, block_q=8), sb.Quadratic(5, "learned"))
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": hf.WORDS}

# -------------------- families

OWN_ATTENTION = {
    "bloom": (transformers.BloomModel, transformers.BloomConfig(n_layer=1, n_head=4, hidden_size=64, vocab_size=9)),
    "deberta-v2": (transformers.DebertaV2Model, transformers.DebertaV2Config(**SMALL, intermediate_size=64)),
    "gpt_neo": (
        transformers.GPTNeoModel,
        transformers.GPTNeoConfig(
            hidden_size=64, num_layers=1, num_heads=4, vocab_size=9, attention_types=[[["global"], 1]]
        ),
    ),
    "falcon": (transformers.FalconModel, transformers.FalconConfig(**SMALL)),
    "roformer": (transformers.RoFormerModel, transformers.RoFormerConfig(**SMALL, intermediate_size=64)),
    "mpt": (transformers.MptModel, transformers.MptConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=9)),
    "longformer": (
        transformers.LongformerModel,
        transformers.LongformerConfig(**SMALL, intermediate_size=64, attention_window=[8]),
    ),
}


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_families_that_would_ignore_the_choice_are_refused_by_name(family: str):
    cls, config = OWN_ATTENTION[family]
    message = rf"{cls.__name__} \({family}\) computes attention in its own code"
    chosen = copy.deepcopy(config)
    chosen._attn_implementation = "scatterbrain"
    with pytest.raises(ValueError, match=message):
        cls(chosen)
    with pytest.raises(ValueError, match=message):
        cls(copy.deepcopy(config)).set_attn_implementation("scatterbrain")


def test_replace_attention_says_so_too():
    cls, config = OWN_ATTENTION["bloom"]
    with pytest.warns(UserWarning, match="changed nothing"):
        report = sb.replace_attention(cls(copy.deepcopy(config)))
    assert [entry.note for entry in report.entries] == [
        "bloom computes attention in its own code, without transformers' AttentionInterface"
    ]


# -------------------- arguments of a layer

T5 = transformers.T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=hf.WORDS)
GEMMA2 = transformers.Gemma2Config(
    **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=16, attn_logit_softcapping=20.0, sliding_window=4096
)
GPT_OSS = transformers.GptOssConfig(
    **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=16, num_local_experts=2, sliding_window=4096
)
REFUSED = {
    "T5": (transformers.T5EncoderModel, T5, r"T5Attention adds a bias to the scores \(position_bias\)"),
    "Gemma2": (transformers.Gemma2Model, GEMMA2, r"Gemma2Attention caps the scores \(softcap\)"),
    "GPT-OSS": (transformers.GptOssModel, GPT_OSS, r"GptOssAttention adds attention sinks \(s_aux\)"),
}


@pytest.mark.parametrize("implementation", ["scatterbrain:full", INPUT])
@pytest.mark.parametrize("family", REFUSED)
def test_scores_that_are_more_than_products_are_refused(family: str, implementation: str):
    cls, config, message = REFUSED[family]
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    with pytest.raises(ValueError, match=message):
        cls(config).eval()(input_ids=hf.tokens(20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_mask": torch.ones(4)}, r"masks heads \(head_mask\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 10, 20])}, "sequences packed into one row"),
    ],
    ids=["head mask", "packed"],
)
def test_arguments_of_a_call_are_refused(arguments: dict, message: str):
    model = hf.FAMILIES["bert"].build(INPUT)
    with pytest.raises(ValueError, match=message):
        model(input_ids=hf.tokens(20), **arguments)


EXACT = {
    "sliding window": ("mistral with a window", LEARNED, {}, "has a sliding window, 24 tokens wide"),
    "bool mask": (
        "llama",
        LEARNED,
        {"attention_mask": torch.ones(2, 1, 100, 100, dtype=torch.bool).tril().triu(-60)},
        "its mask differs from query to query",
    ),
    "float mask": ("bert", INPUT, {"attention_mask": torch.zeros(2, 1, 100, 100)}, "its mask is added to the scores"),
    "packed": (
        "llama",
        LEARNED,
        {"position_ids": torch.arange(100)[None].expand(2, -1) % 50, "use_cache": False},
        "packed sequences",
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_masks_that_no_support_has_run_exactly_and_say_so(case: str):
    name, implementation, arguments, message = EXACT[case]
    with pytest.warns(UserWarning, match=f"runs exact attention, without approximation: .*{message}"):
        mine = hf.run(hf.FAMILIES[name].build(implementation), input_ids=hf.tokens(), **arguments)
    exact = hf.run(hf.FAMILIES[name].build("sdpa"), input_ids=hf.tokens(), **arguments)
    torch.testing.assert_close(mine, exact, rtol=2e-5, atol=2e-5)


def test_a_window_that_hides_nothing_is_no_reason():
    model = hf.FAMILIES["mistral with a window"].build(LEARNED)
    with pytest.warns(UserWarning, match="runs exact attention, without approximation: its mask differs from query to"):
        model(input_ids=hf.tokens(20), position_ids=torch.arange(20)[None].expand(2, -1) % 10, use_cache=False)


@pytest.mark.filterwarnings("ignore:.*runs exact attention")
@pytest.mark.parametrize("case", ["sliding window", "bool mask", "packed"])
def test_calibration_of_layers_that_run_exactly_says_why(case: str):
    name, _, arguments, message = EXACT[case]
    model = hf.FAMILIES[name].build("scatterbrain")
    expected = pytest.raises(
        ValueError, match=f"calibrate: no ScatterbrainAttention was run .*exact attention: .*{message}"
    )
    with expected, sb.calibrate(model):
        hf.run(model, input_ids=hf.tokens(), **arguments)


def test_each_cure_for_a_sliding_window_that_is_named_calibrates():
    cure = r"tokens wide, .*; pass sequences of at most 24 tokens, load the model with sliding_window=None .*where="
    windowed = hf.FAMILIES["mistral with a window"]
    model = windowed.build("scatterbrain")
    error, warning = pytest.raises(ValueError, match=cure), pytest.warns(UserWarning, match=cure)
    with error, warning, sb.calibrate(model):
        model(input_ids=hf.tokens(100))
    assert calibrated(windowed.build("scatterbrain"), 24)
    assert calibrated(windowed.build("scatterbrain", sliding_window=None), 100)
    mixed = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 24, "use_sliding_window": True}
    full = mixed | {"layer_types": ["full_attention"] * 2, "sliding_window": None}
    assert calibrated(hf.FAMILIES["qwen3"].build("scatterbrain", **full), 100)
    model = hf.FAMILIES["qwen3"].build("sdpa", **mixed)
    settings = sb.Window(16), sb.Quadratic(4)
    assert len(sb.replace_attention(model, *settings, where=lambda path: ".0." in path).replaced) == 1
    assert calibrated(model, 100)


def calibrated(model: torch.nn.Module, tokens: int) -> bool:
    """Whether every layer is after a calibration that does not warn."""
    with warnings.catch_warnings(), sb.calibrate(model), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        for seed in range(12):
            model(input_ids=hf.tokens(tokens, seed=seed))
    return all(core.is_calibrated for core in cores(model).values())


def test_dropout_on_weights_runs_exactly_in_training_and_says_how_to_stop_it():
    model = hf.FAMILIES["bert"].build(INPUT).train()
    with pytest.warns(
        UserWarning, match=r"dropout=0.1 acts on attention weights .*set_attention_dropout\(model, 0.0\)"
    ):
        model(input_ids=hf.tokens())
    assert set_attention_dropout(model, 0.0) == [f"encoder.layer.{i}.attention.self" for i in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(input_ids=hf.tokens())


@pytest.mark.filterwarnings("ignore:.*runs exact attention, without approximation. it has a sliding window")
@pytest.mark.parametrize("name", hf.named("encoder", "decoder", "vision", "seq2seq"))
def test_attention_dropout_of_every_family_can_be_set(name: str):
    model = hf.FAMILIES[name].build(LEARNED).train()
    set_attention_dropout(model, 0.5)
    layers = len(set_attention_dropout(model, 0.0))
    assert layers == len([path for path, _ in model.named_modules() if path.endswith(".scatterbrain")])
    arguments, _ = hf.inputs(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dropout=")
        model(**arguments)


def test_attention_weights_are_not_returned_and_that_is_said():
    model = hf.FAMILIES["whisper"].build(LEARNED)
    with pytest.warns(UserWarning, match="returns no attention weights"):
        model(**hf.inputs("whisper")[0], output_attentions=True)


def test_a_layer_with_a_window_refuses_masks_that_say_nothing_of_it():
    model = hf.FAMILIES["mistral with a window"].build(LEARNED)
    mask = torch.ones(2, 1, 1, hf.TOKENS, dtype=torch.bool)
    with pytest.raises(
        ValueError, match="has a sliding window of 24 keys, and its mask of 100 keys says nothing of it"
    ):
        model(input_ids=hf.tokens(), attention_mask=mask)


def test_a_window_that_hides_no_real_token_is_none():
    arguments = {"input_ids": hf.tokens(), "attention_mask": hf.keep("left", padded=80)[[1, 1]]}
    name = register("scatterbrain:limits-every-key", sb.Window(4096), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mine = hf.run(hf.FAMILIES["mistral with a window"].build(name), **arguments)
    exact = hf.run(hf.FAMILIES["mistral with a window"].build(), **arguments)
    torch.testing.assert_close(mine[:, 80:], exact[:, 80:], rtol=2e-5, atol=2e-5)


def test_a_clustering_support_is_refused_by_a_causal_model():
    with pytest.raises(ValueError, match="support=LSH is bidirectional only"):
        hf.FAMILIES["llama"].build("scatterbrain:paper")(input_ids=hf.tokens())


def test_a_rank_above_the_head_dimension_is_refused():
    with pytest.raises(ValueError, match="rank must be at most head_dim=8, got 9"):
        hf.FAMILIES["bert"].build("scatterbrain:quadratic", num_attention_heads=8)


# -------------------- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scatterbrain", "is built in"),
        ("scatterbrain:drop_in", "is built in"),
        ("mine", "expected a name such as 'scatterbrain:mine'"),
        ("scatterbrain:a/b", "expected a name such as"),
        ("scatterbrain:flash", "takes a name with 'flash' for its own"),
        ("scatterbrain:like-sdpa", "takes a name with 'sdpa' for its own"),
    ],
)
def test_names_that_cannot_be_registered(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        register(name, sb.Window(8))


def test_a_name_that_nobody_registered_lists_those_there_are():
    with pytest.raises(ValueError, match="'scatterbrain:nobody' is not registered, expected one of scatterbrain, "):
        hf.FAMILIES["bert"].build().set_attn_implementation("scatterbrain:nobody")
    with pytest.raises(ValueError, match="'scatterbrain:nobody' is not registered, expected one of scatterbrain, "):
        hf.FAMILIES["bert"].build("scatterbrain:nobody")


def test_settings_are_checked_when_they_are_registered():
    with pytest.raises(TypeError, match="support must be one of"):
        register("scatterbrain:wrong", 64)
    with pytest.raises(ValueError, match="leaves no attention at all"):
        register("scatterbrain:wrong", sb.Empty(), None)
    assert "scatterbrain:wrong" not in SETTINGS
