"""A Llama-style language model that reads a long prompt with sparse + low-rank attention and writes exactly.

The prompt is approximated in one pass; every new token attends to the whole cache exactly.

    pip install 'scatterbrain[transformers]'
    python examples/llama_generation.py
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import scatterbrain as sb
from scatterbrain.integrations.transformers import register

# Lists of keys for every query: a language model copies from far back, where a list shared by 16 queries is too coarse.
NAME = register("scatterbrain:lm", sb.Routed(64, block_q=1, block_k=8, window=16, pools=2), sb.Quadratic(rank=9))


def counting(first: int, length: int) -> Tensor:
    """(1, length) bytes of a text that counts sheep."""
    text = "".join(f"{n} sheep on the hill, one jumps the fence; " for n in range(first, first + length // 30))
    return torch.tensor([list(text[:length].encode())])


@torch.no_grad()
def main(prompt_length: int = 2048, steps: int = 60) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256, max_position_embeddings=4096, eos_token_id=0)
    model = LlamaForCausalLM(config)
    with torch.enable_grad():  # enough training to know the text; put your own model here
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(steps):
            batch = counting(100 + 7 * step, prompt_length)
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    prompt, other = counting(500, prompt_length), counting(300, prompt_length)

    for name in ("sdpa", NAME):
        model.set_attn_implementation(name)
        if name == NAME:
            with sb.calibrate(model):
                model(other)
        start = time.perf_counter()
        loss = float(model(prompt, labels=prompt).loss)
        milliseconds = 1e3 * (time.perf_counter() - start)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
        written = bytes(out[0, prompt_length:].tolist()).decode(errors="replace")
        print(f"{name:15}  loss {loss:.3f} in {milliseconds:.0f} ms  writes {written!r}")


if __name__ == "__main__":
    main()
