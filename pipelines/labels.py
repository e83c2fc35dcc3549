"""Labelling rules: what two answers to one prompt are to each other, as plain array functions.

One place says what `same_policy`, `cross_policy` and `ambiguous` mean; pairs and groups both read
it. No budget, no Beam and no I/O here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import ids
from pipelines.errors import BadInputError

# Codes of the arrays below are positions in these tuples; the first three are schemas.PAIRS' words.
LABELS = ("same_policy", "cross_policy", "ambiguous")
REASONS = ("", "exact", "near", "empty", "related")
RELATIONS = ("same", "sibling", "same_family", "other_family")
EXCLUSIONS = ("", "unknown_policy", "mixed_sides", "sampling")
SAME, CROSS, AMBIGUOUS = range(3)

UNKNOWN = "unknown:"  # policies so named stand for answers whose author is not known

INPUT_SQL = """
select t.trajectory_id, t.prompt_id, t.policy_id, t.sampling_id, t.content_hash,
    length(t.text)::integer as length, list_contains(t.flags, 'empty') as empty,
    y.name as policy, y.policy_group, y.family, y.lineage_step, y.split as policy_side,
    p.split as prompt_side, p.category, p.source, d.cluster_id{signature}
from trajectories t
join policies y using (policy_id)
join prompts p using (prompt_id)
left join duplicates d on d.trajectory_id = t.trajectory_id and d.scope = 'prompt'{signatures}
where p.source in ({sources})
order by t.prompt_id, t.trajectory_id
"""


def input_sql(sources: Sequence[str], signatures: Path | None = None) -> str:
    """The lake query whose result, as one Parquet file, is what pairs and groups are made from.

    Args:
        sources: values of `prompts.source` to take.
        signatures: what dedup left, Parquet (trajectory_id, signature), a file or a folder of
            them; pairs need it for `similarity`, groups do not.
    """
    named = sql_list(sources)
    if signatures is None:
        return INPUT_SQL.format(sources=named, signature="", signatures="")
    files = signatures / "*.parquet" if signatures.is_dir() else signatures
    join = f"left join read_parquet({sql_list([str(files)])}) s"
    return INPUT_SQL.format(
        sources=named,
        signature=", s.signature",
        signatures=f"\n{join} on s.trajectory_id = t.trajectory_id",
    )


def sql_list(values: Sequence[str]) -> str:
    """Strings as the inside of SQL's `in (...)`."""
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values) or "null"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Some prompts' answers as columns of length n, sorted by (prompt, trajectory id).

    `*_id` hold raw ids; `prompt`, `policy`, ... are integer codes, comparable within this object.
    """

    trajectory_id: pa.Array
    prompt_id: pa.Array
    policy_id: pa.Array
    words: np.ndarray  # (n, 2) uint64, trajectory ids as numbers
    prompt: np.ndarray
    policy: np.ndarray
    sampling: np.ndarray
    group: np.ndarray
    family: np.ndarray
    step: np.ndarray  # int64, -1 where none is declared
    text: np.ndarray  # equal texts share a code
    cluster: np.ndarray  # near-duplicates share a code, -1 without a cluster
    length: np.ndarray  # characters
    empty: np.ndarray
    unknown: np.ndarray  # the policy has no name
    policy_test: np.ndarray
    prompt_test: np.ndarray
    source: np.ndarray
    sources: list[str]
    category: pa.Array
    signature: np.ndarray | None  # (n, permutations) uint32

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def cell(self) -> np.ndarray:
        """Position in schemas.CELLS, from the prompt's side and the answer's policy's side."""
        return 2 * self.prompt_test.astype(np.int8) + self.policy_test


