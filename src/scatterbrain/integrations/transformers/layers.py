"""Which modules of a transformers model are attention, and the ScatterbrainAttention that each of them owns."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scatterbrain.integrations.restrictions import NotReplaceable, pairs_that_run
from scatterbrain.integrations.transformers.masks import is_silent
from scatterbrain.integrations.transformers.registry import SETTINGS, Settings, add
from scatterbrain.layer_settings import LayerSettings
from scatterbrain.low_rank import Heads
from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.nn.distributed import fill
from scatterbrain.nn.pairs import Pairs
from scatterbrain.supports import Full

CORE = "scatterbrain"  # attribute of an attention module that holds its ScatterbrainAttention; part of state dict names
PARKED = "_scatterbrain_parked"  # holds it outside of the state dict while another implementation runs
NEVER_CAUSAL = "_scatterbrain_is_never_causal"  # of a module whose attribute is_causal is missing, or wrong

_INTERFACE = ("ALL_ATTENTION_FUNCTIONS", "AttentionInterface")
# Names of parameters of forward: states of other tokens, the cache of the layer's own, and keys or values apart, which
# in a causal layer are of the same tokens.
_OTHER_TOKENS = re.compile(r"key_value|encoder|cross|context|memory|latent|image|vision|text|media")
_CACHE = re.compile(r"past_|cache")
_APART = re.compile(r"kv|query|queries|value")
_CROSS_NAME = re.compile(r"cross|encoder_att|enc_?dec", re.IGNORECASE)
# Classes whose layers say that they are causal, in models that are no decoders and make bidirectional masks for them.
WRONGLY_CAUSAL = (
    "BridgeTowerSelfAttention",
    "LightGlueAttention",
    "Phi4MultimodalAudioAttention",
    "Phi4MultimodalVisionAttention",
)
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
    # The class of TorchScript's modules has no forward of its own.
    code = getattr(inspect.unwrap(getattr(cls, "forward", None)), "__code__", None)
    return code is not None and any(name in code.co_names for name in _INTERFACE)


def is_of_transformers(cls: type) -> bool:
    """Whether a class is one of those that transformers has for its models and their configurations. torch derives
    classes of its own, for modules with parametrizations and others."""
    own = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
    return own.__module__.startswith("transformers.models.")


def implementation(module: nn.Module) -> str | None:
    """The attention implementation that a module's configuration names."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the modules whose attention function can be chosen; each module once."""
    for path, module in model.named_modules():
        if routes(type(module)) and hasattr(module, "config"):
            yield path, module


# -------------------- heads


def heads_of(module: nn.Module) -> Heads | None:
    """Heads of an attention module, from its attributes, projections and configuration; None if they do not tell."""
    head_dim = _first_int(module, _HEAD_DIM)
    heads = _first_int(module, _HEADS)
    if head_dim is None and heads is not None:
        width = _out_features(module, _QUERY) or _first_int(module, ("embed_dim", "hidden_size", "all_head_size"))
        head_dim = width // heads if width else None
    if head_dim is None:
        return None
    query_width, key_width = _out_features(module, _QUERY), _out_features(module, _KEY)
    heads = heads or _first_int(module.config, _HEADS)
    # Some projections of queries have gates of the output beside them, which are no heads.
    if query_width and not (heads and query_width % (heads * head_dim) == 0):
        heads = query_width // head_dim
    if heads is None:
        return None
    if key_width:
        kv_heads = key_width // head_dim
    else:
        groups = _first_int(module, ("num_key_value_groups", "n_rep"))
        kv_heads = heads // groups if groups else _first_int(module, ("num_key_value_heads", "num_kv_heads")) or heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        return None
    return Heads(heads, head_dim, kv_heads)


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


