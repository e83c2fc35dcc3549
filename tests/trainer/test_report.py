"""The report: sentences that own up, pages that open anywhere and run nothing."""

import json
from datetime import UTC, datetime
from html.parser import HTMLParser
from xml.etree import ElementTree

import pyarrow as pa
import pytest

from trainer.evaluate import DISCRIMINATION, EVALUATION_SCHEMA, PREFERENCE, with_notes
from trainer.plots import INK, balance_svg, curves_svg
from trainer.report import ReportContext, write_report
from trainer.verdicts import read_strata, verdicts

NASTY = "<script>alert(1)</script>|&\n$x_1$"


def stratum(values: dict, *, suite=DISCRIMINATION, cell="seen", category="all", n=500, **other):
    """Accuracy rows with intervals 3 points wide each way, and differences 4 points each way."""
    same = {"suite": suite, "cell": cell, "category": category, "n": n}
    same |= {"clusters": 40, "interval": "two_way"} | other
    first = next(iter(values.values()))
    rows = []
    for metric, half in (("accuracy", 0.03), ("difference", 0.04)):
        for index, (scorer, value) in enumerate(values.items()):
            if metric == "difference":
                value = first - value
                if index == 0:
                    continue
            row = {"metric": metric, "scorer": scorer, "value": value}
            rows.append(same | row | {"low": value - half, "high": value + half})
    return rows


def rows_of(*parts) -> pa.Table:
    rows = pa.Table.from_pylist([row for part in parts for row in part], EVALUATION_SCHEMA)
    return with_notes(rows, ["a remark"])


CONFIGURATION = json.dumps({"lr": 0.001, "note": "</pre><script>" + "long " * 30})
GOOD = {"model": 0.85, "shuffled_reference": 0.5, "tfidf": 0.64, "reference_blind": 0.51}


def test_a_clear_lead_over_the_best_ruler_is_said():
    said = verdicts(rows_of(stratum(GOOD, cell="new_prompt")))
    assert said[0] == (
        "Policy discrimination, new prompts: the model is right in 85.0 % [82.0, 88.0] of 500 "
        "comparisons; the best ruler, tfidf, in 64.0 % [61.0, 67.0]. "
        "The model is ahead by +21.0 points [+17.0, +25.0]."
    )
    assert "The reference-blind ruler is at 50 % within its interval in every cell, as due." in said


@pytest.mark.parametrize(
    ("ruler", "words"),
    [
        (0.84, "could be chance"),
        (0.86, "The ruler is above the model, by +1.0 points [−3.0, +5.0], which could be chance"),
        (0.95, "The ruler is above the model, by +10.0 points [+6.0, +14.0], beyond chance"),
    ],
)
def test_a_ruler_that_is_level_or_above_is_said(ruler, words):
    said = verdicts(rows_of(stratum(GOOD | {"length": ruler, "tfidf": ruler - 0.005})))
    assert words in said[0]
    assert ("Also above it: tfidf" in said[0]) == (ruler > 0.85)


def test_reference_blind_off_one_half_and_few_clusters_are_said():
    said = " ".join(verdicts(rows_of(stratum(GOOD | {"reference_blind": 0.6}, clusters=3))))
    assert "The reference-blind ruler is not at 50 %: seen prompts" in said
    assert "Fewer than 10 clusters" in said


def test_models_are_set_against_each_other_under_their_labels():
    values = {"model": 0.75, "without_pretraining": 0.66, "pretrained_only": 0.74, "length": 0.5}
    labels = {PREFERENCE: {"model": "fine-tuned", "without_pretraining": "fine-tuned alone"}}
    said = verdicts(rows_of(stratum(values, suite=PREFERENCE, cell="all")), labels)
    assert "Preference, all cells: fine-tuned is above fine-tuned alone by +9.0 points" in said[1]
    assert "fine-tuned and the model 'pretrained only' are not told apart" in said[2]


def test_siblings_and_categories_have_their_say():
    rows = rows_of(
        stratum(GOOD, cell="new_policy"),
        stratum(GOOD | {"model": 0.55}, category="siblings", cell="new_policy"),
        stratum(GOOD | {"model": 0.55}, category="siblings", cell="all"),
        stratum({"model": 0.7, "length": 0.5}, suite=PREFERENCE, cell="all"),
        stratum({"model": 0.7, "length": 0.5}, suite=PREFERENCE, cell="all", category="sums"),
        stratum({"model": 0.7, "length": 0.8}, suite=PREFERENCE, cell="all", category="rhymes"),
    )
    said = " ".join(verdicts(rows))
    assert "Policy discrimination, siblings: the model is right in 55.0 %" in said
    assert "in 1 of 2 categories a ruler is above the model: rhymes (length)" in said


