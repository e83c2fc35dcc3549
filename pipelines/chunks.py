"""Chunks: the input of pairs and groups cut into Arrow files that hold whole prompts.

A chunk is one Beam element: small enough that all its possible pairs fit in memory, large enough
that Beam costs nothing. No labelling here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

from pipelines import ids
from pipelines.errors import BadInputError

Progress = Callable[[int, int, str], None]

PAIRS_PER_CHUNK = 500_000
ROW_COST = 10  # a row weighs as much as this many pairs: it carries a signature


def split_chunks(file: Path, folder: Path, pairs: int = PAIRS_PER_CHUNK) -> list[Path]:
    """Cut a Parquet file sorted by `prompt_id` into Feather files of about `pairs` possible pairs.

    Raises:
        BadInputError: a prompt's rows are not together in ascending order of prompt_id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, table in enumerate(_whole_prompts(file, pairs)):
        files.append(folder / f"{number:06d}.arrow")
        feather.write_feather(table, files[-1], compression="uncompressed")
    return files


def _whole_prompts(file: Path, pairs: int) -> Iterator[pa.Table]:
    rest: pa.Table | None = None
    with pq.ParquetFile(file) as source:
        for batch in source.iter_batches(batch_size=16384):
            table = pa.Table.from_batches([batch])
            table = table if rest is None else pa.concat_tables([rest, table])
            starts = _starts(table, file)
            done, cost = 0, 0
            for start, end in pairwise([*starts, table.num_rows]):
                size = int(end - start)
                more = size * (size - 1) // 2 + ROW_COST * size
                if cost and cost + more > pairs:
                    yield table.slice(done, start - done)
                    done, cost = start, 0
                cost += more
            rest = table.slice(done)  # the last prompt may go on in the next batch
    if rest is not None and rest.num_rows:
        yield rest


def _starts(table: pa.Table, file: Path) -> np.ndarray:
    """Row numbers where a prompt begins."""
    words = ids.words(table["prompt_id"])
    high, low = words[:, 0], words[:, 1]
    up = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))
    if (~up & (words[1:] != words[:-1]).any(axis=1)).any():
        msg = f"{file}: rows are not sorted by prompt_id; make the file with labels.input_sql"
        raise BadInputError(msg)
    return np.concatenate([[0], np.flatnonzero(up) + 1])


@contextmanager
def meanwhile(look: Callable[[], object]) -> Iterator[None]:
    """Call `look` twice a second, in a thread, while the block runs."""
    over = threading.Event()

    def often() -> None:
        while not over.wait(0.5):
            look()

    thread = threading.Thread(target=often, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def watching(
    folder: Path, pattern: str, total: int, note: str, progress: Progress | None
) -> Iterator[None]:
    """Report the number of files like `pattern` in `folder` while a pipeline writes them there.

    Files are what every Beam runner shows of its advance, and a callback need not be pickled.
    """
    if progress is None:
        yield
        return
    with meanwhile(lambda: progress(sum(1 for _ in folder.glob(pattern)), total, note)):
        yield
    progress(total, total, note)