class LayerAttention(ScatterbrainAttention):
    """The ScatterbrainAttention of an attention module of transformers. A class of this package, so that a pickled
    model imports it, and with it the implementation that the model's configuration names.

    Attributes:
        is_self: whether queries and keys are the same tokens.
        is_guess: whether the heads are what :func:`heads_of` says, and not those of a call.
        seed: of random projections.
        registered: name and settings under which a model chose it; None for single layers.
    """

    is_self = True
    is_guess = False
    seed = 0
    registered: tuple[str, Settings | LayerSettings] | None = None

    @property
    def is_query_by_query(self) -> bool:
        """Cross-attention, which :func:`cross_pairs` decides on."""
        return not self.is_self

    @torch.no_grad()
    def restart(self) -> None:
        """Puts every tensor back to what it was at first; modules that the kernels compute with stay as they are."""
        fresh = _build(_heads(self), self.pairs, self.seed)
        for name, tensor in (fresh._parameters | fresh._buffers).items():
            fill(getattr(self, name), tensor)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.registered is not None and self.registered[0] not in SETTINGS:
            add(*self.registered)


def core_of(module: nn.Module) -> LayerAttention | None:
    """The ScatterbrainAttention of an attention module; None if it has none."""
    return module._modules.get(CORE)


def attach(
    module: nn.Module,
    pairs: Pairs,
    path: str = "",
    heads: Heads | None = None,
    seed: int = 0,
    is_causal: bool | None = None,
) -> LayerAttention:
    """Gives an attention module its ScatterbrainAttention.

    A layer that is never causal gets no kernel for causal calls, and one that always is none for others. Cross-
    attention gets what :func:`cross_pairs` says. A module that has one already, or had one before another
    implementation was chosen, keeps it with its calibration and learned projections if the low-rank kernel that these
    belong to is the same, whatever the support: supports own no state. One that has no state, such as exact attention,
    keeps the other for later.

    Args:
        module: an attention module of transformers.
        pairs: its settings.
        path: of the module in the model; tells self-attention from cross-attention.
        heads: default :func:`heads_of`, checked against the first tensors.
        seed: of random projections; global random number generators are left as they are.
        is_causal: what :func:`causality` says.

    Raises:
        ValueError: the heads are too narrow for the rank of the low-rank kernel.
    """
    if not _is_self(module, path):
        pairs = cross_pairs(pairs)[0]
    elif is_causal is not None:
        pairs = pairs.always_causal() if is_causal else pairs.never_causal()
    pairs = pairs.needed()
    known, kernel = heads or heads_of(module), pairs.kernel_of_state()
    present = [core for core in (core_of(module), module.__dict__.pop(PARKED, None)) if core is not None]
    core = next((core for core in present if core.keeps_state_of(kernel)), None)
    if core is None or (heads is not None and _heads(core) != heads):
        kernels = (pairs.low_rank, pairs.low_rank_of(True))
        least_head_dim = max(1 if kernel is None else kernel.least_head_dim for kernel in kernels)
        core = _build(known or Heads(1, least_head_dim, 1), pairs, seed)
        core.is_self = _is_self(module, path)
        core.is_guess = heads is None
    for inner in core.modules():  # an adapter that saves the module holds a copy beside the original
        if isinstance(inner, ScatterbrainAttention):
            inner.pairs = pairs
    waiting = next((other for other in present if other is not core and other.has_state), None)
    if waiting is not None and not core.has_state:
        module.__dict__[PARKED] = waiting
    device = next((p.device for p in module.parameters(recurse=False) or ()), None)
    device = device or next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type != "meta":
        core.to(device)
    core.train(module.training)
    setattr(module, CORE, core)
    return core


def park(module: nn.Module) -> None:
    """Takes the ScatterbrainAttention out of the module and its state dict, and keeps it for a later :func:`attach`."""
    core = module._modules.pop(CORE, None)
    if core is not None and (core.has_state or PARKED not in module.__dict__):
        module.__dict__[PARKED] = core


def detach(module: nn.Module) -> None:
    """Drops the ScatterbrainAttention of a module, parked or not."""
    module._modules.pop(CORE, None)
    module.__dict__.pop(PARKED, None)


