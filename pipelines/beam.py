"""Beam wiring that dedup and pairs share: how a pipeline is run, read, counted and written.

Elements are Arrow tables of thousands of rows, never single documents: a GroupByKey costs
microseconds per element. No algorithm lives here; the stages wire plain functions of their own.

Only FnApiRunner in one process is used locally: DirectRunner looks for a runner to download, and
`multi_threading` loses elements without an error. Another runner is a matter of `options`. Stages
take `beam` itself from here, for importing it is noisy.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import PolarError

# Importing Beam warns on the root logger, and so installs a handler there.
_disabled, _handlers = logging.root.manager.disable, list(logging.root.handlers)
logging.disable(logging.WARNING)
import apache_beam as beam  # noqa: E402
from apache_beam.io.parquetio import WriteToParquetBatched  # noqa: E402
from apache_beam.metrics import Metrics  # noqa: E402
from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402

logging.disable(_disabled)
logging.root.handlers[:] = _handlers

LOCAL = ("--runner=FnApiRunner", "--direct_running_mode=in_memory")
NAMESPACE = "polar"


class CountMismatchError(PolarError):
    """Rows were lost or made twice between two stages; nothing of the run may be published."""


class TableCoder(beam.coders.Coder):
    """Tables between stages as Arrow IPC: pickle would write all that a slice was cut from.

    It is chosen by type, so a function before a GroupByKey is annotated or given
    `with_output_types(tuple[int, pa.Table])`.
    """

    def encode(self, value: pa.Table) -> bytes:  # noqa: D102
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write_table(value)
        return sink.getvalue().to_pybytes()

    def decode(self, encoded: bytes) -> pa.Table:  # noqa: D102
        return pa.ipc.open_stream(encoded).read_all()

    def is_deterministic(self) -> bool:  # noqa: D102
        return True


beam.coders.registry.register_coder(pa.Table, TableCoder)


def run_pipeline(
    build: Callable[[beam.Pipeline], object], options: Sequence[str] = LOCAL
) -> dict[str, int]:
    """Build and run a pipeline to its end.

    Args:
        build: applies the transforms to the pipeline it is given.
        options: Beam's command-line options, the runner among them.

    Returns:
        The counters that `count` and `add` filled, by name.

    Raises:
        PolarError: the runner ended in another state than DONE.
    """
    pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
    build(pipeline)
    result = pipeline.run()
    state = result.wait_until_finish()
    if state != "DONE":
        msg = f"the Beam pipeline ended as {state}, not DONE; its log names the failed step"
        raise PolarError(msg)
    counters = result.metrics().query()["counters"]
    totals: dict[str, int] = {}
    for counter in counters:
        if counter.key.metric.namespace == NAMESPACE:
            name = counter.key.metric.name
            totals[name] = totals.get(name, 0) + counter.result
    return totals


def run_shares(
    stage: Callable[[beam.Pipeline, Sequence[Any]], object],
    elements: Sequence[Any],
    workers: int = 1,
    options: Sequence[str] = (),
) -> dict[str, int]:
    """Run a stage as one pipeline a process, each over a share of the elements.

    Beam's own multi-process modes gain nothing on two cores, and its threads lose elements; this
    is how both cores are used. What a share makes must be files, named by element. The processes
    are forked from a server that imports `pipelines.ready` once.

    Args:
        stage: applies its transforms to a pipeline, for some of the elements; must be picklable.
        elements: in order; each process gets a range of them.
        workers: processes; with one, everything runs in this process.
        options: Beam's options; none are `LOCAL`.

    Returns:
        Counters by name, summed over the processes.

    Raises:
        PolarError: a process failed; its own message is in its log.
    """
    options = options or LOCAL
    size = -(-len(elements) // max(workers, 1)) or 1
    shares = [elements[at : at + size] for at in range(0, len(elements), size)]
    if len(shares) < 2:
        return run_pipeline(lambda pipeline: stage(pipeline, elements), options)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.ready"])
    running = []
    for share in shares:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_share,
            args=(dict(os.environ), stage, share, tuple(options), theirs),
            daemon=True,
        )
        process.start()
        theirs.close()
        running.append((process, ours))
    totals: dict[str, int] = {}
    failed: list[Exception] = []
    for process, ours in running:
        try:
            result = ours.recv()
        except EOFError:
            process.join()
            result = PolarError(
                f"a worker process ended with exit code {process.exitcode} before its share was "
                "done; if that is -9 it was killed, most often for want of memory: use fewer"
            )
        process.join()
        if isinstance(result, Exception):
            failed.append(result)
            continue
        for name, rows in result.items():
            totals[name] = totals.get(name, 0) + rows
    if failed:
        raise failed[0]
    return totals


def _run_share(
    environment: Mapping[str, str],
    stage: Callable[[beam.Pipeline, Sequence[Any]], object],
    share: Sequence[Any],
    options: Sequence[str],
    answer: Connection,
) -> None:
    """One process of `run_shares`: sends its counters, or the exception that ended it."""
    os.environ.update(environment)  # the server's is that of the first time
    try:
        result: Any = run_pipeline(lambda pipeline: stage(pipeline, share), options)
    except Exception as error:
        result = error if isinstance(error, PolarError) else PolarError(f"{error!r}")
    answer.send(result)
    answer.close()


def add(name: str, rows: int) -> None:
    """Add to a counter from inside a transform."""
    Metrics.counter(NAMESPACE, name).inc(rows)


def count(name: str) -> beam.PTransform:
    """A step that passes tables on unchanged and counts their rows under `name`."""

    def tally(table: pa.Table) -> pa.Table:
        add(name, table.num_rows)
        return table

    return f"Count {name}" >> beam.Map(tally).with_output_types(pa.Table)


def check_counts(stage: str, counts: Mapping[str, int], came: str, went: Iterable[str]) -> None:
    """Hold the books of a stage: what came in is all that went anywhere.

    Raises:
        CountMismatchError: the sums differ.
    """
    went = list(went)
    total = sum(counts.get(name, 0) for name in went)
    if counts.get(came, 0) != total:
        parts = " + ".join(f"{name} {counts.get(name, 0)}" for name in went)
        msg = (
            f"{stage}: {came} {counts.get(came, 0)} rows, but {parts} = {total}; "
            "rows were lost or doubled, so the run is void: start it again"
        )
        raise CountMismatchError(msg)


def read_parquet(
    files: Sequence[Path], columns: Sequence[str] | None = None, rows: int = 8192
) -> beam.PTransform:
    """Tables of at most `rows` rows, read row group by row group inside the workers."""
    names = None if columns is None else list(columns)
    pieces = [
        (str(file), group)
        for file in files
        for group in range(pq.ParquetFile(file).metadata.num_row_groups)
    ]

    def read(piece: tuple[str, int]) -> Iterator[pa.Table]:
        path, group = piece
        with pq.ParquetFile(path) as source:
            for batch in source.iter_batches(rows, row_groups=[group], columns=names):
                yield pa.Table.from_batches([batch])

    @beam.ptransform_fn
    def expand(begin: beam.Pipeline) -> beam.PCollection:
        return (
            begin
            | "Row groups" >> beam.Create(pieces)
            | "Read" >> beam.FlatMap(read).with_output_types(pa.Table)
        )

    return "Read Parquet" >> expand()


def write_parquet(folder: Path, schema: pa.Schema, shards: int = 1) -> beam.PTransform:
    """Write tables to `folder/part-*.parquet`; the order of rows is not defined."""
    return "Write Parquet" >> WriteToParquetBatched(
        str(folder / "part"),
        schema,
        codec="zstd",
        num_shards=shards,
        file_name_suffix=".parquet",
    )