class Page(HTMLParser):
    """Collects what a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]


@pytest.fixture(scope="module")
def context() -> ReportContext:
    return ReportContext(
        title=f"Report {NASTY}",
        checkpoints=[
            {
                "name": NASTY,
                "stage": "pretrain",
                "parents": ["a", "b"],
                "configuration": CONFIGURATION,
            }
        ],
        snapshot=7,
        configuration="abc123",
        command=f"polar run --config '{NASTY}'",
        created_at=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        labels={PREFERENCE: {"model": NASTY}},
        curves={NASTY: [{"step": s, "loss": 1 / s, "accuracy": 0.5} for s in (1, 2)], "none": []},
        balance=[
            {"split": "train", "label": "same_policy", "rows": 40},
            {"split": "train", "label": "cross_policy", "rows": 60},
            {"split": NASTY, "label": "cross_policy", "rows": 0},
        ],
        notes=[NASTY],
    )


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return rows_of(
        stratum(GOOD | {"tfidf": 0.9}, cell="seen"),
        stratum(GOOD, cell="new_prompt"),
        stratum(GOOD | {"model": 0.55}, category="siblings", cell="seen"),
        stratum({"model": 0.7, "rival": 0.6, "length": 0.5}, suite=PREFERENCE, cell="all"),
        stratum({"model": 0.7, "rival": 0.6}, suite=PREFERENCE, cell="all", category=NASTY),
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory, rows, context) -> dict[str, str]:
    paths = write_report(tmp_path_factory.mktemp("report"), rows, context)
    return {kind: path.read_text(encoding="utf-8") for kind, path in paths.items()}


def test_html_is_self_contained_and_runs_nothing(pages):
    text = pages["html"]
    page = Page()
    page.feed(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert page.tags.count("svg") == 5
    assert "@import" not in text
    assert INK not in text
    assert "&lt;script&gt;alert(1)" in text
    for shown in ("2026-01-02 03:04 UTC", "lake snapshot 7", "abc123", "a remark", "90.0"):
        assert shown in text
    assert 'class="above">90.0' in text


def test_long_facts_of_checkpoints_stand_below_their_table(pages):
    text = pages["html"]
    table, rest = text[text.index("What was trained") :].split("</table>", maxsplit=1)
    assert "lr" not in table
    assert "<details><summary>configuration of" in rest
    assert "&#34;lr&#34;: 0.001" in rest


def test_language_model_losses_have_a_panel_of_their_own(context):
    curves = context.curves | {"backbone": [{"step": 1, "loss": 5.0}]}
    assert "next-token loss" in curves_svg(curves)
    assert "next-token loss" not in curves_svg(context.curves)


def test_svgs_are_well_formed_even_with_odd_names(context):
    for svg in (curves_svg(context.curves), balance_svg(context.balance)):
        ElementTree.fromstring(svg)
        assert "currentColor" in svg


def test_markdown_holds_the_same_numbers_and_escapes(pages):
    text = pages["md"]
    prose = text[: text.index("### The command")]
    assert "<script>" not in prose
    assert "| tfidf | 90.0 [87.0, 93.0] | 64.0 [61.0, 67.0] |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_json_is_strict_and_complete(tmp_path, pages, rows, context):
    odd = ReportContext(checkpoints=[{"loss": float("nan")}])
    record = json.loads(write_report(tmp_path, rows_of(), odd)["json"].read_text())
    assert record["checkpoints"] == [{"loss": None}]
    record = json.loads(pages["json"])
    assert record["rows"] == rows.to_pylist()
    assert record["verdicts"] == verdicts(rows, context.labels)
    assert record["snapshot"] == 7


def test_nothing_measured_is_said(tmp_path):
    paths = write_report(tmp_path, rows_of())
    assert "Nothing was measured" in paths["html"].read_text()
    assert paths["md"].read_text().count("There is none") == 2
    assert json.loads(paths["json"].read_text())["rows"] == []


def test_a_suite_without_rulers_is_still_reported(tmp_path):
    rows = rows_of(stratum({"model": 0.8}, cell="seen"))
    assert read_strata(rows)[0].best_ruler is None
    assert "80.0" in write_report(tmp_path, rows)["html"].read_text()


def test_the_same_rows_give_the_same_pages(tmp_path, pages, rows, context):
    for kind, path in write_report(tmp_path, rows, context).items():
        assert path.read_text(encoding="utf-8") == pages[kind]