def _build(heads: Heads, pairs: Pairs, seed: int) -> LayerAttention:
    """Built on the CPU in float32, whatever the defaults are while a model is built, and without advancing its random
    number generator: later weights are those of the same model with another implementation."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            torch.manual_seed(torch.initial_seed() + seed)
            core = LayerAttention(*heads, **pairs._asdict())
            core.seed = seed
            return core
        finally:
            torch.set_default_dtype(dtype)


def _heads(core: ScatterbrainAttention) -> Heads:
    return Heads(core.num_heads, core.head_dim, core.num_kv_heads)


def fit_to(module: nn.Module, core: ScatterbrainAttention, query: Tensor, key: Tensor) -> None:
    """Makes ``core`` in place one for the heads that came, if :func:`heads_of` had guessed others. What it remembers
    stays where it does not depend on what was guessed wrong; learned projections of other heads, and statistics, raise
    ValueError."""
    came = Heads(query.shape[1], query.shape[3], key.shape[1])
    if _heads(core) == came or not getattr(core, "is_guess", False):
        return  # ScatterbrainAttention raises for a mismatch
    fresh = _build(came, core.pairs, core.seed).to(query.device)
    fits = all(fresh._buffers[name].shape == buffer.shape for name, buffer in core._buffers.items())
    if any(True for _ in core.parameters()) or (core.is_calibrated and not fits):
        raise ValueError(
            f"{type(module).__name__}: its ScatterbrainAttention was made for {_heads(core)}, got {came}; it holds "
            "calibration or learned projections, which do not fit: attach it anew with set_attn_implementation"
        )
    if not fits:
        core._buffers.update(fresh._buffers)
    core.num_heads, core.head_dim, core.num_kv_heads = came
    core.is_guess = False


def cross_pairs(pairs: Pairs) -> tuple[Pairs, str]:
    """What cross-attention runs with, in which neither the choice of a token's keys nor the weights of the others may
    depend on later target tokens, and a note if that is something else than asked for. Exact attention if there is
    nothing."""
    try:
        return pairs_that_run(pairs, is_query_by_query=True)
    except NotReplaceable as reason:
        return Pairs(Full(), None), f"exact: {reason}"


def cross_note(module: nn.Module, path: str, pairs: Pairs) -> str:
    """A note for the report if this layer runs with something else than asked for; "" otherwise."""
    return "" if _is_self(module, path) else cross_pairs(pairs)[1]


def causality(module: nn.Module, model: nn.Module | None = None, path: str = "") -> bool | None:
    """Whether the self-attention of a layer is causal in all calls (True) or in none (False); None where neither is
    known. Of a layer that says it is not, that holds if the model told it so, and else if nothing around it, up to the
    outermost model with the same configuration, makes causal masks: some pass them to layers that know of none.
    The latter is all there is of a layer of transformers that says nothing, whose models make masks for every layer.
    Layers of others that say nothing may rely on transformers' sdpa, which takes them for causal.

    Args:
        module: the attention module, at ``path`` in ``model``.
        model: None where it is not known.
    """
    says = _says(module)
    if says is not None:
        was_told = "is_causal" in inspect.signature(type(module).__init__).parameters and not is_silent(module)
        if says or was_told:
            return says
    elif _is_wrongly_causal(module):
        return False
    elif not is_of_transformers(type(module)):
        return None
    around = _around(model, path)
    if any(isinstance(part, PreTrainedModel) for part in around):
        makes_causal = any(_makes_causal_masks(type(part)) for part in around)
        # A user's model around such a layer may rely on sdpa, too, where those of the layer's file are causal.
        is_unknown = says is None and not is_of_transformers(type(around[-1])) and _may_make_causal_masks(type(module))
        return None if makes_causal or is_unknown else False
    return None if says is not None or _may_make_causal_masks(type(module)) else False


def note_causality(module: nn.Module, is_causal: bool | None, path: str = "") -> None:
    """Notes for :func:`is_causal_alone` that a layer is never causal, where it does not say so itself. transformers'
    sdpa takes such layers for causal, which eager attention is not. A layer is looked at again once there is a model
    around its own, which may know better, and the note goes.

    Args:
        module: the attention module, at ``path`` in its model.
        is_causal: what :func:`causality` says of it.
    """
    if _says(module) is None and (is_causal is False or not _is_self(module, path)):
        module.__dict__[NEVER_CAUSAL] = True
    else:
        module.__dict__.pop(NEVER_CAUSAL, None)


def is_causal_alone(module: nn.Module) -> bool:
    """Whether calls of a layer without a mask are causal."""
    return NEVER_CAUSAL not in module.__dict__ and getattr(module, "is_causal", True)


def _says(module: nn.Module) -> bool | None:
    """Whether a layer says that it is causal; None where it says nothing, or what does not hold."""
    says = getattr(module, "is_causal", None)
    return says if isinstance(says, bool) and not _is_wrongly_causal(module) else None


def _is_wrongly_causal(module: nn.Module) -> bool:
    is_named = type(module).__name__ in WRONGLY_CAUSAL and getattr(module, "is_causal", None) is True
    return is_named and not getattr(module.config, "is_decoder", False)


def _around(model: nn.Module | None, path: str) -> list[nn.Module]:
    """The modules around the one at ``path`` in ``model``, from the inside, up to the outermost PreTrainedModel that
    shares its configuration with the nearest; all of them if there is no PreTrainedModel."""
    names, found, end, config = path.split("."), [], None, None
    for length in range(len(names) - 1, -1, -1) if model is not None else ():
        found.append(model.get_submodule(".".join(names[:length])))
        if isinstance(found[-1], PreTrainedModel):
            if end is not None and found[-1].config is not config:
                break
            end, config = len(found), found[-1].config
    return found[:end]


def _may_make_causal_masks(cls: type[nn.Module]) -> bool:
    """Whether any model in the file of that class makes causal masks, or there is none."""
    found = vars(sys.modules.get(cls.__module__, object)).values()
    models = [c for c in found if inspect.isclass(c) and issubclass(c, PreTrainedModel) and c is not PreTrainedModel]
    return not models or any(_makes_causal_masks(model) for model in models)


@functools.cache
def _makes_causal_masks(cls: type[nn.Module]) -> bool:
    """Whether the methods of a model's class name any causal mask, or those of another module the function for one."""
    is_model = issubclass(cls, PreTrainedModel)
    bases = cls.__mro__[: cls.__mro__.index(PreTrainedModel if is_model else nn.Module)]
    methods = (inspect.unwrap(method) for base in bases for method in vars(base).values() if callable(method))
    codes = (method.__code__ for method in methods if hasattr(method, "__code__"))
    # Parts of models pass on names of masks that they may never be given.
    causal = re.compile("causal" if is_model else r"create_\w*causal\w*mask")
    return any(causal.search(name) for code in codes for name in (*code.co_names, *code.co_varnames))


