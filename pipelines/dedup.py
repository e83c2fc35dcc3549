"""Answers that repeat others: exact by hash, near by MinHash-LSH, joined into clusters.

The way of a text: signature and shingles (`minhash.py`) go to files; identical texts are collapsed;
the distinct ones are looked through for near pairs (`near.py`); connected texts are a cluster,
named by its smallest trajectory id. Nothing is removed: what a repeat means for a label is said
in `pairs.py`.

Two scopes: `prompt` joins the answers to one prompt, through texts of that prompt only; `corpus`
joins all answers. Answers that show nothing are `empty` and join no cluster.

Everything is decided by ids and texts, so input order and batch size change nothing. The driver
holds about a hundred bytes an answer; texts are read batch by batch, once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipelines import ids, minhash, schemas
from pipelines.errors import BadInputError
from pipelines.near import DedupSettings, Entries, ShingleFile, near_pairs

Progress = Callable[[int, int, str], None]

BATCH_ROWS = 8_192
COLUMNS = ("trajectory_id", "prompt_id", "source", "text")
SUMMARY = pa.schema(
    [
        ("trajectory_id", pa.uuid()),
        ("prompt_id", pa.uuid()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("digest", pa.binary(16)),
        ("empty", pa.bool_()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class DedupResult:
    """What a run leaves.

    Attributes:
        duplicates: schema `schemas.DUPLICATES`; every member of every cluster of two or more.
        counts: schema `schemas.COUNTS`, stage `dedup`, by source, for the scope `prompt`:
            `in` = `out` + `excluded`. `out` are answers unlike any smaller one of their prompt
            (each cluster counted once), `excluded` the others by reason: `empty`, `exact` (the
            text of a smaller one), `near` (like a smaller one). Counted, not removed.
        signatures: Parquet file (trajectory_id, signature), in the order of the input.
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
        row: row of the input, int64 (n,).
        text: smallest rank with this text, int64 (n,); -1 for an empty one.
        in_prompt: smallest rank with this text and prompt, int64 (n,); -1 for an empty one.
    """

    trajectory_id: pa.Array
    source: pa.Array
    prompt: np.ndarray
    row: np.ndarray
    text: np.ndarray
    in_prompt: np.ndarray


def dedup(
    files: Sequence[Path],
    settings: DedupSettings,
    work: Path,
    progress: Progress | None = None,
) -> DedupResult:
    """Find exact and near duplicates among the answers in Parquet files.

    Args:
        files: Parquet with trajectory_id and prompt_id (uuid), source and text (strings).
        settings: signatures, threshold and bands.
        work: folder for `signatures.parquet` and, while it runs, for scratch files.
        progress: called as progress(answers done, answers in all, note).

    Raises:
        BadInputError: a trajectory id comes twice, or a column is missing or has nulls.
        CountMismatchError: rows were lost on the way; nothing of the run may be used.
    """
    from pipelines.beam import check_counts

    work.mkdir(parents=True, exist_ok=True)
    signatures = work / "signatures.parquet"
    with tempfile.TemporaryDirectory(prefix="dedup-", dir=work) as scratch:
        documents = _sketch(files, settings, signatures, Path(scratch), progress)
        edges = near_pairs(signatures, _entries(documents), settings, Path(scratch))
    if progress is not None:
        progress(len(documents.row), len(documents.row), f"{len(edges)} near pairs of texts")
    clusters = {
        "prompt": prompt_clusters(documents.prompt, documents.in_prompt, documents.text, edges),
        "corpus": corpus_clusters(documents.text, edges),
    }
    counts = _counts(documents, clusters["prompt"])
    sums = {
        what: pc.sum(counts["rows"].filter(pc.equal(counts["what"], what)), min_count=0).as_py()
        for what in ("in", "out", "excluded")
    }
    sums["read"] = sum(pq.read_metadata(file).num_rows for file in files)
    check_counts("dedup", sums, "read", ["in"])
    check_counts("dedup", sums, "in", ["out", "excluded"])
    return DedupResult(
        duplicates=_duplicates(documents, clusters), counts=counts, signatures=signatures
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
    own = np.flatnonzero(in_prompt == np.arange(len(in_prompt)))  # each (prompt, text) once
    where = [pa.array(text[own]), pa.array(prompt[own]), pa.array(own)]
    found = (
        pa.table({"left": edges[:, 0], "right": edges[:, 1]})
        .join(pa.table(where, ["left", "prompt", "a"]), "left", join_type="inner")
        .join(pa.table(where, ["right", "prompt", "b"]), ["right", "prompt"], join_type="inner")
    )
    smallest = components(len(text), found["a"].to_numpy(), found["b"].to_numpy())
    return np.where(in_prompt < 0, -1, smallest[in_prompt])


def _sketch(
    files: Sequence[Path],
    settings: DedupSettings,
    signatures: Path,
    scratch: Path,
    progress: Progress | None,
) -> Documents:
    """Read the texts once: signatures and shingles to files, the rest into `Documents`."""
    total = sum(pq.read_metadata(file).num_rows for file in files)
    schema = minhash.signatures_schema(settings)
    shingle_file = ShingleFile(scratch)
    kept: list[pa.RecordBatch] = []
    partial = signatures.with_suffix(".tmp")
    done = 0
    with pq.ParquetWriter(partial, schema, compression="none", use_dictionary=False) as writer:
        for batch in _read(files):
            sets = minhash.shingles(batch["text"], settings.words)
            shingle_file.append(sets)
            values = pa.array(minhash.signatures(sets, settings).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(values, type=schema.field("signature").type)
            writer.write_batch(pa.record_batch([batch["trajectory_id"], column], schema=schema))
            kept.append(_summary(batch, np.diff(sets.offsets) == 0))
            done += batch.num_rows
            if progress is not None:
                progress(done, total, "signatures")
    partial.replace(signatures)
    return _documents(pa.Table.from_batches(kept, SUMMARY))


def _summary(batch: pa.RecordBatch, empty: np.ndarray) -> pa.RecordBatch:
    """A batch without its texts, but with a 128-bit hash of each."""
    digests = [xxhash.xxh3_128_digest(text) for text in batch["text"].cast(pa.binary()).to_pylist()]
    columns = [batch[name] for name in ("trajectory_id", "prompt_id", "source")]
    columns += [pa.array(digests, pa.binary(16)), pa.array(empty)]
    return pa.record_batch([c.cast(f.type) for c, f in zip(columns, SUMMARY, strict=True)], SUMMARY)


def _documents(summary: pa.Table) -> Documents:
    """Order by id and collapse identical texts."""
    words = ids.words(summary["trajectory_id"])
    row = np.lexsort((words[:, 1], words[:, 0]))
    repeats = np.flatnonzero((words[row[1:]] == words[row[:-1]]).all(axis=1))
    trajectory_id = ids.storage(summary["trajectory_id"]).take(pa.array(row))
    if len(repeats):
        msg = (
            f"dedup: {len(repeats)} trajectory ids come more than once, one of them "
            f"{ids.text(trajectory_id[int(repeats[0])].as_py())}; give each trajectory once"
        )
        raise BadInputError(msg)
    prompt = ids.codes(summary["prompt_id"])[0][row]
    digest = ids.words(summary["digest"])[row]
    empty = summary["empty"].to_numpy()[row]
    text = np.where(empty, -1, _smallest(digest[:, 0], digest[:, 1]))
    return Documents(
        trajectory_id=trajectory_id,
        source=summary["source"].unify_dictionaries().combine_chunks().take(pa.array(row)),
        prompt=prompt,
        row=row,
        text=text,
        in_prompt=np.where(empty, -1, _smallest(prompt, text)),
    )


def _entries(documents: Documents) -> Entries:
    """Each distinct text once for the corpus (realm 0) and once for each of its prompts."""
    ranks = np.arange(len(documents.row))
    own, own_in_prompt = (np.flatnonzero(x == ranks) for x in (documents.text, documents.in_prompt))
    realm = np.concatenate([np.zeros(len(own), np.int64), documents.prompt[own_in_prompt] + 1])
    rank = np.concatenate([own, own_in_prompt])
    order = np.argsort(documents.row[rank], kind="stable")
    rank, realm = rank[order], realm[order]
    return Entries(row=documents.row[rank], text=documents.text[rank], realm=realm)


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


def _read(files: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    """Batches of the four columns, checked."""
    for file in files:
        source = pq.ParquetFile(file)
        missing = [name for name in COLUMNS if name not in source.schema_arrow.names]
        if missing:
            msg = f"{file}: dedup needs the columns {', '.join(COLUMNS)}; missing: {missing}"
            raise BadInputError(msg)
        for batch in source.iter_batches(BATCH_ROWS, columns=list(COLUMNS)):
            for name in COLUMNS:
                if batch[name].null_count:
                    msg = f"{file}: column {name} holds nulls; quarantine such rows before dedup"
                    raise BadInputError(msg)
            yield batch


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
