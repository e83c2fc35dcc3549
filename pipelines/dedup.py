"""Answers that repeat others: exact by hash, near by MinHash-LSH, joined into clusters.

The way of a text: signature and shingles go to files (`sketches.py`); identical texts are
collapsed; the distinct ones are looked through for near pairs (`near.py`); connected texts are a
cluster, named by its smallest trajectory id. Nothing is removed: what a repeat means for a label
is said in `pairs.py`. What a run knows can be kept, so that the next one looks at new answers
alone (`dedup_index.py`).

Two scopes: `prompt` joins the answers to one prompt, through texts of that prompt only; `corpus`
joins all answers. Answers that show nothing are `empty` and join no cluster.

Everything is decided by ids and texts, so input order, batch size and number of processes change
nothing. The driver holds some hundred bytes an answer; texts are read batch by batch, once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import ids, schemas
from pipelines.dedup_index import Index, find_more, match_texts
from pipelines.errors import BadInputError
from pipelines.near import DedupSettings, Entries, near_pairs
from pipelines.sketches import Piece, join_signatures, pieces, read_rows, sketch

if TYPE_CHECKING:
    from pipelines.beam import beam

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class DedupResult:
    """What a run leaves.

    Attributes:
        duplicates: schema `schemas.DUPLICATES`; every member of every cluster of two or more.
        counts: schema `schemas.COUNTS`, stage `dedup`, by source, for the scope `prompt`:
            `in` = `out` + `excluded`. `out` are answers unlike any smaller one of their prompt
            (each cluster counted once), `excluded` the others by reason: `empty`, `exact` (the
            text of a smaller one), `near` (like a smaller one). Counted, not removed.
        signatures: Parquet (trajectory_id, signature), in the order of the input: a file, or with
            an index the index's folder with a file of each run, those that it held first.
    """

    duplicates: pa.Table
    counts: pa.Table
    signatures: Path


@dataclass(frozen=True, kw_only=True)
class Documents:
    """One entry an answer, in the order of trajectory ids: an entry's index is its rank.

    Attributes:
        trajectory_id: raw ids, (n,).
        source: dictionary array (n,).
        prompt: number of the prompt, int64 (n,).
        text: smallest rank with this text, int64 (n,); -1 for an empty one.
        in_prompt: smallest rank with this text and prompt, int64 (n,); -1 for an empty one.
        rank_of_text: smallest rank by number of the text, int64 (texts,).
    """

    trajectory_id: pa.Array
    source: pa.Array
    prompt: np.ndarray
    text: np.ndarray
    in_prompt: np.ndarray
    rank_of_text: np.ndarray


def dedup(
    files: Sequence[Path],
    settings: DedupSettings,
    work: Path,
    progress: Progress | None = None,
    *,
    index: Path | None = None,
    workers: int = 1,
    options: Sequence[str] = (),
) -> DedupResult:
    """Find exact and near duplicates among the answers in Parquet files.

    Args:
        files: Parquet with trajectory_id and prompt_id (uuid), source and text (strings); and
            content_hash (uuid) where there is one, or one is made.
        settings: signatures, threshold and bands.
        work: folder for scratch files while it runs and, without an index, for
            `signatures.parquet`.
        progress: called as progress(answers done, answers in all, note).
        index: folder to keep what is known in. The answers it holds are part of the result, and
            must not be in `files` again; what comes out is as if all had been given at once.
        workers: processes side by side.
        options: Beam's, for another runner; its workers must see the same folders.

    Raises:
        BadInputError: a trajectory id comes twice, or a column is missing or has nulls, or the
            index was made with other settings.
        CountMismatchError: rows were lost on the way; nothing of the run may be used.
    """
    from pipelines.beam import check_counts

    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dedup-", dir=work) as name:
        scratch = Path(name)
        known = Index.open(index or scratch / "index", settings)
        tasks = pieces(files, known.parts_folder, first=len(known.parts))
        total = sum(pq.read_metadata(file).num_rows for file in files)
        sketch_parts(tasks, settings, workers, total, progress, options)
        parts = [*known.parts, *(Path(task.part) for task in tasks)]
        rows = read_rows(parts)
        new = np.arange(len(rows)) >= known.rows
        check_counts(
            "dedup",
            {"read": total, "sketched": int(new.sum())},
            "read",
            ["sketched"],
        )
        texts = match_texts(known, rows)
        documents = _documents(rows, texts)
        entries = _entries(rows, texts, new)
        if known.rows:
            edges = find_more(known, parts, rows, texts, entries, settings)
        else:
            runs = known.runs_folder if index is not None else None
            edges = near_pairs(
                parts, entries, settings, scratch, runs=runs, workers=workers, options=options
            )
        if index is None:
            signatures = work / "signatures.parquet"
            join_signatures(parts, settings, signatures)
        else:
            signatures = known.signatures_folder
            signatures.mkdir(exist_ok=True)  # only now: `duplicates` is stale while it is missing
            join_signatures(parts[len(known.parts) :], settings, known.signatures_file)
            known.commit(parts, texts, edges)
    if progress is not None:
        progress(total, total, f"{len(edges)} near pairs of texts")
    edges = np.sort(documents.rank_of_text[edges], axis=1)
    clusters = {
        "prompt": prompt_clusters(documents.prompt, documents.in_prompt, documents.text, edges),
        "corpus": corpus_clusters(documents.text, edges),
    }
    counts = _counts(documents, clusters["prompt"])
    sums = {
        what: pc.sum(counts["rows"].filter(pc.equal(counts["what"], what)), min_count=0).as_py()
        for what in ("in", "out", "excluded")
    }
    check_counts("dedup", sums | {"rows": len(new)}, "rows", ["in"])
    check_counts("dedup", sums, "in", ["out", "excluded"])
    return DedupResult(
        duplicates=_duplicates(documents, clusters), counts=counts, signatures=signatures
    )


def sketch_parts(
    tasks: Sequence[Piece],
    settings: DedupSettings,
    workers: int = 1,
    total: int = 0,
    progress: Progress | None = None,
    options: Sequence[str] = (),
) -> None:
    """The signature stage: make all parts, with a range of them for each process."""
    from pipelines.beam import run_shares
    from pipelines.chunks import watching

    if not tasks:
        return

    def parts_to_rows(done: int, of: int, note: str) -> None:
        if progress is not None:
            progress(total * done // of, total, note)

    watch = parts_to_rows if progress is not None else None
    folder = Path(tasks[0].part).parent
    with watching(folder, "*/rows.arrow", len(tasks), "signatures", watch):
        run_shares(partial(_sketch_stage, settings=settings), tasks, workers, options)


def _sketch_stage(
    pipeline: beam.Pipeline, tasks: Sequence[Piece], *, settings: DedupSettings
) -> None:
    from pipelines.beam import beam

    _ = (
        pipeline
        | "Pieces" >> beam.Create(list(tasks))
        | "Sketch" >> beam.Map(sketch, settings=settings)
    )


def components(nodes: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The smallest node of each node's connected component, int64 (nodes,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(nodes, nodes))
    count, label = connected_components(graph, directed=False)
    smallest = np.full(count, nodes, np.int64)
    np.minimum.at(smallest, label, np.arange(nodes))
    return smallest[label]


def corpus_clusters(text: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Smallest rank of each answer's cluster among all answers, int64 (n,); -1 if empty."""
    smallest = components(len(text), edges[:, 0], edges[:, 1])
    return np.where(text < 0, -1, smallest[text])


