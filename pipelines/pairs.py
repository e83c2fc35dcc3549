"""Pairs: every two answers to one prompt are labelled, counted, and kept within a budget.

Two passes over chunks of whole prompts: the first counts what there is, from which `budget` says
how much of it is drawn; the second labels again and writes. Each pass leaves files named by chunk,
so processes take a range of chunks each. The rules themselves are in `labels`, what the kept pairs
add up to in `pairs_balance`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
from pydantic import Field

from pipelines import minhash, schemas
from pipelines.beam import add, beam, check_counts, run_shares
from pipelines.budget import BINS, KINDS, Budget, Rates, Stratum, draw_rates
from pipelines.chunks import PAIRS_PER_CHUNK, Progress, split_chunks, watching
from pipelines.labels import (
    AMBIGUOUS,
    CROSS,
    EXCLUSIONS,
    LABELS,
    REASONS,
    RELATIONS,
    SAME,
    Answers,
    Labelled,
    all_pairs,
    label_pairs,
    read_answers,
    uniform,
)
from pipelines.pairs_balance import merge_sums, occurring, sum_pairs
from pipelines.settings import Settings

REASONS_OUT = (*EXCLUSIONS, "budget")  # why a pair is not in the table
BUDGET = len(EXCLUSIONS)
COUNTS_COLUMNS = schemas.COUNTS.schema.names
UNSEEN_SIDES = EXCLUSIONS.index("mixed_sides")  # up to this one an excluded pair has no cell


class PairSettings(Settings):
    """What may be paired, and how much of it is kept."""

    require_same_sampling: bool = Field(
        default=True, description="of same-policy pairs; recorded data have none to require"
    )
    budget: Budget | None = Field(default=Budget(), description="none keeps every pair")


@dataclass(frozen=True, kw_only=True)
class PairsResult:
    """Parquet files with schemas.PAIRS; rows for schemas.PAIR_SUMS and schemas.COUNTS."""

    files: list[Path]
    sums: pa.Table
    counts: pa.Table
    rows: int


def make_pairs(
    answers: Path,
    settings: PairSettings,
    work: Path,
    *,
    progress: Progress | None = None,
    chunk_pairs: int = PAIRS_PER_CHUNK,
    workers: int = 1,
    options: Sequence[str] = (),
) -> PairsResult:
    """Label all pairs of answers to one prompt and write those that the budget keeps.

    Args:
        answers: Parquet file from `labels.input_sql`, with signatures.
        settings: rules and budget.
        work: an empty folder for chunks and results.
        progress: called with (chunks done, chunks, note); each chunk counts once a pass.
        chunk_pairs: possible pairs per chunk; the result does not depend on it.
        workers: processes side by side; the result does not depend on it.
        options: Beam's, for another runner; its workers must see the same folders.

    Raises:
        BadInputError: the file is not sorted by prompt, or lacks signatures.
        CountMismatchError: pairs in differ from pairs out and excluded.
    """
    chunks = split_chunks(answers, work / "chunks", chunk_pairs)
    elements = [str(path) for path in chunks]
    out, sums = work / "pairs", work / "sums"
    for folder in (out, sums):
        folder.mkdir(parents=True, exist_ok=True)
    passes = 2 if settings.budget else 1
    with watching(work, "*/*.done", passes * len(chunks), "pairs", progress):
        rates = None
        if settings.budget:
            tally_stage = partial(_tally_stage, settings=settings)
            run_shares(tally_stage, elements, workers, options)
            tallies: Counter[Stratum] = Counter()
            for path in chunks:
                for *stratum, rows in json.loads(_tally_file(path).read_text(encoding="utf-8")):
                    tallies[tuple(stratum)] += rows
            rates = draw_rates(tallies, settings.budget)
        write_stage = partial(_write_stage, settings=settings, work=work, rates=rates)
        totals = run_shares(write_stage, elements, workers, options)
    files = sorted(out.glob("*.parquet"))
    rows = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
    counts = _counts_table(totals)
    _check(counts, rows)
    return PairsResult(
        files=files, sums=merge_sums(sorted(sums.glob("*.arrow"))), counts=counts, rows=rows
    )


def _tally_stage(pipeline: beam.Pipeline, chunks: Sequence[str], *, settings: PairSettings) -> None:
    paths = pipeline | "Chunks" >> beam.Create(list(chunks))
    _ = paths | "Tally" >> beam.Map(partial(_tally_chunk, settings=settings))


def _write_stage(
    pipeline: beam.Pipeline,
    chunks: Sequence[str],
    *,
    settings: PairSettings,
    work: Path,
    rates: Rates | None,
) -> None:
    paths = pipeline | "Chunks" >> beam.Create(list(chunks))
    write = partial(_write_chunk, settings=settings, work=work, rates=rates)
    _ = paths | "Write" >> beam.Map(write)


def _tally_file(chunk: Path) -> Path:
    return chunk.with_suffix(".tally")


def _tally_chunk(path: str, settings: PairSettings) -> None:
    x = read_answers(feather.read_table(path))
    found = [(*stratum, rows) for stratum, rows in tally(x, judge(x, settings)).items()]
    _tally_file(Path(path)).write_text(json.dumps(found), encoding="utf-8")
    Path(path).with_suffix(".done").touch()


def _write_chunk(path: str, settings: PairSettings, work: Path, rates: Rates | None) -> None:
    x = read_answers(feather.read_table(path))
    judged = judge(x, settings)
    gone = drop(x, judged, rates, settings)
    kept = np.flatnonzero(gone == 0)
    alike = similarity(x, judged.a[kept], judged.b[kept])
    name = Path(path).stem
    pq.write_table(
        pairs_table(x, judged, kept, alike),
        work / "pairs" / f"{name}.parquet",
        compression="zstd",
        store_schema=False,
    )
    sums = sum_pairs(x, judged, kept, alike)
    feather.write_feather(sums, work / "sums" / f"{name}.arrow", compression="uncompressed")
    for key, rows in count_pairs(x, judged, gone).items():
        add(json.dumps(key), rows)
    (work / "pairs" / f"{name}.done").touch()


@dataclass(frozen=True, kw_only=True)
class Judged:
    """All pairs of a chunk: rows (a, b), their labels, and what the budget goes by."""

    a: np.ndarray
    b: np.ndarray
    labelled: Labelled
    gone: np.ndarray  # position in REASONS_OUT before any draw; 0 may be kept
    kind: np.ndarray  # position in budget.KINDS
    ratio: np.ndarray  # shorter by longer length, 0..1
    place: np.ndarray  # its bin
    draw: np.ndarray  # uniform in [0, 1) by the hash of both ids


def judge(x: Answers, settings: PairSettings) -> Judged:
    """Label all pairs; those beyond `same_per_policy` or `cross_per_policies` leave by hash."""
    a, b = all_pairs(x.prompt)
    labelled = label_pairs(x, a, b, require_same_sampling=settings.require_same_sampling)
    budget = settings.budget
    draw = uniform(np.column_stack([x.words[a, 1], x.words[b, 1]]), budget.seed if budget else 0)
    gone = labelled.exclusion.copy()
    if budget:
        limits = {SAME: budget.same_per_policy, CROSS: budget.cross_per_policies}
        policies = int(x.policy.max(initial=0)) + 1
        for label, limit in limits.items():
            if limit is not None:
                rows = np.flatnonzero((labelled.label == label) & (gone == 0))
                one, other = x.policy[a[rows]], x.policy[b[rows]]
                low, high = np.minimum(one, other), np.maximum(one, other)
                group = (x.prompt[a[rows]] * policies + low) * policies + high
                # By its lower bits: what is left would otherwise have small draws, and be kept.
                lower = np.modf(draw[rows] * 2.0**20)[0]
                gone[rows[_beyond(limit, lower, group)]] = BUDGET
    longer = np.maximum(x.length[a], x.length[b])
    ratio = np.where(longer == 0, 1.0, np.minimum(x.length[a], x.length[b]) / np.maximum(longer, 1))
    return Judged(
        a=a,
        b=b,
        labelled=labelled,
        gone=gone,
        kind=np.where(labelled.label == AMBIGUOUS, 3, np.minimum(labelled.relation, 2)),
        ratio=ratio.astype(np.float32),
        place=np.minimum((ratio * BINS).astype(np.int8), BINS - 1),
        draw=draw,
    )


def _beyond(limit: int, draw: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Mask of the rows that are not among the `limit` smallest draws of their group."""
    _, place = occurring(group, int(group.max(initial=0)) + 1)
    crowded = np.flatnonzero(np.bincount(place)[place] > limit)
    order = crowded[np.lexsort((draw[crowded], place[crowded]))]
    new = np.ones(len(order), bool)
    new[1:] = place[order[1:]] != place[order[:-1]]
    first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    result = np.zeros(len(draw), bool)
    result[order] = np.arange(len(order)) - first >= limit
    return result


