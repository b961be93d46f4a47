"""Replacing the attention modules of a model in place."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from scatterbrain.integrations import multihead  # noqa: F401  (registers its replacer)
from scatterbrain.integrations.replacer import PACKAGES, causal_arguments, prepare_replacers, replacer_of
from scatterbrain.integrations.report import Entry, Report
from scatterbrain.integrations.restrictions import NotReplaceable, pairs_that_run, parallel_wrapper
from scatterbrain.integrations.vision import (
    apply_order,
    apply_order_where_possible,
    check_token_order,
    exact_class_tokens,
)
from scatterbrain.layer_settings import LayerSettings, Pair
from scatterbrain.low_rank import check_low_rank
from scatterbrain.nn.attention import ScatterbrainAttention, check_count, join_layers
from scatterbrain.nn.host_module import HostModule
from scatterbrain.nn.multihead import MultiheadAttention
from scatterbrain.nn.pairs import Choice, Pairs
from scatterbrain.supports import Support, check_support


def replace_attention(
    model: nn.Module,
    support: Support | None = None,
    low_rank: Choice = ...,
    where: Callable[[str], bool] | None = None,
    token_order: str | None = "auto",
    causal_support: Support | None = None,
    causal_low_rank: Choice = ...,
    exact_below: int = 0,
    layers: LayerSettings | Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Report:
    """Replaces the attention modules of ``model`` in place and reports each of them.

    nn.MultiheadAttention modules become :class:`scatterbrain.MultiheadAttention`: the same objects with the same
    parameters, requires_grad, hooks, mode, dtype and device. Every nn.TransformerEncoder that holds one stops using
    nested tensors, which only torch's own attention reads. A subclass of nn.MultiheadAttention is left alone, since its
    forward may differ.

    By default bidirectional attention needs no calibration: its kernel, ``Centroid``, takes what it needs from the
    tokens of each call. Causal attention runs with another one, ``Quadratic``, which must be calibrated before use
    (``with sb.calibrate(model): model(batch)``). A module that may have both kinds of calls keeps the state of the
    second; one that is never causal (timm's, diffusers', encoders of transformers) keeps none, and has the state dict
    of the original.

    In the cross-attention of an nn.TransformerDecoderLayer neither the target tokens after a token nor their number may
    choose its keys or weigh the others. A window, or lists shared by a block of queries, become lists of single queries
    there, and a kernel that reads all queries (Centroid, statistics="input") gives way to that of causal calls; with
    LSH, or where no such kernel is left, the module is left alone. For a decoder of your own choose such a support and
    kernel yourself, with ``where``.

    Attention layers of Hugging Face transformers get a :class:`scatterbrain.ScatterbrainAttention` as their submodule
    ``scatterbrain``; layers that are left out stay exact (:mod:`scatterbrain.integrations.transformers`).

    Quadratic(statistics="learned") adds parameters: create the optimizer afterwards.

    Args:
        model: any module.
        support: which keys are exact; default that of :func:`scatterbrain.presets.drop_in`, in causal calls that of
            :func:`scatterbrain.presets.causal`.
        low_rank: the kernel of the rest; default that of :func:`scatterbrain.presets.drop_in`, in causal calls that of
            :func:`scatterbrain.presets.causal`. A kernel that is given serves causal calls too, which ``Centroid``
            refuses.
        where: called with a module's path, says whether to replace it; default all.
        token_order: "hilbert" orders image patches along a Hilbert curve inside the blocks of every vision transformer
            in ``model`` (timm's VisionTransformer and Eva families and NaFlexVit; transformers' ViT, ViT-MSN,
            I-JEPA, DeiT, DINOv2, DINOv3, CLIP and SigLIP). Every run of tokens is then a compact piece of the picture,
            which makes the approximation better. Class, register and distillation tokens stay first; outputs and
            intermediate outputs are in the model's own order. "natural" (or None) keeps the model's order everywhere.
            Default "auto": Hilbert order where the model is one that supports it and the support gains from it (windows
            and lists that neighbours share), the model's order elsewhere, and in single calls that need it (masks
            between patches, hooks that would see the curve), which warn; the report says which.
        causal_support: the support of calls that are causal (nn.MultiheadAttention with the causal mask, decoders of
            transformers); default ``support`` where that is given. Cross-attention is never causal.
        causal_low_rank: the kernel of causal calls; default ``low_rank`` where that is given.
        exact_below: bidirectional calls with fewer keys than this run exact attention, as
            :class:`ScatterbrainAttention` says; default 0, never.
        layers: a pair of a support and a kernel for every layer, in place of one for all: what
            :func:`scatterbrain.tune` returns as ``settings``, the YAML file of it, or a mapping from paths to pairs.
            Layers that it does not name, or names with ``Full()``, stay as they are. Settings of a model serve the
            same model inside of another, and a part of it.

    Returns:
        :class:`Report`: a table of every module that looks like attention, with what it is now or why it was left, and
        ``restore()``. If nothing could be replaced there is a warning too.

    Raises:
        TypeError: model, support or low_rank of a wrong type, or a ``where`` that cannot be called with one path. What
            ``where`` itself raises passes through. The model is then as it was.
        ValueError: two different kernels with state; an exact_below that is no count; "learned" for a model that is in
            DistributedDataParallel or FSDP already.
        ValueError: layers of a part of which ``model`` has several that would fit.
        ValueError: token_order="hilbert" for a model without a vision transformer that can be ordered.
    """
    if layers is not None:
        layers = LayerSettings.of(layers)
        if (support, low_rank, causal_support, causal_low_rank) != (None, ..., None, ...):
            raise ValueError("replace_attention: layers has a support and a kernel for every layer; give no others")
    pairs = Pairs.chosen(support, low_rank, causal_support, causal_low_rank)
    _check_arguments(model, pairs, layers, token_order)
    _check_where(where)
    check_count("replace_attention: exact_below", exact_below)
    prepare_replacers(model)
    modules = list(attention_modules(model))
    left_out = {path for path, _ in modules if where is not None and not where(path)}
    by_path = {} if layers is None else layers.in_model(_names(modules, left_out), type(model).__name__)
    report = Report(_settings(pairs) if layers is None else f"layer by layer, {len(layers)} of them")
    cross_attention = {m.multihead_attn for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer)}
    if token_order == "hilbert":
        report._add(*apply_order(model))
    done: dict[nn.Module, Entry] = {}
    for path, module in modules:
        if module in done:  # one module under two names
            first = done[module]
            report.entries.append(Entry(path, first.was, first.now, f"the same module as {first.path}"))
            continue
        entry = done[module] = Entry(path, _class_name(module), None)
        report.entries.append(entry)
        if path in left_out:
            entry.note = "left out by where="
            continue
        of_layer = pairs if layers is None else _pairs_of_layer(by_path[path], entry)
        if of_layer is None:
            continue
        undo = _replace(module, entry, of_layer, module in cross_attention)
        if undo is not None:
            report._undo.append(undo)
    if token_order == "auto" and report.replaced:
        report._add(*apply_order_where_possible(model))
    report.notes += exact_class_tokens(model, {entry.path for entry in report.replaced}.__contains__)
    if exact_below > 0 and (cores := _cores(model, report)):
        for core in cores:
            core.exact_below = exact_below
        report.notes.append(f"bidirectional calls with fewer than {exact_below} keys run exact attention")
    _stop_nested_tensors(model, report)
    join_layers(model)
    if not report.replaced:
        warnings.warn(f"replace_attention changed nothing: {report}", stacklevel=2)
    return report


def _names(modules: list[tuple[str, nn.Module]], left_out: set[str]) -> list[str]:
    """The path of every module that is looked at, the first one of a module under several."""
    first: dict[nn.Module, str] = {}
    for path, module in modules:
        first.setdefault(module, path)
    return [path for path in first.values() if path not in left_out]


def _pairs_of_layer(pair: Pair | None, entry: Entry) -> Pairs | None:
    """What a layer runs with; None, with a note, where it stays as it is."""
    if pair is None or pair[0].is_full:
        entry.note = "layers= does not name it" if pair is None else "layers= keeps it exact"
        return None
    return Pairs(*pair)


def _cores(model: nn.Module, report: Report) -> list[ScatterbrainAttention]:
    """The attention of every module that was replaced."""
    return [core for entry in report.replaced for core in _cores_of(model.get_submodule(entry.path))]


def _cores_of(host: nn.Module) -> list[ScatterbrainAttention]:
    return [core for core in host.modules() if isinstance(core, ScatterbrainAttention)]


def _settings(pairs: Pairs) -> str:
    if pairs.is_exact:
        return "exact attention"
    support, low_rank = pairs.support_of(True), pairs.low_rank_of(True)
    is_one = (support, low_rank) == (pairs.support, pairs.low_rank)
    causal = "" if is_one else f" (causal calls: {support}, {low_rank})"
    return f"{pairs.support}, {pairs.low_rank}{causal}"


def _check_arguments(model: nn.Module, pairs: Pairs, layers: LayerSettings | None, token_order: str | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_attention: model must be an nn.Module, got {type(model).__name__}")
    try:
        check_support(pairs.support)
        check_low_rank(pairs.low_rank)
        pairs.check_causal()
        pairs.needed().kernel_of_state()
    except (TypeError, ValueError) as error:
        raise type(error)(f"replace_attention: {error}") from error
    check_token_order(token_order, "replace_attention: token_order")
    of_layers = [pairs] if layers is None else [Pairs(*pair) for pair in layers.values()]
    kernels = (kernel for p in of_layers if not p.is_exact for kernel in (p.low_rank, p.low_rank_of(True)))
    adding = next((kernel for kernel in kernels if kernel is not None and kernel.adds_parameters), None)
    if adding is not None and (wrapper := parallel_wrapper(model)):
        raise ValueError(
            f"replace_attention: expected a model that is not yet in {wrapper}, which would neither shard nor "
            f"synchronise the parameters that {adding} adds; replace attention first, then wrap the model"
        )


def _check_where(where: Callable[[str], bool] | None) -> None:
    """Raises TypeError for anything but a function of one path."""
    if where is None:
        return
    expected = "replace_attention: where must be a function of a module's path, such as lambda path: 'encoder' in path"
    if not callable(where):
        raise TypeError(f"{expected}; got {type(where).__name__}")
    try:
        signature = inspect.signature(where)
    except ValueError:  # functions of C need not have one
        return
    try:
        signature.bind("path")
    except TypeError as error:
        raise TypeError(f"{expected}; got one with arguments {signature}: {error}") from error


def _replace(module: nn.Module, entry: Entry, pairs: Pairs, is_cross_attention: bool) -> Callable[[], None] | None:
    """Replaces one module, if that is possible, and completes its entry. Returns the function that undoes it."""
    replacer = replacer_of(module)
    if replacer is None:
        entry.note = _why_not_replaced(module)
        return None
    try:
        pairs, why = pairs_that_run(pairs, is_cross_attention)
        note, undo = replacer.replace(module, pairs.support, pairs.low_rank, **causal_arguments(replacer, pairs))
    except NotReplaceable as reason:
        entry.note = str(reason)
        return None
    if is_cross_attention:
        for core in _cores_of(module):
            core.is_query_by_query = True
    entry.note = "; ".join(text for text in (why, note) if text)
    now = _class_name(module)
    entry.now = now if now != entry.was else f"{now}, scatterbrain inside"
    return undo


def _stop_nested_tensors(model: nn.Module, report: Report) -> None:
    """An nn.TransformerEncoder built with torch's own layers turns padded batches into nested tensors, which only those
    layers read."""
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoder) or not getattr(encoder, "use_nested_tensor", False):
            continue
        inside = (module for module in encoder.modules() if isinstance(module, MultiheadAttention))
        if all(module.attention is None for module in inside):
            continue
        encoder.use_nested_tensor = False
        report._undo.append(lambda encoder=encoder: setattr(encoder, "use_nested_tensor", True))


# -------------------- recognition


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what a replacer takes or what is attention by class or name, under every path that a module
    has; of nested ones only the innermost."""
    found = [
        (path, module) for path, module in model.named_modules(remove_duplicate=False) if _looks_like_attention(module)
    ]
    paths = {path for path, _ in found}
    for path, module in found:
        prefix = f"{path}." if path else ""
        if not any(other != path and other.startswith(prefix) for other in paths):
            yield path, module


