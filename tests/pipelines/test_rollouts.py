"""Rollouts: who answers what, only what is missing, nothing lost, killed and gone on."""

import collections
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipelines import ids, rollouts, schemas, staged
from pipelines.engines.base import Completion, FinishReason, in_batches
from pipelines.errors import PolarError, PolicyUnavailableError
from pipelines.rollouts import RolloutSettings, SamplingSettings, assign, rollout
from tests.pipelines import rollout_process, tiny_policy

ROOT = Path(__file__).parents[2]


class FakeEngine:
    """Answers with the prompt and the seed; fails from the `dies_at`-th batch on."""

    name = "fake"
    version = "1"
    chat = False

    def __init__(self, answer=None, dies_at=10**9):
        self.answer = answer or (lambda request: f"{request.prompt} / {request.seed}.")
        self.dies_at = dies_at
        self.batches = []

    def stream(self, requests, at_once):
        return in_batches(self.generate, requests, at_once)

    def generate(self, requests):
        if len(self.batches) >= self.dies_at:
            raise PolicyUnavailableError("engine died")
        self.batches.append(requests)
        return [self.complete(request) for request in requests]

    def complete(self, request):
        reason: FinishReason
        if "too long" in request.prompt:
            reason, text = "prompt_too_long", ""
        else:
            text = self.answer(request)
            reason = "length" if "limit" in request.prompt else "stop"
        return Completion(
            trajectory_id=request.trajectory_id,
            text=text,
            tokens=len(text),
            finish_reason=reason,
            seed=request.seed,
        )

    def close(self):
        pass


def policies_table(*kinds, template="{prompt}"):
    return pa.table(
        {
            "policy_id": ids.array(ids.content_id("policy", i) for i in range(len(kinds))),
            "kind": list(kinds),
            "template": pa.array([template] * len(kinds), pa.string()),
        }
    )


def read(files):
    tables = [pq.read_table(path) for path in files]
    table = pa.concat_tables([schemas.TRAJECTORIES.schema.empty_table(), *tables])
    return {row["trajectory_id"]: row for row in table.to_pylist()}, table


def made_by(table):
    rows = table.drop_columns(["created_at"]).to_pylist()
    return {row["trajectory_id"]: row for row in rows}


def counted(result):
    return {(r["what"], r["reason"]): r["rows"] for r in result.counts.to_pylist()}


# --- who answers what


def pairs(table):
    return set(zip(*(table[name].to_pylist() for name in table.schema.names), strict=True))


def test_kinds_of_prompts_and_policies():
    def kind(policy, template="{prompt}"):
        return rollouts.answers({"kind": policy, "template": template})

    assert kind("base") == "prefix"
    assert kind("base", "Text: {prompt}") == "prefix"
    assert kind("chat") == kind("api") == "instruction"
    assert kind("checkpoint") == kind("checkpoint", None) == "prefix"
    assert kind("checkpoint", "Q: {prompt}\nA:") == "instruction"
    assert kind("recorded") is None


def test_dense_assignment_asks_all_of_the_right_kind():
    prefixes = tiny_policy.prompts_table(["a", "b"])
    instructions = tiny_policy.prompts_table(["c"], kind="instruction")
    prompts = pa.concat_tables([instructions, prefixes])
    policies = policies_table("chat", "base", "recorded", "base", "checkpoint")
    got = assign(prompts, policies, RolloutSettings(assignment="dense"))
    p, q = prompts["prompt_id"].to_pylist(), policies["policy_id"].to_pylist()
    expected = [(p[0], q[0]), *((p[i], q[j]) for i in (1, 2) for j in (1, 3, 4))]
    assert list(zip(*got.to_pydict().values(), strict=True)) == expected
    assert got.schema == rollouts.ASSIGNMENT


