"""Groups for policy discrimination: one reference, one answer of its policy, and K-1 of others.

Who meets whom is in `blocks`; this room splits answers into cells, keeps whole blocks within caps
and makes the table. The other group rooms open from here too: preference groups, which are made in
`preference_groups`, and the trainer's file, written in `groups_file`.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

from pipelines import ids, schemas
from pipelines.beam import LOCAL, add, beam, run_pipeline
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
from pipelines.group_rows import CountKey, GroupRows, counts_table, split_name
from pipelines.groups_file import export_groups
from pipelines.labels import RELATIONS, Answers, label_pairs, read_answers, uniform
from pipelines.preference_groups import preference_groups

__all__ = ["GroupSettings", "export_groups", "make_groups", "preference_groups"]

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
    counts: Counter[CountKey] = Counter({tuple(json.loads(key)): n for key, n in totals.items()})
    drafts = [pq.read_table(file) for file in sorted(out.glob("*.parquet"))]
    groups = cap(pa.concat_tables([pa.Table.from_batches([], DRAFTS), *drafts]), settings, counts)
    for (source, kind, *where), rows in _sizes(groups).items():
        counts[source, "out", kind, "", split_name(*where)] += rows
    return groups.select(schemas.GROUPS.schema.names), counts_table(counts)


def _write_chunk(path: str, settings: GroupSettings, snapshot: int, folder: Path) -> None:
    counts: Counter[CountKey] = Counter()
    x = read_answers(feather.read_table(path))
    groups = cap(draft(x, settings, snapshot, counts), settings, counts)
    pq.write_table(groups, folder / f"{Path(path).stem}.parquet")
    for key, rows in counts.items():
        add(json.dumps(key), rows)
    (folder / f"{Path(path).stem}.done").touch()


def draft(
    x: Answers, settings: GroupSettings, snapshot: int, counts: Counter[CountKey]
) -> pa.Table:
    """All groups of some prompts with the columns of DRAFTS, before any cap."""
    rows = Rows(x)
    held = (x.cell == 0) & (uniform(x.words, settings.seed) < settings.seen_eval_share)
    starts = np.flatnonzero(np.diff(x.prompt, prepend=-1)).tolist()
    drafts = [
        found
        for start, end in pairwise([*starts, len(x)])
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
    counts: Counter[CountKey],
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
            where = split_name(split, cell)
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
    counts: Counter[CountKey],
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


def _drafts_table(x: Answers, drafts: list[_Draft], snapshot: int) -> pa.Table:
    """One row per group: block by block, each draw the reference and positive once."""
    references: list[int] = []
    members: list[int] = []
    sizes: list[int] = []
    of: list[int] = []
    for number, item in enumerate(drafts):
        for draw in item.block:
            others = sorted(other.candidate for other in item.block if other is not draw)
            references.append(draw.reference)
            members += [draw.candidate, *others]
            sizes.append(len(item.block))
            of.append(number)
    reference, member = pa.array(references, pa.int64()), pa.array(members, pa.int64())
    size = np.array(sizes, np.int64)
    against = np.repeat(reference.to_numpy(), size)
    relation = label_pairs(x, against, member.to_numpy(), require_same_sampling=False).relation
    first = np.zeros(len(member), bool)
    first[np.cumsum(size) - size] = True
    items = [drafts[number] for number in of]
    table = GroupRows(
        prompt_id=x.prompt_id.take(reference),
        reference=x.trajectory_id.take(reference),
        size=size,
        candidate=x.trajectory_id.take(member),
        rank=(~first).astype(np.int32),
        policy_id=x.policy_id.take(member),
        relation=[RELATIONS[code] for code in relation],
        category=x.category.take(reference),
        split=[item.split for item in items],
        cell=[item.cell for item in items],
    ).table("pretrain", snapshot)
    source = [x.sources[code] for code in x.source[reference.to_numpy()]]
    extra = [
        pa.array(source, pa.string()),
        pa.array([item.kind for item in items], pa.string()),
        pa.array([item.turn for item in items], pa.int64()),
        _block_numbers(table, np.array(of, np.int64)),
    ]
    return pa.Table.from_arrays([*table.columns, *extra], schema=DRAFTS)


def _block_numbers(table: pa.Table, of: np.ndarray) -> pa.Array:
    """A hash for each block, the smallest of its groups' ids, beside each of its groups."""
    first = np.full(of.max(initial=-1) + 1, 2**64 - 1, np.uint64)
    words = ids.words(table["group_id"])[:, 0]
    np.minimum.at(first, of, words)
    return pa.array(first[of], pa.uint64())


def cap(drafts: pa.Table, settings: GroupSettings, counts: Counter[CountKey]) -> pa.Table:
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
        counts[source, "excluded", kind, "cap", split_name(*where)] += rows
    return drafts.filter(pa.array(kept))


def _sizes(drafts: pa.Table) -> Counter[tuple[str, ...]]:
    """Rows by (source, kind, split, cell)."""
    names = ("source", "kind", "split", "cell")
    return Counter(zip(*(drafts[name].to_pylist() for name in names), strict=True))
