"""From groups to what is evaluated: items to score and comparisons between two of them.

Used for training groups (rulers are fitted on their comparisons) and for evaluation groups alike.
No scoring and no statistics here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.errors import TrainerError

UNKNOWN = "unknown"  # a cell or a policy group that the groups do not name
UNCATEGORISED = "uncategorised"
SIBLINGS = "sibling"  # relation of a candidate to the reference's policy

NEEDED = ("group_id", "wrapper", "prompt", "reference", "candidates", "split", "cell")

Group = Mapping[str, Any]
Item = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Candidates of groups, and every two of one group of which one ranks higher.

    Attributes:
        items: one a candidate: prompt, reference, output, wrapper, as a scorer takes them.
        winner: (n,) index into `items` of the candidate with the smaller rank.
        loser: (n,) index into `items` of the other one.
        group: (items,) index of each item's group.
        cell: (n,) evaluation cell.
        category: (n,) category of the group.
        sibling: (n,) whether the loser's policy is a sibling of the reference's.
        prompt: (n,) prompt group, the first way of clustering.
        policy: (n,) policy group of the reference, the second way.
    """

    items: list[Item]
    winner: np.ndarray
    loser: np.ndarray
    group: np.ndarray
    cell: np.ndarray
    category: np.ndarray
    sibling: np.ndarray
    prompt: np.ndarray
    policy: np.ndarray

    def __len__(self) -> int:
        return len(self.winner)

    def outcomes(self, scores: np.ndarray) -> np.ndarray:
        """Of each comparison: 1 when the winner scores higher, 0 when lower, 0.5 for a tie (n,).

        Scores (items,) are compared in fp32.
        """
        scores = np.asarray(scores, np.float32)
        return (np.sign(scores[self.winner] - scores[self.loser]) + 1) / 2

    def only(self, mask: np.ndarray) -> Comparisons:
        """Some of the comparisons (mask: (n,) bool), and only the items that they need."""
        used = np.unique([self.winner[mask], self.loser[mask]])
        return Comparisons(
            items=[self.items[index] for index in used],
            winner=np.searchsorted(used, self.winner[mask]),
            loser=np.searchsorted(used, self.loser[mask]),
            group=self.group[used],
            **{
                name: getattr(self, name)[mask]
                for name in ("cell", "category", "sibling", "prompt", "policy")
            },
        )


def choose(
    groups: pa.Table, wrapper: str, split: str, limit: int, *, by_cell: bool, seed: int = 0
) -> tuple[list[Group], list[str]]:
    """Groups of one wrapper and split, at most `limit` of them (of each cell with `by_cell`).

    Which ones does not depend on the order of the table.

    Returns:
        The rows, and a sentence for each sample that was taken.

    Raises:
        TrainerError: a column is missing.
    """
    _require(groups)
    own = groups.filter((pc.field("wrapper") == wrapper) & (pc.field("split") == split))
    order = pc.sort_indices(own.column("group_id")).to_numpy().astype(np.int64)
    cells = np.full(len(order), "", object)
    if by_cell:
        cells = np.array([cell or UNKNOWN for cell in own.column("cell").to_pylist()], object)
    rng = np.random.default_rng(seed)
    kept, remarks = [np.empty(0, np.int64)], []
    for cell in sorted(set(cells)):
        indices = order[cells[order] == cell]
        if len(indices) > limit:
            place = f" in cell {cell}" if cell else ""
            remarks.append(f"{limit:,} of {len(indices):,} {split} groups{place} were drawn.")
            indices = rng.choice(indices, limit, replace=False)
        kept.append(indices)
    rows = read_rows(own.take(np.concatenate(kept)))
    return rows, remarks


def _require(groups: pa.Table) -> None:
    missing = set(NEEDED) - set(groups.column_names)
    if missing:
        msg = (
            f"groups lack the columns {', '.join(sorted(missing))}; "
            f"they have {', '.join(groups.column_names)}; see GROUPS_SCHEMA in trainer/data.py"
        )
        raise TrainerError(msg)


def read_rows(groups: pa.Table) -> list[Group]:
    """Groups as plain rows, in the order of their ids, with what clustering needs filled in.

    A file without groups of prompts or policies (the official JSONL) counts equal prompts as one
    prompt group, and all policies as one.

    Raises:
        TrainerError: a column is missing that nothing can stand in for.
    """
    _require(groups)
    rows = groups.to_pylist()
    for row in rows:
        row["prompt_group"] = row.get("prompt_group") or plain(row["prompt"])
        row["policy_group"] = row.get("policy_group") or UNKNOWN
        row["cell"] = row.get("cell") or UNKNOWN
        row["category"] = row.get("category") or UNCATEGORISED
    return sorted(rows, key=lambda row: row["group_id"])


def compare(rows: Sequence[Group], references: Sequence[str] | None = None) -> Comparisons:
    """All comparisons of `rows`; `references` (one a row) replaces the rows' own references."""
    items: list[Item] = []
    group: list[int] = []
    columns: dict[str, list] = defaultdict(list)
    for index, row in enumerate(rows):
        first = len(items)
        for candidate in row["candidates"]:
            group.append(index)
            items.append(
                {
                    "prompt": row["prompt"],
                    "reference": row["reference"] if references is None else references[index],
                    "output": candidate["text"],
                    "wrapper": row["wrapper"],
                }
            )
        for i, better in enumerate(row["candidates"]):
            for j, worse in enumerate(row["candidates"]):
                if better["rank"] < worse["rank"]:
                    columns["winner"].append(first + i)
                    columns["loser"].append(first + j)
                    columns["sibling"].append(worse.get("relation") == SIBLINGS)
                    columns["cell"].append(row["cell"])
                    columns["category"].append(row["category"])
                    columns["prompt"].append(row["prompt_group"])
                    columns["policy"].append(row["policy_group"])
    return Comparisons(
        items=items,
        winner=np.array(columns["winner"], np.int64),
        loser=np.array(columns["loser"], np.int64),
        group=np.array(group, np.int64),
        sibling=np.array(columns["sibling"], bool),
        **{
            name: np.array(columns[name], np.str_)
            for name in ("cell", "category", "prompt", "policy")
        },
    )


def shuffle_references(rows: Sequence[Group], seed: int = 0) -> tuple[list[str], int]:
    """Give each group the reference of another one; returns them and how many kept their prompt.

    A donor is drawn from the groups of the same prompt whose reference comes from another policy
    group and is none of this group's own texts. Where there is none, another prompt's group of the
    same wrapper gives one. A single group that has no other keeps an empty reference.
    """
    rng = np.random.default_rng(seed)
    by_prompt: dict[tuple, list[int]] = defaultdict(list)
    by_wrapper: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_prompt[row["wrapper"], plain(row["prompt"])].append(index)
        by_wrapper[row["wrapper"]].append(index)
    references, kept = [], 0
    for row in rows:
        prompt = plain(row["prompt"])
        own = {row["reference"], *(candidate["text"] for candidate in row["candidates"])}
        donors = [
            rows[other]["reference"]
            for other in by_prompt[row["wrapper"], prompt]
            if rows[other]["policy_group"] != row["policy_group"]
            and rows[other]["reference"] not in own
        ]
        kept += bool(donors)
        donors = donors or [
            rows[other]["reference"]
            for other in rng.permutation(by_wrapper[row["wrapper"]])[:50]
            if rows[other]["reference"] not in own and plain(rows[other]["prompt"]) != prompt
        ]
        references.append(donors[rng.integers(len(donors))] if donors else "")
    return references, kept


def plain(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt's text: a string as it is, messages joined by line breaks without their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt)
