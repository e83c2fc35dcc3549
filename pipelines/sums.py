"""Sums kept beside the rows, so that an overview of millions of answers reads a few hundred rows.

`Lake.publish` brings them up to date in the transaction that changes their tables, so they never
lag; rows that did not change are not written again. Their columns are in `schemas.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pipelines.schemas import ANSWER_SUMS, PAIRS, POLICIES, PROMPT_SUMS, Table


@dataclass(frozen=True)
class Sums:
    """A table that is the result of a query over others: one row for each key in `each`."""

    table: Table
    each: Table
    of: frozenset[str]
    sql: str

    @property
    def updates(self) -> list[str]:
        """Statements that make the table what the query gives; they touch what differs."""
        names = self.table.schema.names
        values = [name for name in names if name not in self.table.key]
        match = " and ".join(f"old.{key} = new.{key}" for key in self.table.key)
        old, new = (f"({', '.join(f'{side}.{v}' for v in values)})" for side in ("old", "new"))
        keys = ", ".join(self.table.key)
        return [
            f"delete from {self.table.name} where ({keys}) not in "
            f"(select distinct {keys} from {self.each.name})",
            f"merge into {self.table.name} as old using ({self.sql}) as new on {match} "
            f"when matched and {old} is distinct from {new} "
            f"then update set {', '.join(f'{value} = new.{value}' for value in values)} "
            f"when not matched then insert ({', '.join(names)}) "
            f"values ({', '.join(f'new.{name}' for name in names)})",
        ]


SUMS: dict[str, Sums] = {
    sums.table.name: sums
    for sums in (
        Sums(
            ANSWER_SUMS,
            POLICIES,
            frozenset({"policies", "trajectories", "duplicates"}),
            """
            select p.policy_id,
                   count(distinct t.prompt_id) as prompts,
                   count(t.trajectory_id) as trajectories,
                   coalesce(sum(t.original_length), 0)::bigint as characters,
                   coalesce(sum(t.tokens), 0)::bigint as tokens,
                   count(t.tokens) as counted,
                   count(*) filter (list_contains(t.flags, 'empty')) as empty,
                   count(*) filter (list_contains(t.flags, 'loop')) as loop,
                   count(*) filter (list_contains(t.flags, 'truncated')) as truncated,
                   count(*) filter (list_contains(t.flags, 'refusal')) as refusal,
                   count(*) filter (list_contains(t.flags, 'other_language')) as other_language,
                   count(d.trajectory_id) as repeated,
                   count(*) filter (t.correct) as correct,
                   count(t.correct) as checked
            from policies as p
            left join trajectories as t on t.policy_id = p.policy_id
            left join duplicates as d on d.trajectory_id = t.trajectory_id and d.scope = 'prompt'
            group by p.policy_id
            """,
        ),
        Sums(
            PROMPT_SUMS,
            PAIRS,
            frozenset({"pairs"}),
            """
            select prompt_id, cell, label, count(*) as pairs
            from pairs group by prompt_id, cell, label
            """,
        ),
    )
}


def updates(changed: Collection[str]) -> list[str]:
    """Statements for the sums of the tables that a transaction changes."""
    found = (sums.updates for sums in SUMS.values() if sums.of & set(changed))
    return [statement for statements in found for statement in statements]
