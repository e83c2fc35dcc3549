"""The lake: publishing, snapshots, columns, moving, tidying up. Faults and locks have own files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import ddl, ids, schemas
from pipelines.errors import LakeError, QueryError
from pipelines.ids import content_id
from pipelines.lake import Append, Lake, Replace, Upsert
from pipelines.maintenance import maintain
from pipelines.sums import SUMS
from pipelines.views import VIEWS
from tests.pipelines.lake_rows import fill, rows, small_lake, trajectory


@pytest.fixture(scope="module")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("empty")
    Lake.open(home).close()
    return home


@pytest.fixture(scope="module")
def filled_home(empty_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("filled") / "home"
    shutil.copytree(empty_home, home)
    with Lake.open(home) as lake:
        fill(lake)
    return home


@pytest.fixture
def own_lake(empty_home: Path, tmp_path: Path):
    """A lake of one test."""
    shutil.copytree(empty_home, tmp_path / "home")
    with Lake.open(tmp_path / "home") as lake:
        yield lake


@pytest.fixture(scope="module")
def shared_lake(empty_home: Path, tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("shared") / "home"
    shutil.copytree(empty_home, home)
    with Lake.open(home) as lake:
        yield lake


@pytest.fixture
def lake(shared_lake: Lake) -> Lake:
    """An empty lake; its older snapshots are those of other tests."""
    counts = shared_lake.row_counts()
    used = [Replace(name, [], "true") for name in counts if counts[name] and name not in SUMS]
    shared_lake.publish("tests", "empty", used)
    return shared_lake


@pytest.fixture(scope="module")
def filled(filled_home: Path):
    with Lake.open(filled_home, read_only=True) as lake:
        yield lake


def counts(*numbers: int, stage: str = "pairs") -> pa.Table:
    return rows("counts", *({"stage": stage, "reason": str(n), "rows": n} for n in numbers))


def stored(lake: Lake, snapshot: int | None = None) -> list[int]:
    at = "" if snapshot is None else f"at (version => {snapshot})"
    return lake.query(f"select rows from counts {at} order by rows")["rows"].to_pylist()


def test_every_table_and_view_is_there_as_the_schemas_say(own_lake: Lake):
    lake = own_lake
    assert lake.snapshot() == 1  # opening it again, for this test, changed nothing
    for table in schemas.TABLES.values():
        found = lake.query(f"from {table.name}").schema
        assert found.names == table.schema.names
        assert found.types == table.schema.types
    for view in VIEWS.values():
        assert lake.query(f"from {view.name}").schema.names == list(view.columns)
    assert lake.row_counts() == dict.fromkeys(schemas.TABLES, 0)


def test_rows_come_back_as_they_were_published(filled: Lake):
    published = {change.table: change.data for change in small_lake()}
    assert published.keys() == schemas.TABLES.keys() - SUMS.keys()
    for name, data in published.items():
        key = schemas.TABLES[name].key
        assert _sorted(filled.query(f"from {name}"), key) == _sorted(data, key)


def _sorted(table: pa.Table, key: tuple[str, ...]) -> list[dict]:
    return sorted(table.to_pylist(), key=lambda row: [str(row[name]) for name in key])


def test_a_publish_is_one_snapshot_with_author_and_message(lake: Lake):
    before = lake.snapshot()
    after = lake.publish(
        "rollouts", "it's new", [Append("counts", counts(1)), Append("counts", counts(2))]
    )
    assert after == before + 1 == lake.snapshot()
    (row,) = lake.query(
        f"select author, commit_message from lake.snapshots() where snapshot_id = {after}"
    ).to_pylist()
    assert row == {"author": "rollouts", "commit_message": "it's new"}


def test_changes_that_touch_no_row_make_no_snapshot(lake: Lake):
    before = lake.snapshot()
    changes = [
        Append("counts", counts()),
        Append("counts", []),
        Replace("counts", [], "stage = 'none'"),
        Upsert("counts", []),
    ]
    assert lake.publish("tests", "nothing", changes) == before
    assert lake.publish("tests", "nothing", []) == before


def test_replace_and_upsert(lake: Lake):
    lake.publish("tests", "one", [Append("counts", counts(1, 2, 3))])
    lake.publish("tests", "two", [Replace("counts", counts(7), "rows >= 2")])
    assert stored(lake) == [1, 7]
    again = counts(7, 8).set_column(6, "rows", pa.array([70, 80]))
    lake.publish("tests", "three", [Upsert("counts", again)])
    assert stored(lake) == [1, 70, 80]
    lake.publish("tests", "four", [Upsert("counts", again)])
    assert stored(lake) == [1, 70, 80]
    lake.publish("tests", "five", [Replace("counts", [], "true")])
    assert stored(lake) == []


def test_changes_of_one_publish_see_each_other(lake: Lake):
    changes = [Append("counts", counts(1, 2)), Replace("counts", counts(3), "rows = 1")]
    lake.publish("tests", "both", [*changes, Upsert("counts", counts(3))])
    assert stored(lake) == [2, 3]


def test_parquet_files_are_published_by_column_name(lake: Lake, tmp_path: Path):
    table = rows("trajectories", trajectory("ada", "north", 0), trajectory("ada", "north", 1))
    files = [tmp_path / "it's [1].parquet", tmp_path / "two*.parquet"]
    pq.write_table(table.slice(0, 1).select(table.schema.names[::-1]), files[0])
    pq.write_table(table.slice(1), files[1])
    lake.publish("tests", "files", [Append("trajectories", files)])
    lake.publish("tests", "again", [Upsert("trajectories", files)])
    found = lake.query("from trajectories")
    assert _sorted(found, ("trajectory_id",)) == _sorted(table, ("trajectory_id",))


def test_what_the_lake_writes_can_be_published_again(filled: Lake, lake: Lake, tmp_path: Path):
    expected = filled.row_counts()
    names = [name for name in schemas.TABLES if name not in SUMS]
    files = {name: tmp_path / f"{name}.parquet" for name in names}
    for name, path in files.items():
        assert filled.copy(f"from {name}", path) == expected[name]
    rows = [Append(name, filled.query(f"from {name}")) for name in names]
    lake.publish("tests", "query", rows)
    lake.publish("tests", "copy", [Upsert(name, [path]) for name, path in files.items()])
    assert lake.row_counts() == expected


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["append", "replace", "upsert"]),
            st.lists(st.integers(0, 9), max_size=4, unique=True),
        ),
        max_size=6,
    )
)
def test_every_snapshot_shows_the_state_after_its_publish(lake: Lake, steps):
    lake.publish("tests", "begin", [Replace("counts", [], "true")])
    state: list[int] = []
    history = {}
    for kind, numbers in steps:
        data = counts(*numbers)
        if kind == "append":
            change, state = Append("counts", data), sorted(state + numbers)
        elif kind == "replace":
            change = Replace("counts", data, "rows < 5")
            state = sorted([n for n in state if n >= 5] + numbers)
        else:
            change = Upsert("counts", data)
            state = sorted([n for n in state if n not in numbers] + numbers)
        history[lake.publish("tests", kind, [change])] = state
        assert stored(lake) == state
    for snapshot, state in history.items():
        assert stored(lake, snapshot) == state


def test_a_snapshot_shows_tables_and_views_as_they_were(lake: Lake, tmp_path: Path):
    empty = lake.snapshot()
    full = fill(lake)
    lake.publish("tests", "gone", [Replace("groups", [], "true"), Replace("pairs", [], "true")])
    assert len(lake.query("from triples", snapshot=full)) == 1
    assert lake.query("select now() as n", snapshot=full).schema.types == [schemas.TIME]
    assert len(lake.query("from triples", snapshot=empty)) == 0
    assert len(lake.query("from triples")) == 0
    assert lake.copy("from pairs", tmp_path / "pairs.parquet", snapshot=full) == 3
    assert len(lake.query("from pairs")) == 0


def test_a_snapshot_that_is_not_there(lake: Lake):
    with pytest.raises(LakeError, match="999"):
        lake.query("from pairs", snapshot=999)


def test_sums_booleans_and_missing_values_are_plain_arrow(lake: Lake):
    found = lake.query(
        "select sum(i) as s, sum(-i) as m, sum(null::int) as n, sum(i) > 0 as b, "
        "null::boolean as c, 2::hugeint ** 3 as h from range(4) as r(i)"
    )
    assert found.drop(["h"]).to_pylist() == [{"s": 6, "m": -6, "n": None, "b": True, "c": None}]
    assert found.schema.types[:5] == [pa.int64()] * 3 + [pa.bool_()] * 2


def test_a_query_takes_parameters_and_arrow_tables(filled: Lake):
    one = ids.text(content_id("prompt", "north"))
    found = filled.query("select source_key from prompts where prompt_id = ?", [one])
    assert found.to_pylist() == [{"source_key": "north"}]
    wanted = pa.table({"trajectory_id": ids.array([content_id("t", "ada", "north", 0), bytes(16)])})
    missing = "select count(*) as n from wanted anti join trajectories using (trajectory_id)"
    assert filled.query(missing, tables={"wanted": wanted})["n"].to_pylist() == [1]
    with pytest.raises(QueryError):
        filled.query(missing)


def test_a_wrong_query_says_so(lake: Lake):
    with pytest.raises(QueryError, match="pairs"):
        lake.query("from pairz")
    assert stored(lake) == []


def test_a_copy_appears_whole_or_not_at_all(lake: Lake, tmp_path: Path):
    path = tmp_path / "out" / "x.parquet"
    with pytest.raises(QueryError):
        lake.copy("select error('no') from range(3)", path)
    assert list(path.parent.iterdir()) == []
    assert lake.copy("select i from range(3) as r(i)", path) == 3
    assert pq.read_table(path)["i"].to_pylist() == [0, 1, 2]


def test_duplicate_keys_are_named(lake: Lake):
    lake.publish("tests", "twice", [Append("counts", counts(1, 2, 3)), Append("counts", counts(2))])
    (row,) = lake.duplicate_keys("counts").to_pylist()
    assert row == {"source": "x", "stage": "pairs", "what": "x", "label": "x"} | {
        "reason": "2",
        "split": "x",
        "rows": 2,
    }


def test_files_are_sorted_for_the_questions(own_lake: Lake):
    lake = own_lake
    rng = np.random.default_rng(0)
    for _ in range(3):
        raw = [bytes(row) for row in rng.integers(0, 256, (500, 16), dtype=np.uint8)]
        lake.publish(
            "tests", "t", [Append("prompts", rows("prompts", *({"prompt_id": i} for i in raw)))]
        )
    maintain(lake, timedelta(0))
    (file,) = (lake.home / "lake" / "data").rglob("*.parquet")
    found = [bytes(i) for i in ids.storage(pq.read_table(file)["prompt_id"]).to_pylist()]
    assert found == sorted(found)
    assert len(found) == 1500


def test_a_prompt_is_in_one_of_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ddl, "FILE_SIZE", "100KB")
    rng = np.random.default_rng(0)
    raw = [bytes(row) for row in rng.integers(0, 256, (40_000, 16), dtype=np.uint8)]
    made = [{"prompt_id": raw[n % 400], "trajectory_id": i} for n, i in enumerate(raw)]
    with Lake.open(tmp_path) as lake:
        lake.publish("tests", "t", [Append("trajectories", rows("trajectories", *made))])
        maintain(lake, timedelta(0))
    spans = []
    for file in (tmp_path / "lake" / "data").rglob("*.parquet"):
        found = [bytes(i) for i in ids.storage(pq.read_table(file)["prompt_id"]).to_pylist()]
        spans.append((min(found), max(found)))
    spans.sort()
    assert len(spans) > 2
    assert all(last <= first for (_, last), (first, _) in pairwise(spans))


def test_maintenance_keeps_every_snapshot(own_lake: Lake):
    lake = own_lake
    history = {}
    for n in range(8):
        history[lake.publish("tests", "n", [Append("counts", counts(n))])] = list(range(n + 1))
    for n in range(6):
        change = Replace("counts", [], f"rows = {n}")
        history[lake.publish("tests", "n", [change])] = list(range(n + 1, 8))
    orphan = lake.home / "lake" / "data" / "main" / "counts" / "left-by-a-crash.parquet"
    orphan.write_bytes(b"")
    done = maintain(lake, timedelta(0))
    assert done["after"] == 1 < done["before"]
    assert done["removed"] >= 1
    assert not orphan.exists()
    for snapshot, state in history.items():
        assert stored(lake, snapshot) == state
    assert stored(lake) == [6, 7]


def test_maintenance_leaves_young_files_to_their_readers(own_lake: Lake):
    lake = own_lake
    for n in range(3):
        lake.publish("tests", "n", [Append("counts", counts(n))])
    folder = lake.home / "lake" / "data" / "main" / "counts"
    (folder / "being-written.parquet").write_bytes(b"")
    before = set(folder.iterdir())
    assert maintain(lake)["removed"] == 0
    assert before < set(folder.iterdir())
    for path in before:
        os.utime(path, (0, 0))
    assert maintain(lake)["removed"] == 1
    assert not (folder / "being-written.parquet").exists()
    lake._con.execute(
        "update __ducklake_metadata_lake.ducklake_files_scheduled_for_deletion "
        "set schedule_start = now() - interval 49 hour"
    )
    assert maintain(lake)["removed"] == 3
    assert stored(lake) == [0, 1, 2]


@pytest.mark.parametrize("name", ["moved", "it's [a] new place*"])
def test_a_moved_home_still_attaches(filled_home: Path, tmp_path: Path, name: str):
    shutil.copytree(filled_home, tmp_path / "old")
    shutil.move(tmp_path / "old", tmp_path / name)
    with Lake.open(tmp_path / name, read_only=True) as lake:
        assert lake.row_counts()["pairs"] == 3
        assert len(lake.query("from triples")) == 1
    with Lake.open(tmp_path / name) as lake:
        new = lake.publish("tests", "after the move", [Append("counts", counts(1))])
        maintain(lake, timedelta(0))
        assert len(lake.query("from counts")) == 2
        assert len(lake.query("from counts", snapshot=new - 1)) == 1
    assert not (tmp_path / "old").exists()


def test_a_linked_home_is_not_swept_clean(filled_home: Path, tmp_path: Path):
    shutil.copytree(filled_home, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with Lake.open(tmp_path / "link") as lake:
        maintain(lake, timedelta(0))
        assert len(lake.query("from trajectories")) == 12


def test_views_answer_under_any_name(filled_home: Path):
    code = """
