"""Logs of a run as a table reads them."""

from __future__ import annotations

import json
import math

from scatterbrain.training.table_run import TableRun

STEP = {"learning_rate": 0.1, "loss": 1.0, "accuracy": 0.5, "gradient_norm": 1.0, "tokens": 10}


def step(number: int, seconds: float = 2.0, attention_seconds: float = 0.5) -> dict:
    return {"kind": "train", "step": number, "seconds": seconds, "attention_seconds": attention_seconds} | STEP


def validation(number: int, perplexity: float, seconds: float, **more) -> dict:
    figures = {"loss": math.log(perplexity), "accuracy": 1 / perplexity}
    return {"kind": "validation", "step": number, "seconds": seconds} | figures | more


def write_log(run: TableRun, *records: dict) -> None:
    run.folder.path.mkdir(parents=True, exist_ok=True)
    run.folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
