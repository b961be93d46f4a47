"""transformers' models under torch.compile, torch.export and torch.func: what is approximated without a trace is
approximated in the graph, and rows of packed sequences stay right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
import hf_models as hf
from testkit import cores

import scatterbrain as sb
from scatterbrain.integrations.transformers import SETTINGS, register

ROUTED = register("scatterbrain:traced", sb.Routed(32, block_q=8), sb.Quadratic(5))
LEARNED = register("scatterbrain:traced-learned", sb.Window(16), sb.Quadratic(5, "learned"))
SPLIT = 70  # tokens of the first sequence of a packed row
ROW = torch.arange(hf.TOKENS)
PACKED = torch.stack([ROW % SPLIT] * 2)
EXACT = "ignore:.*exact attention, without approximation"
ATTENTION = torch.ops.scatterbrain.attention.default


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calibrated(name: str = "llama", implementation: str = ROUTED, **arguments: object) -> nn.Module:
    model = hf.FAMILIES[name].build(implementation, num_hidden_layers=1, **arguments)
    if SETTINGS[implementation].low_rank.statistics == "stored":
        with sb.calibrate(model):
            hf.run(model, **hf.inputs(name)[0])
    return model


def compiled(model: nn.Module, dynamic: bool | None = None) -> tuple[list[torch.fx.Graph], nn.Module]:
    """The graphs of operators that compiling makes, of forward and backward passes, and the model that fills them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    return graphs, torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)


