"""What users do with a model after they chose its attention: packaging, quantising, generating, tuning prefixes,
loading data in other processes. Adapters are in test_peft.py, DistributedDataParallel in
tests/distributed/test_ddp_paths.py."""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from testkit import assert_same_bits, cores, encoder, qkv, rand, run_python, with_biases
from torch import Tensor, nn

import scatterbrain as sb

EVERY_KEY = (sb.Window(512, block_q=8), sb.Quadratic(4, "learned"))  # exact attention, by this library's kernels
APPROXIMATED = (sb.Window(8, block_q=8), sb.Quadratic(4, "learned"))
NEW = 10  # tokens that are generated


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Deprecations inside of torch, transformers and peft."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", "(torch.quantize_per_tensor|TypedStorage)")
        yield


# -------------------- AOTInductor


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="compiles for Linux")
def test_aotinductor_packages_a_calibrated_module_for_any_length(tmp_path: Path):
    program = """
    import sys

    import torch
    from testkit import rand

    import scatterbrain as sb

    class SelfAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = sb.MultiheadAttention(32, 2, batch_first=True, support=sb.Routed(16, block_q=8))

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    module, example = SelfAttention().eval(), rand(2, 40, 32)
    with torch.no_grad():
        with sb.calibrate(module):
            module(example)
        tokens = torch.export.Dim("tokens", min=20, max=200)
        exported = torch.export.export(module, (example,), dynamic_shapes=({1: tokens},))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=sys.argv[1])
        loaded = torch._inductor.aoti_load_package(package)
        for count in (40, 77, 200):
            x = rand(2, count, 32, seed=count)
            torch.testing.assert_close(loaded(x), module(x))
    """
    done = run_python("-c", textwrap.dedent(program), tmp_path / "model.pt2", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


# -------------------- quantisation


def swapped_encoder() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    return with_biases(encoder(32, 2, nested=False)), lambda model: model(rand(2, 40, 32))


def swapped_vision_transformer() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    timm = pytest.importorskip("timm")
    arguments = {"img_size": 96, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    return model, lambda model: model(rand(2, 3, 96, 96))


def hugging_face(name: str) -> Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    def build() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        hf = pytest.importorskip("hf_models")
        return hf.FAMILIES[name].build(), lambda model: hf.output(model(input_ids=hf.tokens(40)))

    return build


MODELS = {
    "encoder": swapped_encoder,
    "timm": swapped_vision_transformer,
    "bert": hugging_face("bert"),
    "llama": hugging_face("llama"),
}


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    """torch's fused encoder layer does not know quantised layers."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def quantized(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear})


@torch.no_grad()
@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="no quantised kernels")
@pytest.mark.parametrize("name", MODELS)
def test_a_quantised_model_computes_what_the_quantised_exact_model_does(name: str):
    torch.manual_seed(0)
    model, run = MODELS[name]()
    exact = run(quantized(model))
    sb.replace_attention(model, *EVERY_KEY)
    ours = quantized(model)
    assert len(cores(ours)) == 2 and any("quantized" in type(m).__module__ for m in ours.modules())
    # Another rounding of attention may round an activation to the next of 256 steps.
    assert (run(ours) - exact).abs().mean() < 0.02 * exact.std()
    assert not torch.equal(run(ours), run(model))


# -------------------- generation


def names() -> dict[str, str]:
    """Implementations of transformers' attention by what they compute."""
    transformers = pytest.importorskip("scatterbrain.integrations.transformers")
    return {
        "exact": "sdpa",
        "full": "scatterbrain:full",
        "every key": transformers.register("scatterbrain:every-key", *EVERY_KEY),
        "approximated": transformers.register("scatterbrain:approximated", *APPROXIMATED),
    }


def left_padded() -> dict[str, Tensor]:
    hf = pytest.importorskip("hf_models")
    mask = hf.keep("left", 40)
    return {"input_ids": hf.tokens(40).masked_fill(mask == 0, hf.PAD), "attention_mask": mask}


def generated(kind: str, inputs: dict[str, Tensor] | None = None, **arguments: Any) -> Tensor:
    hf = pytest.importorskip("hf_models")
    model = hf.FAMILIES["llama"].build(names()[kind])
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": hf.PAD}
    return model.generate(**(inputs or left_padded()), **settings | arguments)[:, -NEW:]


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "beams, static cache": {"num_beams": 2, "cache_implementation": "static"},
    "beams, no cache": {"num_beams": 2, "use_cache": False},
}


@pytest.mark.parametrize("way", GENERATION)
def test_generation_with_left_padding_is_that_of_the_exact_implementation(way: str):
    exact = generated("exact", **GENERATION[way])
    assert exact.unique().numel() > 2
    assert torch.equal(generated("full", **GENERATION[way]), exact)
    assert torch.equal(generated("every key", **GENERATION[way]), exact)


@pytest.mark.parametrize("way", [way for way in GENERATION if "no cache" not in way])
def test_padding_does_not_change_what_is_generated(way: str):
    """Nor does what stands in it, nor the other rows of the batch."""
    padded = left_padded()
    other = {**padded, "input_ids": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, 7)}
    row = padded["attention_mask"][1].bool()
    alone = {name: tensor[1:, row] for name, tensor in padded.items()}
    first = generated("approximated", padded, **GENERATION[way])
    assert torch.equal(generated("approximated", other, **GENERATION[way]), first)
    rows = first.shape[0] // 2
    assert torch.equal(generated("approximated", alone, **GENERATION[way]), first[rows:])


# -------------------- prefix tuning


def prefix_tuned(kind: str) -> tuple[Tensor, Tensor]:
    """Logits of the tokens that count, and the gradient of the prefix."""
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("hf_models")
    model = hf.FAMILIES["llama"].build(names()[kind])
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    inputs = left_padded()
    out = model.train()(**inputs).logits[inputs["attention_mask"].bool()]
    out.square().mean().backward()
    (prefix,) = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return out.detach(), prefix


@pytest.mark.filterwarnings("ignore:the learned projections")
def test_prefix_tuning_has_the_gradients_of_the_exact_implementation():
    out, gradient = prefix_tuned("exact")
    for kind in ("full", "every key"):
        ours, of_prefix = prefix_tuned(kind)
        torch.testing.assert_close(ours, out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_prefix, gradient, rtol=1e-4, atol=1e-7)
    approximated, of_prefix = prefix_tuned("approximated")
    assert not torch.allclose(approximated, out, atol=1e-2) and of_prefix.any()


# -------------------- other processes


class Attended(torch.utils.data.Dataset):
    """Outputs and gradients, computed where the data are loaded."""

    def __init__(self) -> None:
        self.module = sb.ScatterbrainAttention(2, 8, 1, sb.Routed(16, block_q=8), sb.Quadratic(4, "learned"))

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[Tensor]:
        query, key, value = qkv(300, seed=index)
        out = self.module(query.requires_grad_(), key, value)
        return [out.detach(), torch.autograd.grad(out.square().sum(), query)[0]]


def load_with_workers(start: str) -> None:
    data = Attended()
    torch.set_num_threads(2)
    here = [data[i] for i in range(len(data))]  # OpenMP has threads before the workers are forked
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=1 + (start == "fork"), multiprocessing_context=start, timeout=240
    )
    for mine, theirs in zip(loader, here, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("start", [pytest.param("fork"), pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_that_load_data_compute_the_same_bits(start: str):
    """In a process of its own: torch forbids gradients in a fork of one whose autograd has started threads."""
    done = run_python(__file__, start, seconds=300)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    load_with_workers(sys.argv[1])
