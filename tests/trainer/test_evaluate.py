"""Evaluation: right numbers in the right rows, and faults that say what to do."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipelines.schemas import EVALUATIONS
from tests.trainer.style_world import discrimination, knows_style, preference
from trainer import rulers
from trainer.errors import TrainerError
from trainer.evaluate import (
    CELLS,
    DISCRIMINATION,
    EVALUATION_SCHEMA,
    PREFERENCE,
    EvaluationSettings,
    evaluate,
    joined,
    notes_of,
    reference_blind_check,
)
from trainer.evaluate_files import evaluate_command
from trainer.model import Mark, Record, write_record

QUICK = EvaluationSettings(resamples=100)
PLAIN = EvaluationSettings(resamples=100, rulers=("length", "random"), shuffled_reference=False)


@pytest.fixture(scope="module")
def world() -> pa.Table:
    return pa.concat_tables([discrimination(500), preference(120)])


@pytest.fixture(scope="module")
def rows(world) -> pa.Table:
    models = {"model": knows_style, "without_pretraining": rulers.length}
    return evaluate(models, world, world, QUICK)


def find(rows, **wanted) -> list[dict]:
    return [r for r in rows.to_pylist() if all(r[key] == value for key, value in wanted.items())]


def test_schema_is_the_lake_table_without_ids():
    ids = {"checkpoint_id", "snapshot", "created_at"}
    lake = [(f.name, f.type, f.nullable) for f in EVALUATIONS.schema if f.name not in ids]
    assert [(f.name, f.type, f.nullable) for f in EVALUATION_SCHEMA] == lake


def test_rows_have_the_schema_and_unique_keys(rows):
    assert rows.schema.remove_metadata() == EVALUATION_SCHEMA
    keys = rows.select([name for name in EVALUATIONS.key if name != "checkpoint_id"])
    assert keys.group_by(keys.column_names).aggregate([]).num_rows == rows.num_rows
    for row in rows.to_pylist():
        assert row["low"] <= row["value"] <= row["high"], row


def test_every_scorer_has_every_cell_siblings_apart(rows):
    for cell in CELLS:
        found = find(rows, suite=DISCRIMINATION, cell=cell, category="all", metric="accuracy")
        names = ["model", "without_pretraining", "shuffled_reference", *rulers.RULERS]
        assert [row["scorer"] for row in found] == names
        assert len({row["n"] for row in found}) == 1
    siblings = find(rows, suite=DISCRIMINATION, category="siblings", scorer="model")
    assert {row["cell"] for row in siblings} >= {"seen", "all"}


def test_numbers_are_the_mean_over_comparisons(world, rows):
    expected, compared = 0.0, 0
    groups = world.filter((pc.field("split") == "eval") & (pc.field("cell") == "new_prompt"))
    for group in groups.filter(pc.field("wrapper") == "pretrain").to_pylist():
        positive, *negatives = group["candidates"]
        for negative in negatives:
            if negative["relation"] != "sibling":
                gaps = [abs(len(group["reference"]) - len(c["text"])) for c in (positive, negative)]
                expected += (gaps[0] < gaps[1]) + 0.5 * (gaps[0] == gaps[1])
                compared += 1
    row = find(rows, suite=DISCRIMINATION, cell="new_prompt", category="all", scorer="length")[0]
    assert row["n"] == compared
    assert row["value"] == pytest.approx(expected / compared)


def test_differences_are_the_model_less_the_other(rows):
    for row in find(rows, metric="difference"):
        same = {key: row[key] for key in ("suite", "cell", "category")} | {"metric": "accuracy"}
        model = find(rows, **same, scorer="model")[0]
        other = find(rows, **same, scorer=row["scorer"])[0]
        assert row["value"] == pytest.approx(model["value"] - other["value"])
        assert row["n"] == model["n"] == other["n"]


def test_a_perfect_model_is_perfect_and_helpless_with_shuffled_references(rows):
    cell = {"suite": DISCRIMINATION, "cell": "new_prompt", "category": "all", "metric": "accuracy"}
    model, shuffled, blind = (
        find(rows, **cell, scorer=scorer)[0]
        for scorer in ("model", "shuffled_reference", "reference_blind")
    )
    assert model["value"] > 0.97
    assert shuffled["value"] < 0.6
    assert blind["low"] <= 0.5 <= blind["high"]
    assert find(rows, **(cell | {"metric": "difference"}), scorer="length")[0]["low"] > 0


def test_preference_has_categories_cells_and_all(rows):
    accuracy = find(rows, suite=PREFERENCE, metric="accuracy", scorer="model")
    strata = {(row["cell"], row["category"]): row["n"] for row in accuracy}
    assert strata[("all", "all")] == 3 * 60
    assert strata[("seen", "all")] + strata[("new_prompt", "all")] == 3 * 60
    categories = [("all", name) for name in ("rhymes", "sums", "uncategorised")]
    assert sum(strata[key] for key in categories) == 3 * 60
    assert accuracy[0]["interval"] == "prompt_groups"  # one policy group, so that way is out


def test_notes_say_where_shuffled_references_came_from_and_survive_joining(rows, world):
    notes = notes_of(rows)
    assert any(note.startswith("policy_discrimination: shuffled_reference") for note in notes)
    few = EvaluationSettings(resamples=100, max_eval_groups=5, rulers=("random",))
    other = evaluate(knows_style, world, world, few, suites=[PREFERENCE])
    assert set(other["suite"].to_pylist()) == {PREFERENCE}
    assert any("5 of 30 eval groups in cell seen were drawn" in note for note in notes_of(other))
    both = joined([rows, other])
    assert both.num_rows == rows.num_rows + other.num_rows
    assert notes_of(both) == notes + notes_of(other)


def test_it_is_the_same_again_and_in_any_order(world):
    order = np.random.default_rng(0).permutation(world.num_rows)
    first = evaluate(knows_style, world, world, PLAIN)
    again = evaluate(knows_style, world.take(order), world.take(order), PLAIN)
    assert first.equals(again)


def test_rulers_are_fitted_on_training_groups_only(world):
    bare = world.filter(pc.field("split") == "eval")
    rows = evaluate(knows_style, world, bare, QUICK)
    assert {"length", "random"} <= set(rows["scorer"].to_pylist())
    assert not {"tfidf", "surface_logistic"} & set(rows["scorer"].to_pylist())
    assert any("so without tfidf, surface_logistic" in note for note in notes_of(rows))


def test_no_groups_give_no_rows_and_a_remark(world):
    rows = evaluate(knows_style, world.slice(0, 0), world, PLAIN)
    assert rows.num_rows == 0
    assert len(notes_of(rows)) == 2


def test_progress_counts_to_its_end(world):
    told = []
    evaluate(knows_style, world, world, PLAIN, progress=lambda *step: told.append(step))
    done, total, _ = told[-1]
    assert done == total
    assert [step[0] for step in told] == sorted(step[0] for step in told)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda items: np.full(len(items), np.nan), "not finite"),
        (lambda items: np.zeros(3), "3 scores for"),
    ],
)
def test_bad_scores_are_refused(world, score, message):
    with pytest.raises(TrainerError, match=message):
        evaluate(score, world, world, PLAIN)


def test_unknown_rulers_and_columns_are_named(world):
    with pytest.raises(ValidationError, match="unknown rulers weight"):
        EvaluationSettings(rulers=("weight",))
    with pytest.raises(TrainerError, match="lack the columns candidates"):
        evaluate(knows_style, world.drop_columns("candidates"), world, PLAIN)


def test_reference_blind_check_passes_a_fair_corpus_and_catches_a_leak(tmp_path):
    fair = reference_blind_check(discrimination(500), discrimination(500), QUICK)
    assert [(r["split"], r["cell"]) for r in fair] == [
        ("train", "seen"),
        *(("eval", cell) for cell in CELLS),
    ]
    assert not any(row["leaks"] for row in fair)
    file = tmp_path / "groups.parquet"
    pq.write_table(discrimination(500, leak=True), file)
    leaky = {(r["split"], r["cell"]): r for r in reference_blind_check(file, file, QUICK)}
    for where in (("train", "seen"), ("eval", "seen"), ("eval", "new_prompt")):
        assert leaky[where]["leaks"]
        assert leaky[where]["low"] > 0.5


def test_reference_blind_check_needs_training_groups(world):
    with pytest.raises(TrainerError, match="needs training groups"):
        reference_blind_check(preference(10), world, QUICK)


RECORD = Record(
    wrapper="pretrain",
    separator=Mark(token="<s>", id=0),
    reward=Mark(token="<r>", id=1),
    max_length=64,
    max_response_length=8,
    stage="pretrain",
)


class FakeScorer:
    """Stands in for a checkpoint; where it was loaded from decides how good it is."""

    def __init__(self, good: bool) -> None:
        self.good = good

    @classmethod
    def load(cls, path: Path) -> "FakeScorer":
        return cls("good" in path.name)

    def score(self, items):
        return knows_style(items) if self.good else rulers.length(items)


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> list[Path]:
    monkeypatch.setattr("trainer.score.Scorer", FakeScorer)
    folders = [tmp_path / name for name in ("good", "poor", "length")]
    for folder in folders:
        folder.mkdir()
        write_record(folder, RECORD)
    (folders[0] / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7, "accuracy": 0.5}\n')
    return folders


def test_the_command_goes_from_files_to_files(tmp_path, world, checkpoints):
    groups, out = tmp_path / "groups.parquet", tmp_path / "report"
    pq.write_table(world, groups)
    rows = evaluate_command(checkpoints, [groups], out=out, settings=PLAIN)
    assert pq.read_table(out / "evaluations.parquet").equals(rows)
    models = [s for s in dict.fromkeys(rows["scorer"].to_pylist()) if s != "random"]
    assert models == ["model", "poor", "length_2", "length"]  # a folder never shadows a ruler
    record = json.loads((out / "report.json").read_text())
    assert record["checkpoints"][0]["scorer"] == "model"
    assert record["command"].startswith("python -m trainer evaluate ")
    assert "loss on training data" in (out / "report.html").read_text()


def test_the_command_measures_all_rows_where_none_is_marked_eval(tmp_path, checkpoints):
    line = {"prompt": "q", "reference": "w1 w2", "chosen": "w1 w2", "rejected": "no"}
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(line | {"prompt": f"q{i}"}) for i in range(4)))
    rows = evaluate_command(checkpoints[:1], [file], settings=QUICK, suites=[PREFERENCE])
    row = find(rows, scorer="model", category="all")[0]
    assert (row["value"], row["n"], row["interval"]) == (1.0, 4, "wilson")
    assert "No row of the groups says split eval" in notes_of(rows)[0]


def test_the_command_names_an_unknown_suite(tmp_path):
    with pytest.raises(TrainerError, match="suite 'taste' is unknown"):
        evaluate_command([tmp_path], [tmp_path], suites=["taste"])
