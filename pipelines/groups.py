"""Groups for policy discrimination: one reference, one answer of its policy, and K-1 of others.

Who meets whom is in `blocks`; this room splits answers into cells, keeps whole blocks within caps
and makes the table. Preference groups are in `preferences`, the trainer's file in `groups_file`.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

from pipelines import ids, schemas
from pipelines.beam import LOCAL, add, check_counts, run_pipeline
from pipelines.blocks import (
    Block,
    Draw,
    GroupSettings,
    Rows,
    make_blocks,
    once,
    parts,
    sibling_blocks,
)
from pipelines.chunks import PAIRS_PER_CHUNK, Progress, split_chunks, watching
from pipelines.labels import RELATIONS, Answers, label_pairs, read_answers, uniform

# A draft is a group and what caps go by: its kind, its block, the block's turn on its prompt.
DRAFTS = pa.schema(
    [
        *schemas.GROUPS.schema,
        pa.field("source", pa.string()),
        pa.field("kind", pa.string()),  # groups or siblings
        pa.field("turn", pa.int64()),
        pa.field("block", pa.uint64()),
    ]
)
Key = tuple[str, str, str, str, str]  # source, what, label, reason, split
Pool = dict[int, list[Draw]]  # what each policy can draw


def make_groups(
    answers: Path,
    settings: GroupSettings,
    work: Path,
    *,
    snapshot: int = 0,
    progress: Progress | None = None,
    chunk_pairs: int = PAIRS_PER_CHUNK,
    options: Sequence[str] = LOCAL,
) -> tuple[pa.Table, pa.Table]:
    """Make the groups of all cells from the answers to all prompts.

    Args:
        answers: Parquet file from `labels.input_sql`; signatures are not needed.
        settings: how many, of which kind.
        work: an empty folder for scratch files.
        snapshot: the lake snapshot that `answers` was read from.
        progress: called with (chunks done, chunks, note).
        chunk_pairs: size of chunks; the result does not depend on it.
        options: Beam's options.

    Returns:
        Rows for schemas.GROUPS, and for schemas.COUNTS: those of label `policies` count (prompt,
        policy) cells, those of `groups` and `siblings` draws, each of which becomes one group or
        says why not; their `split` is train, or the evaluation cell.

    Raises:
        BadInputError: the file is not sorted by prompt.
        CountMismatchError: what came in differs from what is out and excluded.
    """
    chunks = split_chunks(answers, work / "chunks", chunk_pairs)
    out = work / "groups"
    out.mkdir(parents=True, exist_ok=True)
    write = partial(_write_chunk, settings=settings, snapshot=snapshot, folder=out)

    def build(pipeline: beam.Pipeline) -> None:
        paths = pipeline | "Chunks" >> beam.Create([str(path) for path in chunks])
        _ = paths | "Groups" >> beam.Map(write)

    with watching(out, "*.done", len(chunks), "groups", progress):
        totals = run_pipeline(build, options)
    counts: Counter[Key] = Counter({tuple(json.loads(key)): n for key, n in totals.items()})
    drafts = [pq.read_table(file) for file in sorted(out.glob("*.parquet"))]
    groups = cap(pa.concat_tables([pa.Table.from_batches([], DRAFTS), *drafts]), settings, counts)
    for (source, kind, *where), rows in _sizes(groups).items():
        counts[source, "out", kind, "", _split_name(*where)] += rows
    return groups.select(schemas.GROUPS.schema.names), counts_table("groups", counts)


def _write_chunk(path: str, settings: GroupSettings, snapshot: int, folder: Path) -> None:
    counts: Counter[Key] = Counter()
    x = read_answers(feather.read_table(path))
    groups = cap(draft(x, settings, snapshot, counts), settings, counts)
    pq.write_table(groups, folder / f"{Path(path).stem}.parquet")
    for key, rows in counts.items():
        add(json.dumps(key), rows)
    (folder / f"{Path(path).stem}.done").touch()


def draft(x: Answers, settings: GroupSettings, snapshot: int, counts: Counter[Key]) -> pa.Table:
    """All groups of some prompts with the columns of DRAFTS, before any cap."""
    rows = Rows(x)
    held = (x.cell == 0) & (uniform(x.words, settings.seed) < settings.seen_eval_share)
    starts = np.flatnonzero(np.diff(x.prompt, prepend=-1)).tolist()
    drafts = [
        found
        for start, end in zip(starts, [*starts[1:], len(x)], strict=True)
        for found in _prompt_drafts(x, rows, range(start, end), held, settings, counts)
    ]
    return _drafts_table(x, drafts, snapshot)


class _Draft(NamedTuple):
    """One block on its way into the table."""

    block: Block
    split: str
    cell: str
    kind: str
    turn: int


def _prompt_drafts(
    x: Answers,
    rows: Rows,
    span: range,
    held: np.ndarray,
    settings: GroupSettings,
    counts: Counter[Key],
) -> Iterator[_Draft]:
    source = x.sources[x.source[span.start]]
    random = Random(f"{settings.seed} {x.prompt_id[span.start].as_py().hex()}")
    seen: set[tuple[Draw, frozenset[int]]] = set()
    for (split, cell), pool in _pools(x, rows, span, held, settings, counts).items():
        kinds = [("groups", make_blocks, pool)]
        if split == "eval":
            declared = {p: draws for p, draws in pool.items() if rows.step[draws[0].reference] >= 0}
            kinds.append(("siblings", sibling_blocks, declared))
        for kind, make, able in kinds:
            blocks = make(rows, able, settings, random)
            kept, repeated = once(blocks, seen)
            random.shuffle(kept)
            yield from (_Draft(block, split, cell, kind, turn) for turn, block in enumerate(kept))
            where = _split_name(split, cell)
            drawn, met = settings.rounds * len(able), sum(map(len, blocks))
            counts[source, "in", kind, "", where] += drawn
            counts[source, "excluded", kind, "no_partner", where] += drawn - met
            counts[source, "excluded", kind, "repeat", where] += sum(map(len, repeated))


def _pools(
    x: Answers,
    rows: Rows,
    span: range,
    held: np.ndarray,
    settings: GroupSettings,
    counts: Counter[Key],
) -> dict[tuple[str, str], Pool]:
    """What the policies can draw on one prompt, by split and cell.

    On the train side an answer that is held back stands in no train group in any role; evaluation
    groups of the cell `seen` are those whose reference is held back.
    """
    own: dict[int, list[int]] = defaultdict(list)
    for row in span:
        own[rows.policy[row]].append(row)
    pools: dict[tuple[str, str], Pool] = defaultdict(dict)
    for policy, answers in own.items():
        draws, reason = parts(rows, answers, settings.require_same_sampling)
        source, cell = x.sources[x.source[span.start]], schemas.CELLS[x.cell[answers[0]]]
        counts[source, "in", "policies", "", ""] += 1
        counts[source, "excluded" if reason else "out", "policies", reason, ""] += 1
        free = [d for d in draws if not held[d.reference] and not held[d.candidate]]
        apart = [d for d in draws if held[d.reference]]
        for split, able in (("train", free), ("eval", apart if cell == "seen" else draws)):
            if able and (split == "eval" or cell == "seen"):
                pools[split, cell][policy] = able
    return pools


def _split_name(split: str, cell: str) -> str:
    """How counts name where a group goes: train, or its evaluation cell."""
    return "train" if split == "train" else cell


def _drafts_table(x: Answers, drafts: list[_Draft], snapshot: int) -> pa.Table:
    """One row per group: block by block, each draw the reference and positive once."""
    raw = x.trajectory_id.to_pylist()
    group_ids, blocks, references, offsets, members, meta = [], [], [], [0], [], []
    for item in drafts:
        made = []
        for draw in item.block:
            others = sorted(d.candidate for d in item.block if d is not draw)
            candidates = [draw.candidate, *others]
            key = group_id("pretrain", raw[draw.reference], [raw[c] for c in candidates])
            made.append(key)
            references.append(draw.reference)
            members += candidates
            offsets.append(len(members))
            meta.append(item)
        group_ids += made
        blocks += [int.from_bytes(min(made)[:8], "big")] * len(made)
    reference, member = np.array(references, np.int64), np.array(members, np.int64)
    size = np.diff(offsets)
    of = np.repeat(reference, size)
    relation = label_pairs(x, of, member, require_same_sampling=False).relation
    first = np.zeros(len(member), bool)
    first[np.array(offsets[:-1], np.int64)] = True
    candidates = pa.StructArray.from_arrays(
        [
            _ids(x.trajectory_id, member),
            pa.array((~first).astype(np.int32)),
            _ids(x.policy_id, member),
            pa.array([RELATIONS[code] for code in relation], pa.string()),
        ],
        fields=list(schemas.CANDIDATES.value_type),
    )
    rows = len(reference)
    columns = {
        "group_id": ids.array(group_ids),
        "prompt_id": _ids(x.prompt_id, reference),
        "reference": _ids(x.trajectory_id, reference),
        "candidates": pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), candidates, type=schemas.CANDIDATES
        ),
        "wrapper": pa.array(["pretrain"] * rows, pa.string()),
        "category": x.category.take(pa.array(reference)),
        "split": pa.array([item.split for item in meta], pa.string()),
        "cell": pa.array([item.cell for item in meta], pa.string()),
        "snapshot": pa.array([snapshot] * rows, pa.int64()),
        "source": pa.array([x.sources[code] for code in x.source[reference]], pa.string()),
        "kind": pa.array([item.kind for item in meta], pa.string()),
        "turn": pa.array([item.turn for item in meta], pa.int64()),
        "block": pa.array(blocks, pa.uint64()),
    }
    return pa.table(columns, schema=DRAFTS)


def _ids(column: pa.Array, rows: np.ndarray) -> pa.Array:
    return pa.ExtensionArray.from_storage(schemas.UUID, column.take(pa.array(rows)))


def group_id(wrapper: str, reference: bytes, candidates: Sequence[bytes]) -> bytes:
    """The id of a group: its wrapper, its reference and its candidates from best to worst."""
    return ids.content_id("group", wrapper, reference, *candidates)


def cap(drafts: pa.Table, settings: GroupSettings, counts: Counter[Key]) -> pa.Table:
    """Keep whole blocks until a split or cell has its number of groups; count what goes.

    Every prompt's first block comes before any prompt's second, so that few groups still come from
    many prompts. The block that reaches the cap is kept whole. Capping the parts and then all of
    them keeps the same groups as capping all.
    """
    kept = np.zeros(len(drafts), bool)
    turn, block = drafts["turn"].to_numpy(), drafts["block"].to_numpy()
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    columns = [drafts[name].to_pylist() for name in ("kind", "split", "cell")]
    for row, place in enumerate(zip(*columns, strict=True)):
        places[place].append(row)
    for (kind, split, _), found in places.items():
        members = np.array(found)
        order = members[np.lexsort((block[members], turn[members]))]
        new = np.ones(len(order), bool)
        new[1:] = block[order[1:]] != block[order[:-1]]
        before = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
        limit = settings.limit(kind, split)
        kept[order] = True if limit is None else before < limit
    gone = drafts.filter(pa.array(~kept))
    for (source, kind, *where), rows in _sizes(gone).items():
        counts[source, "excluded", kind, "cap", _split_name(*where)] += rows
    return drafts.filter(pa.array(kept))


def _sizes(drafts: pa.Table) -> Counter[tuple[str, ...]]:
    """Rows by (source, kind, split, cell)."""
    names = ("source", "kind", "split", "cell")
    return Counter(zip(*(drafts[name].to_pylist() for name in names), strict=True))


def counts_table(stage: str, counts: Counter[Key]) -> pa.Table:
    """Rows for schemas.COUNTS.

    Raises:
        CountMismatchError: for some label, what came in differs from what is out and excluded.
    """
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    rows = []
    for (source, what, label, reason, split), number in sorted(counts.items()):
        if number:
            sums[label][what] += number
            values = (source, stage, what, label, reason, split, number)
            rows.append(dict(zip(schemas.COUNTS.schema.names, values, strict=True)))
    for label, totals in sums.items():
        check_counts(f"{stage} ({label})", totals, "in", ("out", "excluded"))
    return pa.Table.from_pylist(rows, schema=schemas.COUNTS.schema)
