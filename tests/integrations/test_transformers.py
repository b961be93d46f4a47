"""Sparse + low-rank attention inside transformers' models: what is approximated, and what holds whatever the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from testkit import COPIES, cores
from torch import nn

pytest.importorskip("transformers")
import hf_models as hf
import transformers

import scatterbrain as sb
from scatterbrain.integrations.transformers import SETTINGS, register

ROUTED = register("scatterbrain:small", sb.Routed(32, block_q=8), sb.Quadratic(5))
WINDOW = register("scatterbrain:window", sb.Window(16, block_q=8), sb.Quadratic(5))
LEARNED = register("scatterbrain:learned", sb.Routed(32, block_q=1, block_k=8, window=16), sb.Quadratic(5, "learned"))
INPUT = register("scatterbrain:input", sb.Routed(32, block_q=8), sb.Quadratic(5, "input"))
pytestmark = pytest.mark.filterwarnings("ignore:.*has a sliding window")
WINDOWED = "mistral with a window"  # exact in every layer
CAUSAL = [name for name in hf.named("decoder") if name != WINDOWED]


def calibrated(name: str, implementation: str = ROUTED, **arguments) -> nn.Module:
    model = hf.FAMILIES[name].build(implementation, **arguments)
    if any(core.needs_calibration for core in cores(model).values()):
        with sb.calibrate(model):
            hf.run(model, **hf.inputs(name, "right", seed=9)[0])
    return model


# -------------------- approximation


def layers_of(name: str) -> int:
    """Attention layers that are not exact by their own choice of keys."""
    return {"whisper": 6, "bart": 6, "bert decoder": 4, "gpt2 with cross-attention": 4, "modernbert": 1}.get(name, 2)


@pytest.mark.parametrize("name", [name for name in hf.FAMILIES if name != WINDOWED])
def test_every_layer_is_calibrated_and_approximates(name: str):
    arguments, counts = hf.inputs(name, "right")
    exact = hf.run(hf.FAMILIES[name].build("sdpa"), **arguments)[counts]
    model = calibrated(name)
    assert sum(core.is_calibrated for core in cores(model).values()) == layers_of(name)
    error = (hf.run(model, **arguments)[counts] - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.4


@pytest.mark.parametrize("name", ["bert", "llama", "whisper"])
def test_calibrating_runs_exact_attention(name: str):
    arguments, counts = hf.inputs(name, "right")
    model = hf.FAMILIES[name].build(ROUTED)
    with sb.calibrate(model):
        inside = hf.run(model, **arguments)
    torch.testing.assert_close(inside[counts], hf.run(hf.FAMILIES[name].build("sdpa"), **arguments)[counts])


def test_an_uncalibrated_layer_says_how_to_calibrate():
    with pytest.raises(ValueError, match=r"BertSelfAttention is not calibrated: .*sb.calibrate\(model\)"):
        hf.run(hf.FAMILIES["bert"].build("scatterbrain:quadratic"), **hf.inputs("bert")[0])


@pytest.mark.parametrize("implementation", [LEARNED, INPUT])
def test_statistics_that_need_no_calibration(implementation: str):
    assert hf.run(calibrated("bert", implementation), **hf.inputs("bert")[0]).isfinite().all()


PRESETS = ["drop_in", "quality", "fast", "quadratic", "causal", "train", "paper"]


@pytest.mark.parametrize("name", ["scatterbrain", *(f"scatterbrain:{preset}" for preset in PRESETS)])
def test_the_presets_run_by_name(name: str):
    model = hf.FAMILIES["bert"].build(name)
    preset = getattr(sb.presets, name.partition(":")[2] or "drop_in")()
    assert all((core.support, core.low_rank) == preset for core in cores(model).values())
    if name in ("scatterbrain:quadratic", "scatterbrain:causal"):
        with sb.calibrate(model):
            hf.run(model, **hf.inputs("bert")[0])
    assert hf.run(model, **hf.inputs("bert")[0]).isfinite().all() and len(cores(model)) == 2


def test_causal_layers_have_the_support_of_the_causal_preset():
    """Decoders run it, and its kernel; encoders do not. Cross-attention, whose queries are a decoder's, has the
    kernel."""
    causal, drop_in = sb.presets.causal()[0], sb.presets.drop_in()[0]
    for name in ("scatterbrain", "scatterbrain:drop_in"):
        for family in ("llama", "gpt2"):
            for core in cores(hf.FAMILIES[family].build(name)).values():
                assert (core.support, core.causal_support) == (drop_in, causal), family
                assert core.low_rank == core.causal_low_rank == sb.presets.causal()[1]
    for path, core in cores(hf.FAMILIES["gpt2 with cross-attention"].build("scatterbrain")).items():
        assert core.causal_support == (None if "crossattention" in path else causal), path
    for path, core in cores(hf.FAMILIES["whisper"].build("scatterbrain")).items():
        assert core.causal_support == (causal if "decoder" in path and "encoder_attn" not in path else None), path
        assert core.low_rank == (sb.presets.causal() if "decoder" in path else sb.presets.drop_in())[1], path
    assert all(c.causal_support is None for c in cores(hf.FAMILIES["llama"].build("scatterbrain:train")).values())


def test_a_decoder_attends_with_the_causal_support_and_an_encoder_with_the_other():
    for name, expected in (("llama", sb.presets.causal()), ("bert", sb.presets.drop_in())):
        model = calibrated(name, "scatterbrain")
        arguments, counts = hf.inputs(name)
        ours = hf.run(model, **arguments)
        model.set_attn_implementation(register(f"scatterbrain:only-{name}", *expected))
        assert torch.equal(hf.run(model, **arguments)[counts], ours[counts])


def test_a_name_is_registered_with_a_causal_support():
    support = sb.Window(8)
    name = register("scatterbrain:own-causal", sb.Window(16), sb.Quadratic(4, "learned"), causal_support=support)
    assert SETTINGS[name][:3] == (sb.Window(16), sb.Quadratic(4, "learned"), support)
    assert SETTINGS[register("scatterbrain:no-causal", sb.Window(16))].causal_support is None
    assert SETTINGS[register("scatterbrain:default-causal", low_rank=None)].causal_support == sb.presets.causal()[0]
    with pytest.raises(ValueError, match="causal_support must be .* got LSH"):
        register("scatterbrain:lsh-causal", causal_support=sb.LSH(32))


def test_the_choice_of_implementation_leaves_the_random_weights_of_a_model_alone():
    torch.manual_seed(3)
    plain = transformers.BertForMaskedLM(transformers.BertConfig(**hf.TEXT))
    torch.manual_seed(3)
    ours = transformers.BertForMaskedLM(transformers.BertConfig(**hf.TEXT, attn_implementation=LEARNED))
    state = ours.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in plain.state_dict().items())


def test_layers_start_with_projections_of_their_own():
    first, second = cores(hf.FAMILIES["bert"].build(LEARNED)).values()
    assert not torch.equal(first.key_projection, second.key_projection)


# -------------------- padding


@pytest.mark.parametrize("implementation", [ROUTED, WINDOW, LEARNED])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", hf.named("encoder") + CAUSAL)
def test_the_content_of_padding_changes_no_bit(name: str, side: str, implementation: str):
    model = calibrated(name, implementation)
    arguments, counts = hf.inputs(name, side)
    other = arguments | {"input_ids": torch.where(counts, arguments["input_ids"], hf.tokens(seed=77))}
    assert torch.equal(hf.run(model, **arguments)[counts], hf.run(model, **other)[counts])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "gpt2", "llama", "qwen3", "opt"])
def test_added_padding_changes_nothing(name: str, side: str):
    model = calibrated(name)
    arguments, counts = hf.inputs(name, side)
    short = arguments["input_ids"][1:, counts[1]]
    if name != "opt":
        positions = (counts.long().cumsum(1) - 1).clamp(min=0)
        if name == "roberta":  # its positions start behind the id of padding
            positions = positions + hf.PAD + 1
        arguments["position_ids"] = positions
    alone = hf.run(model, input_ids=short, attention_mask=torch.ones_like(short))
    torch.testing.assert_close(hf.run(model, **arguments)[1, counts[1]], alone[0], rtol=1e-5, atol=1e-5)


def test_padded_states_of_an_encoder_reach_no_decoder():
    model = calibrated("bert decoder")
    arguments, counts = hf.inputs("bert decoder", "right")
    padded = arguments["encoder_attention_mask"] == 0
    other = arguments["encoder_hidden_states"].masked_fill(padded[..., None], 1e4)
    out = hf.run(model, **arguments | {"encoder_hidden_states": other})
    assert torch.equal(hf.run(model, **arguments)[counts], out[counts])


# -------------------- causality


@pytest.mark.parametrize("implementation", [ROUTED, WINDOW, LEARNED])
@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_change_no_bit_of_earlier_outputs(name: str, implementation: str):
    model = calibrated(name, implementation)
    ids = hf.tokens()
    before = hf.run(model, input_ids=ids)
    for cut in (1, 37, 64, 99):
        later = torch.cat([ids[:, :cut], hf.tokens(seed=5)[:, cut:]], 1)
        assert torch.equal(hf.run(model, input_ids=later)[:, :cut], before[:, :cut])


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "opt"])
def test_no_gradient_flows_to_the_future(name: str):
    model = calibrated(name)
    embeddings = model.get_input_embeddings()(hf.tokens()).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[:, :50].square().sum().backward()
    assert embeddings.grad[:, 50:].abs().max() == 0 and embeddings.grad[:, :50].abs().min(0)[0].max() > 0


# -------------------- caches


def one_by_one(first: int) -> list[int]:
    """The ends of pieces: ``first`` tokens together, the others one by one."""
    return list(range(first, hf.TOKENS + 1))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "opt"])
def test_decoding_is_exact_over_the_cache(name: str):
    """The first layer's keys are the same whatever its attention, so a model of one layer decodes as sdpa does."""
    layers = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}
    model, exact = calibrated(name, **layers), hf.FAMILIES[name].build("sdpa", **layers)
    ids = hf.tokens()
    mine = hf.in_pieces(model, ids, one_by_one(90))
    reference = hf.run(exact, input_ids=ids)
    torch.testing.assert_close(mine[:, 90:], reference[:, 90:], rtol=2e-5, atol=2e-5)
    assert torch.equal(mine[:, :90], hf.run(model, input_ids=ids[:, :90]))


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "opt"])
def test_token_by_token_is_one_pass_but_for_the_approximation(name: str, side: str | None):
    model, exact = calibrated(name), hf.FAMILIES[name].build("sdpa")
    ids, mask = hf.tokens(), None if side is None else hf.keep(side)
    mine = hf.in_pieces(model, ids, one_by_one(50), mask)[:, 50:]
    reference = hf.run(exact, input_ids=ids, attention_mask=mask)[:, 50:]
    one_pass = hf.run(model, input_ids=ids, attention_mask=mask)[:, 50:]
    assert (mine - reference).norm() <= (one_pass - reference).norm()


