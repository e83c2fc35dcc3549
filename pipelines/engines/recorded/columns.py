"""The columns of the files a user may bring, and how each lies in memory.

Reading them is `parquet.py` and `jsonl.py`; users find them explained in `docs/recorded.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.schemas import BOOL, INT, LONG, MESSAGES, REAL, TEXT

NAMES = {
    TEXT: "text",
    INT: "an integer",
    LONG: "an integer",
    REAL: "a number",
    BOOL: "true or false",
    MESSAGES: "a list of {role, content}",
}
WORDS = pa.dictionary(pa.int32(), TEXT)  # text whose values repeat


@dataclass(frozen=True)
class Column:
    """One column of an input file. `prose` is text that is never made from a number."""

    name: str
    type: pa.DataType = TEXT
    required: bool = False
    prose: bool = False

    @property
    def arrow(self) -> pa.DataType:
        """The Arrow type it has in memory: long texts plain, repeating ones as a dictionary."""
        if self.type == MESSAGES:
            return TEXT
        return WORDS if self.type == TEXT and not self.name.startswith("response") else self.type


def _prompt() -> tuple[Column, ...]:
    return Column("prompt_id"), Column("source"), Column("prompt", prose=True)


def _answer(suffix: str, *, required: bool) -> tuple[Column, ...]:
    return Column(f"policy{suffix}"), Column(f"response{suffix}", required=required, prose=True)


COLUMNS: dict[str, tuple[Column, ...]] = {
    "trajectories": (
        *_prompt(),
        Column("policy", required=True),
        Column("response", required=True, prose=True),
        Column("policy_group"),
        Column("family"),
        Column("lineage_step", LONG),
        Column("sample_index", INT),
        Column("sampling"),
        Column("finished", BOOL),
        Column("is_correct", BOOL),
        Column("license"),
    ),
    "prompts": (
        *_prompt(),
        Column("kind"),
        Column("category"),
        Column("prompt_group"),
        Column("reference", prose=True),
        Column("turns", MESSAGES),
        Column("license"),
    ),
    "preferences": (
        *_prompt(),
        *_answer("_a", required=False),
        Column("sample_index_a", INT),
        *_answer("_b", required=False),
        Column("sample_index_b", INT),
        Column("preference", required=True),
        Column("strength", REAL),
        Column("annotator"),
        Column("annotator_type"),
        Column("category"),
        Column("license"),
    ),
    "ranked_triples": (
        *_prompt(),
        *_answer("_1", required=True),
        *_answer("_2", required=True),
        *_answer("_3", required=True),
        Column("annotator"),
        Column("annotator_type"),
        Column("category"),
        Column("license"),
    ),
}


def empty(label: str) -> pa.Table:
    """A table of the file's columns and `row`, without rows."""
    fields = [pa.field(column.name, column.arrow) for column in COLUMNS[label]]
    return pa.schema([*fields, pa.field("row", LONG)]).empty_table()


def with_source(table: pa.Table, source: str) -> pa.Table:
    """The table with `source` where a row names none."""
    position = table.schema.get_field_index("source")
    filled = pc.fill_null(table["source"].cast(TEXT), source).dictionary_encode()
    return table.set_column(position, "source", filled)


def distinct(table: pa.Table, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct tuples of some columns, nulls being a value like any other.

    Returns:
        codes (n,), each row's tuple, numbered in order of first appearance; and `first` (tuples,),
        the row where each appears first, ascending.
    """
    codes = np.zeros(table.num_rows, np.int64)
    for name in names:
        encoded = table[name].dictionary_encode().combine_chunks()
        values = encoded.indices.fill_null(-1).to_numpy() + 1
        _, codes = np.unique(codes * (len(encoded.dictionary) + 1) + values, return_inverse=True)
    _, first, codes = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[codes], first[order]


def pick(values: list[bytes], codes: np.ndarray) -> pa.ExtensionArray:
    """The ids that `codes` (n,) name, as a column."""
    raw = pa.array(values, pa.binary(16)).take(pa.array(codes))
    return pa.ExtensionArray.from_storage(pa.uuid(), raw)
