"""nn.MultiheadAttention with sparse + low-rank attention inside: the same arguments, parameters and mask meanings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.nn.host_module import HostModule, attention_unless_exact, has_weight
from scatterbrain.nn.masks import as_bool_padding, is_causal_mask, is_unreadable
from scatterbrain.nn.pairs import Choice, Pairs
from scatterbrain.supports import Support


class MultiheadAttention(HostModule, nn.MultiheadAttention):
    """Multi-head attention with the arguments, the parameters and the masks of :class:`torch.nn.MultiheadAttention`.

    A call is approximated where sparse + low-rank attention can express it. Every other call runs exactly, as
    nn.MultiheadAttention computes it, and warns once per module and reason, naming the cure. No argument is ignored.

    ================================================== =============================================================
    call                                               what happens
    ================================================== =============================================================
    no ``attn_mask``                                   approximated
    ``attn_mask`` the causal mask                      approximated, causal; the mask is compared with the causal one
                                                       (once per mask tensor), whatever ``is_causal`` says. Under
                                                       torch.compile ``is_causal=True`` is taken on trust, and without
                                                       it a mask runs exactly
    ``key_padding_mask`` bool, or float 0 / -inf       approximated; in self-attention the rows of padded queries are
                                                       zero before the output projection
    2-D (unbatched) inputs, both ``batch_first``       approximated
    ``kdim``, ``vdim``; other lengths of key and query approximated
    every key of a row padded                          approximated: zeros before the output projection, never NaN
    ``need_weights=True`` (the default)                exact, warns: pass need_weights=False
    any other ``attn_mask``, with ``is_causal`` or not exact with that mask, warns
    ``key_padding_mask`` with other float values       exact, warns (under torch.compile: RuntimeError)
    ``dropout`` > 0 in training                        exact, warns: ``set_attention_dropout``
    ``add_bias_kv``, ``add_zero_attn``                 exact, warns
    ``support=Full()``                                 nn.MultiheadAttention itself, its fast paths and TorchScript
                                                       included; ``attention`` is None and ``low_rank`` unused
    ``is_causal=True`` without ``attn_mask``           raises, as nn.MultiheadAttention does
    wrong shapes or mask types                         raises, as nn.MultiheadAttention does
    nested tensors of the strided layout, of which     approximated, as padding
    query, key and value are one, without masks
    other nested tensors (unless ``support=Full()``)   ValueError
    statistics="stored" before calibration, the        ValueError of :class:`ScatterbrainAttention`
    default of causal calls
    ================================================== =============================================================

    ``query`` and ``key`` that are the same tensor object, or views of the same memory (outside of torch.compile), are
    self-attention: ``key_padding_mask`` then marks padded queries as well. Of two different tensors every query is
    computed. In a decoder's cross-attention the keys that one
    target token reads must not depend on later ones: give a support of single queries, ``Routed(keys, block_q=1,
    block_k=8)``, and ``Quadratic``, as :func:`scatterbrain.replace_attention` does; the centroid kernel of the default
    reads the mean of all queries.

    The submodule ``attention`` is the :class:`ScatterbrainAttention`. A checkpoint of nn.MultiheadAttention loads
    strictly: calibrated statistics are reset, since they belong to the weights that they were fitted with, and learned
    projections stay. A checkpoint of this module loads strictly into nn.MultiheadAttention if its low-rank kernel
    remembers nothing: None, statistics="input", and every kernel with support=Full().

    In evaluation without gradients nn.TransformerEncoderLayer would compute exact attention itself and never call this
    module, unless there are hooks in the layer: a forward pre-hook that does nothing prevents it. torch.fx traces the
    module as one node, as it does torch's own modules. TorchScript cannot hold an approximating module and raises; use
    torch.compile or torch.export.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            :class:`torch.nn.MultiheadAttention`.
        support: which keys are exact; default that of :func:`scatterbrain.presets.drop_in`, in causal calls of
            :func:`scatterbrain.presets.causal`.
        low_rank: the kernel of the rest; default that of :func:`scatterbrain.presets.drop_in`, in causal calls that of
            :func:`scatterbrain.presets.causal`, which must be calibrated (:func:`scatterbrain.calibrate`).
        causal_support: the support of causal calls; default ``support`` where that is given.
        causal_low_rank: the kernel of causal calls; default ``low_rank`` where that is given.

    Raises:
        TypeError, ValueError: for a support or low-rank kernel that does not fit, or as nn.MultiheadAttention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        support: Support | None = None,
        low_rank: Choice = ...,
        causal_support: Support | None = None,
        causal_low_rank: Choice = ...,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        pairs = Pairs.chosen(support, low_rank, causal_support, causal_low_rank)
        self._attach(attention_unless_exact(num_heads, self.head_dim, pairs))
        if self.attention is not None and device is not None:
            self.attention.to(device)

    def _attach(self, attention: ScatterbrainAttention | None) -> None:
        super()._attach(attention)
        if attention is not None:
            self.register_forward_pre_hook(_must_be_called)

    def _detach(self) -> None:
        super()._detach()
        for number, hook in list(self._forward_pre_hooks.items()):
            if hook is _must_be_called:
                del self._forward_pre_hooks[number]

    def _is_of_original(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> bool:
        return has_weight(state_dict, f"{prefix}out_proj")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`; the class docstring lists which calls are approximated.

        Args:
            query: (L, N, embed_dim), (N, L, embed_dim) if batch_first, or (L, embed_dim). key, value: the same with S
                tokens and kdim, vdim features.
            key_padding_mask: (N, S), or (S) for unbatched inputs; bool, True = ignore, or float, added.
            need_weights: also return the attention weights, which needs exact attention.
            attn_mask: (L, S) or (N * num_heads, L, S); bool, True = not allowed, or float, added.
            average_attn_weights: average the returned weights over the heads.
            is_causal: attn_mask is the causal mask, query i sees keys <= i.

        Returns:
            The output in query's layout, and the weights or None.
        """
        exact = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights)
        if isinstance(query, fx.Proxy) and query.tracer.root is not self:
            return _as_one_node(self, query.tracer, (*exact, is_causal))
        if self.attention is None:
            return super().forward(*exact, is_causal)
        if query.is_nested or key.is_nested or value.is_nested:
            return self._nested(*exact, is_causal)
        if not self._fits(query, key, value, key_padding_mask, attn_mask, is_causal):
            return self._exact(*exact, is_causal)  # raises nn.MultiheadAttention's own error
        causal = attn_mask is not None and is_causal_mask(attn_mask, is_causal)
        padding = as_bool_padding(key_padding_mask)
        obstacle = self._obstacle(need_weights, attn_mask, causal, key_padding_mask, padding)
        if obstacle is not None:
            self._warn_exact(obstacle)
            return self._exact(*exact, causal)

        # 1. Tokens to (batch, heads, tokens, head_dim), as views of the projections.
        batched = query.dim() == 3
        batch_first = self.batch_first or not batched
        q, k, v = (self._split(x if batched else x[None], batch_first) for x in self._project(query, key, value))
        # 2. Attention. In self-attention a padded key is a padded query too; elsewhere no query is padded.
        if padding is not None and not batched:
            padding = padding[None]
        queries = None
        if padding is not None and not _are_same_tokens(query, key):
            queries = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        out = self.attention(q, k, v, key_padding_mask=padding, is_causal=causal, query_padding_mask=queries)
        # 3. Back to the layout of query, and through the output projection.
        out = out.permute(0, 2, 1, 3) if batch_first else out.permute(2, 0, 1, 3)
        out = out.flatten(2) if batched else out[0].flatten(1)
        return self.out_proj(out), None

    # -------------------- what is possible

    def _fits(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
              attn_mask: Tensor | None, is_causal: bool) -> bool:  # fmt: skip
        """Whether shapes and mask types are what nn.MultiheadAttention takes."""
        rank = query.dim()
        if rank not in (2, 3) or key.dim() != rank or value.dim() != rank or query.shape[-1] != self.embed_dim:
            return False
        if key.shape[-1] != self.kdim or value.shape[-1] != self.vdim or key.shape[:-1] != value.shape[:-1]:
            return False
        axis = 0 if self.batch_first or rank == 2 else 1
        tokens = 1 if self.batch_first and rank == 3 else 0
        batch = query.shape[axis] if rank == 3 else 1
        if rank == 3 and key.shape[axis] != batch:
            return False
        if is_causal and attn_mask is None:
            return False
        length, keys = query.shape[tokens], key.shape[tokens]
        shapes = (((batch, keys) if rank == 3 else (keys,),), ((length, keys), (batch * self.num_heads, length, keys)))
        for mask, allowed in zip((key_padding_mask, attn_mask), shapes):
            if mask is None:
                continue
            if tuple(mask.shape) not in allowed or not (mask.dtype == torch.bool or mask.is_floating_point()):
                return False
        return True

    def _obstacle(self, need_weights: bool, attn_mask: Tensor | None, causal: bool,
                  key_padding_mask: Tensor | None, padding: Tensor | None) -> str | None:  # fmt: skip
        """Why this call cannot be approximated, with the cure; None if it can."""
        if self.bias_k is not None:
            return "add_bias_kv=True adds a key that no support holds; construct the module without it"
        if self.add_zero_attn:
            return "add_zero_attn=True adds a key that no support holds; construct the module without it"
        if need_weights:
            return "need_weights=True (the default) asks for the attention weights; pass need_weights=False"
        if self.training and self.dropout > 0:
            return (
                f"dropout={self.dropout} acts on attention weights in training; call "
                "sb.set_attention_dropout(model, 0.0)"
            )
        if attn_mask is not None and not causal:
            if is_unreadable(attn_mask):
                return (
                    "attn_mask cannot be looked at under torch.compile or vmap; pass is_causal=True if it is the "
                    "causal mask"
                )
            return (
                "attn_mask is not the causal mask (query i sees keys <= i), the only one that is approximated; pass "
                "that mask or none, and padding as key_padding_mask"
            )
        if key_padding_mask is not None and padding is None:
            return "key_padding_mask holds values other than 0 and -inf; pass a bool mask, True = ignore"
        return None

    # -------------------- compute

    def _nested(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, need_weights: bool,
                attn_mask: Tensor | None, average_attn_weights: bool,
                is_causal: bool) -> tuple[Tensor, None]:  # fmt: skip
        """Rows of several lengths, which nn.TransformerEncoder makes of a padded batch, are padded again."""
        is_rows = query is key and key is value and query.layout == torch.strided and self.batch_first
        if not is_rows or need_weights or is_causal or key_padding_mask is not None or attn_mask is not None:
            raise ValueError(
                "MultiheadAttention: expected padded tensors with key_padding_mask, got a nested tensor; in an "
                "nn.TransformerEncoder set use_nested_tensor=False (sb.replace_attention does)"
            )
        tokens = query.to_padded_tensor(0.0)
        lengths = query._nested_tensor_size()[:, :1].to(query.device)
        padding = torch.arange(tokens.shape[1], device=query.device) >= lengths
        out, _ = self.forward(tokens, tokens, tokens, padding, False)
        return torch._nested_tensor_from_mask(out, ~padding, mask_check=False), None

    def _exact(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, need_weights: bool,
               attn_mask: Tensor | None, average_attn_weights: bool,
               is_causal: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What nn.MultiheadAttention computes, by the way that it takes with gradients: the other one has other
        rounding, and NaN in padded rows."""
        swap = self.batch_first and query.dim() == 3
        if swap:
            # Inputs that are one tensor must stay one: torch chooses the projection by identity.
            q = query.transpose(0, 1)
            k = q if key is query else key.transpose(0, 1)
            v = k if value is key else value.transpose(0, 1)
            query, key, value = q, k, v
        weight, bias = self.out_proj.weight, self.out_proj.bias
        is_adapted = not isinstance(self.out_proj, nn.Linear)  # by peft, whose forward torch's function does not call
        if is_adapted:
            weight, bias = torch.eye(self.embed_dim, dtype=weight.dtype, device=weight.device), None
        out, weights = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k,
            self.bias_v, self.add_zero_attn, self.dropout, weight, bias,
            training=self.training, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            use_separate_proj_weight=self.in_proj_weight is None, q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight, v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        out = self.out_proj(out) if is_adapted else out
        return self.attention.with_zero_gradients(out.transpose(0, 1) if swap else out), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input projections, in one product where the inputs are one tensor."""
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        if weight is not None and key is value:
            q = F.linear(query, weight[:width], None if bias is None else bias[:width])
            return q, *F.linear(key, weight[width:], None if bias is None else bias[width:]).chunk(2, -1)
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = separate if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))

    def _split(self, x: Tensor, batch_first: bool) -> Tensor:
        """(N, L, E) or (L, N, E) to (N, heads, L, head_dim)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.permute(0, 2, 1, 3) if batch_first else x.permute(1, 2, 0, 3)


def _are_same_tokens(query: Tensor, key: Tensor) -> bool:
    """Whether queries and keys are one tensor, or two of the same memory: reentrant checkpointing runs the second
    forward pass on a detached tensor for every argument."""
    if query is key:
        return True
    if torch.compiler.is_compiling() or not all(type(t) in (Tensor, nn.Parameter) for t in (query, key)):
        return False
    if query.is_meta or torch._C._are_functorch_transforms_active():  # without an address
        return False
    same_layout = (query.shape, query.stride(), query.dtype) == (key.shape, key.stride(), key.dtype)
    return same_layout and query.device == key.device and query.data_ptr() == key.data_ptr()


def _must_be_called(module: nn.Module, arguments: tuple) -> None:
    """A hook that does nothing: torch's fused encoder layer would compute attention without a call of forward, and
    leaves that to layers without hooks."""


def _as_one_node(module: nn.Module, tracer: fx.Tracer, arguments: tuple) -> fx.Proxy:
    """The call of ``module`` in a graph that torch.fx traces; its masks can only be read when the graph runs."""
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})
