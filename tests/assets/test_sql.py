"""`polar sql`: formats, refusals, the prompt, and asking while another process writes."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from assets import sql
from assets.sql import prompt, run_query
from assets.sql_rows import SHOWN_ROWS
from pipelines.errors import LakeError, QueryError
from pipelines.lake import Append, Lake, Replace
from tests.pipelines.lake_rows import fill, rows, trajectory

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("it's a home")
    with Lake.open(home) as lake:
        fill(lake)
        wild = trajectory("ada", "north", 9, "two\nlines, \x1b[31m[red]\x07 “é”") | {
            "flags": ["loop"]
        }
        lake.publish("tests", "wild text", [Append("trajectories", rows("trajectories", wild))])
        lake.publish("tests", "empty", [Replace("quarantine", [], "true")])
    return home


@pytest.fixture(scope="module")
def sandbox(home: Path):
    with sql._sandbox(home, None) as con:
        yield con


def answer(home: Path, query: str, format: str = "table", **more) -> str:
    stream = io.StringIO()
    run_query(home, query, format, stream=stream, **more)
    return stream.getvalue()


def test_a_table(home: Path):
    shown = answer(home, "select name, split, lineage_step from policies order by name")
    lines = [line.strip("│┃\n ") for line in shown.splitlines()]
    assert [" ".join(line.replace("┃", "").split()) for line in lines][
        1
    ] == "name split lineage_step"
    assert [line.replace("│", "").split() for line in lines[3:6]] == [
        ["ada", "train", "1"],
        ["bob", "train", "2"],
        ["eve", "test", "1"],
    ]


def test_a_table_shows_wild_text_tamely(home: Path):
    shown = answer(home, "select text, flags from trajectories where sample_index = 9")
    assert "two\\nlines, \\x1b[31m[red]\\x07 “é”" in shown
    assert "\x1b" not in shown
    assert '["loop"]' in shown


def test_a_long_table_says_that_it_is_cut(home: Path):
    shown = answer(home, f"from range({SHOWN_ROWS + 1})")
    assert f"the first {SHOWN_ROWS} rows" in shown
    assert len(shown.splitlines()) == SHOWN_ROWS + 5
    assert "the first" not in answer(home, f"from range({SHOWN_ROWS})")


def test_csv(home: Path):
    query = "select name, parent, lineage_step, null as n, true as t, 0.1::float as f from policies"
    found = list(csv.DictReader(io.StringIO(answer(home, f"{query} order by name", "csv"))))
    assert found[0] == {"name": "ada", "parent": "", "lineage_step": "1", "n": "", "t": "true"} | {
        "f": found[0]["f"]
    }
    assert float(found[0]["f"]) == pytest.approx(0.1)
    wild = "select text, flags from trajectories where sample_index = 9"
    ((text, flags),) = list(csv.reader(io.StringIO(answer(home, wild, "csv"), newline="")))[1:]
    assert text == "two\nlines, \x1b[31m[red]\x07 “é”"
    assert json.loads(flags) == ["loop"]


def test_json(home: Path):
    found = json.loads(answer(home, "from groups", "json"))
    assert len(found) == 1
    assert [c["rank"] for c in found[0]["candidates"]] == [0, 1]
    assert len(found[0]["candidates"][0]["trajectory_id"]) == 36
    query = (
        "select 'nan'::double as x, 1 as x, [1.5, 'inf'::double] as y, created_at from checkpoints"
    )
    assert json.loads(answer(home, query, "json")) == [
        {"x": None, "x_1": 1, "y": [1.5, None], "created_at": "2026-01-02T00:00:00+00:00"}
    ]
    assert json.loads(answer(home, "from quarantine", "json")) == []


@pytest.mark.parametrize("table", ["groups", "quarantine", "trajectories"])
def test_parquet(home: Path, tmp_path: Path, table: str):
    path = tmp_path / "out.parquet"
    run_query(home, f"from {table}", "parquet", output=path)
    with Lake.open(home, read_only=True) as lake:
        expected = lake.query(f"from {table}")
    assert pq.read_table(path).equals(expected)


def test_parquet_to_standard_output_and_not_to_a_terminal(home: Path):
    stream = io.TextIOWrapper(io.BytesIO())
    run_query(home, "select 1 as a, 2 as a", "parquet", stream=stream)
    assert pq.read_table(pa.BufferReader(stream.buffer.getvalue())).to_pydict() == {
        "a": [1],
        "a_1": [2],
    }

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with pytest.raises(QueryError, match="--output"):
        run_query(home, "select 1", "parquet", stream=Terminal())


def test_an_output_that_cannot_be_written_is_said_so(home: Path, tmp_path: Path):
    with pytest.raises(QueryError, match="is a folder; give the name of a file"):
        run_query(home, "select 1", "csv", output=tmp_path)
    with pytest.raises(QueryError, match="x.csv: cannot be written: No such file or directory"):
        run_query(home, "select 1", "csv", output=tmp_path / "none" / "x.csv")


def test_an_output_file_appears_whole_or_not_at_all(home: Path, tmp_path: Path):
    with pytest.raises(QueryError, match="no"):
        run_query(home, "select error('no') from range(9)", "csv", output=tmp_path / "x.csv")
    assert list(tmp_path.iterdir()) == []
    run_query(home, "select 'é' as e", "csv", output=tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text(encoding="utf-8") == "e\né\n"


def test_a_snapshot(home: Path):
    with Lake.open(home, read_only=True) as lake:
        newest = lake.snapshot()
    count = "select count(*) as n from {}quarantine"
    assert answer(home, count.format(""), "csv") == "n\n0\n"
    for name in ("", "lake."):
        assert answer(home, count.format(name), "csv", snapshot=newest - 1) == "n\n1\n"
    with pytest.raises(LakeError, match="has no snapshot 999"):
        answer(home, "select 1", snapshot=999)


def test_several_queries_are_several_tables(home: Path):
    assert answer(home, "select 1 as one; select 2 as two;").count("┏") == 2
    with pytest.raises(QueryError, match="rows of one query, 2 were given"):
        answer(home, "select 1; select 2", "csv")


@pytest.mark.parametrize(
    "query",
    [
        "from pool_overview",
        "with a as (select 1 as x) select * from a",
        "values (1)",
        "show tables",
        "describe pairs",
        "summarize policies",
        "pragma table_info('pairs')",
        "explain select * from pairs",
        "explain analyze select count(*) from pairs",
        "explain /* é */ (analyze, format json) select 1",
        "explain (select 1)",
        "from lake.snapshots()",
        "select 'copy(' as query, 'ducklake_expire_snapshots(' as set_option",
        "select count(*) from pairs at (version => 1)",
    ],
)
def test_what_reads_is_answered(home: Path, sandbox, query: str):
    stream = io.StringIO()
    sql._answer(sandbox, sql._readable(sandbox, query), "table", home, stream)
    assert stream.getvalue()


@pytest.mark.parametrize(
    "query",
    [
        "insert into pairs from pairs",
        "delete from pairs",
        "update pairs set label = 'x'",
        "truncate pairs",
        "drop table pairs",
        "alter table pairs add column x int",
        "create table x as select 1",
        "create temp table x as select 1",
        "comment on table pairs is 'x'",
        "copy pairs to 'HOME/lake/x.csv'",
        "copy (select 1) to 'x.csv'",
        "explain analyze copy pairs to 'HOME/lake/x.csv'",
        "explain (analyze) copy pairs to 'HOME/lake/x.csv'",
        "explain analyze insert into pairs from pairs",
        "select 1; copy pairs to 'HOME/lake/x.csv'",
        "export database 'HOME/lake/x'",
        "attach 'HOME/lake/x.db' as x",
        "detach lake",
        "install httpfs",
        "load httpfs",
        "set threads = 4",
        "pragma threads = 4",
        "reset lock_configuration",
        "use memory",
        "begin",
        "checkpoint",
        "vacuum",
        "prepare x as select 1",
        "call lake.set_commit_message('a', 'b')",
        "call ducklake_merge_adjacent_files('lake')",
        "from ducklake_merge_adjacent_files('lake')",
        "from \"ducklake_merge_adjacent_files\" /* x */ ('lake')",
        "summarize from DuckLake_Rewrite_Data_Files('lake')",
        "explain analyze from ducklake_cleanup_old_files('lake', cleanup_all => true)",
        "from ducklake_delete_orphaned_files('lake', cleanup_all => true)",
        "from ducklake_expire_snapshots('lake', versions => [1])",
        "from lake.set_option('parquet_compression', 'gzip')",
        "from query('from ducklake_merge_adjacent_files(''lake'')')",
        "from sqlite_query('__ducklake_metadata_lake', 'select 1')",
    ],
)
def test_what_writes_is_refused(home: Path, sandbox, query: str):
    with pytest.raises(QueryError, match="^refused: .*only reads"):
        sql._readable(sandbox, query.replace("HOME", str(home).replace("'", "''")))


@pytest.mark.parametrize(
    "query",
    [
        "insert into pairs from pairs",
        "explain analyze copy pairs to 'x.csv'",
        "select 1; copy pairs to 'x.csv'",
        "from ducklake_merge_adjacent_files('lake')",
    ],
)
def test_nothing_of_a_refused_query_runs(home: Path, query: str):
    def files() -> dict[str, int]:
        found = [path for path in home.rglob("*") if path.is_file() and "sqlite-" not in path.name]
        return {str(path): path.stat().st_size for path in found}

    before = files()
    inside = query.replace("x.csv", str(home / "lake" / "x.csv").replace("'", "''"))
    with pytest.raises(QueryError, match="^refused: .*only reads"):
        answer(home, inside)
    assert files() == before


@pytest.mark.parametrize(
    "query",
    [
        "insert into pairs from pairs",
        "attach 'x.db' as x",
        "load httpfs",
        "set threads = 4",
        "set enable_external_access = true",
        "copy pairs to 'x.csv'",
    ],
)
def test_the_sandbox_holds_without_the_check(sandbox, tmp_path: Path, query: str):
    with pytest.raises(duckdb.Error, match=r"read-only|Cannot access|locked|disabled"):
        sandbox.execute(query.replace("'x.", f"'{tmp_path}/x."))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("selct 1", "syntax error"),
        ("from pairz", 'Did you mean "pairs"'),
        ("select labl from pairs", "label"),
        ("", "no query"),
        (" ; -- nothing", "no query"),
        ("from read_text('/etc/hostname')", "Cannot access file"),
        ("from read_csv('https://example.org/x.csv')", "Cannot access file"),
    ],
)
def test_what_is_wrong_is_said(home: Path, sandbox, query: str, said: str):
    with pytest.raises(QueryError, match=said):
        sql._answer(sandbox, sql._readable(sandbox, query), "csv", home, io.StringIO())


def test_no_lake_and_no_such_format(home: Path, tmp_path: Path):
    with pytest.raises(LakeError, match="no lake here"):
        answer(tmp_path, "select 1")
    with pytest.raises(QueryError, match="there are table, csv, json, parquet"):
        answer(home, "select 1", "xml")


def test_head_may_stop_reading(home: Path):
    code = (
        "import sys; from pathlib import Path; from assets.sql import run_query; "
        "run_query(Path(sys.argv[1]), 'from range(1000000)', 'csv')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as asked:
        assert asked.stdout is not None
        assert asked.stderr is not None
        assert asked.stdout.readline() == b"range\n"
        asked.stdout.close()
        errors = asked.stderr.read()
    assert (asked.returncode, errors) == (0, b"")


def test_asking_works_while_another_process_writes(tmp_path: Path):
    code = """
