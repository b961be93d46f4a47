"""The CUDA kernels on a GPU: what tests/cuda/test_emulated.py asks of them in the emulator, and what only a device has:
streams, graphs, synchronisation, large tensors, the modules and libraries around them.

SCATTERBRAIN_DEVICE_TESTS=emulator runs what needs no GPU on the CPU, which tests this file.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_cases import SIZES, assert_agree, fields, tokens_of
from cuda_calls import (
    CAUSAL_PAIRS,
    LOW_RANKS,
    PAIRS,
    SUPPORTS,
    Gpu,
    Machine,
    attend,
    cancelling_call,
    excess,
    placed,
    statistics_of,
    tokens,
)
from oracle import CASES, assert_parity, draw, row_error
from testkit import LAYOUTS, assert_same_bits, causal_mask, leaves, qkv, rand, randomized
from torch import Tensor, nn
from torch.nn.functional import pad

import scatterbrain as sb

ON_GPU = torch.cuda.is_available()
IN_EMULATOR = not ON_GPU and os.environ.get("SCATTERBRAIN_DEVICE_TESTS") == "emulator"
pytestmark = pytest.mark.skipif(not ON_GPU and not IN_EMULATOR, reason="needs a CUDA device")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="asks what only a CUDA device has")


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    return Gpu() if ON_GPU else request.getfixturevalue("emulator")


@pytest.fixture(autouse=True)
def _a_broken_device_ends_the_process() -> Iterator[None]:
    """After some errors every further call of a process fails. pytest-xdist goes on in another one, and names the test
    that ran."""
    yield
    if not ON_GPU:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(f"the CUDA device is unusable from here on: {error}", 1)
        print(error, file=sys.__stderr__, flush=True)
        os._exit(1)


def place_on(machine: Machine) -> Callable[[Any], Any]:
    return lambda given: placed(given, machine.device)


# -------------------- parity


@pytest.mark.parametrize("seed", range(0, CASES, 3))
def test_float32_matches_the_definition(machine: Machine, seed: int) -> None:
    assert not excess(machine, draw(seed), torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(0, CASES, 19))
def test_half_precision_errs_no_more_than_twice_the_formula_in_torch(
    machine: Machine, seed: int, dtype: torch.dtype
) -> None:
    assert not excess(machine, draw(seed, dtype), dtype, 0.0)


@pytest.mark.parametrize("seed", range(1, CASES, 28))
def test_float64_accumulates_in_float64(machine: Machine, seed: int) -> None:
    case = draw(seed)
    assert not excess(machine, case, torch.float64, max(1e-10, 1e-14 * case.low_rank_share()))


@pytest.mark.parametrize("seed", range(2, CASES, 5))
def test_gradients_match_the_definition(machine: Machine, seed: int) -> None:
    case = draw(seed)
    with machine.installed():
        assert_parity(case, torch.float32, 1e-5, case.low_rank_share(), place_on(machine))


@pytest.mark.parametrize("is_causal", [False, True])
def test_where_subtraction_would_cancel_queries_are_computed_again(machine: Machine, is_causal: bool) -> None:
    arguments = cancelling_call(130, is_causal)
    with machine.installed():
        got = torch.ops.scatterbrain.attention(*placed(arguments, machine.device))
    want = torch.ops.scatterbrain.attention(*(t.double() for t in arguments[:5]), *arguments[5:])
    assert row_error(got[0].cpu(), want[0]) <= 1e-5 and float((got[1].cpu() - want[1]).abs().max()) <= 1e-5


# -------------------- lists and clusters

ROUTED = {
    "pooled": sb.Routed(48, block_q=16),
    "pooled with window and sinks": sb.Routed(64, block_q=16, window=24, sinks=5),
    "two pools": sb.Routed(48, block_q=16, pools=2),
    "per query": sb.Routed(32, block_q=1, block_k=8, window=16),
    "per query of two pools": sb.Routed(32, block_q=1, block_k=8, window=16, pools=2),
    "per query by sketches": sb.Routed(32, block_q=1, block_k=8, window=16, pools=0),
}


@pytest.mark.parametrize("kind", ["none", "quadratic", "favor", "centroid"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("support", ROUTED)
def test_lists_are_those_of_the_cpu(machine: Machine, support: str, is_causal: bool, kind: str) -> None:
    """In float64, where no two blocks score alike within rounding."""
    if is_causal and kind == "centroid":
        pytest.skip("its clusters are of all keys")
    query, key = rand(2, 4, 200, 16, dtype=torch.float64), rand(2, 2, 200, 16, seed=1, dtype=torch.float64)
    mask = torch.zeros(2, 200, dtype=torch.bool)
    mask[1, :7] = mask[1, 150:] = True
    low_rank = LOW_RANKS[kind]
    statistics = sb.fit_statistics(query, key, 4) if kind == "quadratic" else None
    if kind == "centroid":
        statistics = sb.reference.cluster(query, key, 5, mask)
    arguments = dict(is_causal=is_causal, key_padding_mask=mask, statistics=statistics)
    want = sb.route(query, key, ROUTED[support], low_rank, **arguments)
    with machine.installed():
        given = placed((query, key, arguments), machine.device)
        got = placed(sb.route(given[0], given[1], ROUTED[support], low_rank, **given[2]), torch.device("cpu"))
    assert torch.equal(got.index, want.index) and torch.equal(got.count, want.count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_clusters_are_those_of_the_definition(machine: Machine, name: str, dtype: torch.dtype) -> None:
    query, key, clusters = tokens_of(name, dtype)
    with machine.installed():
        found = sb.cluster(*placed((query, key), machine.device), clusters, scale=0.3)
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-5, atol=2e-6)
    assert_agree(placed(found, torch.device("cpu")), sb.reference.cluster(query, key, clusters, scale=0.3), **tolerance)


# -------------------- bits


def results(machine: Machine, given: list[Tensor], support: object, low_rank: object, **arguments: Any) -> list[Tensor]:
    """out, lse and the gradients of the tokens."""
    arguments.setdefault("statistics", statistics_of(low_rank))
    with machine.installed():
        (given, arguments) = placed((given, arguments), machine.device)
        inputs = leaves(given)
        out, lse = sb.attention(*inputs, support, low_rank, return_lse=True, **arguments)
        weight = rand(*out.shape, seed=9).to(out)
        found = [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, weight)]
    return placed(found, torch.device("cpu"))


@pytest.mark.parametrize(("support", "kind"), PAIRS)
def test_two_runs_and_every_layout_give_the_same_bits(machine: Machine, support: str, kind: str) -> None:
    base = results(machine, tokens(), SUPPORTS[support], LOW_RANKS[kind])
    assert_same_bits(results(machine, tokens(), SUPPORTS[support], LOW_RANKS[kind]), base)
    for layout in ("tokens before heads", "part of a larger one", "unaligned"):
        given = [LAYOUTS[layout](t) for t in tokens()]
        assert_same_bits(results(machine, given, SUPPORTS[support], LOW_RANKS[kind]), base)


@pytest.mark.parametrize(("support", "kind"), CAUSAL_PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_of_the_past_depends_on_the_future(
    machine: Machine, support: str, kind: str, dtype: torch.dtype
) -> None:
    given = [t.to(dtype) for t in tokens()]
    base = attend(machine, given, SUPPORTS[support], LOW_RANKS[kind], is_causal=True)
    for edge in (1, 64, 101):
        for content in (1e4, torch.nan):
            changed = [t.clone() for t in given]
            for t in changed:
                t[:, :, edge:] = content
            got = attend(machine, changed, SUPPORTS[support], LOW_RANKS[kind], is_causal=True)
            assert_same_bits([t[:, :, :edge] for t in got], [t[:, :, :edge] for t in base], ("out", "lse"))


@pytest.mark.parametrize("pattern", ["right", "left", "holes"])
@pytest.mark.parametrize(("support", "kind"), PAIRS)
def test_no_bit_depends_on_what_padding_holds(machine: Machine, support: str, kind: str, pattern: str) -> None:
    n = tokens()[0].shape[2]
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[:, {"right": slice(n - 31, None), "left": slice(0, 31), "holes": slice(3, None, 4)}[pattern]] = True
    found = []
    for content in (0.0, 1e4, torch.nan):
        given = [t.masked_fill(mask[:, None, :, None], content) for t in tokens()]
        arguments = dict(is_causal=kind != "centroid", key_padding_mask=mask)
        found.append(attend(machine, given, SUPPORTS[support], LOW_RANKS[kind], **arguments))
    for got in found[1:]:
        assert_same_bits(got, found[0], ("out", "lse"))


@pytest.mark.parametrize(("support", "kind"), PAIRS)
def test_no_bit_depends_on_how_much_padding_there_is(machine: Machine, support: str, kind: str) -> None:
    base = results(machine, tokens(), SUPPORTS[support], LOW_RANKS[kind])
    n = tokens()[0].shape[2]
    for left, right in ((0, 77), (64, 3)):
        mask = pad(torch.zeros(1, n, dtype=torch.bool), (left, right), value=True)
        given = [pad(t, (0, 0, left, right), value=1e4) for t in tokens()]
        got = attend(machine, given, SUPPORTS[support], LOW_RANKS[kind], key_padding_mask=mask)
        assert_same_bits([t[:, :, left : left + n] for t in got], base[:2], ("out", "lse"))


# -------------------- streams, graphs, synchronisation


def step_on_gpu(
    support: str, kind: str, is_causal: bool = False, backward: bool = True, seed: int = 0
) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """Leaves on the GPU, and a call that computes out and their gradients."""
    low_rank = LOW_RANKS[kind]
    inputs = [rand(1, heads, 130, 24, seed=seed + i).cuda() for i, heads in enumerate((4, 2, 2))]
    upstream = rand(1, 4, 130, 24, seed=seed + 5).cuda()
    arguments = dict(low_rank=low_rank, statistics=placed(statistics_of(low_rank), Gpu.device), is_causal=is_causal)

    def step() -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [sb.attention(*inputs, SUPPORTS[support], **arguments)]
        given = leaves(inputs)
        out = sb.attention(*given, SUPPORTS[support], **arguments)
        return [out.detach(), *torch.autograd.grad(out, given, upstream)]

    return inputs, step


CALLS = [(*pair, False) for pair in PAIRS] + [(*pair, True) for pair in CAUSAL_PAIRS]
DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])


@needs_gpu
@DIRECTIONS
@pytest.mark.parametrize(("support", "kind", "is_causal"), CALLS)
def test_calls_do_not_wait_for_the_device(support: str, kind: str, is_causal: bool, backward: bool) -> None:
    _, step = step_on_gpu(support, kind, is_causal, backward)
    step()  # what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@DIRECTIONS
@pytest.mark.parametrize(("support", "kind", "is_causal"), CALLS)
def test_calls_can_be_captured_in_a_graph(support: str, kind: str, is_causal: bool, backward: bool) -> None:
    inputs, step = step_on_gpu(support, kind, is_causal, backward)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    others, other_step = step_on_gpu(support, kind, is_causal, backward, seed=20)
    for mine, other in zip(inputs, others):
        mine.copy_(other)
    graph.replay()
    want = other_step()
    torch.cuda.synchronize()
    # The gradient that arrives is part of the graph.
    assert_same_bits(kept[:1], want[:1])
    if backward:
        assert_same_bits(kept, step())


@needs_gpu
@DIRECTIONS
@pytest.mark.parametrize(("support", "kind"), PAIRS)
def test_calls_run_on_the_current_stream(support: str, kind: str, backward: bool) -> None:
    """Inputs come late on a side stream: a kernel on another one would read what was there before."""
    inputs, step = step_on_gpu(support, kind, backward=backward)
    want = [t.clone() for t in step()]
    torch.cuda.synchronize()
    saved = [t.clone() for t in inputs]
    for t in inputs:
        t.fill_(torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for t, value in zip(inputs, saved):
            t.copy_(value)
        got = step()
    stream.synchronize()
    assert_same_bits(got, want)


@needs_gpu
def test_calls_run_on_the_device_of_their_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    given = qkv(70)
    out = [sb.attention(*(t.to(f"cuda:{i}") for t in given), sb.Window(16), sb.Favor(16)) for i in range(2)]
    assert out[1].device.index == 1 and torch.cuda.current_device() == 0
    assert_same_bits([out[1].cpu()], [out[0].cpu()])


@needs_gpu
def test_operators_refuse_a_tensor_of_another_device() -> None:
    """A kernel would read the host's memory, or that of another device."""
    x, weight = rand(1, 2, 9, 16), rand(1, 2, 3, 16)
    with pytest.raises(RuntimeError, match="expected all tensors of a call on CUDA device 0"):
        torch.ops.scatterbrain.project(x.cuda(), weight, None)
    mask = torch.zeros(1, 9, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="expected all tensors of a call on CUDA device 0"):
        torch.ops.scatterbrain.cluster(x.cuda(), x.cuda(), None, mask, None, None, None, 4, 0.3)