def tally(x: Answers, j: Judged) -> dict[Stratum, int]:
    """How many pairs each stratum could give, and from how many prompts."""
    shape = (len(x.sources), len(schemas.CELLS), len(KINDS), BINS)
    open_ = j.gone == 0
    a = j.a[open_]
    key = np.ravel_multi_index((x.source[a], x.cell[a], j.kind[open_], j.place[open_]), shape)
    numbers = np.bincount(key, minlength=np.prod(shape)).reshape(shape)
    labelled = a[j.kind[open_] < KINDS.index("ambiguous")]
    touched = np.zeros((x.prompt.max(initial=-1) + 1, len(schemas.CELLS)), bool)
    touched[x.prompt[labelled], x.cell[labelled]] = True
    prompt, cell = np.nonzero(touched)
    source = x.source[np.searchsorted(x.prompt, prompt)]
    np.add.at(numbers[:, :, KINDS.index("prompts"), 0], (source, cell), 1)
    return {
        (x.sources[of], int(cell), int(kind), int(place)): int(numbers[of, cell, kind, place])
        for of, cell, kind, place in zip(*np.nonzero(numbers), strict=True)
    }


def drop(x: Answers, j: Judged, rates: Rates | None, settings: PairSettings) -> np.ndarray:
    """Position in REASONS_OUT per pair: 0 is kept."""
    gone = j.gone.copy()
    if rates is None or settings.budget is None:
        return gone
    table = np.zeros((len(x.sources), len(schemas.CELLS), len(KINDS), BINS))
    for (source, cell, kind, place), rate in rates.items():
        if source in x.sources:
            table[x.sources.index(source), cell, kind, place] = rate
    rate_of = table[x.source[j.a], x.cell[j.a], j.kind, j.place]
    gone[(gone == 0) & (j.draw >= rate_of)] = BUDGET
    if settings.budget.pairs_per_prompt is not None:
        kept = np.flatnonzero(gone == 0)
        limit = settings.budget.pairs_per_prompt
        draw = j.draw[kept] / rate_of[kept]  # uniform again, so that no stratum goes first
        gone[kept[_beyond(limit, draw, x.prompt[j.a[kept]])]] = BUDGET
    return gone


