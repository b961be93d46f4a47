"""Fine-tune a vision transformer on images with transformers' Trainer after its attention was swapped.

pip install transformers accelerate scikit-learn && python examples/finetune_vit.py
"""

import argparse
import tempfile

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import scatterbrain as sb


def images(size: int) -> list[dict[str, torch.Tensor]]:
    """Handwritten digits, enlarged; any dataset of pixel_values and labels will do."""
    digits, labels = load_digits(return_X_y=True)
    pixels = F.interpolate(torch.from_numpy(digits).float().view(-1, 1, 8, 8) / 8 - 1, size=size, mode="bilinear")
    return [{"pixel_values": x, "labels": torch.tensor(y)} for x, y in zip(pixels, labels)]


def train(model: ViTForImageClassification, data: list, steps: int) -> None:
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=32, learning_rate=2e-3,
        lr_scheduler_type="cosine", use_cpu=True, warmup_steps=steps // 5, save_strategy="no", report_to="none",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()


@torch.no_grad()
def accuracy(model: ViTForImageClassification, data: list) -> float:
    pixels, labels = (torch.stack([item[name] for item in data]) for name in ("pixel_values", "labels"))
    return (model.eval()(pixels).logits.argmax(-1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="pixels of an image's side, of which patches have 2")
    parser.add_argument("--steps", type=int, default=300, help="of training, and of fine-tuning after the swap")
    options = parser.parse_args()
    set_seed(0)
    test, training = images(options.size)[:300], images(options.size)[300:]
    shape = {"image_size": options.size, "patch_size": 2, "num_channels": 1, "hidden_size": 64, "num_hidden_layers": 3}
    model = ViTForImageClassification(ViTConfig(**shape, num_attention_heads=2, intermediate_size=128, num_labels=10))
    train(model, training, options.steps)
    print(f"accuracy with exact attention {accuracy(model, test):.3f}")
    sb.set_attention_dropout(model, 0.0)  # with it, training would run exact attention; ViT's default is 0 already
    print(sb.replace_attention(model, *sb.presets.drop_in(keys=32)))
    print(f"accuracy after the swap {accuracy(model, test):.3f}")
    train(model, training, options.steps)
    print(f"accuracy after fine-tuning {accuracy(model, test):.3f}")


if __name__ == "__main__":
    main()
