"""The table of a task: rows from logs, and as text."""

from __future__ import annotations

import csv
import io
import math

import pytest
import torch
from table_logs import step, validation, write_log

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import AttentionConfig, ModelConfig, RunConfig
from scatterbrain.training.metrics import ACCURACY, PERPLEXITY, Evaluation
from scatterbrain.training.table import Row, Table, as_csv, baseline_of, equal_cost, markdown, multiply_adds, row_of
from scatterbrain.training.table_picture import curve
from scatterbrain.training.tasks.image_classification import ImageClassification


def test_a_row_has_mean_best_time_and_share_of_its_seeds(make_run):
    first, second = make_run(seed=0), make_run(seed=1)
    write_log(first, step(1), step(2, 4.0), validation(2, 9.0, 6.0, low_rank_shares=[0.2, 0.4]))
    write_log(
        second,
        step(1, 3.0, 1.5),
        validation(1, 4.0, 3.0),
        step(2, 3.0, 1.5),
        validation(2, 5.0, 6.0, low_rank_shares=[0.5, 0.7]),
    )
    row = row_of([first, second], PERPLEXITY, 100.0, until=4.5)
    assert row.final == pytest.approx((9.0, 5.0)) and row.best == pytest.approx((9.0, 4.0))
    assert row.reached == (None, 3.0) and row.steps == 2 and row.seeds == (0, 1)
    assert row.seconds == (6.0, 6.0) and row.in_attention == pytest.approx((1 / 6, 0.5))
    assert row.low_rank_share == pytest.approx((0.3, 0.6))


def test_the_best_accuracy_is_the_largest(make_run):
    run = make_run()
    write_log(run, step(1), validation(1, 2.0, 2.0), step(2), validation(2, 4.0, 4.0))
    row = row_of([run], ACCURACY, None, until=0.3)
    assert row.best == (0.5,) and row.final == (0.25,) and row.reached == (2.0,)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_validation_that_is_no_number_is_neither_the_best_nor_good_enough(make_run, order):
    run = make_run()
    perplexities = [[math.nan, 3.0, 2.0][index] for index in order]
    log = [validation(number, perplexity, float(number)) for number, perplexity in enumerate(perplexities, 1)]
    write_log(run, *[step(number) for number in (1, 2, 3)], *log)
    found = row_of([run], PERPLEXITY, None, until=2.0)
    assert found.best == pytest.approx((2.0,)) and found.reached == (1.0 + perplexities.index(2.0),)
    write_log(run, step(1), validation(1, math.nan, 1.0))
    found = row_of([run], ACCURACY, None, until=0.0)
    assert math.isnan(found.best[0]) and found.reached == (None,)


def table_of(*rows: Row, reference: float | None = 1000.0) -> Table:
    return Table("copy", PERPLEXITY, rows, Evaluation(math.log(8), 0.2), reference, 2.0, ("a note",))


def row(method: str, multiply_adds: float | None, *final: float) -> Row:
    times = tuple(10.0 for _ in final)
    seeds = tuple(range(len(final)))
    return Row(method, seeds, 4, final, final, (None,) * len(final), times, times, (), multiply_adds)


def cells(text: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first of their line."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: cells[1:] for cells in rows}


def test_the_text_marks_methods_that_are_not_at_equal_cost_and_spares_exact_attention():
    text = markdown(table_of(row("full", 9000, 1.0, 3.0), row("window", 1099, 4.0), row("routed-32-keys", 899, 5.0)))
    found = cells(text)
    assert list(found)[2:] == ["full", "window", "routed-32-keys *", "frequencies of the targets"]
    assert found["full"][:2] == ["2.000 ± 1.414", "2.000 ± 1.414"] and found["window"][0] == "4.000"
    assert found["frequencies of the targets"][0] == "8.000"
    assert "* not at equal cost: 1,000 multiply-adds" in text and "a note" in text
    assert "not at equal cost" not in markdown(table_of(row("window", 1099, 4.0)))


def test_the_csv_has_numbers_in_full_and_every_seed():
    lines = list(
        csv.DictReader(io.StringIO(as_csv(table_of(row("window", 1200.0, 1.25, 1.75), row("full", None, 1.0)))))
    )
    assert [line["method"] for line in lines] == ["window", "full", "baseline"]
    assert float(lines[0]["perplexity_mean"]) == 1.5 and lines[0]["perplexity_by_seed"] == "1.25 1.75"
    assert lines[0]["at_equal_cost"] == "False" and lines[1]["multiply_adds"] == lines[1]["perplexity_deviation"] == ""
    assert float(lines[2]["perplexity_mean"]) == pytest.approx(8.0)


def test_the_csv_says_of_equal_cost_only_what_is_known():
    rows = row("window", 1000.0, 1.0), row("favor", None, 1.0), row("full", 1000.0, 1.0)
    for reference, expected in ((1000.0, ["True", "", "False"]), (None, ["", "", "False"])):
        lines = list(csv.DictReader(io.StringIO(as_csv(table_of(*rows, reference=reference)))))
        assert [line["at_equal_cost"] for line in lines[:3]] == expected


def test_a_run_that_broke_leaves_the_table_readable():
    assert "inf ± nan" in markdown(table_of(row("window", 1000, math.inf, 2.0)))


def test_equal_cost_is_that_of_the_cheaper_combined_method():
    assert equal_cost({"routed-quadratic": 5.0, "routed-centroid": 4.0, "window": 1.0}) == 4.0
    assert equal_cost({"routed-quadratic": 5.0, "routed-centroid": None}) == 5.0
    assert equal_cost({"window": 1.0}) is None


def test_the_cost_of_a_model_of_images_is_that_of_the_attention_that_reads_the_longest_sequences():
    task = ImageClassification(model="t2t_vit", image_size=128, token_width=48)
    config = RunConfig(model=ModelConfig(width=128, heads=2), attention=AttentionConfig(support="full"))
    assert multiply_adds(config, task, 1024) == 2 * 1024 * 48
    assert multiply_adds(config, ImageClassification(), 1024) == 2 * 1024 * 64


def test_the_baseline_knows_the_frequencies_of_the_scored_targets_alone():
    batches = [Batch(torch.zeros(1, 4), torch.tensor([[3, 3, -100, 5]])), Batch(torch.zeros(1, 1), torch.tensor([[3]]))]
    found = baseline_of(batches)
    assert found.accuracy == 0.75
    assert found.loss == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_a_curve_is_the_mean_at_the_validations_that_all_seeds_have():
    logs = [[validation(1, 4.0, 1.0), validation(2, 2.0, 2.0)], [validation(2, 6.0, 4.0), step(2)]]
    seconds, means, lowest, highest = curve(logs, PERPLEXITY)
    assert seconds == [3.0]
    assert (means, lowest, highest) == (pytest.approx([4.0]), pytest.approx([2.0]), pytest.approx([6.0]))