@pytest.mark.parametrize("implementation", [WINDOW, LEARNED])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_chunks_are_one_pass(name: str, kind: str, side: str | None, implementation: str):
    """Windows and lists of single queries do not look before a chunk, so chunks of whole blocks give the same rows."""
    model = calibrated(name, implementation)
    ids, mask = hf.tokens(), None if side is None else hf.keep(side, padded=32)
    counts = hf.keep(side or "none", padded=32).bool()
    chunks = hf.in_pieces(model, ids, (48, 80, 100), mask, kind)
    one_pass = hf.run(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(chunks[counts], one_pass[counts], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "opt"])
def test_generation_is_the_same_with_both_caches(name: str):
    model = calibrated(name)
    arguments = {"input_ids": hf.tokens(), "attention_mask": hf.keep("left"), "do_sample": False, "max_new_tokens": 6}
    arguments |= {"min_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    dynamic, static = (model.generate(**arguments, cache_implementation=kind) for kind in ("dynamic", "static"))
    assert torch.equal(dynamic.sequences, static.sequences)
    torch.testing.assert_close(torch.stack(dynamic.logits), torch.stack(static.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "opt"])
def test_a_few_tokens_behind_a_cache_are_those_tokens_one_by_one(name: str, kind: str, side: str | None):
    """So the verification of guessed tokens sees what decoding without guesses sees."""
    model, ids, mask = calibrated(name), hf.tokens(), None if side is None else hf.keep(side)
    one_by_one_, together = (
        hf.in_pieces(model, ids, cuts, mask, kind)[:, 70:] for cuts in (one_by_one(70), (70, 72, 79, 84, 100))
    )
    torch.testing.assert_close(together, one_by_one_, rtol=1e-4, atol=1e-5)
    more = hf.in_pieces(model, ids, (70, 87, 100), mask, kind)[:, 70:87]
    assert (more - one_by_one_[:, :17]).norm() > 1e-3 * more.norm()  # 17 tokens are approximated


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_guessed_tokens_change_nothing_of_what_is_written(way: str):
    model = calibrated("llama")
    ids = torch.cat([hf.tokens(12, batch=1)] * 8, 1)  # repeats itself, so that looking up guesses
    arguments = {"input_ids": ids, "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    guessing: dict[str, Any] = {"prompt_lookup_num_tokens": 5}
    if way == "assistant":
        guessing = {"assistant_model": calibrated("llama", num_hidden_layers=1)}
        guessing["assistant_model"].generation_config.num_assistant_tokens = 5
    assert torch.equal(model.generate(**arguments, **guessing), model.generate(**arguments))


def test_beams_and_assistants_generate():
    model = calibrated("llama")
    arguments = {"input_ids": hf.tokens(batch=1), "attention_mask": torch.ones(1, hf.TOKENS), "max_new_tokens": 5}
    assert model.generate(**arguments, num_beams=3).shape[0] == 1
    assert model.generate(**arguments, assistant_model=calibrated("llama"), do_sample=False).shape[0] == 1


@pytest.mark.parametrize("implementation", [ROUTED, WINDOW, LEARNED, INPUT, "scatterbrain:paper"])
@pytest.mark.parametrize("name", ["bart", "whisper", "gpt2 with cross-attention"])
def test_a_target_token_sees_nothing_after_it_through_cross_attention(name: str, implementation: str):
    """Neither what later target tokens are, nor that they are there, chooses its keys."""
    model = hf.FAMILIES[name].build("sdpa")
    report = sb.replace_attention(model, *SETTINGS[implementation][:2], where=lambda path: path in crossing(model))
    assert {entry.path for entry in report.replaced} == set(crossing(model))
    if SETTINGS[implementation].low_rank == sb.Quadratic(5):
        with sb.calibrate(model):
            hf.run(model, **hf.inputs(name, seed=9)[0])
    arguments, _ = hf.inputs(name)
    ids = "input_ids" if name.startswith("gpt2") else "decoder_input_ids"
    masks = [
        k for k in ("decoder_attention_mask", "attention_mask" if name.startswith("gpt2") else "") if k in arguments
    ]
    kept = hf.TOKENS - 21
    changed = {**arguments, ids: arguments[ids].clone()}
    changed[ids][:, kept:] = changed[ids][:, kept:].flip(1)
    cut = {**arguments, **{k: arguments[k][:, :kept] for k in (ids, *masks)}}
    before, after, alone = (hf.run(model, **a)[:, :kept] for a in (arguments, changed, cut))
    assert torch.equal(before, after)
    torch.testing.assert_close(alone, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Bart", "Marian", "Musicgen"])
def test_a_decoder_alone_has_cross_attention_too(family: str):
    """Its configuration names no encoder."""
    sizes = {**hf.TEXT, **hf.LONG, "ffn_dim": 80} if family == "Musicgen" else {**hf.BART, **hf.LONG}
    config = getattr(transformers, "MusicgenDecoderConfig" if family == "Musicgen" else f"{family}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config(**sizes, attn_implementation="scatterbrain")).eval()
    ids = hf.tokens(batch=2 * getattr(model.config, "num_codebooks", 1))
    states = torch.randn(2, 90, hf.WIDTH, generator=torch.Generator().manual_seed(1))
    with sb.calibrate(model):
        hf.run(model, input_ids=ids, encoder_hidden_states=states)
    changed = torch.cat([ids[:, :60], ids[:, :40]], 1)
    out, other = (hf.run(model, input_ids=i, encoder_hidden_states=states) for i in (ids, changed))
    assert torch.equal(out[:, :60], other[:, :60]) and not torch.equal(out, other)
    assert len(crossing(model)) == 2
    assert not any(layer.scatterbrain.is_self for path, layer in model.named_modules() if path in crossing(model))


def crossing(model: nn.Module) -> list[str]:
    names = ("encoder_attn", "crossattention")
    return [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in names]


def test_whisper_generates():
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**hf.WHISPER)).eval()
    model.set_attn_implementation(ROUTED)
    arguments = hf.inputs("whisper")[0]
    with sb.calibrate(model):
        hf.run(model, **arguments)
    out = model.generate(arguments["input_features"], decoder_input_ids=hf.tokens(4), max_new_tokens=4)
    assert out.shape[0] == 2


# -------------------- training, precision, compile


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "whisper"])
def test_gradient_checkpointing_changes_no_gradient(name: str):
    arguments, _ = hf.inputs(name, "right")
    gradients = []
    for checkpointing in (False, True):
        model = calibrated(name, LEARNED)
        zero_dropout(model)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
            arguments = arguments | {"use_cache": False} if name != "bert" else arguments
        hf.output(model(**arguments)).square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and any("scatterbrain.key_projection" in key for key in plain)
    for key in plain:
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-5, atol=1e-7)


