"""Swap nn.MultiheadAttention in an encoder of your own: replace, run, and take it back.

python examples/swap_multihead_attention.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import scatterbrain as sb


class Encoder(nn.Module):
    """Bytes to one vector per text: a stack of blocks such as many models have, knowing nothing of Scatterbrain."""

    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(layers))
        mlps = (nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(layers))
        self.mlps = nn.ModuleList(mlps)

    def forward(self, text: Tensor, padding: Tensor) -> Tensor:
        x = self.embed(text)
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps):
            y = norm(x)
            x = x + attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]
            x = x + mlp(x)
        return x.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)


def main() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    text = torch.randint(0, 256, (2, 1024))
    padding = torch.arange(1024) >= torch.tensor([[1024], [700]])

    with torch.no_grad():
        exact = model(text, padding)

        report = sb.replace_attention(model, *sb.presets.drop_in())
        print(report)

        approximated = model(text, padding)
        error = (approximated - exact).norm() / exact.norm()
        print(f"relative error: {error:.4f} with 64 of up to 1024 keys per query")

        report.restore()
        print(f"restored: {torch.equal(model(text, padding), exact)}")


if __name__ == "__main__":
    main()
