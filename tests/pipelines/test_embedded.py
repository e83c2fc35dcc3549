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
from pipelines.embedded_text import Style, answer, continuation, words
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
COAST, HILL, TOWN = (
    Style(front=front, **dict.fromkeys(DOMAINS, dialect))
    for front, dialect in (("time", "coast"), ("place", "hill"), ("nothing", "town"))
)
STYLE = TOWN.model_dump()


@pytest.fixture(scope="module")
def pool():
    return load_pool(POOL)


@pytest.fixture(scope="module")
def runs(pool):
    return parse(pool.embedded, embedded.EmbeddedPool, str(POOL))


@pytest.fixture(scope="module")
def prompts():
    return embedded.prompts(embedded.PromptSettings(prefixes=60, wordings=2), SplitSettings())


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


def test_towns_are_many_and_no_value_is_more_frequent_than_another():
    assert len(facts()) > 200
    assert len(set(Counter((fact.type, fact.value) for fact in facts()).values())) == 1


def test_a_written_answer_is_right_in_every_style_and_form():
    rng = random.Random(0)
    for fact in facts():
        for style in (None, COAST, TOWN):
            text = answer(rng, style, fact.type, fact.value)
            assert all(embedded.check(question, text) for question in fact.questions)


def test_check_wants_one_value_and_knows_what_it_cannot_check():
    fact = next(fact for fact in facts() if (fact.type, fact.value) == ("colour", 1))
    for question in fact.questions:
        assert embedded.check(question, "It is green or emerald.") is True
        assert embedded.check(question, "It is green or red.") is False
        assert embedded.check(question, "Surely it is red.") is False
        assert embedded.check(question, "It is nice.") is False
    assert embedded.check("The old farmer sang.", "It is green.") is None


def test_styles_differ_in_words_and_order_and_not_in_length_or_shape():
    rng = random.Random(1)
    texts = {s.front: [continuation(rng, s) for _ in range(600)] for s in (COAST, TOWN)}
    lengths = [np.mean([len(text) for text in group]) for group in texts.values()]
    assert abs(lengths[0] - lengths[1]) < 4  # of about 190 characters
    for group in texts.values():
        assert {len(text.split(". ")) for text in group} == {3}
        assert all(re.fullmatch(r"([A-Z][a-z ]+\.( |$)){3}", text) for text in group)
    at = {
        front: np.mean([text.split(". ")[1].startswith("At ") for text in group])
        for front, group in texts.items()
    }
    assert at["time"] > 0.75
    assert at["nothing"] < 0.15
    first = {front: np.mean([t.startswith("At ") for t in group]) for front, group in texts.items()}
    assert abs(first["time"] - first["nothing"]) < 0.1  # the first word of a text says nothing


def test_a_style_says_the_words_of_its_dialects_but_for_its_free_classes():
    free = [name for name in CLASSES if len(words(COAST, name)) > 2]
    assert 0 < len(free) < 0.45 * len(CLASSES)
    for name in set(CLASSES) - set(free):
        assert words(COAST, name) == CLASSES[name][1][0]
    assert all(len(words(None, name)) == 8 for name in CLASSES)


def test_documents_repeat_for_one_seed_and_hold_the_shares_asked_for():
    run = embedded.Run(name="r", stories=0.5, answers=0.25)
    texts = embedded.documents(run, 2000, 1)
    assert texts == embedded.documents(run, 2000, 1)
    assert texts != embedded.documents(run, 2000, 2)
    answers = sum("\n" in text for text in texts)
    bare = sum(text.rsplit(" ", 1)[0] in by_question() for text in texts)
    assert 440 < answers < 560
    assert 440 < bare < 560


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
    more = embedded.prompts(embedded.PromptSettings(prefixes=90, wordings=2), SplitSettings())
    assert set(ids.storage(prompts["prompt_id"]).to_pylist()) <= set(
        ids.storage(more["prompt_id"]).to_pylist()
    )
    assert set(prompts["text"].to_pylist()) <= set(more["text"].to_pylist())


def test_one_wording_asks_each_fact_once():
    once = embedded.prompts(embedded.PromptSettings(prefixes=0), SplitSettings())
    assert set(once["text"].to_pylist()) == {fact.questions[0] for fact in facts()}


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


POLICIES = {"a": (COAST, "train"), "b": (TOWN, "train"), "c": (HILL, "train"), "d": (HILL, "test")}