def zero_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize("name", ["modernbert", "llama"])
def test_compiles_in_one_graph(name: str):
    model = calibrated(name)
    arguments, counts = hf.inputs(name, "right")
    if name == "llama":
        arguments["use_cache"] = False
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(hf.run(compiled, **arguments)[counts], hf.run(model, **arguments)[counts])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_autocast_and_half_precision(name: str):
    model = calibrated(name)
    arguments, counts = hf.inputs(name, "left")
    full = hf.run(model, **arguments)[counts]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = hf.run(model, **arguments)[counts].float()
    half = hf.run(model.to(torch.bfloat16), **arguments)[counts].float()
    assert all(core.query_projection.dtype == torch.float32 for core in cores(model).values())
    for out in (autocast, half):
        assert (out - full).norm() < 0.1 * full.norm()


# -------------------- state


@pytest.mark.parametrize("implementation", [ROUTED, LEARNED, "scatterbrain:paper"])
def test_what_a_model_learned_is_saved_and_loaded_with_it(implementation: str, tmp_path):
    model = calibrated("bert", implementation) if implementation != "scatterbrain:paper" else None
    model = model or hf.FAMILIES["bert"].build(implementation)
    arguments, counts = hf.inputs("bert", "right")
    if implementation == LEARNED:
        with torch.no_grad():
            [core.query_bias.normal_() for core in cores(model).values()]
    model.save_pretrained(tmp_path)
    for auto in (transformers.BertModel, transformers.AutoModel):
        loaded = auto.from_pretrained(tmp_path, attn_implementation=implementation)
        assert torch.equal(hf.run(loaded, **arguments)[counts], hf.run(model, **arguments)[counts])
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(state[key].dtype == value.dtype for key, value in model.state_dict().items())


