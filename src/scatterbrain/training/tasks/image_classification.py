"""Classification of images by a vision transformer or by T2T-ViT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from scatterbrain.training.config import DataConfig, ModelConfig, TrainConfig, require, require_defaults
from scatterbrain.training.metrics import ACCURACY, Metric
from scatterbrain.training.models.blocks import AttentionFactory
from scatterbrain.training.models.exchangeable import exact_attention
from scatterbrain.training.models.t2t_vit import SPLITS, T2TViT
from scatterbrain.training.models.vit import VisionTransformer
from scatterbrain.training.tasks.base import Task
from scatterbrain.training.tasks.image_batches import ImageBatches
from scatterbrain.training.tasks.images import read_images

OWN_FIELDS = {
    "vit": ("patch_size", "pooling"),
    "t2t_vit": ("first_kernel", "first_stride", "token_width", "tokens", "attend"),
}  # of one model alone


@dataclass(frozen=True)
class ImageClassification(Task):
    """The class of an image: ``data.path`` is a .npz file or the folder of CIFAR-10's python batches.

    Args:
        model: "vit" (Dosovitskiy et al., ICLR 2021) or "t2t_vit" (Yuan et al., ICCV 2021).
        image_size: height and width that the model sees, in pixels; square images of another size are resized.
        patch_size: height and width of a token of "vit", in pixels.
        pooling: of "vit": "mean" of all tokens, or "class" for a token of its own.
        first_kernel, first_stride: of "t2t_vit": of the first soft split, 7 and 4 as published. Those of the second and
            the third are 3 and 2.
        token_width: of "t2t_vit": features of the token transformers' one head.
        tokens: of "t2t_vit": kind of the token transformers' parameters, "transformer" or "performer".
        attend: of "t2t_vit": where the section ``attention`` applies: in the "tokens" transformers alone, which read
            the long sequences, or in "all" layers.
        hilbert: whether attention sees tokens in the order of a Hilbert curve, in which near tokens are near in the
            image, in place of raster order.
        shift: training images move by up to so many pixels.
        mirror: whether training images are mirrored, each by the toss of a coin.
    """

    kind: ClassVar[str] = "image_classification"
    metric: ClassVar[Metric] = ACCURACY
    head: ClassVar[str] = "sequence"

    model: Literal["vit", "t2t_vit"] = "vit"
    image_size: int = 32
    patch_size: int = 1
    pooling: Literal["mean", "class"] = "mean"
    first_kernel: int = SPLITS[0][0]
    first_stride: int = SPLITS[0][1]
    token_width: int = 64
    tokens: Literal["transformer", "performer"] = "transformer"
    attend: Literal["tokens", "all"] = "tokens"
    hilbert: bool = True
    shift: int = 2
    mirror: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "patch_size", "first_kernel", "first_stride", "token_width"):
            require(getattr(self, name) > 0, f"task.{name}", "positive", getattr(self, name))
        require(self.shift >= 0, "task.shift", "0 or more", self.shift)
        kernel, stride = self.first_kernel, self.first_stride
        require(kernel >= stride, "task.first_kernel", f"task.first_stride = {stride} or more", kernel)
        step = self.patch_size if self.model == "vit" else 4 * stride
        require(self.image_size % step == 0, "task.image_size", f"a multiple of {step}", self.image_size)

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest sequence that attention reads."""
        if self.model == "vit":
            return (self.image_size // self.patch_size) ** 2 + (self.pooling == "class")
        return (self.image_size // self.first_stride) ** 2

    def head_dim(self, config: ModelConfig) -> int:
        return super().head_dim(config) if self.model == "vit" else self.token_width

    def open(self, data: DataConfig, train: TrainConfig) -> ImageBatches:
        images = read_images(data.path)
        height, width = images.train.shape[2:]
        require(height == width, "data.path", "square images", f"{height} x {width} pixels")
        return ImageBatches(
            images, train.batch, train.seed, self.image_size, self.shift, self.mirror, self.sequence_length
        )

    def build_model(
        self, data: ImageBatches, config: ModelConfig, attention: AttentionFactory, generator: torch.Generator
    ) -> nn.Module:
        self._check(config)
        sizes = {"width": config.width, "depth": config.layers, "heads": config.heads, "mlp_width": config.mlp_width}
        sizes |= {"image_size": self.image_size, "channels": data.input_size, "classes": data.classes}
        if self.model == "vit":
            return VisionTransformer(
                patch_size=self.patch_size,
                pooling=self.pooling,
                attention=attention,
                hilbert=self.hilbert,
                generator=generator,
                **sizes,
            )
        return T2TViT(
            token_width=self.token_width,
            tokens=self.tokens,
            splits=((self.first_kernel, self.first_stride), *SPLITS[1:]),
            attention=attention if self.attend == "all" else exact_attention,
            token_attention=attention,
            hilbert=self.hilbert,
            generator=generator,
            **sizes,
        )

    def check_unused(self, data: ImageBatches, config: ModelConfig) -> list[str]:
        why = f"{self.model} has no use for it"
        of_others = [name for kind, names in OWN_FIELDS.items() if kind != self.model for name in names]
        require_defaults(self, of_others, "task.", why)
        require_defaults(config, ("rope_base", "tied", "embedding_std"), "model.", why)
        return []

    def _check(self, config: ModelConfig) -> None:
        """Both models have one form, which published weights fit; a setting of another one is not dropped silently."""
        positions = "learned" if self.model == "vit" else "none"  # T2T-ViT adds sines, which nothing learns
        form = {"mlp": "gelu", "norm": "layer", "positions": positions, "convolution": 1, "pooling": "mean"}
        for name, expected in form.items():
            got = getattr(config, name)
            elsewhere = " (a vit's is task.pooling)" * (name == "pooling")
            require(got == expected, f"model.{name}", f"{expected!r}, the one form of {self.model}{elsewhere}", got)
        got = config.kv_heads
        require(got in (None, config.heads), "model.kv_heads", f"null, since {self.model} has no grouped queries", got)