def test_sparse_assignment():
    prompts = tiny_policy.prompts_table([str(i) for i in range(3000)])
    policies = policies_table(*["base"] * 10)
    settings = RolloutSettings(policies_per_prompt=3)
    got = assign(prompts, policies, settings)
    assert got.num_rows == 9000
    per_prompt = collections.Counter(got["prompt_id"].to_pylist())
    assert set(per_prompt.values()) == {3}
    per_policy = collections.Counter(got["policy_id"].to_pylist())
    assert len(per_policy) == 10
    assert all(780 < count < 1020 for count in per_policy.values())  # 900, five deviations of 25
    # neither the other prompts nor the order of the policies matter
    part = assign(prompts.slice(100, 50), policies.take(list(range(9, -1, -1))), settings)
    assert pairs(part) <= pairs(got)
    # a new policy takes places, and nobody else changes any
    fewer = assign(prompts, policies.slice(0, 9), settings)
    gone, new = pairs(fewer) - pairs(got), pairs(got) - pairs(fewer)
    assert {policy for _, policy in new} == {policies["policy_id"][9].as_py()}
    assert len(gone) == len(new)
    assert pairs(assign(prompts, policies, RolloutSettings(seed=1))) != pairs(got)


def test_assignment_of_few_or_none():
    prompts = tiny_policy.prompts_table(["a"])
    assert assign(prompts, policies_table("base"), RolloutSettings()).num_rows == 1
    assert assign(prompts, policies_table("chat"), RolloutSettings()).num_rows == 0
    assert assign(prompts.slice(0, 0), policies_table("base"), RolloutSettings()).num_rows == 0
    assert assign(prompts, policies_table(), RolloutSettings()).num_rows == 0


def test_prompts_of_a_policy():
    prompts = tiny_policy.prompts_table([str(i) for i in range(40)])
    policies = policies_table(*["base"] * 5)
    assignment = assign(prompts, policies, RolloutSettings())
    total = 0
    for row in policies.to_pylist():
        mine = rollouts.prompts_of(row, prompts, assignment)
        assert all(
            (p, row["policy_id"]) in pairs(assignment) for p in mine["prompt_id"].to_pylist()
        )
        total += mine.num_rows
    assert total == assignment.num_rows


def test_settings_that_cannot_be_meant():
    with pytest.raises(ValidationError, match="samples: 1 or a temperature above 0"):
        RolloutSettings(samples=2, sampling=SamplingSettings(temperature=0))
    values = {"temperature": 1, "top_p": 0.9, "top_k": 50, "max_tokens": 9}
    same = SamplingSettings.model_validate(values).sampling_id
    assert same == SamplingSettings.model_validate(values | {"temperature": 1.0}).sampling_id
    for name, value in {"temperature": 0.9, "top_p": 1, "top_k": 0, "max_tokens": 8}.items():
        assert SamplingSettings.model_validate(values | {name: value}).sampling_id != same
    for name, value in {"temperature": -1, "top_p": 0, "top_k": -1, "max_tokens": 0}.items():
        with pytest.raises(ValidationError):
            SamplingSettings.model_validate(values | {name: value})


# --- making