def test_a_head_on_top_finds_the_state_of_its_base(tmp_path):
    calibrated("bert").save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path, attn_implementation=ROUTED)
    assert all(core.is_calibrated for core in cores(model).values())


def test_a_checkpoint_without_our_state_loads_uncalibrated_and_without_a_word(tmp_path, caplog):
    hf.FAMILIES["bert"].build("sdpa").save_pretrained(tmp_path)
    transformers.utils.logging.enable_propagation()
    model, report = transformers.BertModel.from_pretrained(
        tmp_path, attn_implementation=LEARNED, output_loading_info=True
    )
    transformers.utils.logging.disable_propagation()
    assert not any("scatterbrain" in key for key in report["missing_keys"]) and "scatterbrain" not in caplog.text
    for core in cores(model).values():
        rows = core.key_projection
        torch.testing.assert_close(rows @ rows.transpose(-1, -2), torch.eye(5).expand(hf.HEADS, 5, 5))


def test_a_half_precision_load_keeps_statistics_in_full(tmp_path):
    model = calibrated("bert")
    model.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path, attn_implementation=ROUTED, dtype=torch.bfloat16)
    for mine, theirs in zip(cores(model).values(), cores(loaded).values()):
        assert torch.equal(mine.key_projection, theirs.key_projection) and theirs.is_calibrated


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_copies_carry_their_calibration(copied):
    model = calibrated("llama")
    arguments, _ = hf.inputs("llama")
    assert torch.equal(hf.run(copied(model), **arguments), hf.run(model, **arguments))


