"""The same tables as a lake, as hive-partitioned Parquet and as JSONL: written, and opened.

The lake is what the product publishes. Hive is one folder a policy (for pairs: the policy of
trajectory_a), each table else one file. JSONL is one file a table. On those two the lake's sums
and views are asked of the rows, for nothing keeps them.
"""

from __future__ import annotations

import json
from pathlib import Path

import duckdb

from pipelines.attach import connect, quoted
from pipelines.ddl import sql_type
from pipelines.schemas import TABLES
from pipelines.sums import SUMS
from pipelines.views import VIEWS

THREADS, MEMORY = 2, "4GB"
PLAIN = ("policies", "prompts", "duplicates")
PARTITIONED = ("trajectories", "pairs")
VIEWED = ("pool_overview", "pair_balance")

# What the lake keeps summed; elsewhere it is asked of the pairs, which name their policies.
PAIR_SUMS = """
select q.source, least(p.policy_a, p.policy_b) as policy_a,
       greatest(p.policy_a, p.policy_b) as policy_b, p.split, p.cell, p.label,
       coalesce(p.reason, '') as reason, p.relation, count(*) as pairs,
       avg(p.similarity) as mean_similarity, avg(p.length_ratio) as mean_length_ratio
from pairs as p join prompts as q on q.prompt_id = p.prompt_id
group by q.source, least(p.policy_a, p.policy_b), greatest(p.policy_a, p.policy_b), p.split,
       p.cell, p.label, p.reason, p.relation
"""


def opened(store: str, root: Path) -> duckdb.DuckDBPyConnection:
    """A connection on which the tables and views have the names they have in the lake."""
    if store == "lake":
        return connect(root / "lake", read_only=True, threads=THREADS, memory_limit=MEMORY)
    con = duckdb.connect(config={"threads": THREADS, "memory_limit": MEMORY})
    con.execute(f"set temp_directory = {quoted(str(root / 'spill'))}")
    folder = root / store
    for table in (*PLAIN, *PARTITIONED):
        con.execute(f"create view {table} as from {_source(store, folder, table)}")
    con.execute(f"create view pair_sums as {PAIR_SUMS}")
    for table, kept in SUMS.items():
        con.execute(f"create view {table} as {kept.sql}")
    for view in VIEWED:
        con.execute(f"create view {view} as {VIEWS[view].sql}")
    return con


def _source(store: str, folder: Path, table: str) -> str:
    if store == "hive" and table in PARTITIONED:
        key = "policy_id" if table == "trajectories" else "policy_a"
        files = quoted(f"{folder / table}/*/*.parquet")
        types = f"hive_types = {{'{key}': uuid}}"
        return f"read_parquet({files}, hive_partitioning = true, {types})"
    if store == "hive":
        return f"read_parquet({quoted(str(folder / table))} || '.parquet')"
    types = {column.name: sql_type(column.type) for column in TABLES[table].columns}
    if table == "pairs":
        types |= {"policy_a": "uuid", "policy_b": "uuid"}
    columns = ", ".join(f"{name}: '{kind}'" for name, kind in types.items())
    return f"read_json({quoted(str(folder / table))} || '.jsonl', columns = {{{columns}}})"


def write(con: duckdb.DuckDBPyConnection, store: str, folder: Path, table: str, sql: str) -> None:
    """Write the rows of a query as a table of a store."""
    folder.mkdir(parents=True, exist_ok=True)
    if store == "jsonl":
        con.execute(f"copy ({sql}) to {quoted(str(folder / f'{table}.jsonl'))} (format json)")
        return
    target, more = str(folder / f"{table}.parquet"), ""
    if table in PARTITIONED:
        target = str(folder / table)
        more = f", partition_by ({'policy_id' if table == 'trajectories' else 'policy_a'})"
    con.execute(f"copy ({sql}) to {quoted(target)} (format parquet, compression zstd{more})")


def size(path: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def load_keys(root: Path) -> dict[str, list]:
    """The random keys that were drawn when the stores were made."""
    return json.loads((root / "keys.json").read_text(encoding="utf-8"))
