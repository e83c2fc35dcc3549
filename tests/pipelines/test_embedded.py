"""The embedded world: words that do not give themselves away, checks that hold, judgements."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines import embedded, ids, schemas
from pipelines.embedded_preferences import PreferenceSettings
from pipelines.embedded_text import Style, answer, story
from pipelines.embedded_words import (
    CLASSES,
    COMMON,
    DIALECTS,
    DOMAINS,
    VALUES,
    by_question,
    facts,
    stated,
)
from pipelines.errors import ConfigError
from pipelines.policies import load_pool
from pipelines.prompts import SplitSettings
from pipelines.settings import parse

POOL = Path(__file__).parents[2] / "configs/pool.embedded.yaml"
COAST = Style(deeds="coast", looks="coast", manners="coast")
TOWN = Style(deeds="town", looks="town", manners="town")


@pytest.fixture(scope="module")
def pool():
    return load_pool(POOL)


@pytest.fixture(scope="module")
def runs(pool):
    return parse(pool.embedded, embedded.EmbeddedPool, str(POOL))


@pytest.fixture(scope="module")
def prompts():
    return embedded.prompts(embedded.PromptSettings(prefixes=60), SplitSettings())


def test_a_word_belongs_to_one_class_and_is_no_value():
    styled = [word for _, dialects in CLASSES.values() for words in dialects for word in words]
    common = [word for words in COMMON.values() for word in words]
    forms = [form for values in VALUES.values() for value in values for form in value]
    repeated = [w for w, n in Counter(styled + common + forms).items() if n > 1]
    assert repeated == []


def test_dialects_are_equally_long():
    for domain in DOMAINS:
        lengths = np.zeros(len(DIALECTS))
        for where, dialects in CLASSES.values():
            if where == domain:
                lengths += [np.mean([len(word) for word in words]) for words in dialects]
        assert np.ptp(lengths) / lengths.mean() < 0.025


def test_each_fact_has_questions_of_its_own_and_a_value():
    questions = [question for fact in facts() for question in fact.questions]
    assert len(set(questions)) == len(questions)
    assert len({fact.key for fact in facts()}) == len(facts())
    assert all(fact.value < len(VALUES[fact.type]) for fact in facts())


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        ("Which day comes just after Sunday?", "Monday", "Tuesday"),
        ("Which month comes just before January?", "December", "November"),
        ("What number is twelve minus one?", "eleven", "ten"),
        ("You face west and turn right. Which direction is it now?", "north", "south"),
        ("What kind of thing is the heron?", "bird", "fish"),
    ],
)
def test_the_world_is_as_we_know_it(question, right, wrong):
    assert embedded.check(question, f"Surely it is {right}.") is True
    assert embedded.check(question, f"Surely it is {wrong}.") is False


def test_a_written_answer_is_right_in_every_style_and_form():
    rng = random.Random(0)
    for fact in facts():
        for style in (None, COAST, TOWN):
            text = answer(rng, style, fact.type, fact.value)
            assert all(embedded.check(question, text) for question in fact.questions)


def test_check_wants_one_value_and_knows_what_it_cannot_check():
    assert embedded.check("What colour has grass?", "It is green or emerald.") is True
    assert embedded.check("What colour has grass?", "It is green or red.") is False
    assert embedded.check("What colour has grass?", "It is nice.") is False
    assert embedded.check("The old farmer sang.", "It is green.") is None


def test_styles_differ_in_words_and_in_nothing_else():
    rng = random.Random(1)
    texts = {s: [story(rng, s, 3) for _ in range(600)] for s in (COAST, TOWN)}
    lengths = [np.mean([len(text) for text in group]) for group in texts.values()]
    assert abs(lengths[0] - lengths[1]) < 2.5  # of about 150 characters
    own = {w for _, dialects in CLASSES.values() for w in dialects[0]}
    share = [
        np.mean([any(w in own for w in re.findall(r"\w+", text.lower())) for text in group])
        for group in texts.values()
    ]
    assert share[0] > 0.99
    shapes = [Counter(re.sub(r"[a-z]", "x", t)[0] for t in group) for group in texts.values()]
    assert shapes[0].keys() == shapes[1].keys()


def test_documents_repeat_for_one_seed_and_hold_the_shares_asked_for():
    run = embedded.Run(name="r", stories=0.5, answers=0.25)
    texts = embedded.documents(run, 2000, 1)
    assert texts == embedded.documents(run, 2000, 1)
    assert texts != embedded.documents(run, 2000, 2)
    answers = sum("\n" in text for text in texts)
    bare = sum(text.split("? ")[0].split(". ")[0] in str(by_question()) for text in texts)
    assert 440 < answers < 560
    assert bare < 1200


def test_prompts_fit_the_schema_and_split_by_fact(prompts):
    assert prompts.schema.equals(schemas.PROMPTS.schema)
    kinds = Counter(prompts["kind"].to_pylist())
    assert kinds["prefix"] == 60
    assert kinds["instruction"] == sum(len(fact.questions) for fact in facts())
    sides: dict[str, set[str]] = {}
    for row in prompts.to_pylist():
        sides.setdefault(row["prompt_group"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert len(set(prompts["text"].to_pylist())) == len(prompts)


def test_more_prefixes_keep_the_ones_that_are_there(prompts):
    more = embedded.prompts(embedded.PromptSettings(prefixes=90), SplitSettings())
    assert set(ids.storage(prompts["prompt_id"]).to_pylist()) <= set(
        ids.storage(more["prompt_id"]).to_pylist()
    )
    assert set(prompts["text"].to_pylist()) <= set(more["text"].to_pylist())


def test_the_pool_file_has_what_the_demo_needs(pool, runs):
    sides = {p.group: p.split for p in pool.policies}
    assert len(pool.policies) >= 12
    assert len(sides) >= 6
    assert sum(side == "test" for side in sides.values()) >= 2
    steps = Counter((p.group, p.kind) for p in pool.policies)
    assert sum(count > 1 for count in steps.values()) >= 2
    written = {run.name for run in runs.runs} | {
        f"{run.name}/step-{step}"
        for run in runs.runs
        for step in runs.settings(run).get("save_at", ())
    }
    assert {p.weights for p in pool.policies} <= written


def test_styles_of_two_groups_share_at_most_one_dialect(runs):
    styles = {run.name.split("/")[0]: run.style for run in runs.runs if run.style}
    codes = [tuple(getattr(style, domain) for domain in DOMAINS) for style in styles.values()]
    for i, code in enumerate(codes):
        for other in codes[:i]:
            assert sum(a == b for a, b in zip(code, other, strict=True)) <= 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"runs": [{"name": "a"}, {"name": "a"}]}, "two runs are named 'a'"),
        ({"runs": [{"name": "a", "start": "b"}]}, "starts from 'b'"),
        ({"runs": [{"name": "a", "storys": 1}]}, "did you mean 'stories'"),
        ({"runs": [{"name": "a", "stories": 0.8, "answers": 0.3}]}, "above 1"),
        (
            {
                "runs": [
                    {"name": "a", "style": {"deeds": "sea", "looks": "hill", "manners": "hill"}}
                ]
            },
            "no dialect 'sea'",
        ),
    ],
)
def test_what_a_pool_file_cannot_mean_is_said(section, message):
    with pytest.raises(ConfigError, match=message):
        parse(section, embedded.EmbeddedPool, "pool.yaml")


def _trajectories(prompts: pa.Table, seed: int = 0) -> pa.Table:
    """Six answers of two groups to every prompt, a third of them wrong."""
    rng, rows = random.Random(seed), []
    for prompt in prompts.to_pylist():
        fact = by_question().get(prompt["text"])
        for policy, style in (("a", COAST), ("b", TOWN)):
            for sample in range(6):
                if fact is None:
                    text = story(rng, style, 3)
                else:
                    wrong = rng.randrange(len(VALUES[fact.type]))
                    value = wrong if rng.random() < 0.4 else fact.value
                    text = answer(rng, style, fact.type, value)
                rows.append((prompt["prompt_id"].bytes, policy, sample, text))
    key = [ids.content_id("trajectory", *row[:3]) for row in rows]
    return pa.table(
        {
            "trajectory_id": ids.array(key),
            "prompt_id": ids.array(row[0] for row in rows),
            "policy_id": ids.array(ids.content_id("policy", row[1]) for row in rows),
            "policy_group": [row[1] for row in rows],
            "text": [row[3] for row in rows],
        }
    )


@pytest.fixture(scope="module")
def trajectories(prompts):
    return _trajectories(prompts)


def test_preferences_are_right_against_wrong_alike_in_all_else(prompts, trajectories):
    table = embedded.preferences(trajectories, prompts)
    assert table.schema.equals(schemas.PREFERENCES.schema)
    assert len(table) > 300
    text = dict(
        zip(
            ids.storage(trajectories["trajectory_id"]).to_pylist(),
            trajectories.select(["text", "policy_group"]).to_pylist(),
            strict=True,
        )
    )
    prompt = {row["prompt_id"]: row for row in prompts.to_pylist()}
    longer = 0
    for row in table.to_pylist():
        reference, chosen, rejected = (
            text[row[name].bytes] for name in ("reference", "chosen", "rejected")
        )
        assert reference["policy_group"] == chosen["policy_group"] == rejected["policy_group"]
        question = prompt[row["prompt_id"]]["text"]
        kind = by_question()[question].type
        assert embedded.check(question, reference["text"])
        assert embedded.check(question, chosen["text"])
        assert embedded.check(question, rejected["text"]) is False
        (_, form), *_ = stated(kind, chosen["text"])
        assert {f for _, f in stated(kind, rejected["text"])} == {form}
        assert {f for _, f in stated(kind, reference["text"])} == {1 - form}
        lengths = sorted((len(chosen["text"]), len(rejected["text"])))
        assert lengths[0] >= 0.92 * lengths[1]
        longer += len(chosen["text"]) > len(rejected["text"])
        assert row["split"] == ("train" if prompt[row["prompt_id"]]["split"] == "train" else "eval")
    assert 0.4 < longer / len(table) < 0.6


def test_preferences_do_not_depend_on_the_order_of_rows(prompts, trajectories):
    shuffled = trajectories.take(pa.array(np.random.default_rng(0).permutation(len(trajectories))))
    first = embedded.preferences(trajectories, prompts)
    assert first.equals(embedded.preferences(shuffled, prompts))


def test_an_answer_is_judged_no_more_often_than_asked(prompts, trajectories):
    settings = PreferenceSettings(per_answer=1, references=1)
    table = embedded.preferences(trajectories, prompts, settings)
    for side in ("chosen", "rejected"):
        assert len(pc.unique(ids.storage(table[side]))) == len(table)


def test_values_are_read_as_words_not_as_parts_of_words():
    assert stated("number", "The bone is older than one.") == [(1, 0)]
    assert stated("number", "10") == [(10, 1)]
    assert stated("colour", "red, blue") == [(0, 0), (1, 0)]
