"""Which modules of a transformers model are attention, and the ScatterbrainAttention that each of them owns."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scatterbrain.integrations.restrictions import NotReplaceable, query_by_query
from scatterbrain.low_rank import LowRank, Quadratic
from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.supports import Full, Support

CORE = "scatterbrain"  # attribute of an attention module, and so part of the names in its state dict
PARKED = "_scatterbrain_parked"  # where it waits, outside of the state dict, while another implementation runs
PER_LAYER = "scatterbrain:per_layer"  # implementation whose layers are exact unless they own a ScatterbrainAttention

_INTERFACE = ("ALL_ATTENTION_FUNCTIONS", "AttentionInterface")
_CROSS = re.compile(r"key_value|encoder|cross|context|memory|latent|image|vision|text|media|kv|query|queries|value")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_attn_heads", "encoder_attention_heads")
_HEAD_DIM = (
    "head_dim",
    "attention_head_size",
    "qk_head_dim",
    "head_size",
    "key_value_proj_dim",
    "dim_per_head",
    "d_kv",
)
_QUERY = ("q_proj", "query", "q", "to_q", "q_lin", "linear_q")
_KEY = ("k_proj", "key", "k", "to_k", "k_lin", "linear_k")


def routes(cls: type[nn.Module]) -> bool:
    """Whether modules of this class ask transformers' AttentionInterface for their attention function."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and any(name in code.co_names for name in _INTERFACE)


def implementation(module: nn.Module) -> str | None:
    """The attention implementation that a module's configuration names."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the modules whose attention function can be chosen, each once."""
    for path, module in model.named_modules():
        if routes(type(module)) and hasattr(module, "config"):
            yield path, module


# -------------------- geometry


class Geometry(NamedTuple):
    num_heads: int
    head_dim: int
    num_kv_heads: int


def geometry_of(module: nn.Module) -> Geometry | None:
    """Heads of an attention module as its attributes, projections and configuration tell; None where they do not."""
    head_dim = _first_int(module, _HEAD_DIM)
    heads = _first_int(module, _HEADS)
    if head_dim is None and heads is not None:
        width = _out_features(module, _QUERY) or _first_int(module, ("embed_dim", "hidden_size", "all_head_size"))
        head_dim = width // heads if width else None
    if head_dim is None:
        return None
    query_width, key_width = _out_features(module, _QUERY), _out_features(module, _KEY)
    heads = query_width // head_dim if query_width else heads or _first_int(module.config, _HEADS)
    if heads is None:
        return None
    if key_width:
        kv_heads = key_width // head_dim
    else:
        groups = _first_int(module, ("num_key_value_groups", "n_rep"))
        kv_heads = heads // groups if groups else _first_int(module, ("num_key_value_heads", "num_kv_heads")) or heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        return None
    return Geometry(heads, head_dim, kv_heads)