def test_sdpa_gives_the_model_back_and_our_state_waits():
    exact = hf.FAMILIES["bert"].build("sdpa")
    arguments, _ = hf.inputs("bert", "right")
    before, keys = hf.run(exact, **arguments), exact.state_dict().keys()
    model = calibrated("bert")
    ours = hf.run(model, **arguments)
    model.set_attn_implementation("sdpa")
    assert torch.equal(hf.run(model, **arguments), before) and model.state_dict().keys() == keys
    model.set_attn_implementation(ROUTED)
    assert torch.equal(hf.run(model, **arguments), ours)


FEATURES = register(
    "scatterbrain:features", sb.Window(16, block_q=8), sb.Features(nn.Sequential(nn.Linear(16, 8), nn.Softplus()))
)


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy], ids=["itself", "deepcopy"])
@pytest.mark.parametrize("between", [FEATURES, "sdpa"])
def test_modules_that_took_the_place_of_a_kernels_stay_when_it_is_chosen_again(between: str, copied):
    model = hf.FAMILIES["bert"].build(FEATURES)
    for seed, core in enumerate(cores(model).values()):
        torch.manual_seed(seed)
        core.query_features = nn.Sequential(nn.Linear(16, 4), nn.Softplus())
    model = copied(model)
    arguments, _ = hf.inputs("bert")
    want, present = hf.run(model, **arguments), [core.query_features for core in cores(model).values()]
    model.set_attn_implementation(between)
    model.set_attn_implementation(FEATURES)
    assert all(core.query_features is own for core, own in zip(cores(model).values(), present, strict=True))
    assert torch.equal(hf.run(model, **arguments), want)