@needs_gpu
def test_tensors_on_different_devices_are_named() -> None:
    query, key, value = qkv(20)
    with pytest.raises((RuntimeError, ValueError, TypeError), match="device"):
        sb.attention(query.cuda(), key, value, sb.Window(4), None)


@needs_gpu
def test_kernels_are_stages_of_a_profile() -> None:
    _, step = step_on_gpu("window", "quadratic")
    step()
    with sb.profile() as profile:
        step()
        step()
    assert profile.stages["attention_forward"].calls >= 2 and profile.stages["project"].calls >= 2
    assert all(stage.seconds > 0 for stage in profile.stages.values())
    assert sum(stage.seconds for stage in profile.stages.values()) <= profile.total


@needs_gpu
def test_the_benchmark_measures_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    from scatterbrain.bench.config import BenchConfig
    from scatterbrain.bench.runner import run

    methods = ["sdpa", "window-64", "routed-64+centroid", "torch-window-64", "torch-performer-64", "torch-clusters-64"]
    file = tmp_path / "out.json"
    config = BenchConfig(device="cuda", lengths=[512], methods=methods, dtypes=["bfloat16"], repeats=3, json=file)
    assert run(config) == 0
    content = json.loads(file.read_text())
    assert content["facts"]["clock"] == "CUDA events"
    assert [row["note"] for row in content["rows"]] == [""] * 12
    for row in content["rows"]:
        assert 0 < row["fastest"] <= row["seconds"] < 10 and row["peak_bytes"] >= 512 * 4 * 64 * 2, row["method"]