def test_a_rollout_makes_all_that_is_wanted(tmp_path):
    prompts = tiny_policy.prompts_table(["b" * 7, "aa", "cccc"])
    policy = tiny_policy.policy(kind="chat", template="Q: {prompt} {x}\nA:")
    settings = RolloutSettings(samples=2, batch_size=4, sampling=SamplingSettings(max_tokens=9))
    engine, seen = FakeEngine(), []
    result = rollout(
        policy,
        prompts,
        engine,
        settings,
        tmp_path,
        set(),
        check=lambda prompt, answer: None if prompt == "aa" else prompt in answer,
        progress=lambda *step: seen.append(step),
    )
    rows, table = read(result.files)
    assert table.schema == schemas.TRAJECTORIES.schema
    assert counted(result) == {("in", ""): 6, ("out", ""): 6}
    assert result.made == len(rows) == 6
    assert result.counts.schema == schemas.COUNTS.schema
    assert [len(batch) for batch in engine.batches] == [4, 2]
    assert [request.prompt for request in engine.batches[0]][::2] == [
        "Q: aa {x}\nA:",
        "Q: cccc {x}\nA:",
    ]
    assert [(done, total) for done, total, _ in seen] == [(4, 6), (6, 6)]
    assert seen[0][2].startswith("tiny, ")
    for key, row in rows.items():
        made_of = (policy["policy_id"].bytes, row["prompt_id"].bytes, row["sampling_id"].bytes)
        assert key.bytes == ids.content_id("trajectory", *made_of, row["sample_index"])
        assert row["sampling_id"].bytes == settings.sampling.sampling_id
        assert row["seed"] == ids.seed_of(key.bytes)
        assert row["text"].endswith(f"/ {row['seed']}.")
        assert row["content_hash"].bytes == ids.content_id("text", row["text"])
        assert row["correct"] is (None if "aa" in row["text"] else True)
        assert (row["engine"], row["engine_version"], row["licence"]) == ("fake", "1", "Apache-2.0")
        assert (row["max_tokens"], row["top_k"], row["flags"]) == (9, 50, [])
        assert row["original_length"] == len(row["text"])


def test_answers_are_measured_and_cut(tmp_path):
    loop = "So: " + "the same again and again, " * 9
    texts = {
        "loop": loop,
        "loop at the limit": loop,
        "limit": "It rains. It pours. The old m",
        "limit at an end": "no sentence",
        "blank": "\u200b\n",
        "broken": "\x07 \ufffd",
    }
    prompts = tiny_policy.prompts_table(list(texts))
    engine = FakeEngine(answer=lambda request: texts[request.prompt])
    settings = RolloutSettings(samples=1)
    result = rollout(tiny_policy.policy(), prompts, engine, settings, tmp_path, set())
    of_prompt = {ids.content_id("prompt", "tiny", prompt): prompt for prompt in texts}
    got = {of_prompt[row["prompt_id"].bytes]: row for row in read(result.files)[0].values()}
    kept = "So: the same again and again, the same again and again,"
    assert {prompt: (row["text"], row["cut"], row["flags"]) for prompt, row in got.items()} == {
        "loop": (kept, "loop", ["loop"]),
        "loop at the limit": (kept, "loop", ["loop", "truncated"]),
        "limit": ("It rains. It pours.", "sentence", ["truncated"]),
        "limit at an end": ("no sentence", None, ["truncated"]),
        "blank": ("\u200b\n", None, ["empty"]),
        "broken": ("\x07 \ufffd", None, ["control_characters", "replacement_character"]),
    }
    for prompt, row in got.items():
        assert row["original_length"] == len(texts[prompt])


def test_too_long_prompts_are_listed_and_the_others_go_on(tmp_path):
    prompts = pa.concat_tables(
        [
            tiny_policy.prompts_table(["fits", "this one is too long"]),
            tiny_policy.prompts_table(["too long as well"], source="elsewhere"),
        ]
    )
    settings = RolloutSettings(samples=2, batch_size=1)
    result = rollout(tiny_policy.policy(), prompts, FakeEngine(), settings, tmp_path, set())
    assert len(read(result.files)[0]) == 2
    assert result.made == 2
    account = {(r["source"], r["what"], r["reason"]): r["rows"] for r in result.counts.to_pylist()}
    assert account == {
        ("tiny", "in", ""): 4,
        ("tiny", "out", ""): 2,
        ("tiny", "excluded", "prompt_too_long"): 2,
        ("elsewhere", "in", ""): 2,
        ("elsewhere", "excluded", "prompt_too_long"): 2,
    }
    listed = result.excluded.to_pylist()
    too_long = prompts["prompt_id"].to_pylist()[1:]
    assert {(r["prompt_id"], r["sample_index"]) for r in listed} == {
        (prompt, sample) for prompt in too_long for sample in (0, 1)
    }
    assert {r["reason"] for r in listed} == {"prompt_too_long"}


