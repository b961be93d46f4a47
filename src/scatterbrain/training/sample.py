"""Text written by a trained model."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def generate(model: nn.Module, prompt: bytes, length: int, temperature: float, context: int, seed: int) -> bytes:
    """Continues ``prompt`` by ``length`` bytes, reading at most the last ``context`` bytes for each.

    Every byte recomputes the whole context, which is fast enough for a paragraph.

    Args:
        model: A decoder over bytes.
        prompt: At least one byte.
        length: Bytes to add.
        temperature: 0 takes the most likely byte.
        context: The longest context the model was trained with.
        seed: Of the random draws.

    Returns:
        The added bytes.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(length):
        logits = model(torch.tensor([tokens[-context:]], device=device))[0, -1].float().cpu()
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            probabilities = torch.softmax(logits / temperature, dim=-1)
            tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return bytes(tokens[len(prompt) :])