def prompt_clusters(
    prompt: np.ndarray, in_prompt: np.ndarray, text: np.ndarray, edges: np.ndarray
) -> np.ndarray:
    """Smallest rank of each answer's cluster within its prompt, int64 (n,); -1 if empty.

    An edge between two texts holds in each prompt that has both.
    """
    joined = np.zeros(len(text), np.bool_)
    joined[edges] = True
    # Each (prompt, text) once, where the text has an edge.
    own = np.flatnonzero((in_prompt == np.arange(len(in_prompt))) & joined[text])
    where = [pa.array(text[own]), pa.array(prompt[own]), pa.array(own)]
    found = (
        pa.table({"left": edges[:, 0], "right": edges[:, 1]})
        .join(pa.table(where, ["left", "prompt", "a"]), "left", join_type="inner")
        .join(pa.table(where, ["right", "prompt", "b"]), ["right", "prompt"], join_type="inner")
    )
    smallest = components(len(text), found["a"].to_numpy(), found["b"].to_numpy())
    return np.where(in_prompt < 0, -1, smallest[in_prompt])


def _documents(rows: pa.Table, texts: np.ndarray) -> Documents:
    """Order by id and find the smallest rank of each text."""
    words = ids.words(rows["trajectory_id"])
    row = ids.order(words)
    repeats = np.flatnonzero((words[row[1:]] == words[row[:-1]]).all(axis=1))
    trajectory_id = ids.storage(rows["trajectory_id"]).take(pa.array(row))
    if len(repeats):
        msg = (
            f"dedup: {len(repeats)} trajectory ids come more than once, one of them "
            f"{ids.text(trajectory_id[int(repeats[0])].as_py())}; give each trajectory once"
        )
        raise BadInputError(msg)
    prompt = ids.codes(rows["prompt_id"])[0][row]
    number = texts[row]
    shown = np.flatnonzero(number >= 0)
    rank_of_text = np.zeros(number.max(initial=-1) + 1, np.int64)
    rank_of_text[number[shown[::-1]]] = shown[::-1]  # the last one written stays
    text = np.where(number < 0, -1, rank_of_text[number] if len(rank_of_text) else -1)
    in_prompt = np.where(number < 0, -1, np.arange(len(row)))
    several = np.flatnonzero((text >= 0) & (np.bincount(text + 1)[text + 1] > 1))
    in_prompt[several] = several[_smallest(prompt[several], text[several])]
    return Documents(
        trajectory_id=trajectory_id,
        source=rows["source"].unify_dictionaries().combine_chunks().take(pa.array(row)),
        prompt=prompt,
        text=text,
        in_prompt=in_prompt,
        rank_of_text=rank_of_text,
    )


