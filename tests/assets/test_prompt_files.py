"""Prompts from files through the asset and the command: published, listed, counted, and planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.assets.homes import ROOT, Home, refused


def lines(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sources(**more: Any) -> dict[str, Any]:
    files = [{"name": "tasks", "path": "tasks.jsonl", "kind": "instructions"}]
    return {"files": files, **more}


@pytest.mark.slow
def test_prompts_come_from_files_and_only_new_ones_are_new(fresh: Home, polar):
    folder = fresh.config.parent
    known = "Which of the four wagons of bread did the miller sell to the harbour master in winter?"
    asked = ["What is a river?", "What is a lake?", "What is the sea?"]
    lines(folder / "tasks.jsonl", *({"prompt": text} for text in (*asked, known)), {"prompt": 3})
    lines(folder / "bench.jsonl", {"question": known})
    fresh.edit(
        "run.yaml", prompt_sources=sources(evaluation=[{"name": "bench", "path": "bench.jsonl"}])
    )
    assert fresh.run("prompts").ok
    first = fresh.query("select prompt_id, text, origin, prompt_group, split from prompts")
    assert sorted(row["text"] for row in first) == sorted(asked)
    assert {row["origin"] for row in first} == {f"tasks/tasks.jsonl:{n}" for n in (1, 2, 3)}
    code, out, _ = polar(
        "sql", "select row, problem from quarantine order by row", "-f", "csv", home=fresh.path
    )
    assert code == 0
    assert "4,shares 13 words with bench" in out.replace('"', "")
    assert "prompt is 3, expected text" in out
    assert fresh.one("select sum(rows)::int from counts where what = 'in'") == 5
    assert fresh.one("select sum(rows)::int from counts where what <> 'in'") == 5
    assert fresh.plan("prompts") == {}
    rows = [{"prompt": "What is a canal?"}, *({"prompt": text} for text in asked[::-1])]
    lines(folder / "tasks.jsonl", *rows)
    assert fresh.plan("prompts") == {"prompts": "changed: files"}
    assert fresh.run("prompts").ok
    second = {row["text"]: row for row in fresh.query("from prompts")}
    assert len(second) == 4
    for row in first:
        same = second[row["text"]]
        assert [same[name] for name in ("prompt_id", "prompt_group", "split")] == [
            row[name] for name in ("prompt_id", "prompt_group", "split")
        ]
    assert fresh.one("select count(*) from quarantine") == 0


def test_a_pool_without_prompts_says_so(fresh: Home):
    fresh.edit("pool.yaml", embedded=None)
    outcome = fresh.run("prompts")
    ((_, error),) = outcome.failed
    assert "has no prompts; say where they come from in `prompt_sources`" in error


def test_a_plan_is_printed_before_anything_runs(polar, fresh: Home):
    pool = str(ROOT / "configs" / "pool.paper.yaml")
    code, out, _ = polar("plan", "--config", pool, "--json", "--assume", "gpu_hour=1")
    assert code == 0
    facts = json.loads(out)
    assert facts["total"]["policies"] == 106
    assert facts["total"]["money"] == facts["total"]["gpu_hours"]
    assert facts["assumptions"]["gpu_hour"] == 1
    code, out, _ = polar("plan", "--config", pool)
    assert code == 0
    for words in ("72.7 B", "GPU-hours", "USD", "disk: ", "assumed", "utilisation=0.1"):
        assert words in out
    code, out, _ = polar("plan", "--config", str(fresh.config), "--json")
    assert code == 0
    assert json.loads(out)["total"]["trajectories"] == 6 * 448 * 3
    assert not fresh.path.exists()
    refused(polar("plan", "-c", pool, "--assume", "gpu_hours=1"), "did you mean 'gpu_hour'")
    refused(polar("plan", "-c", pool, "--assume", "gpu_hour"), "expected NAME=VALUE")
    refused(polar("plan", "-c", pool, "--assume", "gpu_hour=much"), "gpu_hour", "'much'")
    refused(polar("plan", "-c", str(ROOT / "configs" / "recorded.yaml")), "there is no plan")


def test_the_configurations_of_the_public_pools_hold():
    from assets.config import load_config
    from pipelines.policies import load_pool

    for name in ("small", "paper"):
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        assert config.prompt_sources
        assert load_pool(ROOT / "configs" / str(config.pool)).source == name
        sampling = config.rollouts.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 0.9, 50)