# --- again, and after a fault


def test_only_what_is_missing_is_made(tmp_path):
    policy, settings = tiny_policy.policy(), RolloutSettings(samples=2, batch_size=3)
    prompts = tiny_policy.prompts_table(tiny_policy.texts(7))
    first = rollout(policy, prompts.slice(0, 4), FakeEngine(), settings, tmp_path, set())
    published = read(first.files)[1]["trajectory_id"]
    staged.clear(first.files)
    assert list(tmp_path.iterdir()) == []

    engine = FakeEngine()
    second = rollout(policy, prompts, engine, settings, tmp_path, published)
    assert second.made == sum(map(len, engine.batches)) == 6
    assert counted(second) == {("in", ""): 14, ("out", ""): 14}
    assert not set(read(second.files)[0]) & set(published.to_pylist())

    engine = FakeEngine()
    known = {key.bytes for key in (*published.to_pylist(), *read(second.files)[0])}
    third = rollout(policy, prompts, engine, settings, tmp_path, known)  # published, not cleared
    assert (third.made, third.files, engine.batches) == (0, [], [])
    assert counted(third) == {("in", ""): 14, ("out", ""): 14}


def test_a_dead_engine_leaves_what_was_staged(tmp_path):
    policy, settings = tiny_policy.policy(), RolloutSettings(samples=1, batch_size=4)
    prompts = tiny_policy.prompts_table(tiny_policy.texts(10))
    with pytest.raises(PolicyUnavailableError):
        rollout(policy, prompts, FakeEngine(dies_at=2), settings, tmp_path, set())
    account = rollout(policy, prompts, None, settings, tmp_path, set())
    assert len(read(account.files)[0]) == 8
    assert counted(account) == {
        ("in", ""): 10,
        ("out", ""): 8,
        ("excluded", "policy_unavailable"): 2,
    }
    assert rollout(policy, prompts, FakeEngine(), settings, tmp_path, set()).made == 2


def test_unfinished_damaged_and_outdated_files_are_made_again(tmp_path):
    policy, settings = tiny_policy.policy(), RolloutSettings(samples=1, batch_size=2)
    prompts = tiny_policy.prompts_table(tiny_policy.texts(8))
    whole = rollout(policy, prompts, FakeEngine(), settings, tmp_path, set())
    expected = made_by(read(whole.files)[1])
    cut, empty, old, _ = whole.files
    cut.write_bytes(cut.read_bytes()[:-10])
    empty.write_bytes(b"")
    pq.write_table(pq.read_table(old).drop_columns(["flags"]), old)
    unfinished = cut.with_suffix(".tmp")
    unfinished.write_bytes(b"PAR1")
    again = rollout(policy, prompts, FakeEngine(), settings, tmp_path, set())
    assert again.made == 6
    assert made_by(read(again.files)[1]) == expected
    assert not unfinished.exists()
    assert sorted(unfinished.parent.iterdir()) == sorted(again.files)


def test_each_policy_has_a_staging_of_its_own(tmp_path):
    settings = RolloutSettings(samples=1)
    prompts = tiny_policy.prompts_table(["a"])
    one = rollout(tiny_policy.policy("one"), prompts, FakeEngine(), settings, tmp_path, set())
    two = rollout(tiny_policy.policy("two"), prompts, FakeEngine(), settings, tmp_path, set())
    assert len({path.parent for path in (*one.files, *two.files)}) == 2
    assert read(one.files)[0].keys().isdisjoint(read(two.files)[0])