import sys, duckdb
from duckdb_extensions import import_extension
con = duckdb.connect()
for name in ("ducklake", "sqlite_scanner"):
    import_extension(name, con=con)
    con.load_extension(name)
home = sys.argv[1]
con.execute(f"attach 'ducklake:sqlite:{home}/lake/catalog.sqlite' as other "
            f"(data_path '{home}/lake/data/', override_data_path true, read_only)")
for view in sys.argv[2:]:
    con.sql(f"from other.{view}").fetchall()
print(con.sql("select count(*) from other.triples").fetchall())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(filled_home), *VIEWS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[(1,)]\n", done.stderr


def test_a_column_that_came_later_is_added(own_lake: Lake):
    lake = own_lake
    fill(lake)
    lake._con.execute("alter table trajectories drop column correct")
    with Lake.open(lake.home) as lake:
        assert lake.query("select distinct correct from trajectories").to_pylist() == [
            {"correct": None}
        ]
        lake.publish("t", "m", [Append("trajectories", rows("trajectories", {"correct": True}))])


def test_a_lake_of_another_version_is_refused_with_every_difference(own_lake: Lake):
    lake = own_lake
    lake._con.execute("alter table counts drop column rows")
    lake._con.execute("alter table duplicates alter column size type bigint")
    with pytest.raises(LakeError, match=r"duplicates\.size is int64.*counts\.rows is not"):
        Lake.open(lake.home)


