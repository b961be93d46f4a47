"""What the attention layers of a model compute with, while it runs with exact attention."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain import functional
from scatterbrain.integrations.replace import replace_attention
from scatterbrain.integrations.report import Report
from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.supports import Full, Window

Batch = Tensor | Mapping[str, Any] | tuple | list | Callable[[nn.Module], Any]
"""How a model is run: ``model(tensor)``, ``model(**mapping)``, ``model(*sequence)`` or ``function(model)``."""


@dataclass(frozen=True)
class LayerCall:
    """One call of the attention of one layer.

    Args:
        path: of the layer in the model.
        query: (B, Hq, N, d). key, value: (B, Hkv, M, d), (B, Hkv, M, dv). Detached, in the model's dtype.
        key_padding_mask, query_padding_mask: bool (B, M), (B, N), True = ignore; None: every token counts.
        is_causal: whether query i sees keys <= i + ``query_offset`` only.
        scale: factor of q.k.
        query_offset: position of the first query among the keys.
        exact_queries: of these first queries the layer computes exact attention whatever its support is.
        is_query_by_query: whether the layer is the cross-attention of a decoder, of which
            :func:`scatterbrain.replace_attention` decides that every query has a list of its own.
    """

    path: str
    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    query_padding_mask: Tensor | None
    is_causal: bool
    scale: float
    query_offset: int | Tensor
    exact_queries: int = 0
    is_query_by_query: bool = False

    def masks(self) -> dict[str, Any]:
        """The arguments of :func:`scatterbrain.attention` beside tokens, support and kernel."""
        return dict(
            key_padding_mask=self.key_padding_mask,
            query_padding_mask=self.query_padding_mask,
            is_causal=self.is_causal,
            scale=self.scale,
            query_offset=self.query_offset,
        )

    def valid_queries(self) -> Tensor:
        """bool (B, N), True where a query counts."""
        mask = self.query_padding_mask
        if mask is None and self.key_padding_mask is not None and self.query.shape[2] == self.key.shape[2]:
            mask = self.key_padding_mask
        batch, _, queries, _ = self.query.shape
        return torch.ones(batch, queries, dtype=torch.bool, device=self.query.device) if mask is None else ~mask

    def first_queries(self, count: int) -> LayerCall:
        """The call of its first queries alone."""
        valid = self.valid_queries()[:, :count]
        return replace(self, query=self.query[:, :, :count], query_padding_mask=~valid)

    def attention(self, support: object, low_rank: object, **arguments: Any) -> Any:
        """:func:`scatterbrain.attention` of these tokens."""
        return functional.attention(self.query, self.key, self.value, support, low_rank, **self.masks(), **arguments)


def calls_of(model: nn.Module, batch: Batch, token_order: str | None = "auto") -> list[LayerCall]:
    """Runs ``model`` once, with exact attention and in evaluation mode, and returns what its attention layers computed
    with, in the order of their calls.

    The layers are those that :func:`scatterbrain.replace_attention` can replace, or has replaced; afterwards the model
    is as it was. Layers that leave a call to their own code, with one token behind a cache for one, are not in it.

    Args:
        model: any model that :func:`scatterbrain.replace_attention` takes.
        batch: a tensor (``model(batch)``), a mapping (``model(**batch)``), a tuple or list (``model(*batch)``), or a
            function of the model that runs it.
        token_order: as :func:`scatterbrain.replace_attention`: the order of image patches.

    Raises:
        ValueError: no attention that is known: which modules were looked at, and what would be needed; or none of it
            ran, or without tokens.
    """
    calls: list[LayerCall] = []
    with recording(model, calls.append, token_order):
        run(model, batch)
    if not calls:
        raise ValueError(
            "expected the batch to reach the model's attention layers, but none of them computed attention with it; "
            "give a batch of whole sequences, not single tokens behind a cache, without output_attentions"
        )
    for call in calls:
        if 0 in (*call.query.shape, *call.key.shape):
            raise ValueError(
                "expected a batch with at least one row and one token, got queries "
                f"{tuple(call.query.shape)} and keys {tuple(call.key.shape)} in {call.path}"
            )
    return calls


def run(model: nn.Module, batch: Batch) -> Any:
    """``model`` on a batch, in evaluation mode and without gradients; its mode stays.

    Raises:
        TypeError: a batch of another kind.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(batch, Tensor):
                return model(batch)
            if isinstance(batch, Mapping):
                return model(**batch)
            if isinstance(batch, (tuple, list)):
                return model(*batch)
            if callable(batch):
                return batch(model)
    finally:
        for module, mode in modes.items():
            module.training = mode
    raise TypeError(
        "batch must be a tensor, a mapping of arguments, a tuple or list of arguments, or a function of the model, got "
        f"{type(batch).__name__}"
    )