def _entries(rows: pa.Table, texts: np.ndarray, new: np.ndarray) -> Entries:
    """The entries that new answers bring.

    Each distinct text stands once for the corpus (realm 0) and once for each of its prompts, at
    the first row where it does.
    """
    words = ids.words(rows["prompt_id"])
    realm = words[:, 0] ^ ids.mix(words[:, 1])
    shown = np.flatnonzero(texts >= 0)
    first = np.zeros(texts.max(initial=-1) + 1, np.int64)
    first[texts[shown[::-1]]] = shown[::-1]
    own = first[new[first]]
    touched = np.zeros(len(first), np.bool_)
    touched[texts[shown[new[shown]]]] = True
    some = shown[touched[texts[shown]]]  # rows whose text stands in a new one
    once = some[_smallest(texts[some], realm[some]) == np.arange(len(some))]
    once = once[new[once]]
    row = np.concatenate([own, once])
    of = np.concatenate([np.zeros(len(own), np.uint64), realm[once]])
    order = np.argsort(row, kind="stable")
    return Entries(row=row[order], text=texts[row[order]], realm=of[order])


def _duplicates(documents: Documents, clusters: dict[str, np.ndarray]) -> pa.Table:
    """Rows of `schemas.DUPLICATES` from the smallest rank of each answer's cluster, by scope."""
    parts = []
    for scope in schemas.SCOPES:
        cluster = clusters[scope]
        sizes = np.bincount(cluster[cluster >= 0], minlength=len(cluster))
        member = np.flatnonzero((cluster >= 0) & (sizes[cluster] > 1))
        member = member[np.argsort(cluster[member], kind="stable")]
        cluster = cluster[member]
        mixed = np.zeros(len(sizes), np.bool_)
        mixed[cluster[documents.text[member] != documents.text[cluster]]] = True
        raw = documents.trajectory_id
        parts.append(
            pa.table(
                {
                    "trajectory_id": _ids(raw, member),
                    "scope": pa.array(np.full(len(member), scope, object), pa.string()),
                    "cluster_id": _ids(raw, cluster),
                    "kind": pc.if_else(pa.array(mixed[cluster]), "near", "exact"),
                    "size": pa.array(sizes[cluster], pa.int32()),
                    "representative": pa.array(member == cluster),
                },
                schema=schemas.DUPLICATES.schema,
            )
        )
    return pa.concat_tables(parts)


def _counts(documents: Documents, cluster: np.ndarray) -> pa.Table:
    """Rows of `schemas.COUNTS`: what each source brought and what repeats within its prompts."""
    ranks = np.arange(len(cluster))
    kinds = {
        ("out", ""): cluster == ranks,
        ("excluded", "empty"): cluster < 0,
        ("excluded", "exact"): (cluster >= 0) & (documents.in_prompt != ranks),
        ("excluded", "near"): (documents.in_prompt == ranks) & (cluster != ranks),
    }
    names = documents.source.dictionary.to_pylist()
    source = documents.source.indices.to_numpy()
    books = {("in", ""): np.ones(len(ranks), np.bool_), **kinds}
    rows = [
        {"source": name, "stage": "dedup", "what": what, "label": "", "reason": reason, "split": ""}
        | {"rows": int(np.count_nonzero(books[what, reason] & (source == code)))}
        for code, name in sorted(enumerate(names), key=lambda item: item[1])
        for what, reason in books
    ]
    return pa.Table.from_pylist(rows, schema=schemas.COUNTS.schema)


def _ids(raw: pa.Array, ranks: np.ndarray) -> pa.ExtensionArray:
    return pa.ExtensionArray.from_storage(pa.uuid(), raw.take(pa.array(ranks)))


def _smallest(major: np.ndarray, minor: np.ndarray) -> np.ndarray:
    """For each place the smallest one with the same two values, int64 (n,)."""
    order = np.lexsort((minor, major))
    major, minor = major[order], minor[order]
    new = np.concatenate([[True], (major[1:] != major[:-1]) | (minor[1:] != minor[:-1])])
    new = new[: len(order)]
    smallest = np.empty(len(order), np.int64)
    smallest[order] = order[new][np.cumsum(new) - 1]
    return smallest