def pairs_table(x: Answers, j: Judged, kept: np.ndarray, alike: np.ndarray) -> pa.Table:
    """The kept pairs with the columns of schemas.PAIRS, sorted by prompt and ids.

    Words stay dictionaries in memory; in a Parquet file without a stored Arrow schema they are
    strings.
    """
    a, b = j.a[kept], j.b[kept]
    cell = x.cell[a]
    reason = j.labelled.reason[kept]
    columns = {
        "trajectory_a": _ids(x.trajectory_id, a),
        "trajectory_b": _ids(x.trajectory_id, b),
        "prompt_id": _ids(x.prompt_id, a),
        "label": _words(j.labelled.label[kept], LABELS),
        "reason": _words(reason, REASONS, missing=reason == 0),
        "relation": _words(j.labelled.relation[kept], RELATIONS),
        "same_sampling": pa.array(j.labelled.same_sampling[kept]),
        "similarity": pa.array(alike),
        "length_ratio": pa.array(j.ratio[kept]),
        "split": _words(np.minimum(cell, 1), schemas.SPLITS),
        "cell": _words(cell, schemas.CELLS),
    }
    return pa.table(columns)


def _ids(column: pa.Array, rows: np.ndarray) -> pa.Array:
    return pa.ExtensionArray.from_storage(schemas.UUID, column.take(pa.array(rows)))