# -------------------- large tensors


@needs_gpu
@pytest.mark.parametrize("kind", ["none", "quadratic"])
def test_tensors_of_more_than_two_to_the_31_elements(kind: str) -> None:
    """The last head's bits are those of a call on it alone."""
    heads, n = 1050, 1 << 15
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs a device with 60 GB")
    generator = torch.Generator("cuda").manual_seed(0)
    given = [torch.randn(1, heads, n, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3)]
    assert given[0].numel() > 2**31
    low_rank = LOW_RANKS[kind]
    others = rand(1, 1, 99, 64, seed=4), rand(1, 1, 99, 64, seed=5)
    one = sb.fit_statistics(*others, 4) if kind == "quadratic" else None
    every = None
    if one is not None:
        repeated = {name: t.expand(heads, *t.shape[1:]) for name, t in vars(one).items() if isinstance(t, Tensor)}
        every = replace(one, **repeated)
    with torch.no_grad():
        out = sb.attention(*given, sb.Window(16), low_rank, statistics=placed(every, Gpu.device))
        for head in (0, heads - 1):
            alone = [t[:, head : head + 1].contiguous() for t in given]
            want = sb.attention(*alone, sb.Window(16), low_rank, statistics=placed(one, Gpu.device))
            assert_same_bits([out[:, head : head + 1]], [want])
    del out, given, want, alone
    torch.cuda.empty_cache()