def _looks_like_attention(module: nn.Module) -> bool:
    if isinstance(module, ScatterbrainAttention):  # listed as the module that holds it
        return False
    if isinstance(module, nn.MultiheadAttention) or replacer_of(module) is not None:
        return True
    name = type(module).__name__.lower()
    return name.endswith(("attention", "attn")) and next(module.parameters(), None) is not None


def _class_name(module: nn.Module) -> str:
    """Class with its package: torch.nn.MultiheadAttention, timm.Attention."""
    cls = type(module)
    if cls is nn.MultiheadAttention:
        return "torch.nn.MultiheadAttention"
    package = cls.__module__.split(".")[0]
    return cls.__name__ if package in ("__main__", "builtins") else f"{package}.{cls.__name__}"


def _family(module: nn.Module) -> str:
    """The family of a class of transformers: the name of its folder."""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[1:2] == ["models"] and len(parts) > 2 else type(module).__name__


def _why_not_replaced(module: nn.Module) -> str:
    package = type(module).__module__.split(".")[0]
    if any(isinstance(inside, (ScatterbrainAttention, HostModule)) for inside in module.modules()):
        return "it runs Scatterbrain already; restore() the earlier report to change it"
    if is_parametrized(module):
        return "it is parametrized (torch.nn.utils.parametrize); replace attention before that is done"
    if isinstance(module, nn.MultiheadAttention):
        return "a subclass of nn.MultiheadAttention, whose forward may differ; derive it from sb.MultiheadAttention"
    if package == "transformers":
        return f"{_family(module)} computes attention in its own code, without transformers' AttentionInterface"
    if package in PACKAGES:
        return f"attention modules of this class are not handled for {package}"
    return "an attention module of its own; use sb.attention or sb.ScatterbrainAttention in its forward"