import sys
from pathlib import Path
from pipelines.lake import Append, Lake, Replace
from tests.pipelines.lake_rows import rows
with Lake.open(Path(sys.argv[1])) as lake:
    number = 0
    while True:
        data = rows("counts", *({"reason": str(n), "rows": number} for n in range(2000)))
        lake.publish("tests", "n", [Replace("counts", data, "true")])
        print(number, flush=True)
        number += 1
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as writer:
        try:
            assert writer.stdout is not None
            writer.stdout.readline()
            seen = []
            query = "select count(*), count(distinct rows), max(rows) from counts"
            for _ in range(5):
                count, distinct, number = json.loads(
                    "[" + answer(tmp_path, query, "csv").splitlines()[1] + "]"
                )
                assert (count, distinct) == (2000, 1)
                seen.append(number)
            assert seen == sorted(seen)
            assert seen[-1] > seen[0]
        finally:
            writer.kill()


def typed(home: Path, keys: str) -> str:
    stream = io.StringIO()
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        prompt(home, stream=stream, keys=pipe, screen=DummyOutput())
    return stream.getvalue()


CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


def test_the_prompt_answers_until_ctrl_d(home: Path):
    said = typed(
        home, f"select 7 as\rseven;\rfrom pairz;\rdelete from pairs;\rselect 8 as b;\r{CTRL_D}"
    )
    assert "tables: policies, prompts" in said
    assert "seven" in said
    assert "Did you mean" in said
    assert "refused: DELETE" in said
    assert said.rstrip().endswith("┘")


def test_the_prompt_remembers(home: Path):
    typed(home, f"select 41 + 1 as recalled;\r{CTRL_D}")
    assert "select 41 + 1 as recalled;" in (home / "sql_history").read_text()
    assert "recalled" in typed(home, f"{UP}\r{CTRL_D}")


def test_the_prompt_goes_on_after_ctrl_c_and_blank_lines_and_leaves_on_exit(home: Path):
    said = typed(home, f"\rselect 5{CTRL_C}select 6 as six;\rexit\r")
    assert "interrupted" in said
    assert "six" in said


def test_without_a_terminal_standard_input_is_the_query(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "query.sql").write_text("select 3 as three;")
    with (tmp_path / "query.sql").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        stream = io.StringIO()
        prompt(home, stream=stream)
    assert "three" in stream.getvalue()


def test_a_narrow_terminal_gets_one_column_a_line(home: Path, monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setitem(os.environ, "COLUMNS", "60")
    monkeypatch.setitem(os.environ, "TERM", "dumb")
    stream = Terminal()
    run_query(home, "from policies order by name", stream=stream)
    said = stream.getvalue()
    assert "row 1" in said
    assert "policy_group  first" in said
    assert "┃" not in said
