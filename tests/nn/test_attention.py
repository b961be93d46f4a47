"""ScatterbrainAttention: its state, calibration, moving averages and persistence."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import testkit
import torch
import torch.nn.functional as F
from testkit import counting_backend, leaves, padding, rand
from torch import nn

import scatterbrain as sb
from scatterbrain.low_rank.quadratic import EMA_EVERY

qkv = partial(testkit.qkv, 80, heads=4, kv_heads=4, head_dim=16)


QUADRATIC = dict(zip(("support", "low_rank"), sb.presets.quadratic()))


def calibrated(is_causal: bool = False, **kwargs: object) -> sb.ScatterbrainAttention:
    core = sb.ScatterbrainAttention(4, 16, **kwargs or QUADRATIC)
    with sb.calibrate(core):
        core(*qkv(), is_causal=is_causal)
    return core


def test_calibration_runs_exact_attention_and_then_equals_the_functional_form() -> None:
    core, inputs = sb.ScatterbrainAttention(4, 16, **QUADRATIC), qkv()
    with sb.calibrate(core):
        exact = core(*inputs)
    assert torch.allclose(exact, F.scaled_dot_product_attention(*inputs), atol=1e-6)
    want = sb.attention(*inputs, *sb.presets.quadratic(), statistics=sb.fit_statistics(*inputs[:2]))
    assert core.is_calibrated and torch.equal(core(*inputs), want)


def test_calibration_over_batches_weighs_by_tokens() -> None:
    core, (q, k, v) = sb.ScatterbrainAttention(4, 16, **QUADRATIC), qkv()
    with sb.calibrate(core):
        core(q[:1], k[:1], v[:1])
        core(q[1:, :, :30], k[1:, :, :30], v[1:, :, :30])
    mean = torch.cat([q[0], q[1, :, :30]], 1).mean(1) * 16**-0.5
    assert torch.allclose(core.query_mean, mean, atol=1e-6)


def test_a_failed_calibration_leaves_the_module_as_it_was() -> None:
    core = calibrated()
    before = core(*qkv(seed=5))
    with pytest.raises(RuntimeError, match="stop"), sb.calibrate(core):
        core(*qkv(seed=9))
        raise RuntimeError("stop")
    assert torch.equal(core(*qkv(seed=5)), before)


@pytest.mark.parametrize("kind", ["stored", "ema", "learned", "favor"])
def test_a_checkpoint_gives_the_same_output_in_a_new_module(kind: str) -> None:
    low_rank = sb.Favor(24, seed=1) if kind == "favor" else sb.Quadratic(4, kind)
    arguments = dict(num_kv_heads=2, support=sb.Window(16), low_rank=low_rank)
    core, inputs = sb.ScatterbrainAttention(4, 16, **arguments), qkv(kv_heads=2)
    if kind == "stored":
        with sb.calibrate(core):
            core(*inputs)
    if kind == "favor":
        core.redraw(torch.Generator().manual_seed(7))
    if kind == "ema":
        core(*inputs)
        sb.update_statistics(core)
    want = core(*inputs)
    other = sb.ScatterbrainAttention(4, 16, **arguments)
    other.load_state_dict(core.state_dict())
    for copied in (other, copy.deepcopy(core), pickle.loads(pickle.dumps(core))):
        assert torch.equal(copied(*inputs), want)


def test_half_precision_keeps_statistics_in_float32() -> None:
    core = calibrated()
    inputs = [t.bfloat16() for t in qkv()]
    want = core(*inputs)
    assert torch.equal(core.bfloat16()(*inputs), want) and want.dtype == torch.bfloat16
    assert core.query_projection.dtype == torch.float32


def test_learned_projections_start_equal_and_orthonormal_and_get_gradients() -> None:
    core = sb.ScatterbrainAttention(4, 16, 2, *sb.presets.train(32))
    p = core.query_projection.detach()
    assert torch.allclose(p @ p.transpose(-1, -2), torch.eye(9).expand(4, 9, 9), atol=1e-5)
    assert torch.equal(core.key_projection, core.query_projection[::2])
    q, k, v = qkv(kv_heads=2)
    core(q, k, v, is_causal=True).square().sum().backward()
    assert len(list(core.parameters())) == 5
    assert all(parameter.grad is not None and parameter.grad.ne(0).any() for parameter in core.parameters())


def test_moving_averages_commit_after_the_step_and_not_within_it() -> None:
    core = sb.ScatterbrainAttention(4, 16, support=sb.Window(16), low_rank=sb.Quadratic(4, "ema"))
    q, k, v = qkv()
    first = core(q, k, v, is_causal=True)
    assert torch.equal(core(q, k, v, is_causal=True), first) and not core.is_calibrated
    sb.update_statistics(core)
    assert core.is_calibrated and torch.allclose(core.query_mean, q.mean((0, 2)) * 0.25, atol=1e-6)
    mean = core.query_mean.clone()
    for _ in range(EMA_EVERY - 1):
        core(q + 1, k, v, is_causal=True)
        sb.update_statistics(core)
    assert torch.allclose(core.query_mean, 0.8 * mean + 0.2 * (q + 1).mean((0, 2)) * 0.25, atol=1e-5)


@pytest.mark.parametrize("low_rank", [sb.Quadratic(4, "ema"), sb.Favor(8, redraw=3)], ids=lambda kernel: kernel.kind)
def test_compiled_training_is_compiled_no_more_often_the_more_steps_it_has(low_rank: sb.low_rank.LowRank) -> None:
    core = sb.ScatterbrainAttention(4, 16, support=sb.Window(16), low_rank=low_rank).train()
    other = copy.deepcopy(core)
    graphs, backend = counting_backend()
    compiled = torch.compile(core, fullgraph=True, backend=backend)
    counts = []
    for step in range(2 * EMA_EVERY + 2):
        for accumulated in range(2):
            inputs = qkv(seed=2 * step + accumulated)
            assert torch.equal(compiled(*inputs, is_causal=True), other(*inputs, is_causal=True))
        sb.update_statistics(core)
        sb.update_statistics(other)
        counts.append(len(graphs))
    assert core.is_calibrated == (low_rank.kind == "quadratic") and core.steps == 2 * EMA_EVERY + 2
    states = zip(core.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    # The first step's, its second forward's, those of steps between commits, and of steps that commit.
    most = {"quadratic": 5, "favor": 1}[low_rank.kind]
    assert counts[EMA_EVERY] == counts[-1] <= most


def test_a_compiled_step_that_updates_statistics_is_compiled_no_more_often_the_more_steps_it_has() -> None:
    core = sb.ScatterbrainAttention(4, 16, support=sb.Window(16), low_rank=sb.Quadratic(4, "ema")).train()
    other = copy.deepcopy(core)

    def step(module: sb.ScatterbrainAttention, *tokens: torch.Tensor) -> torch.Tensor:
        out = module(*tokens, is_causal=True)
        sb.update_statistics(module)
        return out

    graphs, backend = counting_backend()
    compiled = torch.compile(step, backend=backend)
    counts = []
    for seed in range(2 * EMA_EVERY + 2):
        assert torch.equal(compiled(core, *qkv(seed=seed)), step(other, *qkv(seed=seed)))
        counts.append(len(graphs))
    assert core.steps == len(counts) and counts[EMA_EVERY] == counts[-1] <= 5


def test_evaluation_gathers_nothing() -> None:
    core = sb.ScatterbrainAttention(4, 16, support=sb.Window(16), low_rank=sb.Quadratic(4, "ema")).eval()
    core(*qkv())
    sb.update_statistics(core)
    assert not core.is_calibrated


@pytest.mark.parametrize("centred", [False, True])
def test_a_redraw_changes_no_gradient_of_a_call_before_it(centred: bool) -> None:
    core = sb.ScatterbrainAttention(2, 8, support=sb.Window(8), low_rank=sb.Favor(8, redraw=1, centred=centred))
    tokens = [rand(1, 2, 30, 8, seed=seed).requires_grad_() for seed in range(3)]
    want = torch.autograd.grad(core(*tokens).square().sum(), tokens)
    out = core(*tokens)
    sb.update_statistics(core)
    assert all(map(torch.equal, torch.autograd.grad(out.square().sum(), tokens), want))


def test_random_features_are_redrawn_on_schedule_only() -> None:
    core = sb.ScatterbrainAttention(4, 16, support=sb.Window(16), low_rank=sb.Favor(8, redraw=3))
    start = core.projection.clone()
    seen = []
    for _ in range(6):
        sb.update_statistics(core)
        seen.append(core.projection.clone())
    assert torch.equal(seen[1], start) and not torch.equal(seen[2], start)
    assert torch.equal(seen[3], seen[2]) and not torch.equal(seen[5], seen[2])


def test_another_scale_than_the_calibrated_one_raises() -> None:
    with pytest.raises(ValueError, match="scale"):
        calibrated()(*qkv(), scale=1.0)


def test_another_rank_than_the_checkpoints_raises() -> None:
    with pytest.raises((ValueError, RuntimeError), match="rank|size"):
        sb.ScatterbrainAttention(4, 16, low_rank=sb.Quadratic(4)).load_state_dict(calibrated().state_dict())


def test_reset_forgets() -> None:
    core = calibrated()
    core.reset_parameters()
    with pytest.raises(ValueError, match="calibrated"):
        core(*qkv())


def test_accumulated_forwards_of_a_step_count_by_their_tokens() -> None:
    core = sb.ScatterbrainAttention(4, 16, support=sb.Window(16), low_rank=sb.Quadratic(4, "ema"))
    q, k, v = qkv()
    core(q[:1], k[:1], v[:1], is_causal=True)
    core(q[1:, :, :30], k[1:, :, :30], v[1:, :, :30], is_causal=True)
    sb.update_statistics(core)
    mean = torch.cat([q[0], q[1, :, :30]], 1).mean(1) * 0.25
    assert torch.allclose(core.query_mean, mean, atol=1e-6) and core.moment_tokens.eq(110).all()


def test_a_step_of_padding_alone_commits_nothing() -> None:
    core = sb.ScatterbrainAttention(4, 16, support=sb.Window(16), low_rank=sb.Quadratic(4, "ema"))
    core(*qkv(), key_padding_mask=torch.ones(2, 80, dtype=torch.bool))
    sb.update_statistics(core)
    assert not core.is_calibrated


def test_a_step_that_is_left_out_for_its_nan_leaves_nothing_behind() -> None:
    core = sb.ScatterbrainAttention(4, 16, support=sb.Window(16), low_rank=sb.Quadratic(4, "ema"))
    clean, (q, k, v) = copy.deepcopy(core), qkv()
    for spoiled in ((q * math.nan, k, v), (q, k.clone().index_fill_(1, torch.tensor(1), math.inf), v)):
        core(*spoiled, is_causal=True)  # whose step the trainer skips, update_statistics too
    for module in (core, clean):
        module(q, k, v, is_causal=True)
        sb.update_statistics(module)
    assert core.is_calibrated and all(map(torch.equal, core.state_dict().values(), clean.state_dict().values()))


def test_a_step_with_nan_in_one_layer_is_committed_in_none_and_forgotten() -> None:
    layers = [sb.ScatterbrainAttention(4, 16, support=sb.Window(16), low_rank=sb.Quadratic(4, "ema")) for _ in range(3)]
    model, (q, k, v) = nn.ModuleList(layers), qkv()
    for factor, layer in zip((1, math.nan, 1), layers):
        layer(q * factor, k, v, is_causal=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="update_statistics: the step's queries or keys hold NaN or infinity"):
        sb.update_statistics(model)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert [layer.steps for layer in layers] == [0, 0, 0] and all(layer.gathered is None for layer in layers)
    for layer in layers:
        layer(q + 1, k, v, is_causal=True, scale=0.5)
    sb.update_statistics(model)
    for layer in layers:
        assert torch.allclose(layer.query_mean, (q + 1).mean((0, 2)) / 2, atol=1e-6)
        assert layer.steps == 1 and layer.moment_tokens.eq(160).all()


def test_mixed_dtypes_under_autocast_are_cast_as_the_function_casts_them() -> None:
    core = calibrated()
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = core(q, k.bfloat16(), v.bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, core(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_reset_keeps_the_parameters_of_the_optimizer() -> None:
    core = sb.ScatterbrainAttention(4, 16, 2, *sb.presets.train(32))
    before = [id(p) for p in core.parameters()]
    with torch.no_grad():
        core.key_bias.add_(1)
    core.reset_parameters()
    assert [id(p) for p in core.parameters()] == before and core.key_bias.eq(0).all()


# ------------------------------------------------------------------------------------------------------ exact queries


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_first_queries_attend_to_every_key_exactly_and_the_others_as_without(padded: bool, grad: bool) -> None:
    settings = {"support": sb.Window(16), "low_rank": sb.Quadratic(4, "input")}
    plain, core = (sb.ScatterbrainAttention(4, 16, exact_queries=first, **settings) for first in (0, 3))
    q, k, v = leaves(qkv()) if grad else qkv()
    mask = padding(80, (20 * padded,) * 2)
    bias = testkit.as_kind(mask, float)[:, None, None]
    exact = F.scaled_dot_product_attention(q[:, :, :3], k, v, attn_mask=bias)
    with torch.set_grad_enabled(grad):
        out, lse = core(q, k, v, mask if padded else None, return_lse=True)
        without, without_lse = plain(q, k, v, mask if padded else None, return_lse=True)
    torch.testing.assert_close(out[:, :, :3], exact)
    scores = q[:, :, :3] @ k.transpose(-1, -2) / 4 + bias
    torch.testing.assert_close(lse[:, :, :3], scores.logsumexp(-1))
    assert torch.equal(out[:, :, 3:], without[:, :, 3:]) and torch.equal(lse[:, :, 3:], without_lse[:, :, 3:])
    assert not torch.allclose(without[:, :, :3], exact, rtol=1e-2, atol=1e-2)
    if grad:
        weight = torch.randn(out.shape)
        mine = torch.autograd.grad((out * weight).sum(), (q, k, v))
        expected = (exact * weight[:, :, :3]).sum() + (without * weight)[:, :, 3:].sum()
        for a, b in zip(mine, torch.autograd.grad(expected, (q, k, v))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_causal_attention_has_no_exact_queries_and_fewer_queries_than_named_are_all_exact() -> None:
    settings = {"support": sb.Window(16), "low_rank": None}
    plain, core = (sb.ScatterbrainAttention(4, 16, exact_queries=first, **settings) for first in (0, 99))
    inputs = qkv()
    assert torch.equal(core(*inputs, is_causal=True), plain(*inputs, is_causal=True))
    torch.testing.assert_close(core(*inputs), F.scaled_dot_product_attention(*inputs))


def test_exact_queries_of_other_tokens_than_the_keys_are_not_padded_where_there_are_as_many() -> None:
    q, _, _ = qkv()
    k, v = (t[:, :, :20] for t in qkv(seed=1)[1:])
    mask = padding(20, (0, 7))
    out = sb.ScatterbrainAttention(4, 16, support=sb.Window(8), low_rank=sb.Centroid(4), exact_queries=20)(
        q, k, v, mask
    )
    exact = F.scaled_dot_product_attention(q[:, :, :20], k, v, attn_mask=~mask[:, None, None])
    torch.testing.assert_close(out[:, :, :20], exact)


@pytest.mark.parametrize("wrong", [-1, 1.0, True])
def test_exact_queries_must_be_a_count(wrong: object) -> None:
    with pytest.raises(ValueError, match="exact_queries must be an int of at least 0"):
        sb.ScatterbrainAttention(4, 16, exact_queries=wrong)


# -------------------- short calls


@pytest.mark.parametrize("grad", [False, True])
def test_bidirectional_calls_with_fewer_keys_than_said_are_exact_and_others_as_without(grad: bool) -> None:
    settings = {"support": sb.Window(16), "low_rank": sb.Centroid(4)}
    plain, core = (sb.ScatterbrainAttention(4, 16, exact_below=keys, **settings) for keys in (0, 61))
    for n, is_exact in ((60, True), (61, False)):
        q, k, v = (t[:, :, :n] for t in (leaves(qkv()) if grad else qkv()))
        out, without = core(q, k, v), plain(q, k, v)
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v) if is_exact else without)
        assert not is_exact or not torch.allclose(without, out, rtol=1e-2, atol=1e-2)
        # Keys count, queries do not.
        assert torch.equal(core(q[:, :, :9], k, v), plain(q[:, :, :9], k, v)) != is_exact


def test_short_calls_are_exact_with_masks_and_without_statistics() -> None:
    q, k, v = qkv()
    mask = padding(80, (20, 30))
    core = sb.ScatterbrainAttention(4, 16, support=sb.Window(16), low_rank=sb.Quadratic(4), exact_below=100)
    out, lse = core(q, k, v, mask, return_lse=True)
    valid = ~mask
    for b in range(2):
        want = sb.reference.attention(*(t[b : b + 1, :, valid[b]] for t in (q, k, v)), sb.Full(), None)
        torch.testing.assert_close(out[b : b + 1, :, valid[b]], want.float())
    with pytest.raises(ValueError, match="is not calibrated"):
        core(*(torch.cat([t, t], 2) for t in (q, k, v)))


def test_causal_calls_are_never_exact_for_their_length_whose_first_tokens_would_see_the_last() -> None:
    plain, core = (calibrated(True, **QUADRATIC) for _ in range(2))
    core.exact_below = 1000
    inputs = qkv(seed=3)
    assert torch.equal(core(*inputs, is_causal=True), plain(*inputs, is_causal=True))


def test_a_compiled_module_is_exact_on_short_calls_of_its_length() -> None:
    core = sb.ScatterbrainAttention(4, 16, exact_below=100, support=sb.Window(16), low_rank=sb.Centroid(4))
    compiled = torch.compile(core, backend="aot_eager", dynamic=False)
    inputs = qkv()
    torch.testing.assert_close(compiled(*inputs), F.scaled_dot_product_attention(*inputs))


@pytest.mark.parametrize("wrong", [-1, 1.0, True, None])
def test_exact_below_must_be_a_count(wrong: object) -> None:
    with pytest.raises(ValueError, match="exact_below must be an int of at least 0"):
        sb.ScatterbrainAttention(4, 16, exact_below=wrong)


# -------------------- causal calls


CAUSAL = sb.presets.causal()[0]


def test_causal_calls_of_the_default_have_the_support_of_the_causal_preset() -> None:
    core, inputs = calibrated(is_causal=True, causal_support=None), qkv(seed=3)
    for is_causal, preset in ((False, sb.presets.drop_in()), (True, sb.presets.causal())):
        want = sb.attention(*inputs, *preset, is_causal=is_causal, statistics=core.coefficients(is_causal))
        assert torch.equal(core(*inputs, is_causal=is_causal), want)
    assert sb.presets.causal()[1] == sb.presets.quadratic()[1]  # so calibration and checkpoints are those of either


def test_a_support_that_is_given_serves_causal_calls_too_unless_another_is_given() -> None:
    inputs = qkv(seed=3)
    for given, used in (
        (dict(support=sb.Window(16)), sb.Window(16)),
        (dict(support=sb.Window(16), causal_support=sb.Window(24)), sb.Window(24)),
        (dict(causal_support=sb.Window(24)), sb.Window(24)),
    ):
        core = calibrated(is_causal=True, **given)
        want = sb.attention(*inputs, used, core.causal_low_rank, is_causal=True, statistics=core.coefficients(True))
        assert torch.equal(core(*inputs, is_causal=True), want)
        assert ("causal_support=" in repr(core)) == ("causal_support" in given)
    assert f"causal_support={CAUSAL}, low_rank" in repr(sb.ScatterbrainAttention(4, 16))


def test_checkpoints_do_not_depend_on_the_causal_support() -> None:
    core, other = (
        calibrated(**QUADRATIC | {"causal_support": sb.Window(16)}),
        sb.ScatterbrainAttention(4, 16, **QUADRATIC),
    )
    other.load_state_dict(core.state_dict())
    core.load_state_dict(other.state_dict())
    assert torch.equal(other(*qkv(seed=3)), calibrated()(*qkv(seed=3)))


def test_a_module_pickled_before_there_were_causal_supports_uses_its_support() -> None:
    core = calibrated(support=sb.Window(16), low_rank=sb.Quadratic(9))
    want = core(*qkv(), is_causal=True)
    for name in ("causal_support", "_causal_low_rank", "kernel_of_state"):
        del core.__dict__[name]
    loaded = pickle.loads(pickle.dumps(core))
    assert torch.equal(loaded(*qkv(), is_causal=True), want) and loaded.support_of(True) == sb.Window(16)


def test_exact_bidirectional_calls_need_no_calibration_and_causal_ones_say_so() -> None:
    core, inputs = sb.ScatterbrainAttention(4, 16, support=sb.Full(), causal_support=sb.Window(16)), qkv()
    assert torch.equal(core(*inputs), F.scaled_dot_product_attention(*inputs)) and not core.is_exact
    with pytest.raises(ValueError, match="calibrate"):
        core(*inputs, is_causal=True)
    assert sb.ScatterbrainAttention(4, 16, support=sb.Full(), causal_support=sb.Full()).is_exact


@pytest.mark.parametrize(
    ("support", "error", "message"),
    [
        (
            sb.LSH(32),
            ValueError,
            "causal_support must be a support that causal attention can use, got LSH.*; use Routed",
        ),
        (64, TypeError, "support must be one of Full, .*, got int"),
    ],
)
def test_a_causal_support_that_cannot_be_one_is_refused(support: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        sb.ScatterbrainAttention(4, 16, causal_support=support)