def test_a_changed_view_is_replaced(own_lake: Lake):
    lake = own_lake
    lake._con.execute("create or replace view triples as select 1 as one")
    with Lake.open(lake.home) as lake:
        assert lake.query("from triples").schema.names == list(VIEWS["triples"].columns)


@pytest.mark.slow
def test_publishing_many_rows_streams(tmp_path: Path):
    """1.2 M pairs within 400 MB of DuckDB memory, from files of 100,000 rows."""
    code = """
import re, sys
from pathlib import Path
from pipelines.lake import Append, Lake
home = Path(sys.argv[1])
with Lake.open(home, memory_limit="400MB") as lake:
    id = "md5({0} || i)::uuid"
    sql = f"select {id.format(1)} as trajectory_a, {id.format(2)} as trajectory_b, " \\
          f"{id.format(3)} as prompt_id, 'same_policy' as label, null::varchar as reason, " \\
          "'same' as relation, true as same_sampling, 0.5::float as similarity, " \\
          "0.5::float as length_ratio, 'train' as split, 'seen' as cell from range({0}, {1}) r(i)"
    files = [home / f"{n}.parquet" for n in range(12)]
    for n, path in enumerate(files):
        lake.copy(sql.format(n * 100_000, (n + 1) * 100_000), path)
    lake.publish("tests", "many", [Append("pairs", files)])
    # not getrusage: its peak includes that of the process which started this one
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)
    print(lake.row_counts()["pairs"], int(peak) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    published, megabytes = map(int, done.stdout.split())
    assert published == 1_200_000
    assert megabytes < 700
