"""The lake when something is in the way: other writers, a full disk, kills, wrong rows, Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import locks
from pipelines.attach import connect
from pipelines.errors import LakeError
from pipelines.lake import Append, Lake, Replace
from tests.pipelines.lake_rows import rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("empty")
    Lake.open(home).close()
    return home


@pytest.fixture
def home(empty_home: Path, tmp_path: Path) -> Path:
    shutil.copytree(empty_home, tmp_path / "home")
    return tmp_path / "home"


def counts(*numbers: int) -> pa.Table:
    return rows("counts", *({"reason": str(n), "rows": n} for n in numbers))


def stored(lake: Lake) -> list[int]:
    return lake.query("select rows from counts order by rows")["rows"].to_pylist()


def python(code: str, *args: object, **more) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **more,
    )


@contextmanager
def holding(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A process that has got a lock when it prints, and keeps it until it is killed."""
    holder = python(code + "\nprint('got it', flush=True)\nimport time; time.sleep(60)", *args)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "got it\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


CATALOGUE_LOCK = """
import sqlite3, sys
con = sqlite3.connect(sys.argv[1] + "/lake/catalog.sqlite", isolation_level=None)
con.execute("begin immediate")
"""
PUBLISH_LOCK = """
import sys
from pathlib import Path
from pipelines import locks
lock = locks.exclusive(Path(sys.argv[1], "lake", "publish.lock"), 1)
lock.__enter__()
"""


@pytest.mark.parametrize("lock", [CATALOGUE_LOCK, PUBLISH_LOCK], ids=["foreign", "ours"])
def test_a_lake_locked_by_another_writer(home: Path, lock: str):
    with Lake.open(home, patience=0.5) as lake:
        before = lake.publish("tests", "first", [Append("counts", counts(1))])
        with holding(lock, home) as holder:
            with pytest.raises(LakeError, match=f"locked for writing by process {holder.pid}"):
                lake.publish("tests", "second", [Append("counts", counts(2))])
            assert lake.snapshot() == before
            assert stored(lake) == [1]
        lake.publish("tests", "second", [Append("counts", counts(2))])
        assert stored(lake) == [1, 2]


@pytest.mark.parametrize("lock", [CATALOGUE_LOCK, PUBLISH_LOCK], ids=["foreign", "ours"])
def test_a_publish_waits_for_a_writer_that_ends(home: Path, lock: str):
    with Lake.open(home) as lake, holding(lock, home) as holder:
        threading.Timer(0.5, holder.kill).start()
        lake.publish("tests", "late", [Append("counts", counts(1))])
        assert stored(lake) == [1]


class Overtaken:
    """A connection whose first commit is overtaken by another writer's."""

    def __init__(self, con, other):
        self.con = con
        self.other = other
        self.attempts = 0

    def __getattr__(self, name: str):
        return getattr(self.con, name)

    def execute(self, sql: str, *params):
        if sql == "commit":
            self.attempts += 1
            if self.attempts == 1:
                self.other.execute("insert into counts from counts")
        return self.con.execute(sql, *params)


def test_a_commit_that_is_overtaken_is_made_again(home: Path):
    other = connect(home, read_only=False)
    with Lake.open(home) as lake:
        lake.publish("tests", "first", [Append("counts", counts(1))])
        lake._con = overtaken = Overtaken(lake._con, other)  # type: ignore[assignment]
        lake.publish("tests", "second", [Append("counts", counts(2))])
        assert overtaken.attempts == 2
        assert stored(lake) == [1, 1, 2]
    other.close()


def test_writers_that_meet_in_an_empty_folder_lose_nothing(tmp_path: Path):
    code = """
import sys
from pathlib import Path
from pipelines.lake import Append, Lake
from tests.pipelines.lake_rows import rows
with Lake.open(Path(sys.argv[1])) as lake:
    for n in range(5):
        data = rows("counts", {"reason": f"{sys.argv[2]} {n}", "rows": n})
        lake.publish("writer " + sys.argv[2], f"number {n}", [Append("counts", data)])
"""
    writers = [python(code, tmp_path / "new", writer) for writer in range(2)]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    with Lake.open(tmp_path / "new", read_only=True) as lake:
        assert stored(lake) == [n for n in range(5) for _ in writers]
        authors = "select author, count(*) as n from lake.snapshots() where author like 'writer%'"
        assert lake.query(authors + " group by all")["n"].to_pylist() == [5, 5]


