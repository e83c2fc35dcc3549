"""The shared Beam wiring: everything that goes in comes out, is counted, and a loss is an error."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines.beam import (
    CountMismatchError,
    TableCoder,
    beam,
    check_counts,
    count,
    read_parquet,
    run_pipeline,
    write_parquet,
)


def test_rows_are_read_grouped_counted_and_written(tmp_path):
    table = pa.table({"key": [n % 3 for n in range(100)], "value": list(range(100))})
    source = tmp_path / "in.parquet"
    pq.write_table(table, source, row_group_size=17)

    def by_key(rows):
        for key in range(3):
            yield key, rows.filter(pc.equal(rows["key"], key))

    def build(pipeline):
        (
            pipeline
            | read_parquet([source], rows=10)
            | count("in")
            | beam.FlatMap(by_key).with_output_types(tuple[int, pa.Table])
            | beam.GroupByKey()
            | beam.MapTuple(lambda _, tables: pa.concat_tables(tables)).with_output_types(pa.Table)
            | count("out")
            | write_parquet(tmp_path / "out", table.schema)
        )

    counts = run_pipeline(build)
    assert counts == {"in": 100, "out": 100}
    check_counts("test", counts, "in", ["out"])
    assert pq.read_table(tmp_path / "out").sort_by("value").equals(table)


def test_coder_writes_only_the_slice():
    table = pa.table({"value": list(range(100_000))}).slice(5, 10)
    encoded = TableCoder().encode(table)
    assert len(encoded) < 2_000
    assert TableCoder().decode(encoded).equals(table)


def test_lost_rows_are_an_error_that_names_the_sums():
    with pytest.raises(CountMismatchError, match=r"dedup: in 3 rows, but out 1 \+ excluded 1 = 2"):
        check_counts("dedup", {"in": 3, "out": 1, "excluded": 1}, "in", ["out", "excluded"])


def test_importing_beam_says_nothing_and_leaves_logging_alone():
    code = "import logging, pipelines.beam as b; print(b.beam.__name__, logging.root.handlers)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("apache_beam []\n", "")
