"""Questions to a large lake, and the same to JSONL and to hive-partitioned Parquet.

    python benchmarks/lake/bench.py [--pairs 100000000] [--trajectories 10000000] [--data DIR]

Trajectories and pairs are those of DIR/trajectories.parquet, made by the product, again and again
under other ids (`world.py`); without DIR they are made up. The questions are the SQL files beside
this one, each with a LIMIT or an aggregate, the same for each store. Keyed questions are asked for
50 random keys, others five times, or fewer where they take more than `--budget` seconds in all;
the median is reported. Cold means a new process, warm an open connection; the system's page cache
is as it is. JSONL holds one in `--jsonl` of the prompts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import stores
import world

from pipelines.attach import connect, quoted
from pipelines.lake import Append, Lake
from pipelines.maintenance import maintain

HERE = Path(__file__).parent
KEYED = ("one_policy", "one_prompt", "random_pairs")
QUERIES = (*KEYED, *sorted({file.stem for file in HERE.glob("*.sql")} - {*KEYED}))
KEYS, PROMPTS = 50, 25


def build(root: Path, options: argparse.Namespace) -> None:
    """Make the base, the lake that repeats it, and its peers."""
    base = root.parent / ("base-real" if options.data else "base-made-up")
    world.base(base, options.data, pairs=True)
    part = root.with_name(f".{root.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with (
        Lake.open(base, read_only=True, memory_limit=stores.MEMORY) as small,
        Lake.open(part / "lake", memory_limit=stores.MEMORY) as large,
    ):
        rows = small.row_counts()
        copies = math.ceil(options.trajectories / rows["trajectories"])
        paired = min(math.ceil(options.pairs / rows["pairs"]), copies)
        print(f"base: {rows}; copies: {copies} of trajectories, {paired} of pairs", flush=True)
        world.repeat(small, large, part, copies)
        file = part / "pairs.parquet"
        small.copy(world.repeated_pairs(paired), file)
        large.publish("benchmark", "pairs", [Append("pairs", [file])])
        file.unlink()
        names = ", ".join(large.query("from pair_sums limit 0").column_names)
        sums = f"select {names} from (select * replace (pairs * {paired} as pairs) from pair_sums)"
        small.copy(sums, file)
        large.publish("benchmark", "sums", [Append("pair_sums", [file])])
        file.unlink()
        print("maintenance:", maintain(large, grace=timedelta(0)), flush=True)
        (part / "keys.json").write_text(json.dumps(draw(large)), encoding="utf-8")
    con = connect(part / "lake", read_only=True, memory_limit=stores.MEMORY)
    named = """
        with pairs as (
            select p.*, a.policy_id as policy_a, b.policy_id as policy_b
            from small.pairs p join small.trajectories a on a.trajectory_id = p.trajectory_a
            join small.trajectories b on b.trajectory_id = p.trajectory_b
        )"""
    catalog = quoted(f"ducklake:sqlite:{base}/lake/catalog.sqlite")
    con.execute(f"attach {catalog} as small (read_only, data_path {quoted(f'{base}/lake/data/')}, "
                "override_data_path true)")  # fmt: skip
    for store, share in (("hive", 1), ("jsonl", options.jsonl)):
        for table in (*stores.PLAIN, "trajectories"):
            sql = f"from {table}"
            key = {"trajectories": "prompt_id", "duplicates": "trajectory_id"}.get(table)
            if share > 1 and key is not None:
                some = f"small.{table}, range({max(copies // share, 1)}) as copy(k)"
                sql += f" where {key} in (select {world.copied(key, 'k')} from {some})"
            stores.write(con, store, part / store, table, sql)
        times = max(paired // share, 1)
        pairs = named + world.repeated_pairs(times, "policy_a", "policy_b")
        stores.write(con, store, part / store, "pairs", pairs)
        print(f"{store} is written", flush=True)
    con.close()
    part.rename(root)


def draw(lake: Lake) -> dict[str, list]:
    """Random policies and prompts that have pairs, by seed."""
    prompts = lake.query(
        "select prompt_id::varchar as id from (select distinct prompt_id from pairs) "
        f"order by hash(prompt_id, 1) limit {KEYS * PROMPTS}"
    )["id"].to_pylist()
    policies = lake.query(
        "select policy_a::varchar as id from pair_sums group by policy_a "
        f"order by hash(policy_a, 1) limit {KEYS}"
    )["id"].to_pylist()
    chosen = [
        {
            "policy": policies[n % len(policies)],
            "prompt": prompts[n % len(prompts)],
            "prompts": prompts[n::KEYS],
            "seed": n,
        }
        for n in range(KEYS)
    ]
    return {"keys": chosen}


def small_keys(root: Path) -> list[dict[str, Any]]:
    """Keys whose prompts are in the JSONL files: those of the first copies."""
    con = stores.opened("jsonl", root)
    prompts = [
        row[0]
        for row in con.execute(
            "select prompt_id::varchar from (select distinct prompt_id from pairs) "
            f"order by hash(prompt_id, 1) limit {KEYS * PROMPTS}"
        ).fetchall()
    ]
    keys = stores.load_keys(root)["keys"]
    return [
        key | {"prompt": prompts[n % len(prompts)], "prompts": prompts[n::KEYS]}
        for n, key in enumerate(keys)
    ]


def ask(store: str, root: Path, query: str, keys: list, budget: float, *flags: str) -> dict:
    """The answer times of `ask.py` in a process of its own."""
    command = [sys.executable, str(HERE / "ask.py"), store, str(root), query, json.dumps(keys)]
    done = subprocess.run(
        [*command, "--budget", str(budget), *flags], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{store}, {query}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def measure(store: str, root: Path, query: str, keys: list, budget: float) -> dict[str, Any]:
    """Median milliseconds, cold and warm, and of how many answers."""
    keys = keys if query in KEYED else keys[:5]
    cold: list[float] = []
    began = time.perf_counter()
    for key in keys:
        cold += ask(store, root, query, [key], budget)["seconds"]
        if time.perf_counter() - began > budget:
            break
    warm = ask(store, root, query, keys, budget, "--warm")
    return {
        "cold_ms": round(1000 * statistics.median(cold), 1),
        "warm_ms": round(1000 * statistics.median(warm["seconds"]), 1),
        "asked": [len(cold), len(warm["seconds"])],
        "rows": warm["rows"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    whole = {"type": lambda text: int(text.replace("_", ""))}
    parser.add_argument("--pairs", default=100_000_000, **whole)
    parser.add_argument("--trajectories", default=None, help="a tenth of the pairs", **whole)
    parser.add_argument("--jsonl", default=100, help="JSONL holds one copy in so many", **whole)
    parser.add_argument("--budget", type=float, default=60, help="seconds a question and store")
    parser.add_argument("--queries", nargs="*", default=QUERIES)
    parser.add_argument("--stores", nargs="*", default=["lake", "hive", "jsonl"])
    parser.add_argument("--keep", action="store_true", help="keep what was made, for another run")
    parser.add_argument("--data", type=Path, default=os.environ.get("POLAR_DATA"))
    home = Path(os.environ.get("POLAR_HOME", "var"))
    parser.add_argument("--work", type=Path, default=home / "bench" / "lake")
    options = parser.parse_args()
    options.trajectories = options.trajectories or options.pairs // 10
    kind = "real" if options.data else "made-up"
    root = options.work.resolve() / f"{kind}-{options.trajectories}-{options.pairs}"
    if not root.exists():
        build(root, options)
    with Lake.open(root / "lake", read_only=True) as lake:
        rows = lake.row_counts()
        info = lake.query("select table_name, file_count, file_size_bytes from "
                          "ducklake_table_info('lake') where file_count > 0")  # fmt: skip
    files = {row.pop("table_name"): row for row in info.to_pylist()}
    report: dict[str, Any] = {}
    for query in options.queries:
        report[query] = {}
        for store in options.stores:
            keys = small_keys(root) if store == "jsonl" else stores.load_keys(root)["keys"]
            report[query][store] = measure(store, root, query, keys, options.budget)
            print(query, store, report[query][store], flush=True)
    jsonl = [f"select count(*) from {table}" for table in stores.PARTITIONED]
    con = stores.opened("jsonl", root)
    result = {
        "data": kind,
        "trajectories": rows["trajectories"],
        "pairs": rows["pairs"],
        "jsonl_rows": [con.execute(sql).fetchall()[0][0] for sql in jsonl],
        "bytes": {store: stores.size(root / store) for store in ("lake", "hive", "jsonl")},
        "lake_tables": files,
        "load": round(os.getloadavg()[0], 1),
        "queries": report,
    }
    if not options.keep:
        shutil.rmtree(root)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