# -------------------- modules and libraries


@contextmanager
def on_device(machine: Machine) -> Iterator[torch.device]:
    with machine.installed():
        yield machine.device


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    error = float((got.detach().cpu() - want.detach()).norm() / want.detach().norm())
    assert error <= tolerance, error


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_module_gives_the_results_and_gradients_of_the_cpu(machine: Machine, is_causal: bool) -> None:
    torch.manual_seed(0)
    core = dict(support=sb.Window(16), low_rank=sb.Quadratic(4, "learned"))
    module = sb.MultiheadAttention(32, 4, batch_first=True, **core)
    randomized(module, 0.3)
    x, mask = rand(2, 70, 32), causal_mask(70) if is_causal else None
    found = []
    for where in (nullcontext(torch.device("cpu")), on_device(machine)):
        with where as device:
            mine, given = copy.deepcopy(module).to(device), x.to(device, copy=True).requires_grad_()
            hint = dict(attn_mask=placed(mask, device), is_causal=is_causal, need_weights=False)
            out, _ = mine(given, given, given, **hint)
            out.square().sum().backward()
            found.append([out, given.grad, *(p.grad for p in mine.parameters() if p.grad is not None)])
    for got, want in zip(found[1], found[0], strict=True):
        assert_close(got, want)


def test_a_module_is_calibrated_and_saved_on_the_device(machine: Machine) -> None:
    module = sb.ScatterbrainAttention(4, 24, num_kv_heads=2, support=sb.Window(16), low_rank=sb.Quadratic(4))
    given = tokens(4)[:2] + [rand(1, 2, 130, 24, seed=3)]
    with on_device(machine) as device:
        module.to(device)
        with sb.calibrate(module), torch.no_grad():
            module(*placed(given, device))
        got = module(*placed(given, device))
    other = sb.ScatterbrainAttention(4, 24, num_kv_heads=2, support=sb.Window(16), low_rank=sb.Quadratic(4))
    other.load_state_dict(placed(dict(module.state_dict()), torch.device("cpu")))
    assert_close(got, other(*given))