@contextmanager
def recording(
    model: nn.Module, keep: Callable[[LayerCall], None], token_order: str | None = "auto"
) -> Iterator[Report | None]:
    """Inside, the model's attention runs exactly, and ``keep`` gets every call."""

    def attend(call: LayerCall, return_lse: bool) -> Any:
        keep(call)
        return call.attention(Full(), None, return_lse=return_lse)

    with stand_in(model, attend, token_order) as report:
        yield report


@contextmanager
def stand_in(
    model: nn.Module, attend: Callable[[LayerCall, bool], Any], token_order: str | None = "auto"
) -> Iterator[Report | None]:
    """Inside, ``attend(call, return_lse)`` computes the model's attention: what :func:`scatterbrain.attention` would
    return. Yields what was replaced; None in a model that was swapped before."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    report = None
    if not any(isinstance(module, ScatterbrainAttention) for module in model.modules()):
        report = _replaced(model, token_order)
    cores = {path: m for path, m in model.named_modules() if isinstance(m, ScatterbrainAttention)}
    # What others may have set too, such as hooks of accelerate.
    before = {core: {name: vars(core)[name] for name in _REPLACED if name in vars(core)} for core in cores.values()}
    try:
        for path, core in cores.items():
            core.forward = _StandIn(path.rpartition(".")[0] or path, core, attend)
            core.lacks_statistics = lambda is_causal: False  # nothing is computed with those of the module
        yield report
    finally:
        for core, own in before.items():
            for name in _REPLACED:
                vars(core).pop(name, None)
            vars(core).update(own)
        if report is not None:
            report.restore()


_REPLACED = ("forward", "lacks_statistics")


def _replaced(model: nn.Module, token_order: str | None) -> Report:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "replace_attention changed nothing")
        # Never computed with: the recorder stands in its place. A window gains from the order of image patches.
        report = replace_attention(model, Window(64), None, token_order=token_order)
    if report.replaced:
        return report
    looked_at = "\n".join(f"  {entry.path or 'the model'}: {entry.was}: {entry.note}" for entry in report.entries)
    raise ValueError(
        f"expected a model with attention layers that replace_attention knows, got {type(model).__name__}; modules "
        f"that look like attention:\n{looked_at or '  none'}\n"
        "layers of torch, transformers, timm and diffusers are known; for others let the layer call a "
        "ScatterbrainAttention, or register a replacer (scatterbrain.integrations.register_replacer)"
    )


class _StandIn:
    """Stands in for the forward of a :class:`ScatterbrainAttention`."""

    def __init__(self, path: str, core: ScatterbrainAttention, attend: Callable[[LayerCall, bool], Any]) -> None:
        self.path, self.core, self.attend = path, core, attend

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        query_padding_mask: Tensor | None = None,
        query_offset: int | Tensor = 0,
        return_lse: bool = False,
    ) -> Any:
        scale = functional.default_scale(query, scale)
        masks = key_padding_mask, query_padding_mask
        tokens = (t.detach() for t in functional.cast_for_autocast(query, key, value))
        first = 0 if is_causal else min(self.core.exact_queries, query.shape[2])
        by_query = self.core.is_query_by_query
        call = LayerCall(self.path, *tokens, *masks, is_causal, scale, query_offset, first, by_query)
        return self.attend(call, return_lse)


# -------------------- to a file


def capture(
    model: nn.Module,
    batch: Batch,
    file: str | os.PathLike[str],
    calibration: Batch | None = None,
    name: str = "model",
) -> list[str]:
    """Runs ``model`` once and writes what its self-attention layers compute with to a safetensors file, for
    ``benchmarks/quality.py``, ``scatterbrain bench --inputs`` and ``scatterbrain analyze --inputs``.

    A layer of a batch row is the float32 tensors ``<name>.N<tokens>.layer<l>.q``, ``.k`` and ``.v``, each (heads,
    tokens, head_dim): valid tokens alone, in the model's own order, key/value heads repeated for their query heads, and
    queries scaled such that attention is softmax(q k^T / sqrt(head_dim)) v. Layers count from 0 in the order of their
    calls. Rows of a batch after the first are named ``<name>_<row>``, causal models ``lm_<name>``; rows without tokens
    are left out. Beside them stand ``<name>.cal.layer<l>.q`` and ``.k``, of all rows of the calibration batch, or,
    without one, of the same tokens.

    Args:
        model, batch: as :func:`scatterbrain.compare`.
        file: where to write; folders are made.
        calibration: another batch, to fit statistics on; without one they are fitted on the tokens that are measured,
            which flatters them.
        name: of the model in the file, letters, digits and underscores.

    Returns:
        The names of the layers: what stands before ``.q``, ``.k`` and ``.v``.

    Raises:
        ValueError: a name of other characters; a folder for a file; no attention that is known; no self-attention among
            it.
        ModuleNotFoundError: safetensors is not installed.
    """
    from safetensors.torch import save_file

    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"capture: name must be letters, digits and underscores, got {name!r}")
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"capture: file: expected a file to write, got {file}, which is a folder")
    calls = [call for call in calls_of(model, batch, "natural") if _is_self_attention(call)]
    if not calls:
        raise ValueError(
            "capture: expected self-attention layers, whose queries and keys are the same tokens, got none"
        )
    others = calls
    if calibration is not None:
        others = [call for call in calls_of(model, calibration, "natural") if _is_self_attention(call)]
    tensors: dict[str, Tensor] = {}
    entries = []
    for layer, call in enumerate(calls):
        prefix = f"lm_{name}" if call.is_causal else name
        fitted = dict(zip("qk", (torch.cat(t, 1) for t in zip(*_rows(others[min(layer, len(others) - 1)])))))
        for row, parts in enumerate(_rows(call)):
            if parts[0].shape[1] == 0:  # a row without tokens
                continue
            of_row = prefix if row == 0 else f"{prefix}_{row}"
            entries.append(f"{of_row}.N{parts[0].shape[1]}.layer{layer}")
            tensors |= {f"{entries[-1]}.{part}": t for part, t in zip("qkv", parts)}
            tensors |= {f"{of_row}.cal.layer{layer}.{part}": t.clone() for part, t in fitted.items()}
    if not entries:
        raise ValueError("capture: expected a batch with tokens that are not padding, got none")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: t.contiguous() for key, t in tensors.items()}, file)
    return entries


def _is_self_attention(call: LayerCall) -> bool:
    same_count = call.query.shape[2] == call.key.shape[2]
    is_whole = isinstance(call.query_offset, int) and call.query_offset == 0
    return same_count and is_whole and not call.is_query_by_query


def _rows(call: LayerCall) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """By batch row, float32 (heads, tokens, width), of tokens that count."""
    group = call.query.shape[1] // call.key.shape[1]
    factor = call.scale * call.query.shape[3] ** 0.5
    for row, valid in enumerate(call.valid_queries()):
        q, k, v = (t[row, :, valid].float().cpu() for t in (call.query, call.key, call.value))
        yield q * factor, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