def test_modules_of_a_kernel_keep_what_they_hold_while_a_model_is_loaded(tmp_path):
    hf.FAMILIES["bert"].build("sdpa").save_pretrained(tmp_path)
    features = SETTINGS[FEATURES].low_rank.query_features
    before = {name: tensor.clone() for name, tensor in features.state_dict().items()}
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=FEATURES)
    assert all(core.query_features is features for core in cores(loaded).values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in features.state_dict().items())


def test_another_budget_keeps_the_calibration():
    model = calibrated("bert")
    model.set_attn_implementation(WINDOW)
    assert all(core.is_calibrated and core.support == sb.Window(16, block_q=8) for core in cores(model).values())


def test_another_kernel_starts_anew():
    model = calibrated("bert")
    model.set_attn_implementation("scatterbrain")
    assert not any(core.is_calibrated for core in cores(model).values())


def test_an_implementation_written_into_the_configuration_of_a_layer():
    model = hf.FAMILIES["bert"].build("sdpa")
    layer = model.encoder.layer[1].attention.self
    layer.config = copy.deepcopy(layer.config)
    layer.config._attn_implementation = INPUT
    exact = hf.run(hf.FAMILIES["bert"].build("sdpa"), **hf.inputs("bert")[0])
    error = (hf.run(model, **hf.inputs("bert")[0]) - exact).norm() / exact.norm()
    assert list(cores(model)) == ["encoder.layer.1.attention.self.scatterbrain"] and 1e-5 < error < 0.3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_masks_of_another_implementation_are_read_for_what_they_say(name: str, side: str):
    """Layers whose own configuration names ours get the masks that their model makes for sdpa."""
    arguments, counts = hf.inputs(name, side)
    model, mixed = calibrated(name, WINDOW), calibrated(name, WINDOW)
    mixed.set_attn_implementation("sdpa")
    for module in list(mixed.modules()):
        if "_scatterbrain_parked" in module.__dict__:
            module.config = copy.deepcopy(module.config)
            module.config._attn_implementation = WINDOW
    out = hf.run(mixed, **arguments)
    assert len(cores(mixed)) == 2
    torch.testing.assert_close(out[counts], hf.run(model, **arguments)[counts], rtol=1e-5, atol=1e-5)


def test_moving_a_model_moves_its_state():
    model = calibrated("bert").to("meta")
    assert all(tensor.device.type == "meta" for core in cores(model).values() for tensor in core.buffers())