def test_a_system_turn_goes_where_the_template_says_or_the_prompt_is_left_out(tmp_path):
    prompts = tiny_policy.with_system(tiny_policy.prompts_table(["a", "b"]), None, "be {kind}")
    settings = RolloutSettings(samples=2)
    engine, ends = FakeEngine(), []
    policy = tiny_policy.policy(template="{system}|{prompt}|")
    result = rollout(policy, prompts, engine, settings, tmp_path, set())
    assert counted(result) == {("in", ""): 4, ("out", ""): 4}
    asked = [(request.prompt, request.system) for request in engine.batches[0]]
    assert set(asked) == {("|a|", None), ("be {kind}|b|", None)}
    result = rollout(
        tiny_policy.policy(), prompts, FakeEngine(), settings, tmp_path, set(),
        progress=lambda done, total, _: ends.append((done, total)),
    )  # fmt: skip
    assert counted(result) == {("in", ""): 4, ("out", ""): 2, ("excluded", "system_turn"): 2}
    assert result.made == 2
    assert "no {system}" in result.excluded["detail"][0].as_py()
    assert ends == [(4, 4)]


def test_an_account_that_does_not_add_up_stops_the_stage(tmp_path):
    work = rollouts.wanted(
        tiny_policy.policy(), tiny_policy.prompts_table(["a"]), RolloutSettings()
    )
    with pytest.raises(PolarError, match="2 wanted, but 0 there and 0 excluded"):
        rollouts._counts(tiny_policy.policy(), work, set(), rollouts.EXCLUDED.empty_table())


def test_comparison_lists_each_difference():
    def table(**texts):
        keys = ids.array(ids.content_id("trajectory", name) for name in texts)
        return pa.table({"trajectory_id": keys, "text": list(texts.values())})

    got = rollouts.compare(table(a="x", b="y", c="z"), table(c="z", d="w", b="other"))
    assert got.only_left.to_pylist() == [ids.content_id("trajectory", "a")]
    assert got.only_right.to_pylist() == [ids.content_id("trajectory", "d")]
    assert got.common == 2
    assert got.identical == 0.5
    row = got.different.to_pylist()[0]
    assert row["trajectory_id"].bytes == ids.content_id("trajectory", "b")
    assert (row["text"], row["other"]) == ("y", "other")


# --- with the local engine


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_policy.save(tmp_path_factory.mktemp("tiny"))


def test_killed_and_started_again(weights, tmp_path):
    log, staging = tmp_path / "log", tmp_path / "staging"
    command = [sys.executable, "-m", rollout_process.__name__, weights, staging, log]
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        while process.poll() is None and len(list(staging.glob("*/*.parquet"))) < 3:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    finally:
        process.kill()
    resumed = rollout_process.run(weights, staging, log)
    undisturbed = rollout_process.run(weights, tmp_path / "other", tmp_path / "other.log")

    wanted = rollout_process.PROMPTS * rollout_process.SETTINGS.samples
    assert counted(resumed) == {("in", ""): wanted, ("out", ""): wanted}
    got, expected = read(resumed.files)[1], read(undisturbed.files)[1]
    assert got.num_rows == expected.num_rows == wanted
    comparison = rollouts.compare(got, expected)
    assert len(comparison.only_left) == len(comparison.only_right) == 0
    assert comparison.identical >= 0.999, comparison.different.to_pylist()
    twice = [n for n in collections.Counter(log.read_text().split()).values() if n > 1]
    assert set(twice) <= {2}
    assert len(twice) <= rollout_process.SETTINGS.batch_size
    assert 0 < resumed.made < wanted


@pytest.mark.slow
def test_one_at_a_time_against_batches(weights, tmp_path):
    from pipelines.engines.local import LocalEngine

    engine, policy = LocalEngine(weights), tiny_policy.policy()
    prompts = tiny_policy.prompts_table(tiny_policy.texts(350))
    tables = []
    for size in (1, 32):
        settings = RolloutSettings(
            samples=3, batch_size=size, sampling=SamplingSettings(max_tokens=24)
        )
        result = rollout(policy, prompts, engine, settings, tmp_path / str(size), set())
        tables.append(read(result.files)[1])
    comparison = rollouts.compare(*tables)
    assert comparison.common == 1050
    assert len(comparison.only_left) == len(comparison.only_right) == 0
    assert comparison.identical >= 0.999, comparison.different.to_pylist()
