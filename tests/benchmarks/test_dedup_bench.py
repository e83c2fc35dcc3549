"""The benchmarks run whole, small: their numbers mean nothing at this size, their checks do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "dedup"))
import corpus  # noqa: E402
import exact  # noqa: E402


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_families_hold_near_pairs_and_the_truth_about_them(tmp_path):
    file = tmp_path / "families.parquet"
    corpus.write_families(file, corpus.made_up_texts(150), 400)
    family = pq.read_table(file)["family"].to_numpy()
    truth = exact.true_clusters(str(file))
    assert (family[truth] == family).all()
    near, together = len(family) - len(set(truth)), len(family) - len(set(family))
    assert 0.2 * together < near < 0.9 * together
    assert np.array_equal(exact.near_exhaustive_clusters(str(file)), truth)
    assert exact.agreement(truth, truth) == (1, 1)
    precision, recall = exact.agreement(family, truth)
    assert precision < recall == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dedup_beside_its_peers(tmp_path):
    """With peers where BENCH_ENVIRONMENTS names their environments or packages can be had."""
    envs = os.environ.get("BENCH_ENVIRONMENTS")
    peers = ["rensa", "datasketch", "datatrove", "text-dedup"] if envs else []
    result = run(
        "dedup/bench.py",
        *("--documents", 2000, "--peer-documents", 2000, "--work", tmp_path),
        *("--environments", envs or tmp_path, "--peers", *peers),
    )
    assert result["incremental_equals_full"]
    assert result["shuffled_equals"]
    assert result["precision"] == 1
    assert result["recall"] > 0.9
    for peer in peers:
        assert result["peers"][peer]["recall"] - result["recall"] < 0.02
        assert result[f"ratio_vs_{peer}"] != 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_make_the_same_files(tmp_path):
    result = run("beam.py", "--documents", 120_000, "--rounds", 1, "--work", tmp_path)
    assert result["equal_files"] == 3 * 4
