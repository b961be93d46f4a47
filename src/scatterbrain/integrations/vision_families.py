"""How tokens are ordered in the vision transformers of timm and transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain.integrations.permutation import Permutation, coordinate_order
from scatterbrain.integrations.token_order import (
    FAMILIES,
    EntryHook,
    Family,
    Order,
    PermutationFor,
    RotationHook,
    warn_of_dropped_patches,
)

ROTARY = "its queries and keys are rotated by position (RoPE), in raster order"

# -------------------- timm


class Timm(Family):
    """timm.models.VisionTransformer and its subclasses in timm."""

    METHODS = ("forward_features", "forward_intermediates")
    INSIDE = ("blocks", "norm")

    def entries(self) -> dict[str, type[EntryHook | RotationHook]]:
        return {"norm_pre": EntryHook}

    def prefix(self, model: nn.Module) -> int:
        return model.num_prefix_tokens

    def obstacle(self, model: nn.Module) -> str | None:
        known = hasattr(model.patch_embed, "dynamic_feat_size")
        return None if known else f"{type(model.patch_embed).__name__} does not say how many patches an image has"

    def refused(self, model: nn.Module, arguments: dict[str, Any]) -> str | None:
        return _mask_in_own_order(arguments)

    def prepare(self, model: nn.Module, arguments: dict[str, Any]) -> PermutationFor:
        height, width = self.grid(model, arguments["x"])
        order, training, dropout = model._token_order, model.training, model.patch_drop
        may_drop = training and getattr(dropout, "prob", 0) > 0
        return lambda tokens: _on_grid(order, height, width, may_drop, tokens)

    def grid(self, model: nn.Module, images: Tensor) -> tuple[int, int]:
        return model.patch_embed.dynamic_feat_size(images.shape[-2:])

    def put_back(self, permutation: Permutation, out: Any) -> Any:
        if isinstance(out, Tensor):
            return permutation.undo(out)
        if isinstance(out, tuple):  # last tokens and intermediates
            return permutation.undo(out[0]), self.put_back(permutation, out[1])
        undo = permutation.undo_patches
        if isinstance(out, list):  # intermediates, with or without prefix tokens
            return [(undo(x[0]), x[1]) if isinstance(x, tuple) else undo(x) for x in out]
        for name in ("image_features", "patches"):
            if name in out:
                out[name] = permutation.undo(out[name])
        if "image_intermediates" in out:
            out["image_intermediates"] = [undo(x) for x in out["image_intermediates"]]
        return out


class TimmRotary(Timm):
    """timm.models.Eva: EVA-02, DINOv3, rope ViTs. Their blocks get the rotations of the patches with the tokens."""

    INSIDE = ("norm_pre", "blocks", "norm")

    def entries(self) -> dict[str, type[EntryHook | RotationHook]]:
        return {}  # a method of the model, which has an override

    def overrides(self, base: type[nn.Module]) -> dict[str, Any]:
        original = base._pos_embed

        @functools.wraps(original)
        def _pos_embed(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
            tokens, rotations = original(self, x)
            order: Order | None = getattr(self, "_token_order", None)
            permutation = None if order is None else order.enter(tokens)
            if permutation is None:
                return tokens, rotations
            return permutation.apply(tokens), None if rotations is None else permutation.apply_to_patches(rotations)

        return {"_pos_embed": _pos_embed}


class NaFlex(Timm):
    """timm.models.NaFlexVit, for images or for patches that carry their coordinates."""

    def obstacle(self, model: nn.Module) -> str | None:
        return ROTARY if model.rope is not None else None

    def grid(self, model: nn.Module, images: Tensor) -> tuple[int, int]:
        return model.embeds.dynamic_feat_size(images.shape[-2:])

    def refused(self, model: nn.Module, arguments: dict[str, Any]) -> str | None:
        return _mask_in_own_order(self._given(arguments)[1])

    def _given(self, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        batch = arguments.get("patches", arguments.get("x"))
        return batch, {**arguments, **batch} if isinstance(batch, dict) else arguments

    def prepare(self, model: nn.Module, arguments: dict[str, Any]) -> PermutationFor:
        batch, given = self._given(arguments)
        coordinates, valid = given.get("patch_coord"), given.get("patch_valid")
        if coordinates is None:
            return super().prepare(model, {**arguments, "x": batch})
        prefix = model._token_order.prefix
        may_drop = model.training and model.patch_drop is not None

        def permutation(tokens: Tensor) -> Permutation | None:
            if may_drop and tokens.shape[1] != prefix + coordinates.shape[1]:
                return warn_of_dropped_patches()
            order = coordinate_order(coordinates, valid, prefix)
            return Permutation(order, order.argsort(-1), prefix)

        return permutation


def _mask_in_own_order(arguments: dict[str, Any]) -> str | None:
    for name in ("attn_mask", "is_causal"):
        if arguments.get(name) is not None and arguments[name] is not False:
            return f"{name} speaks of tokens in the model's order, which the blocks do not see; leave it out"
    return None


def _on_grid(order: Order, height: int, width: int, may_drop: bool, tokens: Tensor) -> Permutation | None:
    if torch.jit.is_tracing():  # sizes are tensors there; a trace is for images of one size
        height, width = int(height), int(width)
    expected = order.prefix + height * width
    if tokens.shape[1] == expected:
        return order.on_grid(height, width, tokens.device)
    if may_drop:
        return warn_of_dropped_patches()
    order.refuse(
        f"expected {order.prefix} + {height} x {width} = {expected} tokens before the first block, got "
        f"{tokens.shape[1]}; pass images of the size that the model was made for"
    )
    return None


# -------------------- transformers


class Transformers(Family):
    """A vision model of transformers: embeddings, layers, an output with fields.

    Args:
        inside: submodules that see tokens along the curve.
        prefix: number of tokens before the patches.
        entry: the submodule that returns the tokens before the first layer.
        behind: paths of submodules that pool the tokens behind the layers, where a model has them.
    """

    def __init__(
        self, inside: tuple[str, ...], prefix: int, entry: str = "embeddings", behind: tuple[str, ...] = ()
    ) -> None:
        self.INSIDE, self.BEHIND, self._prefix, self._entry = inside, behind, prefix, entry

    def entries(self) -> dict[str, type[EntryHook | RotationHook]]:
        return {self._entry: EntryHook}

    def prefix(self, model: nn.Module) -> int:
        return self._prefix

    def grid(self, model: nn.Module, images: Tensor) -> tuple[int, int]:
        patch = model.config.patch_size
        patch = patch if isinstance(patch, (tuple, list)) else (patch, patch)
        return images.shape[-2] // patch[0], images.shape[-1] // patch[1]

    def refused(self, model: nn.Module, arguments: dict[str, Any]) -> str | None:
        images, mask = arguments.get("pixel_values"), arguments.get("attention_mask")
        if images is None:
            return "expected pixel_values, got none; pass images"
        height, width = self.grid(model, images)
        tokens = model._token_order.prefix + height * width
        if mask is None or (mask.dim() == 2 and mask.shape[1] == tokens):
            return None
        return (
            f"expected attention_mask of shape (batch, tokens) with {tokens} tokens, got {tuple(mask.shape)}; pass one "
            "such or none"
        )

    def prepare(self, model: nn.Module, arguments: dict[str, Any]) -> PermutationFor:
        order, images = model._token_order, arguments["pixel_values"]
        height, width = self.grid(model, images)
        mask = arguments.get("attention_mask")
        if mask is not None:
            arguments["attention_mask"] = mask.index_select(1, order.on_grid(height, width, mask.device).order)
        return lambda tokens: _on_grid(order, height, width, False, tokens)

    def run(self, model: nn.Module, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        as_dict = arguments.pop("return_dict", None)
        as_dict = model.config.return_dict if as_dict is None else as_dict
        out = super().run(model, function, {**arguments, "return_dict": True})
        return out if as_dict else out.to_tuple()

    def put_back(self, permutation: Permutation, out: Any) -> Any:
        for name, value in list(out.items()):
            if name in ("pooler_output", "image_embeds", "cls_tokens") or value is None:
                continue
            if name == "last_hidden_state":
                out[name] = permutation.undo(value)
            elif name == "hidden_states":
                out[name] = tuple(None if x is None else permutation.undo(x) for x in value)
            elif name == "attentions":
                out[name] = tuple(None if x is None else permutation.undo_pairs(x) for x in value)
            elif name == "feature_maps":
                undo = permutation.undo_patches
                out[name] = tuple(undo(x) if x.dim() == 4 else permutation.undo(x) for x in value)
            else:
                raise RuntimeError(
                    f"token_order: the output {name} may hold tokens along the curve; replace attention with "
                    "token_order='natural'"
                )
        return out


class WithRegisters(Transformers):
    """The same with register tokens behind the prefix."""

    def prefix(self, model: nn.Module) -> int:
        return super().prefix(model) + model.config.num_register_tokens


class TransformersRotary(WithRegisters):
    """The same with rotations of the patches, which a module of its own returns."""

    def entries(self) -> dict[str, type[EntryHook | RotationHook]]:
        return super().entries() | {"rope_embeddings": RotationHook}


_DINOV2_REGISTERS = "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters"
FAMILIES |= {
    "timm.models.vision_transformer.VisionTransformer": Timm(),
    "timm.models.eva.Eva": TimmRotary(),
    "timm.models.naflexvit.NaFlexVit": NaFlex(),
} | {
    f"transformers.models.{name}": family
    for name, family in {
        "vit.modeling_vit.ViTModel": Transformers(("layers", "layernorm"), 1, behind=("pooler",)),
        "vit_msn.modeling_vit_msn.ViTMSNModel": Transformers(("layers", "layernorm"), 1),
        "ijepa.modeling_ijepa.IJepaModel": Transformers(("layers", "layernorm"), 0, behind=("pooler",)),
        "deit.modeling_deit.DeiTModel": Transformers(("layers", "layernorm"), 2, behind=("pooler",)),
        "dinov2.modeling_dinov2.Dinov2Model": Transformers(("encoder", "layernorm"), 1),
        "dinov2.modeling_dinov2.Dinov2Backbone": Transformers(("encoder", "layernorm"), 1),
        f"{_DINOV2_REGISTERS}Model": WithRegisters(("encoder", "layernorm"), 1),
        f"{_DINOV2_REGISTERS}Backbone": WithRegisters(("encoder", "layernorm"), 1),
        "dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel": TransformersRotary(("model", "norm"), 1),
        "dinov3_vit.modeling_dinov3_vit.DINOv3ViTBackbone": TransformersRotary(("model", "norm"), 1),
        "clip.modeling_clip.CLIPVisionModel": Transformers(("encoder", "post_layernorm"), 1, "pre_layrnorm"),
        "siglip.modeling_siglip.SiglipVisionModel": Transformers(
            ("encoder", "post_layernorm"), 0, behind=("head", "head.attention", "head.attention.attention")
        ),
    }.items()
}
