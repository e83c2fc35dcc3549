"""What the training benchmark draws and counts; its contenders are run by the benchmark itself."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "train"))
import triples  # noqa: E402

SAMPLES = {"a1": 3, "a2": 2, "b": 2, "c": 2, "once": 1}
GROUP = {"a1": "a", "a2": "a"}


@pytest.fixture
def data(tmp_path):
    rows = [
        {
            "prompt_id": f"p{prompt}",
            "source": source,
            "prompt": f"prompt {prompt}",
            "policy": policy,
            "policy_group": GROUP.get(policy, policy),
            "response": f"{policy} says something of length to {prompt}, {sample}",
        }
        for prompt in range(6)
        for source in ("oasst_sampling", "other")
        for policy, count in SAMPLES.items()
        for sample in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "trajectories.parquet")
    return tmp_path


def test_a_group_has_one_policy_twice_and_other_groups_once(data):
    def policy(text):
        return text.split()[0]

    drawn = triples.draw(data, 3, 15, np.random.default_rng(0))
    assert drawn == triples.draw(data, 3, 15, np.random.default_rng(0))
    assert len({(g.prompt, g.reference) for g in drawn}) == 15
    for group in drawn:
        positive, *negatives = map(policy, group.candidates)
        assert policy(group.reference) == positive
        assert group.reference != group.candidates[0]
        groups = [GROUP.get(p, p) for p in (positive, *negatives)]
        assert len(set(groups)) == 3
        assert "once" not in groups
    with pytest.raises(ValueError, match="0 groups of 5"):
        triples.draw(data, 5, 1, np.random.default_rng(0))


def random_groups(candidates, count, seed=0):
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        prefix = rng.integers(0, 9, rng.integers(0, 30)).tolist()
        groups.append([prefix + [10 + k, *[5] * rng.integers(0, 20)] for k in range(candidates)])
    return groups


@pytest.mark.parametrize("candidates", [2, 4, 8])
def test_everybody_runs_the_same_pairs(candidates):
    repeats = triples.repeats(
        triples.steps(random_groups(candidates, 9 * 21 // (candidates - 1)), candidates), 3
    )
    paired = [[[p for g in step for p in triples.pairs(g)] for step in r] for r in repeats]
    assert [[len(step) for step in r] for r in paired] == [[21] * 3] * 3
    timed = [steps[1:] for steps in paired]
    ranked = triples.by_length(timed)

    def flat(steps):
        return sorted(pair for r in steps for step in r for pair in step)

    assert flat(ranked) == flat(timed)
    padded, ordered = (
        sum(triples.ids_of_padded(step) for r in steps for step in r) for steps in (timed, ranked)
    )
    assert ordered < padded
    smaller = sum(triples.ids_of_padded(step, 3) for r in ranked for step in r)
    own = sum(len(row) for r in timed for step in r for pair in step for row in pair)
    assert own <= smaller <= ordered


def test_shared_ids_are_counted_once():
    group = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 7, 8]]
    assert triples.shared_prefix(group) == 2
    assert triples.ids_of_shared([group]) == 2 + 2 + 1 + 3
    assert triples.shared_prefix([[1, 2], [1, 2, 3]]) == 1
    assert triples.ids_of_padded([([1, 2], [1]), ([1] * 5, [1])]) == 20
    assert triples.ids_of_padded([([1, 2], [1]), ([1] * 5, [1])], micro=1) == 14