@pytest.mark.parametrize(
    ("limit", "size"), [(400_000, 1_000_000), (150_000, 10)], ids=["data", "catalogue"]
)
def test_a_full_disk_leaves_the_last_snapshot_intact(home: Path, limit: int, size: int):
    """A file-size limit stands in for the full disk: of a data file, or of the catalogue's log."""
    code = """
import random, resource, sys
from pathlib import Path
from pipelines.errors import LakeError
from pipelines.lake import Append, Lake
from tests.pipelines.lake_rows import rows
home, limit, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def data(n):
    problem = "".join(random.choices("0123456789abcdef", k=size))
    return rows("quarantine", {"file": f"{n}", "row": n, "problem": problem})
with Lake.open(home) as lake:
    last = lake.publish("tests", "fits", [Append("quarantine", data(0))])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    rows_then = 1
    try:
        while True:
            last = lake.publish("tests", "too much", [Append("quarantine", data(rows_then))])
            rows_then += 1
    except LakeError as error:
        print(error)
    assert lake.snapshot() == last
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert lake.row_counts()["quarantine"] == rows_then
    assert lake.publish("tests", "again", [Append("quarantine", data(-1))]) == last + 1
    assert lake.row_counts()["quarantine"] == rows_then + 1
"""
    done = python(code, home, limit, size)
    said, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert "cannot publish 'too much': writing under" in said, said
    assert "last snapshot is intact: free space and run again" in said
    with Lake.open(home, read_only=True) as lake:
        (row,) = lake.query("select count(*) as n, min(row) as first from quarantine").to_pylist()
        assert row["n"] >= 2
        assert row["first"] == -1


def test_a_killed_publisher_leaves_the_last_snapshot_intact(home: Path):
    code = """
import sys
from pathlib import Path
from pipelines.lake import Append, Lake, Replace
from tests.pipelines.lake_rows import rows
with Lake.open(Path(sys.argv[1])) as lake:
    number = 0
    while True:
        data = rows("counts", *({"reason": str(n), "rows": number} for n in range(1000)))
        lake.publish("tests", "n", [Replace("counts", data, "true")])
        print(number, flush=True)
        number += 1
"""
    publisher = python(code, home)
    assert publisher.stdout is not None
    for _ in range(3):
        publisher.stdout.readline()
    time.sleep(0.03)
    publisher.kill()
    publisher.communicate()
    with Lake.open(home) as lake:
        assert lake.row_counts()["counts"] == 1000
        assert len(set(stored(lake))) == 1
        lake.publish("tests", "next", [Append("counts", counts(7))])


def test_every_wrong_column_is_named(home: Path, tmp_path: Path):
    table = counts(1)
    wrong = table.drop(["what"]).append_column("extra", pa.array([1]))
    wrong = wrong.set_column(0, "source", pa.array([b"x"]))
    pq.write_table(wrong, tmp_path / "wrong.parquet")
    expected = "column source is binary, must be string; column what .*; column extra is unknown"
    with Lake.open(home) as lake:
        before = lake.snapshot()
        for data, named in ((wrong, "the rows"), ([tmp_path / "wrong.parquet"], "wrong.parquet")):
            changes = [Append("counts", table), Append("counts", data)]
            with pytest.raises(LakeError, match=f"{named} to counts: {expected}"):
                lake.publish("tests", "wrong", changes)
        with pytest.raises(LakeError, match="no table 'count'; it has policies"):
            lake.publish("tests", "wrong", [Append("count", table)])
        with pytest.raises(LakeError, match=r"NOT NULL.*counts\.source"):
            lake.publish("tests", "null", [Append("counts", rows("counts", {"source": None}))])
        with pytest.raises(LakeError, match="no_such_column"):
            lake.publish("tests", "wrong", [Replace("counts", table, "no_such_column = 1")])
        assert lake.snapshot() == before


def test_reading_only(home: Path, tmp_path: Path):
    with (
        Lake.open(home, read_only=True) as lake,
        pytest.raises(LakeError, match="cannot publish 'x'.*read-only"),
    ):
        lake.publish("tests", "x", [Append("counts", counts(1))])
    with pytest.raises(LakeError, match="no lake here.*make demo"):
        Lake.open(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").touch()
    with pytest.raises(LakeError, match="cannot make a lake under .*file"):
        Lake.open(tmp_path / "file")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, in a shell's background job too, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_query_and_the_lake_goes_on(home: Path):
    with Lake.open(home) as lake:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            lake.query("select sum(a.range * b.range % 7) from range(1000000) a, range(1000000) b")
        assert stored(lake) == []


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_publish_and_nothing_of_it_stays(home: Path):
    with Lake.open(home) as lake:
        before = lake.snapshot()
        slow = "rows = (select sum(a.range * b.range % 7) from range(1000000) a, range(1000000) b)"
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        changes = [Append("counts", counts(1)), Replace("counts", counts(2), slow)]
        with pytest.raises(KeyboardInterrupt):
            lake.publish("tests", "slow", changes)
        assert lake.snapshot() == before
        lake.publish("tests", "quick", [Append("counts", counts(3))])
        assert stored(lake) == [3]


def test_nothing_is_left_of_what_was_spilled(home: Path):
    with Lake.open(home, memory_limit="80MB", threads=1) as lake:
        sql = "select i, md5(i::varchar) as m from range(2000000) as r(i) order by m"
        assert lake.copy(sql, home / "sorted.parquet") == 2_000_000
    assert list((home / "staging").glob("*")) == []


def test_holders_without_a_lock(tmp_path: Path):
    (tmp_path / "free").touch()
    assert locks.holders(tmp_path / "free", tmp_path / "absent") == "another process"