def read_answers(table: pa.Table) -> Answers:
    """Check and factorise rows of INPUT_SQL; whole prompts, in any order.

    Raises:
        BadInputError: a trajectory comes twice, or signatures are missing for some rows.
    """
    words = ids.words(table["trajectory_id"])
    prompts = ids.words(table["prompt_id"])
    order = np.lexsort((words[:, 1], words[:, 0], prompts[:, 1], prompts[:, 0]))
    table, words, prompts = table.take(pa.array(order)), words[order], prompts[order]
    if len(words) > 1 and (words[1:] == words[:-1]).all(axis=1).any():
        msg = "a trajectory comes twice in the input of pairs; its key must be unique in the lake"
        raise BadInputError(msg)
    new = np.ones(len(words), bool)
    new[1:] = (prompts[1:] != prompts[:-1]).any(axis=1)
    source, sources = _strings(table["source"])
    return Answers(
        trajectory_id=ids.storage(table["trajectory_id"]),
        prompt_id=ids.storage(table["prompt_id"]),
        policy_id=ids.storage(table["policy_id"]),
        words=words,
        prompt=np.cumsum(new) - 1,
        policy=ids.codes(table["policy_id"])[0],
        sampling=ids.codes(table["sampling_id"])[0],
        group=_strings(table["policy_group"])[0],
        family=_strings(table["family"])[0],
        step=_numbers(pc.fill_null(table["lineage_step"], -1)),
        text=ids.codes(table["content_hash"])[0],
        cluster=_clusters(table["cluster_id"]),
        length=_numbers(table["length"]),
        empty=_flags(table["empty"]),
        unknown=_flags(pc.starts_with(table["policy"], UNKNOWN)),
        policy_test=_flags(pc.equal(table["policy_side"], "test")),
        prompt_test=_flags(pc.equal(table["prompt_side"], "test")),
        source=source,
        sources=sources,
        category=table["category"].combine_chunks(),
        signature=_signatures(table),
    )


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.int64)


def _flags(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(bool)


def _strings(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _clusters(column: pa.ChunkedArray) -> np.ndarray:
    encoded = pc.dictionary_encode(ids.storage(column))
    return pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _signatures(table: pa.Table) -> np.ndarray | None:
    if "signature" not in table.column_names:
        return None
    column = table["signature"].combine_chunks()
    if column.null_count:
        msg = f"{column.null_count} answers have no MinHash signature: run dedup on this snapshot"
        raise BadInputError(msg)
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), len(values) // max(len(column), 1))


def all_pairs(prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (a, b), a < b, of all pairs within one prompt; `prompt` codes are sorted."""
    rows = np.arange(len(prompt))
    after = np.searchsorted(prompt, prompt, side="right") - rows - 1  # partners behind each row
    a = np.repeat(rows, after)
    first = np.repeat(np.cumsum(after) - after, after)  # where the run of each `a` begins
    return a, np.arange(len(a)) - first + a + 1


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Codes per pair; `label` is what an excluded pair would have had."""

    label: np.ndarray
    reason: np.ndarray
    relation: np.ndarray
    exclusion: np.ndarray
    same_sampling: np.ndarray


def label_pairs(
    x: Answers, a: np.ndarray, b: np.ndarray, *, require_same_sampling: bool
) -> Labelled:
    """Label the pairs of rows (a, b).

    An ambiguous pair is so whichever label it would have had: blank answers, equal or near-equal
    texts (one within-prompt cluster), and two policies of one group that no declared step tells
    apart. Excluded are, before any label: policies without a name, policies on different sides,
    and (where required) two samples of one policy that were decoded differently.
    """
    same = x.policy[a] == x.policy[b]
    kin = ~same & (x.group[a] == x.group[b])
    steps = (x.step[a] >= 0) & (x.step[b] >= 0) & (x.step[a] != x.step[b])
    family = kin | (x.family[a] == x.family[b])
    same_sampling = x.sampling[a] == x.sampling[b]
    reason = _first(
        x.empty[a] | x.empty[b],
        x.text[a] == x.text[b],
        (x.cluster[a] == x.cluster[b]) & (x.cluster[a] >= 0),
        kin & ~steps,
        codes=(3, 1, 2, 4),
    )
    exclusion = _first(
        x.unknown[a] | x.unknown[b],
        x.policy_test[a] != x.policy_test[b],
        same & ~same_sampling & require_same_sampling,
        codes=(1, 2, 3),
    )
    return Labelled(
        label=np.where(reason > 0, AMBIGUOUS, np.where(same, SAME, CROSS)).astype(np.int8),
        reason=reason,
        relation=_first(same, kin & steps, family, codes=(0, 1, 2), default=3),
        exclusion=exclusion,
        same_sampling=same_sampling,
    )


def _first(*masks: np.ndarray, codes: tuple[int, ...], default: int = 0) -> np.ndarray:
    """The code of the first mask that holds, else `default`, as int8."""
    result = np.full(len(masks[0]), default, np.int8)
    for mask, code in zip(reversed(masks), reversed(codes), strict=True):
        result[mask] = code
    return result


def uniform(words: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) per row of hashed words (n, k) uint64; the same for ever for one seed."""
    state = np.full(len(words), seed, np.uint64)
    for column in words.T:
        state = ids.mix((state ^ column) + np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(11)) * 2.0**-53