def test_autocast_computes_in_half_precision(machine: Machine) -> None:
    given, low_rank = tokens(), LOW_RANKS["quadratic"]
    want = attend(machine, given, sb.Window(16), low_rank)[0]
    with torch.autocast(machine.device.type, torch.bfloat16):
        got = attend(machine, given, sb.Window(16), low_rank)[0]
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), want, 2e-2)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_gpu)])
def test_a_compiled_call_gives_the_same_results(machine: Machine, backend: str) -> None:
    torch._dynamo.reset()
    call = partial(sb.attention, support=sb.Window(16), low_rank=sb.Favor(16), is_causal=True)
    compiled = torch.compile(lambda *t: call(*t) * 2, backend=backend)
    found = []
    with on_device(machine) as device:
        for function in (compiled, lambda *t: call(*t) * 2):
            inputs = leaves(placed(tokens(), device))
            out = function(*inputs)
            found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for got, want in zip(*found):
        assert_close(got, want.cpu(), 1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_transformers_model_gives_the_results_of_the_cpu(machine: Machine, name: str) -> None:
    hf = pytest.importorskip("transformers")
    common = dict(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    torch.manual_seed(0)
    if name == "bert":
        model = hf.BertModel(hf.BertConfig(**common, attn_implementation="sdpa")).eval()
    else:
        model = hf.LlamaModel(hf.LlamaConfig(**common, num_key_value_heads=2, attn_implementation="sdpa")).eval()
    words = torch.randint(1, 60, (2, 90), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(words)
    mask[1, 70:] = 0
    sb.replace_attention(model, sb.Window(16), sb.Quadratic(4))
    with sb.calibrate(model), torch.no_grad():
        model(words)
    want = model(words, attention_mask=mask).last_hidden_state[mask.bool()]
    with on_device(machine) as device:
        model.to(device)
        out = model(words.to(device), attention_mask=mask.to(device)).last_hidden_state
        out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert_close(out.cpu()[mask.bool()], want)


def test_the_default_pair_runs_in_an_encoder(machine: Machine) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 80, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    sb.replace_attention(model)
    x = rand(1, 200, 64)
    with on_device(machine) as device:
        out = model.to(device)(x.to(device))
        out.square().sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_decoder_learns(machine: Machine) -> None:
    """A few steps of the trainer on a text that repeats; ``train --train.device cuda`` runs the same."""
    from scatterbrain.training.batch import Batch
    from scatterbrain.training.config import ModelConfig, TrainConfig
    from scatterbrain.training.models.decoder import Decoder
    from scatterbrain.training.train_step import TrainState

    def attention(heads: int, kv_heads: int, head_dim: int) -> nn.Module:
        support, low_rank = sb.presets.train(32)
        return sb.ScatterbrainAttention(heads, head_dim, num_kv_heads=kv_heads, support=support, low_rank=low_rank)

    config = ModelConfig(width=32, layers=2, heads=2)
    steps = 12 if ON_GPU else 4
    with on_device(machine) as device:
        train = TrainConfig(device=str(device), bf16=ON_GPU)
        state = TrainState(lambda factory, generator: Decoder(config, 8, factory, generator), train, attention)
        text = torch.arange(97).repeat(2, 1) % 8
        losses = [state.step([Batch(text[:, :-1], text[:, 1:])], 1e-2) for _ in range(steps)]
    assert losses[-1].loss < losses[0].loss - 0.1
    assert all(0 < step.attention_seconds < step.seconds for step in losses)


def captured(machine: Machine, step: Callable[[], Any]) -> Callable[[], Any]:
    """``step`` as a CUDA graph, after three runs on a stream of its own; the emulator runs the step itself."""
    if not ON_GPU:
        for _ in range(3):
            step()
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_training_step_can_be_captured_in_a_graph(machine: Machine, dtype: torch.dtype) -> None:
    """The example model: forward, backward, clipping and AdamW. Replayed on new batches it gives the parameters of the
    same steps without a graph."""
    from scatterbrain.training.config import ModelConfig
    from scatterbrain.training.models.decoder import Decoder

    batch, length = (2, 130) if ON_GPU else (1, 58)  # more than the support covers

    def attention(heads: int, kv_heads: int, head_dim: int) -> nn.Module:
        support, low_rank = sb.presets.train(32)
        return sb.ScatterbrainAttention(heads, head_dim, num_kv_heads=kv_heads, support=support, low_rank=low_rank)

    def twin(device: torch.device) -> tuple[nn.Module, Tensor, Callable[[], None]]:
        torch.manual_seed(0)
        model = Decoder(ModelConfig(width=32, layers=2, heads=2), 8, attention).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, capturable=ON_GPU)
        text = torch.zeros(batch, length, dtype=torch.int64, device=device)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
                logits = model(text[:, :-1])
            nn.functional.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return model, text, step

    texts = [torch.randint(0, 8, (batch, length), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with on_device(machine) as device:
        (model, text, step), (other, other_text, other_step) = twin(device), twin(device)
        text.copy_(texts[0])
        replay = captured(machine, step)
        other_text.copy_(texts[0])
        for _ in range(3):
            other_step()
        for new in texts:
            text.copy_(new), other_text.copy_(new)
            replay(), other_step()
    assert_same_bits([p.cpu() for p in model.parameters()], [p.cpu() for p in other.parameters()])


def test_clusters_have_the_same_bits_every_time(machine: Machine) -> None:
    query, key, _ = placed(tuple(tokens()), machine.device)
    with machine.installed():
        first, second = (placed(sb.cluster(query, key, 16), torch.device("cpu")) for _ in range(2))
    assert_same_bits(fields(second), fields(first), ("index", "representatives", "log_mass", "query_mean"))


@pytest.mark.parametrize("queries", [0, 5])
@pytest.mark.parametrize("keys", [0, 7])
def test_empty_inputs_are_fine(machine: Machine, queries: int, keys: int) -> None:
    for low_rank in (None, sb.Favor(8)):
        given = [rand(1, 2, queries, 16), rand(1, 2, keys, 16), rand(1, 2, keys, 16)]
        out, lse, *gradients = results(machine, given, sb.Window(4), low_rank)
        assert out.shape == (1, 2, queries, 16) and (keys or (not out.any() and (lse == -torch.inf).all()))
        assert [t.shape for t in gradients] == [t.shape for t in given]