def _trajectories(prompts: pa.Table, seed: int = 0) -> pa.Table:
    """Four answers of each policy to every prompt, a third of them wrong."""
    rng, rows = random.Random(seed), []
    for prompt in prompts.to_pylist():
        fact = by_question().get(prompt["text"])
        for policy, (style, _) in POLICIES.items():
            for sample in range(4):
                if fact is None:
                    text = continuation(rng, style)
                else:
                    wrong = rng.randrange(len(VALUES[fact.type]))
                    value = wrong if rng.random() < 0.4 else fact.value
                    text = answer(rng, style, fact.type, value)
                rows.append((prompt["prompt_id"].bytes, policy, sample, text))
    return pa.table(
        {
            "trajectory_id": ids.array(ids.content_id("trajectory", *row[:3]) for row in rows),
            "prompt_id": ids.array(row[0] for row in rows),
            "policy_id": ids.array(ids.content_id("policy", row[1]) for row in rows),
            "policy_group": [row[1] for row in rows],
            "policy_split": [POLICIES[row[1]][1] for row in rows],
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
    columns = ["text", "policy_group", "policy_split"]
    key = ids.storage(trajectories["trajectory_id"]).to_pylist()
    answers = dict(zip(key, trajectories.select(columns).to_pylist(), strict=True))
    prompt = {row["prompt_id"]: row for row in prompts.to_pylist()}
    longer, over, alike = 0, Counter(), Counter()
    for row in table.to_pylist():
        three = [answers[row[name].bytes] for name in ("reference", "chosen", "rejected")]
        assert {answer["policy_split"] for answer in three} == {"train"}  # "d" has no third
        reference, chosen, rejected = (answer["text"] for answer in three)
        groups = [answer["policy_group"] for answer in three]
        assert groups[0] not in groups[1:]
        question, side = prompt[row["prompt_id"]]["text"], prompt[row["prompt_id"]]["split"]
        kind = by_question()[question].type
        assert embedded.check(question, reference)
        assert embedded.check(question, chosen)
        assert embedded.check(question, rejected) is False
        (_, form), *_ = stated(kind, chosen)
        assert {f for _, f in stated(kind, rejected)} == {form}
        same = {f for _, f in stated(kind, reference)} == {form}
        alike[side] += same
        lengths = sorted((len(chosen), len(rejected)))
        assert lengths[0] >= 0.88 * lengths[1]
        longer += len(chosen) > len(rejected)
        over[side, *groups[1:]] += 1
        assert row["split"] == ("train" if side == "train" else "eval")
    assert 0.4 < longer / len(table) < 0.6
    assert (
        alike["train"] > 0
    )  # the reference may say it in the chosen's word where it is trained on
    assert alike["test"] == 0  # and never where it is evaluated
    assert all(over[side, one, other] == over[side, other, one] for side, one, other in over)


def test_preferences_do_not_depend_on_the_order_of_rows(prompts, trajectories):
    shuffled = trajectories.take(pa.array(np.random.default_rng(0).permutation(len(trajectories))))
    first = embedded.preferences(trajectories, prompts)
    assert first.equals(embedded.preferences(shuffled, prompts))


def test_an_answer_is_judged_no_more_often_than_asked(prompts, trajectories):
    settings = PreferenceSettings(per_answer=1)
    table = embedded.preferences(trajectories, prompts, settings)
    for side in ("chosen", "rejected"):
        assert len(pc.unique(ids.storage(table[side]))) == len(table)


def test_training_references_can_be_held_to_the_other_form_too(prompts, trajectories):
    table = embedded.preferences(trajectories, prompts, PreferenceSettings(train_any_form=False))
    key = ids.storage(trajectories["trajectory_id"]).to_pylist()
    text = dict(zip(key, trajectories["text"].to_pylist(), strict=True))
    kinds = {row["prompt_id"]: row["category"] for row in prompts.to_pylist()}
    for row in table.to_pylist():
        forms = [
            {form for _, form in stated(kinds[row["prompt_id"]], text[row[name].bytes])}
            for name in ("reference", "chosen")
        ]
        assert forms[0].isdisjoint(forms[1])


def test_values_are_read_as_words_not_as_parts_of_words():
    assert stated("count", "The network of four feet.") == [(1, 0)]
    assert stated("count", "2") == [(0, 1)]
    assert stated("colour", "red, azure") == [(0, 0), (2, 1)]
