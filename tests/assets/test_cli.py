"""The `polar` command: what its help says, what it prints, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from assets import cli
from tests.assets.homes import ROOT, Home, refused

OPTIONS = {
    "run": ["--config", "--data", "--until", "--dry-run", "--json"],
    "up": ["--config", "--data", "--port"],
    "sql": ["--format", "--snapshot", "--output"],
    "score": ["checkpoint", "--input", "--wrapper", "--json"],
    "finetune": ["checkpoint", "--data", "--out", "--config", "--set", "--recipe", "--json"],
    "evaluate": ["checkpoint", "--suite", "--data", "--out", "--json"],
    "similar": ["text", "--top", "--config", "--json"],
    "plan": ["--config", "--assume", "--json"],
    "explain": ["id", "--again", "--json"],
    "diff": ["before", "after", "--json"],
}


def test_help_names_every_command(polar):
    code, out, _ = polar("--help")
    assert code == 0
    for command in OPTIONS:
        assert re.search(rf"^\s+{command}\s+\S", out, re.MULTILINE), out


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_names_its_options(polar, command: str):
    code, out, _ = polar(command, "--help")
    assert code == 0
    for option in OPTIONS[command]:
        assert option in out, out
    assert out.startswith(f"Usage: polar {command} ")


def test_help_waits_for_nothing_heavy():
    heavy = {"dagster", "torch", "transformers", "apache_beam", "duckdb", "pyarrow", "numpy"}
    code = "import sys; from assets import cli; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "typer" in done.stdout.split()
    assert heavy.isdisjoint(done.stdout.split())


def test_every_command_has_its_help_tested():
    named = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    assert named >= set(OPTIONS)


def test_a_dry_run_prints_the_plan_with_counts_and_makes_nothing(polar, fresh: Home):
    from pipelines import embedded

    config = fresh.workspace().config
    prompts = embedded.prompts(config.prompts, config.split)["kind"].to_pylist()
    answers = prompts.count("instruction") * 6 * config.rollouts.samples
    code, out, _ = polar("run", "-c", str(fresh.config), "--dry-run", home=fresh.path)
    assert code == 0
    for words in (
        "embedded_policies",
        "5 training runs",
        "6 policies",
        f"{len(prompts)} prompts",
        "never made",
        "trajectories (6 policies)",
        f"at most {answers:,} answers",
        "8 steps",
    ):
        assert words in out, (words, out)
    assert not (fresh.path / "lake").exists()
    assert not (fresh.path / "policies").exists()


def test_a_dry_run_as_json(polar, copy: Home):
    copy.edit("run.yaml", finetune={"max_steps": 5})
    code, out, _ = polar("run", "-c", str(copy.config), "--dry-run", "--json", home=copy.path)
    assert code == 0
    found = {row["asset"]: row for row in json.loads(out)}
    assert list(found) == ["finetuned", "finetuned_alone", "report"]
    assert found["finetuned"] == {
        "asset": "finetuned",
        "partition": None,
        "reason": "changed: settings",
        "size": "at most 1 epochs, 5 steps",
    }
    assert found["report"]["reason"] == "after: finetuned, finetuned_alone"


def test_a_run_with_nothing_to_do_says_so_and_sums_up(polar, made: Home):
    code, out, _ = polar("run", "-c", str(made.config), home=made.path)
    assert code == 0
    assert "All is current: nothing to make, no run started." in out
    answers = made.one("select count(*) from trajectories")
    assert re.search(rf"trajectories\s+│\s+{answers:,}", out)
    assert re.search(r"policy_discrimination │ seen .* │ \d\.\d{3} \[", out)
    assert re.search(r"^report: .*reports/tiny/report.html$", out, re.MULTILINE)
    assert re.search(r"^lake: .*catalog.sqlite$", out, re.MULTILINE)
    code, out, err = polar("run", "-c", str(made.config), "--json", home=made.path)
    assert code == 0
    summary = json.loads(out)
    assert (summary["made"], summary["failed"]) == ([], {})
    assert summary["rows"]["trajectories"] == answers
    assert {row["scorer"] for row in summary["metrics"]} > {"model", "length"}
    assert "All is current" in err
    code, out, _ = polar("run", "-c", str(made.config), "--dry-run", home=made.path)
    assert "All is current: a run would make nothing." in out


def test_sql_formats(polar, made: Home, tmp_path: Path):
    query = "select label, count(*)::int as n from pairs group by 1 order by 1"
    expected = made.query(query)
    code, out, _ = polar("sql", query, "--format", "csv", home=made.path)
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [{**row, "n": int(row["n"])} for row in rows] == expected
    code, out, _ = polar("sql", query, "-f", "json", home=made.path)
    assert json.loads(out) == expected
    code, out, _ = polar("sql", query, home=made.path)
    assert "same_policy" in out
    file = tmp_path / "pairs.parquet"
    assert polar("sql", query, "-f", "parquet", "-o", str(file), home=made.path)[0] == 0
    import pyarrow.parquet as pq

    assert pq.read_table(file).to_pylist() == expected
    snapshot = str(made.one("select min(snapshot) from checkpoints") - 1)
    code, out, _ = polar("sql", "select count(*) as n from groups", "--snapshot", snapshot,
                         "-f", "json", home=made.path)  # fmt: skip
    assert json.loads(out) == [{"n": 0}]


def test_scores_are_one_a_line_in_the_order_of_the_items(polar, made: Home, tmp_path, monkeypatch):
    checkpoint = str(made.path / "checkpoints" / "tiny" / "finetuned")
    items = [
        {"prompt": "Which day?", "reference": "Monday.", "output": answer}
        for answer in ("Monday.", "Tuesday. " * 30, "", "Monday.")
    ]
    text = "".join(json.dumps(item) + "\n" for item in items)
    file = tmp_path / "items.jsonl"
    file.write_text(text, encoding="utf-8")
    code, out, _ = polar("score", checkpoint, "--input", str(file))
    assert code == 0
    plain = [float(line) for line in out.splitlines()]
    assert len(plain) == 4
    assert plain[0] == plain[3]
    code, out, _ = polar("score", checkpoint, "--input", str(file), "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["score"] for row in rows] == pytest.approx(plain, abs=1e-4)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code, out, _ = polar("score", checkpoint, "--input", "-")
    assert [float(line) for line in out.splitlines()] == plain
    result = polar("score", checkpoint, "--input", str(file), "--wrapper", "other")
    refused(result, "other")
    other = polar("score", checkpoint, "--input", str(file), "--wrapper", "pretrain")[1]
    assert [float(line) for line in other.splitlines()] != plain


def test_similar_finds_an_answer_by_its_text(polar, made: Home):
    row = made.query(
        "select trajectory_id::varchar as id, text, name from trajectories "
        "join policies using (policy_id) where length(text) > 60 order by all limit 1"
    )[0]
    arguments = ("similar", row["text"], "-c", str(made.config))
    code, out, _ = polar(*arguments, "--json", "--top", "3", home=made.path)
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert 1 <= len(found) <= 3
    best = next(r for r in found if r["trajectory_id"] == row["id"])
    assert (best["similarity"], best["policy"], best["text"]) == (1.0, row["name"], row["text"])
    code, out, _ = polar(*arguments, home=made.path)
    assert row["id"] in out
    code, out, _ = polar("similar", "no one ever wrote this here", "-c", str(made.config),
                         home=made.path)  # fmt: skip
    assert code == 0
    assert "No near-duplicate found." in out
    other = polar("similar", "some text", "-c", str(ROOT / "configs/demo.yaml"), home=made.path)
    refused(other, "no signatures of the configuration 'demo'", "--until duplicates", ": tiny")


def test_finetune_on_twenty_rows_prints_scores_before_and_after(polar, made: Home, tmp_path):
    checkpoint = str(made.path / "checkpoints" / "tiny" / "pretrained")
    rows = [
        {"prompt": f"Is it {i}?", "reference": "Yes.", "chosen": "Yes!", "rejected": "NO NO NO"}
        for i in range(20)
    ]
    file, out = tmp_path / "mine.jsonl", tmp_path / "mine"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ("finetune", checkpoint, "--data", str(file), "--out", str(out))
    code, said, err = polar(*arguments, "--json")  # the README's command, with its own settings
    assert code == 0, err
    found = json.loads(said)
    assert (found["steps"], found["groups"], found["comparisons"]) == (50, 20, 20)
    assert len(found["rows"]) == 20
    assert found["after"]["accuracy"] == 1.0
    assert found["after"]["margin"] > found["before"]["margin"] + 0.1
    code, said, _ = polar(*arguments)  # finished: nothing is trained again
    assert code == 0
    assert f"{found['after']['margin']:.2f} after" in said
    assert f"{found['rows'][19]['after_chosen']:.2f}" in said
    refused(polar(*arguments, "--set", "epochs=3"), "holds another training run", "epochs")
    file.write_text(file.read_text() + "{bad\n")
    refused(polar(*arguments), f"{file}: line 21: not UTF-8 JSON")
    refused(polar("finetune", str(tmp_path), "-d", str(file), "-o", str(out)), "not a POLAR")


def test_evaluate_finds_the_groups_of_the_home(polar, made: Home, tmp_path):
    checkpoint = str(made.path / "checkpoints" / "tiny" / "pretrained")
    code, said, err = polar("evaluate", checkpoint, "--suite", "preference", "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in said.splitlines()]
    assert {row["suite"] for row in rows} == {"preference"}
    assert {"model", "length", "surface_boosting"} <= {row["scorer"] for row in rows}
    given = str(made.path / "groups" / "tiny")
    assert polar("evaluate", checkpoint, "--suite", "preference", "--data", given, "--json") == (
        0,
        said,
        err,
    )
    refused(polar("evaluate", checkpoint, "--data", str(tmp_path)), "no groups file")
    moved = tmp_path / "moved"
    moved.mkdir()
    for part in Path(checkpoint).iterdir():
        if part.is_file():
            (moved / part.name).write_bytes(part.read_bytes())
    refused(polar("evaluate", str(moved)), "give --data", "has none yet")