def assert_approximated(graph: torch.fx.Graph) -> None:
    """The layer runs the operator, and nothing is as large as queries times keys."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert sum(node.target is ATTENTION for node in calls) == 1
    assert not any("scaled_dot_product" in str(node.target) for node in calls)
    sizes = [node.meta["val"].shape for node in calls if isinstance(node.meta.get("val"), Tensor)]
    assert sizes and not [shape for shape in sizes if _is_pairs(shape)]


def _is_pairs(shape: torch.Size) -> bool:
    """Whether a tensor has an entry for each pair of tokens; lengths may be symbols."""
    sizes = [str(size) for size in shape[-2:]]
    return len(sizes) == 2 and sizes[0] == sizes[1] and sizes[0] not in ("1", "2", str(hf.WIDTH))


# -------------------- what runs


CALLS = {
    "tokens alone": (None, {}),
    "any length": (True, {}),
    "a cache": (None, {"use_cache": True}),
    "a mask": (None, {"attention_mask": hf.keep("left")}),
    "a mask that keeps every token": (True, {"attention_mask": torch.ones(2, hf.TOKENS, dtype=torch.long)}),
}


@pytest.mark.parametrize("dynamic, call", CALLS.values(), ids=CALLS)
def test_compiling_changes_no_bit(dynamic: bool | None, call: dict) -> None:
    model, arguments = calibrated(), {"input_ids": hf.tokens(), "use_cache": False} | call
    graphs, traced = compiled(model, dynamic)
    assert torch.equal(hf.run(traced, **arguments), hf.run(model, **arguments))
    (graph,) = graphs
    assert_approximated(graph)


@pytest.mark.parametrize("kind, mask", [("dynamic", None), ("static", hf.keep("left"))], ids=["dynamic", "static"])
def test_compiling_with_a_cache_changes_no_bit(kind: str, mask: Tensor | None) -> None:
    model, ids = calibrated(), hf.tokens()
    graphs, traced = compiled(model)
    cuts = (SPLIT, hf.TOKENS)
    assert torch.equal(hf.in_pieces(traced, ids, cuts, mask, kind), hf.in_pieces(model, ids, cuts, mask, kind))
    for graph in graphs:
        assert_approximated(graph)


@pytest.mark.parametrize(
    "kind, dynamic, is_exact", [("dynamic", False, True), ("dynamic", None, False), ("static", False, False)]
)
def test_a_few_tokens_behind_a_cache_are_exact_where_the_graph_knows_of_it(
    kind: str, dynamic: bool | None, is_exact: bool
) -> None:
    model, ids, cuts = calibrated(), hf.tokens(), (hf.TOKENS - 10, hf.TOKENS)
    graphs, traced = compiled(model, dynamic)
    same = torch.equal(hf.in_pieces(traced, ids, cuts, kind=kind), hf.in_pieces(model, ids, cuts, kind=kind))
    assert same == is_exact
    assert [sum(node.target is ATTENTION for node in graph.nodes) for graph in graphs] == [1, 0 if is_exact else 1]


def test_a_window_that_covers_the_sequence_is_approximated_in_the_graph() -> None:
    model = calibrated("mistral with a window", sliding_window=300)
    graphs, traced = compiled(model)
    assert torch.equal(hf.run(traced, input_ids=hf.tokens(), use_cache=False), hf.run(model, input_ids=hf.tokens()))
    assert_approximated(*graphs)


@pytest.mark.filterwarnings(EXACT)
def test_a_window_that_hides_keys_stays_exact_in_the_graph() -> None:
    model = hf.FAMILIES["mistral with a window"].build(ROUTED, num_hidden_layers=1)
    graphs, traced = compiled(model)
    arguments = {"input_ids": hf.tokens(), "use_cache": False}
    torch.testing.assert_close(hf.run(traced, **arguments), hf.run(model, **arguments))
    assert not any(node.target is ATTENTION for node in graphs[0].nodes)


# -------------------- packed rows


@pytest.mark.filterwarnings(EXACT)
def test_packed_rows_stay_exact_in_a_graph_that_approximates_others() -> None:
    model, ids = calibrated(), hf.tokens()
    graphs, traced = compiled(model)
    for positions in (PACKED, torch.stack([ROW, ROW]), torch.stack([PACKED[0], ROW])):
        arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        torch.testing.assert_close(hf.run(traced, **arguments), hf.run(model, **arguments), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    other = torch.cat([hf.tokens(SPLIT, seed=5), ids[:, SPLIT:]], 1)
    arguments = {"position_ids": PACKED, "use_cache": False}
    got, changed = hf.run(traced, input_ids=ids, **arguments), hf.run(traced, input_ids=other, **arguments)
    assert torch.equal(got[:, SPLIT:], changed[:, SPLIT:]) and not torch.equal(got[:, :SPLIT], changed[:, :SPLIT])


def test_packed_rows_in_a_graph_say_that_they_are_exact() -> None:
    model = calibrated()
    _, traced = compiled(model)
    with pytest.warns(UserWarning, match="packed sequences run exact attention.*pad the sequences into a batch"):
        hf.run(traced, input_ids=hf.tokens(), position_ids=PACKED, use_cache=False)


@pytest.mark.filterwarnings(EXACT)
def test_layers_that_are_exact_separate_packed_rows_in_the_graph_too() -> None:
    model = hf.FAMILIES["llama"].build()  # two layers
    sb.replace_attention(model, sb.Window(16), sb.Quadratic(5, "learned"), where=lambda path: "layers.1." in path)
    _, traced = compiled(model)
    arguments = {"input_ids": hf.tokens(), "position_ids": PACKED, "use_cache": False}
    torch.testing.assert_close(hf.run(traced, **arguments), hf.run(model, **arguments), rtol=1e-4, atol=1e-5)


# -------------------- training


@pytest.mark.parametrize("positions", [None, PACKED], ids=["one sequence", "packed"])
@pytest.mark.filterwarnings(EXACT)
def test_compiled_training_with_gradient_checkpointing_has_the_gradients_of_training_without(
    positions: Tensor | None,
) -> None:
    model = calibrated("llama", LEARNED).train()
    model.activation_checkpointing_enable()
    arguments = {"input_ids": hf.tokens(), "position_ids": positions, "use_cache": False}
    graphs, traced = compiled(model)
    results = []
    for called in (model, traced):
        hf.output(called(**arguments)).square().mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    want, got = results
    assert_approximated(graphs[0])
    assert len(cores(model)) == 1 and set(want) <= set(got)
    for name, gradient in got.items():
        if name in want:
            torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6)
        else:  # of packed rows, which use no projection
            assert not gradient.any()


# -------------------- export


def exported(model: nn.Module, arguments: dict, strict: bool) -> nn.Module:
    lengths = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in arguments}
    with torch.no_grad():
        program = torch.export.export(
            model, (), arguments | {"use_cache": False}, dynamic_shapes=lengths | {"use_cache": None}, strict=strict
        )
    assert_approximated(program.graph)
    return program.module()


def test_an_exported_decoder_serves_other_lengths_without_a_mask() -> None:
    model = calibrated()
    program = exported(model, {"input_ids": hf.tokens()}, strict=False)
    for count, batch in ((hf.TOKENS, 2), (133, 3)):
        arguments = {"input_ids": hf.tokens(count, batch=batch), "use_cache": False}
        assert torch.equal(hf.run(program, **arguments), hf.run(model, **arguments))


class Logits(nn.Module):
    """The logits of a decoder without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return hf.output(self.model(input_ids=input_ids, use_cache=False))