def _is_self(module: nn.Module, path: str) -> bool:
    """Whether queries and keys are the same tokens: by the attribute of classes that serve as both, by the names of
    module and class, or because its forward takes no other tokens."""
    names = ".".join(path.split(".")[-2:])
    if getattr(module, "is_cross_attention", False) or _CROSS_NAME.search(f"{names} {type(module).__name__}"):
        return False
    if hasattr(module, "is_cross_attention"):  # one class for both, which says what this module is
        return True
    if "self" in names.lower() or "self" in type(module).__name__.lower():
        return True
    others = _other_tokens(_parameters(type(module)), getattr(module, "is_causal", None) is True)
    has_encoder = getattr(module.config, "is_encoder_decoder", False) or getattr(
        module.config, "add_cross_attention", False
    )
    return not others or (others == {"key_value_states"} and not has_encoder)


def _other_tokens(parameters: list[str], is_causal: bool) -> set[str]:
    """Those of the parameters of a layer's forward, by name, that may bring in other tokens than the queries'."""
    patterns = (_OTHER_TOKENS,) if is_causal else (_OTHER_TOKENS, _APART)
    return {name for name in parameters if not _CACHE.match(name) and any(p.search(name) for p in patterns)}


def _parameters(cls: type[nn.Module]) -> list[str]:
    return list(inspect.signature(inspect.unwrap(cls.forward)).parameters)[1:]