def _first_int(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _out_features(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for name in names:
        width = getattr(getattr(module, name, None), "out_features", None)
        if isinstance(width, int):
            return width
    return None


# -------------------- the attention that a module owns


def core_of(module: nn.Module) -> ScatterbrainAttention | None:
    """The ScatterbrainAttention of an attention module; None where it has none."""
    return module._modules.get(CORE)


def attach(
    module: nn.Module,
    support: Support,
    low_rank: LowRank,
    path: str = "",
    geometry: Geometry | None = None,
    seed: int = 0,
) -> ScatterbrainAttention:
    """Gives an attention module its ScatterbrainAttention.

    Cross-attention gets a support of :func:`cross_support`. One that is there already, or was before another
    implementation was chosen, keeps its calibration and its learned projections if its low-rank kernel is the same: a
    support owns no state.

    Args:
        module: an attention module of transformers.
        support, low_rank: its settings.
        path: where the module is in the model; tells self-attention from cross-attention.
        geometry: the heads; default what the module tells, checked against the first tensors.
        seed: of random projections; the generators of the program are left as they are.

    Raises:
        ValueError: the heads are too narrow for the rank of the low-rank kernel.
    """
    if not _is_self(module, path):
        support = cross_support(support, low_rank)[0]
    core = core_of(module) or module.__dict__.get(PARKED)
    known = geometry or geometry_of(module)
    if core is None or core.low_rank != low_rank or (geometry is not None and _geometry(core) != geometry):
        rank = low_rank.rank if isinstance(low_rank, Quadratic) else 1
        core = _build(known or Geometry(1, rank, 1), support, low_rank, seed)
        core.is_self = _is_self(module, path)
        core.is_guess = geometry is None
    core.support = support
    module.__dict__.pop(PARKED, None)
    device = next((p.device for p in module.parameters(recurse=False) or ()), None)
    device = device or next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type != "meta":
        core.to(device)
    core.train(module.training)
    setattr(module, CORE, core)
    return core


def park(module: nn.Module) -> None:
    """Takes the ScatterbrainAttention out of the module and of its state dict, and keeps it for its return."""
    core = module._modules.pop(CORE, None)
    if core is not None:
        module.__dict__[PARKED] = core


def detach(module: nn.Module) -> None:
    """Drops the ScatterbrainAttention of a module, parked or not."""
    module._modules.pop(CORE, None)
    module.__dict__.pop(PARKED, None)


def _build(geometry: Geometry, support: Support, low_rank: LowRank, seed: int) -> ScatterbrainAttention:
    """On the CPU in float32 whatever the defaults are while a model is built, and without touching its random numbers:
    the weights drawn after this are those of the same model with another implementation."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            torch.manual_seed(torch.initial_seed() + seed)
            return ScatterbrainAttention(*geometry, support=support, low_rank=low_rank)
        finally:
            torch.set_default_dtype(dtype)


def _geometry(core: ScatterbrainAttention) -> Geometry:
    return Geometry(core.num_heads, core.head_dim, core.num_kv_heads)


def fit_to(module: nn.Module, core: ScatterbrainAttention, query: Tensor, key: Tensor) -> None:
    """Builds ``core`` anew, in place, if what the module told of its heads is not what came, before it holds anything."""
    came = Geometry(query.shape[1], query.shape[3], key.shape[1])
    if _geometry(core) == came or not getattr(core, "is_guess", False):
        return  # a mismatch is an error of ScatterbrainAttention's own
    if core.is_calibrated or any(True for _ in core.parameters()):
        raise ValueError(
            f"{type(module).__name__}: its ScatterbrainAttention was made for {_geometry(core)}, got {came}; it holds "
            "calibration or learned projections, which do not fit: attach it anew with set_attn_implementation"
        )
    fresh = _build(came, core.support, core.low_rank, 0).to(query.device)
    for name, buffer in fresh._buffers.items():
        core._buffers[name] = buffer
    core.num_heads, core.head_dim, core.num_kv_heads = came
    core.is_guess = False


def cross_support(support: Support, low_rank: LowRank) -> tuple[Support, str]:
    """A support for cross-attention, where a target token must not see those after it through what chooses its keys,
    and a note if it is another one than asked for: exact attention if there is none."""
    try:
        return query_by_query(support, low_rank)
    except NotReplaceable as reason:
        return Full(), f"exact: {reason}"


def cross_note(module: nn.Module, path: str, support: Support, low_rank: LowRank) -> str:
    """What of ``support`` is otherwise in this layer, for a report."""
    return "" if _is_self(module, path) else cross_support(support, low_rank)[1]


def _is_self(module: nn.Module, path: str) -> bool:
    """Whether queries and keys are the same tokens: so it is called, or its forward takes nothing else."""
    names = ".".join(path.split(".")[-2:])
    if getattr(module, "is_cross_attention", False) or "cross" in f"{names} {type(module).__name__}".lower():
        return False
    if "self" in names.lower() or "self" in type(module).__name__.lower():
        return True
    others = {name for name in _parameters(type(module)) if _CROSS.search(name)}
    has_encoder = getattr(module.config, "is_encoder_decoder", False) or getattr(
        module.config, "add_cross_attention", False
    )
    return not others or (others == {"key_value_states"} and not has_encoder)


def _parameters(cls: type[nn.Module]) -> list[str]:
    return list(inspect.signature(inspect.unwrap(cls.forward)).parameters)[1:]


# -------------------- dropout


def set_attention_dropout(model: nn.Module, p: float = 0.0) -> list[str]:
    """Sets the dropout on attention weights of every attention layer of ``model``, whose attribute each family of
    models names otherwise. Other dropout stays.

    Returns:
        Paths of the layers that were changed.
    """
    changed = []
    for path, module in attention_layers(model):
        for name in ("attention_dropout", "attn_dropout", "dropout", "dropout_p", "attention_probs_dropout_prob"):
            value = getattr(module, name, None)
            if isinstance(value, nn.Dropout):
                value.p, is_set = p, value.p != p
            elif isinstance(value, float):
                setattr(module, name, p)
                is_set = value != p
            else:
                continue
            changed += [path] if is_set else []
            break
    return changed


def needs_calibration(core: ScatterbrainAttention) -> bool:
    """Whether running ``core`` now would raise for want of statistics."""
    if isinstance(core.support, Full) or not isinstance(core.low_rank, Quadratic):
        return False
    return core.low_rank.statistics == "stored" and not core.is_calibrated and not core.is_collecting