def _words(codes: np.ndarray, names: Sequence[str], missing: np.ndarray | None = None) -> pa.Array:
    indices = pa.array(codes, mask=missing)
    return pa.DictionaryArray.from_arrays(indices, pa.array(names))


def similarity(x: Answers, a: np.ndarray, b: np.ndarray, block: int = 65536) -> np.ndarray:
    """MinHash estimate of the Jaccard similarity: the share of equal permutations, float32."""
    if x.signature is None:
        msg = "similarity needs signatures: make the input with input_sql(sources, signatures)"
        raise ValueError(msg)
    result = np.empty(len(a), np.float32)
    if (fast := minhash.compiled()) is not None:
        fast.agreement(x.signature, a, b, result)
        return result
    for start in range(0, len(a), block):
        part = slice(start, start + block)
        result[part] = (x.signature[a[part]] == x.signature[b[part]]).mean(axis=1)
    return result


def count_pairs(x: Answers, j: Judged, gone: np.ndarray) -> dict[tuple[str, ...], int]:
    """Pairs by (source, what, label, reason, cell); `in` is counted from prompts, not pairs."""
    totals: dict[tuple[str, ...], int] = {}
    _, first, sizes = np.unique(x.prompt, return_index=True, return_counts=True)
    for code, source in enumerate(x.sources):
        n = sizes[x.source[first] == code]
        totals[source, "in", "", "", ""] = int((n * (n - 1) // 2).sum())
    fields = (x.source[j.a], gone, j.labelled.label, j.labelled.reason, x.cell[j.a])
    shape = (len(x.sources), len(REASONS_OUT), len(LABELS), len(REASONS), len(schemas.CELLS))
    numbers = np.bincount(np.ravel_multi_index(fields, shape), minlength=np.prod(shape))
    for place in np.flatnonzero(numbers):
        of, out, label, why, cell = (int(i) for i in np.unravel_index(place, shape))
        reason = REASONS_OUT[out] or REASONS[why]
        if out == BUDGET and why:
            reason = f"budget:{REASONS[why]}"
        where = "" if 0 < out <= UNSEEN_SIDES else schemas.CELLS[cell]
        key = (x.sources[of], "excluded" if out else "out", LABELS[label], reason, where)
        totals[key] = totals.get(key, 0) + int(numbers[place])
    return totals


def _counts_table(totals: Mapping[str, int]) -> pa.Table:
    rows = []
    for key, number in sorted(totals.items()):
        source, *rest = json.loads(key)
        rows.append(dict(zip(COUNTS_COLUMNS, (source, "pairs", *rest, number), strict=True)))
    return pa.Table.from_pylist(rows, schema=schemas.COUNTS.schema)


def _check(counts: pa.Table, written: int) -> None:
    sums = {
        row["what"]: row["rows_sum"]
        for row in counts.group_by("what").aggregate([("rows", "sum")]).to_pylist()
    }
    check_counts("pairs", sums, "in", ("out", "excluded"))
    check_counts("pairs", {"out": sums.get("out", 0), "written": written}, "out", ("written",))
