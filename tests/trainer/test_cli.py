"""`python -m trainer` from files alone."""

from __future__ import annotations

import io
import json

import pytest

from trainer import __main__ as cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, groups_file, backbone):
    out = tmp_path_factory.mktemp("cli") / "out"
    words = ["--set", "max_steps=3", "--set", "batch_groups=8", "--set", "lr=0.01"]
    call("pretrain", "--groups", groups_file, "--start", backbone, "--out", out, *words)
    return out


def call(*words):
    cli.app([str(word) for word in words], standalone_mode=False)


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "items.jsonl"
    rows = [{"prompt": "a", "reference": "B", "output": o} for o in ("B", "b", "c.. d")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_are_one_a_line_in_order(checkpoint, items, capsys, monkeypatch):
    call("score", checkpoint, "--input", items)
    plain = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert len(set(plain)) == 3
    call("score", checkpoint, "--input", items, "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"index": i, "score": score} for i, score in enumerate(plain)]
    stream = io.TextIOWrapper(io.BytesIO(items.read_bytes()))
    monkeypatch.setattr("sys.stdin", stream)
    call("score", checkpoint, "--input", "-", "--wrapper", "sft")
    other = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert other != plain


def test_finetune_goes_on_from_a_checkpoint(checkpoint, tmp_path, capsys):
    data = tmp_path / "ranked.jsonl"
    rows = [
        {"prompt": f"{i}", "reference": "yes", "chosen": "yes", "rejected": "no"} for i in range(20)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "train.yaml"
    config.write_text("epochs: 2\nbatch_groups: 10\n")
    out = tmp_path / "tuned"
    call("finetune", "--groups", data, "--start", checkpoint, "--out", out, "--config", config)
    told = capsys.readouterr()
    assert "4 steps, 40 pairs" in told.out
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"100 %  step 4, loss {last['loss']:.3f}, accuracy {last['accuracy']:.3f}" in told.err
    assert "pairs/s" in told.err
    assert json.loads((out / "polar.json").read_text())["wrapper"] == "sft"


def test_evaluate_prints_the_model_beside_the_rulers(checkpoint, groups_file, capsys):
    call("evaluate", checkpoint, "--groups", groups_file, "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"model", "length", "random"} <= {row["scorer"] for row in rows}
    assert all(row["suite"] == "policy_discrimination" for row in rows)
    call("evaluate", checkpoint, "--groups", groups_file, "--out", checkpoint.parent / "report")
    assert "policy_discrimination" in capsys.readouterr().out
    assert (checkpoint.parent / "report" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["score", "{tmp}", "--input", "{items}"], "not a POLAR checkpoint"),
        (["score", "{checkpoint}", "--input", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["score", "{checkpoint}", "--input", "{bad}"], "line 2: field 'output' is missing"),
        (["score", "{checkpoint}", "--input", "{items}", "--wrapper", "x"], "--wrapper 'x'"),
        (["evaluate", "{checkpoint}", "--groups", "{items}", "--suite", "x"], "'x' is unknown"),
    ],
)
def test_faults_are_one_line_and_status_2(
    checkpoint, items, tmp_path, capsys, monkeypatch, words, said
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(items.read_text().splitlines()[0] + '\n{"prompt": "a", "reference": "b"}\n')
    places = {"tmp": tmp_path, "items": items, "checkpoint": checkpoint, "bad": bad}
    monkeypatch.setattr("sys.argv", ["trainer", *(word.format(**places) for word in words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert captured.out == ""
