"""Scores do not depend on company, order or length; bad items are refused with their place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.trainer.conftest import TEXT, make_groups
from trainer.errors import BadGroupsError
from trainer.model import RewardModel
from trainer.score import Scorer

ITEMS = [
    {"prompt": TEXT[i % 4], "reference": TEXT[j], "output": TEXT[k][: 5 * k + i]}
    for i in range(6)
    for j in range(2)
    for k in range(4)
]


@pytest.fixture(scope="module")
def scorer(backbone):
    model = RewardModel.start(backbone, wrapper="sft")
    torch.manual_seed(2)
    torch.nn.init.normal_(model.network.score.weight, std=0.5)
    return Scorer(model)


def test_company_order_and_layout_do_not_matter(scorer):
    alone = np.concatenate([scorer.score([item]) for item in ITEMS])
    assert alone.dtype == np.float32
    assert alone.std() > 0.1
    together = scorer.score(ITEMS)
    assert np.allclose(alone, together, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(ITEMS))
    shuffled = scorer.score([ITEMS[i] for i in order], batch_tokens=300)
    assert np.allclose(alone[order], shuffled, atol=1e-5)
    separate = Scorer(scorer.model, layout="separate").score(ITEMS)
    assert np.allclose(alone, separate, atol=1e-5)


def test_messages_and_wrappers(scorer):
    item = ITEMS[5]
    messages = {
        key: [{"role": "user", "content": part} for part in text.split(" ", 1)]
        for key, text in item.items()
    }
    lines = {key: text.replace(" ", "\n", 1) for key, text in item.items()}
    assert scorer.score([messages]) == pytest.approx(scorer.score([lines]), abs=1e-5)
    sft, pretrain = scorer.score([{**item, "wrapper": w} for w in ("sft", "pretrain")])
    assert sft == pytest.approx(scorer.score([item])[0], abs=1e-5)
    assert abs(sft - pretrain) > 1e-4


def test_groups_give_the_scores_of_their_items(scorer):
    table = make_groups(7, k=4)
    found = scorer.score_groups(table)
    assert [len(scores) for scores in found] == [4] * 7
    items = [
        {
            "prompt": row["prompt"],
            "reference": row["reference"],
            "output": candidate["text"],
            "wrapper": row["wrapper"],
        }
        for row in table.to_pylist()
        for candidate in row["candidates"]
    ]
    assert np.allclose(np.concatenate(found), scorer.score(items), atol=1e-5)
    assert scorer.score_groups(table.slice(0, 0)) == []


def test_very_long_very_many_and_none(scorer):
    long = {"prompt": "planets " * 3000, "reference": "a " * 900, "output": "b " * 900}
    empty = {"prompt": "", "reference": "", "output": ""}
    assert np.isfinite(scorer.score([long, empty])).all()
    many = scorer.score([{**empty, "output": str(i)} for i in range(40)], batch_tokens=64)
    assert len(set(many.tolist())) > 5
    told = []
    scorer.score(ITEMS, batch_tokens=500, progress=lambda *args: told.append(args[:2]))
    assert told[-1] == (len(ITEMS), len(ITEMS))
    assert scorer.score([]).shape == (0,)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"prompt": "a", "reference": "b"}, "item 1: field 'output' is missing"),
        ({"prompt": 3, "reference": "b", "output": "c"}, "item 1: field 'prompt' is 3"),
        ({**ITEMS[0], "wrapper": "chat"}, "item 1: field 'wrapper' is 'chat'"),
    ],
)
def test_a_bad_item_is_refused_with_its_place(scorer, item, said):
    with pytest.raises(BadGroupsError) as error:
        scorer.score([ITEMS[0], item])
    assert said in str(error.value)
