"""Existing trajectories and preferences instead of rollouts: files in, rows of the lake out.

Here: which files, in which order, and that every row is accounted for. Reading them is
`parquet.py` and `jsonl.py`; what rows name is `names.py`; answers are `answers.py`, judgements
between them `preferences.py`. The columns are explained to users in `docs/recorded.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from pipelines import ids, prompts
from pipelines.engines.recorded import names
from pipelines.engines.recorded.answers import Answers, recorded_answers
from pipelines.engines.recorded.columns import COLUMNS, empty
from pipelines.engines.recorded.jsonl import read_jsonl
from pipelines.engines.recorded.ledger import Batch, Ledger
from pipelines.engines.recorded.parquet import metadata_of, read_parquet
from pipelines.engines.recorded.preferences import preferences_table
from pipelines.errors import BadInputError

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """What files hold, as rows of the lake's tables (`schemas`), and the account of every row.

    In `counts`, `label` is the kind of file (or `answers`: those that preferences bring along),
    and in = out + excluded + quarantined for each source and label.
    """

    policies: pa.Table
    prompts: pa.Table
    trajectories: pa.Table
    preferences: pa.Table
    counts: pa.Table
    quarantine: pa.Table


def locate(data: Path) -> dict[str, Path]:
    """The input files by kind (a key of `COLUMNS`).

    Raises:
        BadInputError: nothing there, neither trajectories nor preferences, or one kind twice.
    """
    if data.is_file():
        if data.suffix not in (".parquet", ".jsonl"):
            msg = f"{data}: neither .parquet nor .jsonl"
            raise BadInputError(msg)
        return {"trajectories": data}
    if not data.is_dir():
        msg = f"{data}: no such file or folder"
        raise BadInputError(msg)
    files: dict[str, Path] = {}
    for label in COLUMNS:
        found = [p for p in (data / f"{label}.parquet", data / f"{label}.jsonl") if p.is_file()]
        if len(found) > 1:
            msg = f"{data} holds both {found[0].name} and {found[1].name}; keep one of them"
            raise BadInputError(msg)
        if found:
            files[label] = found[0]
    if not files.keys() - {"prompts"}:
        msg = f"{data} holds no trajectories.parquet or trajectories.jsonl (see docs/recorded.md)"
        raise BadInputError(msg)
    return files


def default_source(data: Path) -> str:
    """The source of rows that name none: the folder's name, or the file's without its ending."""
    data = data.resolve()
    return data.stem if data.is_file() else data.name


def row_counts(data: Path) -> dict[str, int]:
    """Rows of each input file by its kind, bad ones included, without reading what they hold.

    Raises:
        BadInputError: as `locate`, and a file that is not Parquet though named so.
    """
    counts = {}
    for label, path in locate(data).items():
        if path.suffix == ".parquet":
            counts[label] = metadata_of(path).num_rows
        else:
            with path.open("rb") as file:
                counts[label] = sum(bool(line.strip()) for line in file)
    return counts


def fingerprint(data: Path) -> str:
    """Hash of the input files' contents, 32 hex digits.

    Where they lie does not matter, but for what gives a source to rows that name none.

    Raises:
        BadInputError: as `row_counts`.
    """
    files = locate(data)
    parts = [field for label, path in files.items() for field in (label, ids.of_file(path))]
    named = all(_names_source(path) for path in files.values())
    return ids.content_id("recorded", *parts, None if named else default_source(data)).hex()


def _names_source(path: Path) -> bool:
    """Whether a file has the field `source`: a Parquet column, or in the first line of JSONL."""
    if path.suffix == ".parquet":
        return "source" in metadata_of(path).schema.names
    with path.open("rb") as file:
        return b'"source"' in file.readline()


def ingest(data: Path, split: prompts.SplitSettings, progress: Progress | None = None) -> Ingested:
    """Read a folder of recorded trajectories, or one file of them.

    Args:
        data: folder with `trajectories.parquet` or `.jsonl`, and maybe `prompts`, `preferences`
            and `ranked_triples`; or one trajectories file.
        split: which prompt groups and policy groups are held out.
        progress: called with (done, total, note).

    Raises:
        BadInputError: a file that is of no use as a whole. Single bad rows are in `quarantine`.
    """
    now = datetime.now(UTC)
    ledger = Ledger()
    files = locate(data)
    batches = {label: _read(data, files.get(label), label, ledger, progress) for label in COLUMNS}
    batches, prompt_rows = names.prompts_of(batches, split, ledger)
    if not any(batch.table.num_rows for label, batch in batches.items() if label != "prompts"):
        msg = f"{data}: no usable row\n{ledger.problems() or 'its files are empty'}"
        raise BadInputError(msg)
    batch, policies = names.policies_of(batches["trajectories"], ledger)
    batch = names.number_samples(batch, ledger)
    ledger.count_rows("out", batch)
    trajectories = recorded_answers(batch, now, progress)
    judged = [batches["preferences"], batches["ranked_triples"]]
    answers = Answers(trajectories, judged, ledger)
    preferences = preferences_table(judged, prompt_rows, answers, ledger)
    policies = answers.policies() | policies
    ledger.check()
    return Ingested(
        policies=names.policies_table(policies, split),
        prompts=prompt_rows,
        trajectories=pa.concat_tables([trajectories, answers.table(now)]),
        preferences=preferences,
        counts=ledger.counts(),
        quarantine=ledger.quarantine(now),
    )


def _read(
    data: Path, path: Path | None, label: str, ledger: Ledger, progress: Progress | None
) -> Batch:
    if path is None:
        return Batch(label, label, empty(label))
    file = path.name if path == data else f"{data.resolve().name}/{path.name}"
    if progress:
        progress(0, 1, f"reading {file}")
    batch = Batch(label, file, empty(label))
    if path.suffix == ".parquet":
        return read_parquet(path, batch, default_source(data), ledger)
    return read_jsonl(path, batch, default_source(data), ledger, progress)