BY_TOKEN = register("scatterbrain:traced-by-token", sb.Window(16, block_q=1), sb.Quadratic(5, "learned"))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "implementation, least", [(BY_TOKEN, None), ("scatterbrain:full", None), (LEARNED, 17), (ROUTED, 9)]
)
def test_a_decoder_is_exported_for_a_range_of_lengths(implementation: str, least: int | None, strict: bool) -> None:
    """Any, or those of more than one block of queries: torch takes a tensor of one block for another case."""
    is_full = implementation == "scatterbrain:full"
    build = hf.FAMILIES["llama"].build
    model = build(implementation, num_hidden_layers=1) if is_full else calibrated("llama", implementation)
    model, lengths = Logits(model.eval()), {1: torch.export.Dim("n", min=least, max=512)}
    with torch.no_grad():
        program = torch.export.export(model, (hf.tokens(),), dynamic_shapes=(lengths,), strict=strict).module()
        for count in (least or 2, 17, 33, 512):
            torch.testing.assert_close(program(hf.tokens(count)), model(hf.tokens(count)), rtol=1e-4, atol=1e-5)


class WithCache(nn.Module):
    """The logits of a decoder that fills a cache of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return hf.output(self.model(input_ids=input_ids, use_cache=True))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("implementation", [ROUTED, "scatterbrain:full"])
def test_an_exported_decoder_may_fill_a_cache(implementation: str, strict: bool) -> None:
    is_full = implementation == "scatterbrain:full"
    model = hf.FAMILIES["llama"].build(implementation, num_hidden_layers=1) if is_full else calibrated()
    model, lengths = WithCache(model.eval()), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(model, (hf.tokens(),), dynamic_shapes=(lengths,), strict=strict)
        if not is_full:
            assert_approximated(program.graph)
        for count, batch in ((hf.TOKENS, 2), (133, 3)):
            ids = hf.tokens(count, batch=batch)
            assert torch.equal(program.module()(ids), model(ids))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_an_exported_decoder_reads_the_mask_that_it_is_run_with() -> None:
    model = calibrated()
    example = {"input_ids": hf.tokens(), "attention_mask": torch.ones(2, hf.TOKENS, dtype=torch.long)}
    program = exported(model, example, strict=True)
    for side in ("none", "left", "right"):
        mask = hf.keep(side)
        arguments = {"input_ids": hf.tokens(), "attention_mask": mask, "use_cache": False}
        got, want = hf.run(program, **arguments), hf.run(model, **arguments)
        assert torch.equal(got[mask.bool()], want[mask.bool()])


@pytest.mark.filterwarnings(EXACT)
def test_an_exported_decoder_separates_packed_rows() -> None:
    model = calibrated()
    example = {"input_ids": hf.tokens(), "position_ids": torch.stack([ROW, ROW])}
    program = exported(model, example, strict=False)
    for positions in (PACKED, example["position_ids"]):
        arguments = {"input_ids": hf.tokens(), "position_ids": positions, "use_cache": False}
        torch.testing.assert_close(hf.run(program, **arguments), hf.run(model, **arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_a_decoder_exported_with_its_static_cache_approximates() -> None:
    from transformers import GenerationConfig
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    model, ids, sizes = calibrated(), hf.tokens(batch=1), {"batch_size": 1, "max_cache_len": hf.TOKENS + 28}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=sizes)
    exportable = TorchExportableModuleForDecoderOnlyLM(model, **sizes, device="cpu")
    program = exportable.export(input_ids=ids[:, :50], cache_position=torch.arange(50))
    assert_approximated(program.graph)
    run, positions = program.module(), torch.arange(hf.TOKENS)
    with torch.no_grad():
        got = [run(input_ids=ids[:, part], cache_position=positions[part]) for part in (slice(50), slice(50, None))]
    assert torch.equal(torch.cat(got, 1), hf.in_pieces(model, ids, (50, hf.TOKENS), kind="static"))


# -------------------- torch.func


def test_per_sample_gradients_are_those_of_a_loop_over_the_batch() -> None:
    model, ids, mask = calibrated("llama", LEARNED), hf.tokens(), hf.keep("right")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        call = {"input_ids": ids[None], "attention_mask": mask[None], "use_cache": False}
        logits = torch.func.functional_call(model, parameters, (), call).logits
        return (logits.square() * mask[None, :, None]).mean()

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, ids, mask)
    for row in range(2):
        model.zero_grad()
        loss(dict(model.named_parameters()), ids[row], mask[row]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(mapped[name][row], p.grad, rtol=1e-4, atol=1e-6)
