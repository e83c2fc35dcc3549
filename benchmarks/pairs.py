"""Pairs at scale: from trajectories in a lake to labelled pairs in it; seconds, memory, balance.

    python benchmarks/pairs.py [--trajectories 1000000] [--samples 4] [--workers 2] [--data DIR]

The trajectories are those of DIR/trajectories.parquet, repeated as `benchmarks/lake/world.py` says
(more samples, then as many copies of the prompts as it takes); without DIR they are made up. Timed
are the query of the answers, `make_pairs`, and the publish, each apart and together; the lake and
its signatures are made before. `peak_gib` is the largest resident set of all processes together.
`--check` makes the pairs again, in one process and in smaller chunks, and compares every row.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent / "lake"))
import world

from pipelines.budget import Budget
from pipelines.chunks import meanwhile
from pipelines.labels import input_sql
from pipelines.lake import Append, Lake
from pipelines.pairs import PairSettings, make_pairs
from pipelines.pairs_balance import balance, pair_rulers, rulers_sql


def resident() -> int:
    """Bytes of memory of this process and all that it started; shared pages count in parts."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(entry.name))
    total, todo = 0, [os.getpid()]
    while todo:
        pid = todo.pop()
        todo += parents.get(pid, [])
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def watched(peak: dict[str, int]) -> AbstractContextManager[None]:
    """Keep the largest `resident` of the block in `peak["bytes"]`."""
    return meanwhile(lambda: peak.update(bytes=max(peak.get("bytes", 0), resident())))


def same(one: list[Path], other: list[Path]) -> bool:
    """Whether both say the same, row for row, however they are cut into files."""

    def rows(files: list[Path]) -> Iterator[pa.Table]:
        rest: pa.Table | None = None
        for file in files:
            table = pq.read_table(file)
            rest = table if rest is None else pa.concat_tables([rest, table])
            while len(rest) >= world.ROWS:
                yield rest.slice(0, world.ROWS)
                rest = rest.slice(world.ROWS)
        if rest is not None:
            yield rest

    pairs = zip(rows(one), rows(other), strict=True)
    return all(first.equals(second) for first, second in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=4, help="times the samples of a policy")
    parser.add_argument("--share", type=float, default=0.1, help="same_policy_share")
    parser.add_argument("--per-prompt", type=int, default=150_000, help="pairs_per_prompt")
    parser.add_argument("--per-policies", type=int, default=100, help="cross_per_policies")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--data", type=Path, default=os.environ.get("POLAR_DATA"))
    home = Path(os.environ.get("POLAR_HOME", "var"))
    parser.add_argument("--work", type=Path, default=home / "bench" / "pairs")
    options = parser.parse_args()
    work = options.work.resolve()
    kind = "real" if options.data else "made-up"
    small_home = work / f"base-{kind}"
    known = world.base(small_home, options.data, pairs=False)
    with Lake.open(small_home, read_only=True) as small:
        rows = small.row_counts()["trajectories"]
        copies = math.ceil(options.trajectories / rows / options.samples)
        large_home = work / f"{kind}-{copies}-{options.samples}"
        signatures = large_home / "signatures.parquet"
        if not signatures.exists():
            print(f"{rows:,} answers, {copies} copies of the prompts, {options.samples} x samples")
            shutil.rmtree(large_home, ignore_errors=True)
            with Lake.open(large_home, memory_limit=world.MEMORY) as large:
                world.repeat(small, large, large_home, copies, options.samples)
            part = large_home / "part.parquet"
            world.repeat_signatures(small, known, part, large_home, copies, options.samples)
            part.rename(signatures)
    budget = Budget(
        same_policy_share=options.share,
        same_per_policy=1000,
        cross_per_policies=options.per_policies,
        pairs_per_prompt=options.per_prompt,
    )
    settings = PairSettings(require_same_sampling=False, budget=budget)
    print(f"budget: {budget.model_dump()}", flush=True)
    out = large_home / "work"
    shutil.rmtree(out, ignore_errors=True)
    seconds: dict[str, float] = {}
    peak: dict[str, int] = {}
    with Lake.open(large_home) as lake, watched(peak):
        began = time.perf_counter()
        sources = world.sources(lake)
        answers = lake.copy(input_sql(sources, signatures), out / "answers.parquet")
        seconds["answers"] = time.perf_counter() - began
        began = time.perf_counter()
        file = out / "answers.parquet"
        result = make_pairs(file, settings, out, workers=options.workers)
        seconds["pairs"] = time.perf_counter() - began
        began = time.perf_counter()
        changes: list[Any] = [Append("pairs", result.files), Append("pair_sums", result.sums)]
        lake.publish("benchmark", "pairs", changes)
        seconds["publish"] = time.perf_counter() - began
        began = time.perf_counter()
        rulers = pair_rulers(lake.query(rulers_sql(sources))).to_pylist()
        seconds["rulers"] = time.perf_counter() - began
        files = lake.query("from ducklake_table_info('lake') where table_name = 'pairs'")
    checked = None
    if options.check:
        again = make_pairs(file, settings, out / "again", chunk_pairs=200_000)
        checked = same(result.files, again.files) and result.sums.equals(again.sums)
    for row in balance(result.sums).to_pylist():
        print(row)
    for row in rulers:
        print(row)
    report = {
        "data": kind,
        "trajectories": answers,
        "pairs": result.rows,
        "possible": sum(r["rows"] for r in result.counts.to_pylist() if r["what"] == "in"),
        "seconds": round(sum(seconds[name] for name in ("answers", "pairs", "publish")), 1),
        **{f"seconds_{name}": round(value, 1) for name, value in seconds.items()},
        "peak_gib": round(peak["bytes"] / 2**30, 2),
        "workers": options.workers,
        "load": round(os.getloadavg()[0], 1),
        "lake_bytes": files["file_size_bytes"][0].as_py(),
        "same_again": checked,
        "balance": overall(result.sums),
    }
    shutil.rmtree(out)
    shutil.rmtree(large_home / "lake")
    signatures.unlink()
    print(json.dumps(report))


def overall(sums: pa.Table) -> dict[str, Any]:
    """The balance of the largest source's cell `seen`."""
    rows = [row for row in balance(sums).to_pylist() if row["cell"] == "seen"]
    found = max(rows, key=lambda row: row["pairs"])
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}


if __name__ == "__main__":
    main()
