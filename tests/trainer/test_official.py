"""The scores that POLAR-7B's own page gives, from its converted weights.

Runs where POLAR_OFFICIAL_CHECKPOINT names the folder of POLAR-7B as it is published, or one
converted from it (which takes 30 GB of memory in fp32). The long examples are read from the
README.md of that folder, or of POLAR_OFFICIAL_README.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from trainer.convert import OFFICIAL, convert
from trainer.model import RECORD
from trainer.score import Scorer

NOISE = 0.15
"""Published values come from fp16 on three engines, which differ by thousandths of a score."""
STRAWBERRY = (0.0546, -2.0059, -6.7070, -7.1055, -7.1328, -8.4688, -10.8203)
DUNE = (0.4666, -6.9180, -7.7070, -8.4297, -8.6484, -10.3594)
official = pytest.mark.skipif(
    "POLAR_OFFICIAL_CHECKPOINT" not in os.environ,
    reason="POLAR_OFFICIAL_CHECKPOINT does not name a folder of POLAR-7B",
)


def examples(page: str) -> list[tuple[list[dict], list[float]]]:
    """The items of a page's examples and the rewards printed under them, in their order."""
    found = []
    blocks = re.findall(r"```python\n(.*?)```\s*```txt\n(.*?)```", page, re.DOTALL)
    for code, printed in blocks:
        known = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(code).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
        answers = re.findall(r"^Output: (.*?)\nReward: (\S+)$", printed, re.MULTILINE | re.DOTALL)
        items = [
            {"prompt": known["prompt"], "reference": known["reference"], "output": answer}
            for answer, _ in answers
        ]
        found.append((items, [float(reward) for _, reward in answers]))
    return found


def test_examples_are_read_from_a_page():
    page = (
        "# Page\n```python\nimport client\nprompt = \"Who's there?\"\nreference = 'Me.'\n"
        "outputs = [\n  'Me.',  # same\n  'You.',\n]\nrewards = client(outputs)\n```\n\n"
        "```txt\nOutput: Me.\nReward: 0.5\n\nOutput: You.\nReward: -3.25\n```\n```python\nx\n```\n"
    )
    item = {"prompt": "Who's there?", "reference": "Me."}
    assert examples(page) == [([item | {"output": "Me."}, item | {"output": "You."}], [0.5, -3.25])]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(os.environ["POLAR_OFFICIAL_CHECKPOINT"])


@pytest.fixture(scope="module")
def scorer(folder, tmp_path_factory) -> Scorer:
    if not (folder / RECORD).is_file():
        out = tmp_path_factory.mktemp("official") / "llama"
        convert(folder, out)
        folder = out
    scorer = Scorer.load(folder)
    if scorer.model.network.config.hidden_size != 4096:
        pytest.skip("the published scores are those of POLAR-7B")
    return scorer


@official
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_capital_of_china(scorer):
    assert (scorer.model.record.separator.id, scorer.model.record.reward.id) == (92397, 92527)
    item = {"prompt": "What is the capital of China?", "reference": "Beijing."}
    scores = scorer.score([item | {"output": answer} for answer in ("Beijing.", "Shanghai.")])
    assert scores.tolist() == pytest.approx([-0.5703, -11.0304], abs=NOISE)


@official
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("which", "values"), [(0, STRAWBERRY), (1, DUNE)], ids=["strawberry", "Dune"]
)
def test_the_long_examples(scorer, folder, which, values):
    places = [folder / "README.md", folder / OFFICIAL / "README.md"]
    if "POLAR_OFFICIAL_README" in os.environ:
        places = [Path(os.environ["POLAR_OFFICIAL_README"])]
    page = next((place for place in places if place.is_file()), None)
    if page is None:
        pytest.skip(f"no README.md in {folder}: POLAR_OFFICIAL_README may name one")
    items, printed = examples(page.read_text(encoding="utf-8"))[which]
    assert printed == pytest.approx(values, abs=1e-4)
    scores = scorer.score(items)
    assert scores.tolist() == pytest.approx(printed, abs=NOISE)
