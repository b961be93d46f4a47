from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scatterbrain.analysis.models import Source
from scatterbrain.training.batch import Batch
from scatterbrain.training.config import AttentionConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from scatterbrain.training.files import UnusableRun
from scatterbrain.training.trained import load_trained
from scatterbrain.training.trainer import Trainer


@pytest.fixture(scope="module", params=["causal", "masked"])
def run(request, tmp_path_factory) -> Trainer:
    masked = request.param == "masked"
    low_rank = {"kind": "centroid", "clusters": 8} if masked else {"kind": "quadratic", "rank": 2}
    config = RunConfig(
        task={"kind": "copy", "tokens": 63, "masked": masked},
        model=ModelConfig(layers=2, width=16, heads=2, positions="learned", convolution=2),
        attention=AttentionConfig(support={"kind": "window", "keys": 8}, low_rank=low_rank),
        train=TrainConfig(steps=3, batch=2, threads=1, validation_batches=2),
        output=str(tmp_path_factory.mktemp("runs") / request.param),
    )
    trainer = Trainer(config)
    trainer.run()
    return trainer


def test_a_trained_model_gives_the_logits_that_its_run_ended_with(run):
    found = load_trained(Path(run.config.output))
    batch = found.data.validation_batch(0)
    assert torch.equal(found.model(batch.inputs), run.train_state.model.eval()(batch.inputs))
    assert found.task == run.task and torch.equal(batch.targets, run.validation_batches()[0].targets)


def test_a_command_measures_a_run_on_its_own_validation_inputs(run):
    loaded = Source(run.config.output, rows=2, batches=2).load()
    expected = [run.data.validation_batch(number).inputs for number in range(2)]
    assert [batch.tolist() for batch in loaded.batches] == [batch.tolist() for batch in expected]
    assert "copy" in loaded.about


def batch_of(rows: list[list[int]], width: int, is_padded: bool) -> Batch:
    inputs = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows]) if is_padded else None
    return Batch(inputs, torch.zeros(len(rows), dtype=torch.int64), mask)


WHOLE, CUT, WIDE = batch_of([[1, 2, 3]], 3, False), batch_of([[4, 5]], 3, True), batch_of([[6, 7, 8, 9, 1]], 5, False)


@pytest.mark.parametrize(
    "batches", [(WHOLE, CUT), (CUT, WHOLE), (WHOLE, WIDE), (WIDE, WHOLE), (CUT, WIDE, WHOLE), (WIDE, CUT)]
)
def test_rows_of_batches_of_other_widths_are_padded_and_masked(batches):
    data = SimpleNamespace(validation_batch=lambda number: batches[number])
    rows, mask = Source("run")._validation_rows(data, len(batches))
    assert rows.shape == mask.shape == (len(batches), max(batch.inputs.shape[1] for batch in batches))
    for batch, row, known in zip(batches, rows, mask):
        expected = batch.inputs[0] if batch.mask is None else batch.inputs[0][batch.mask[0]]
        assert row[known].tolist() == expected.tolist() and not row[~known].any()


def test_rows_of_batches_without_padding_have_no_mask():
    rows, mask = Source("run")._validation_rows(SimpleNamespace(validation_batch=lambda number: WHOLE), 2)
    assert mask is None and rows.tolist() == [[1, 2, 3]] * 2


def test_a_run_of_listops_is_measured_on_more_rows_than_a_batch_has(tmp_path):
    config = RunConfig(
        task={"kind": "listops", "tokens": 40, "shortest": 10, "depth": 4},
        model=ModelConfig(layers=1, width=16, heads=2),
        attention=AttentionConfig(support="full"),
        train=TrainConfig(steps=1, batch=2, threads=1, validation_batches=1),
        output=str(tmp_path / "run"),
    )
    Trainer(config).run()
    loaded = Source(config.output, rows=5, batches=2).load()
    widths = {mask.shape[1] for _, mask in loaded.batches}
    assert [len(rows) for rows, _ in loaded.batches] == [5, 5] and len(widths) == 1
    with torch.no_grad():
        assert all(loaded.model(*batch).isfinite().all() for batch in loaded.batches)


def test_other_inputs_are_for_language_models(run, tmp_path):
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ValueError, match="--inputs: the run in .* has the task copy, whose own validation inputs"):
        Source(run.config.output, inputs=tmp_path / "text.txt").load()


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (
            {"kind": "words", "tokenizer": "bpe", "vocabulary": 300},
            "tokenizer.json: expected what the data of this run",
        ),
        ({"kind": "language"}, "data: the content of the files has changed"),
    ],
)
def test_data_that_have_changed_are_refused(tmp_path, task, words):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the cat number {number:03d} sat on the mat\n" for number in range(300)))
    config = RunConfig(
        task=task,
        data=DataConfig(path=str(text), validation_fraction=0.3),
        model=ModelConfig(layers=1, width=16, heads=2),
        attention=AttentionConfig(support="full"),
        train=TrainConfig(steps=1, batch=1, context=24, threads=1, validation_batches=1),
        output=str(tmp_path / "run"),
    )
    Trainer(config).run()
    assert load_trained(tmp_path / "run").task.kind == task["kind"]
    text.write_text(text.read_text().replace("cat", "dog"))
    with pytest.raises(UnusableRun, match=words) as refused:
        Source(config.output).load()
    cure = "--inputs FILE" if task["kind"] == "language" else "or train the task anew"
    assert cure in str(refused.value) and "--output" not in str(refused.value)
    if task["kind"] == "language":
        assert Source(config.output, inputs=text).load().batches, "other inputs do not read the data of the run"
