"""The groups file: groups with their texts, as the trainer reads them.

Its schema is the trainer's (`trainer/data.py`); a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.labels import sql_list

if TYPE_CHECKING:
    from pipelines.lake import Lake

SQL = """
with chosen as (
    select g.*, p.prompt_group,
        coalesce(p.messages, [{{'role': 'user', 'content': p.text}}]) as prompt
    from groups g join prompts p on p.prompt_id = g.prompt_id
    where {where}
    order by md5(g.group_id::varchar) {limit}
),
members as (select group_id, unnest(candidates) as c from chosen),
listed as (
    select m.group_id, list(
        {{
            'trajectory_id': m.c.trajectory_id::varchar, 'text': t.text, 'rank': m.c.rank,
            'policy_id': m.c.policy_id::varchar, 'relation': m.c.relation,
            'policy_group': y.policy_group
        }} order by m.c.rank, m.c.trajectory_id
    ) as candidates
    from members m
    join trajectories t on t.trajectory_id = m.c.trajectory_id
    join policies y on y.policy_id = m.c.policy_id
    group by m.group_id
)
select g.group_id::varchar as group_id, g.wrapper, g.prompt, r.text as reference, l.candidates,
    g.category, g.split, g.cell, g.prompt_group, y.policy_group
from chosen g
join listed l on l.group_id = g.group_id
join trajectories r on r.trajectory_id = g.reference
join policies y on y.policy_id = r.policy_id
order by md5(g.group_id::varchar)
"""


def export_groups(
    lake: Lake,
    path: Path,
    *,
    wrapper: str,
    split: str,
    cells: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    limit: int | None = None,
) -> int:
    """Write groups with their texts to a Parquet file in a shuffled order that never changes.

    Args:
        lake: where groups, prompts, trajectories and policies are.
        path: the file to write.
        wrapper: `pretrain` (policy groups) or `sft` (preference groups).
        split: `train` or `eval`.
        cells: only these cells; all by default.
        sources: only prompts of these sources; all by default.
        limit: only the first so many. Groups of one block are then torn apart, and the balance
            between candidates holds on average instead of exactly.

    Returns:
        How many groups were written.
    """
    where = [f"g.wrapper in ({sql_list([wrapper])})", f"g.split in ({sql_list([split])})"]
    if cells is not None:
        where.append(f"g.cell in ({sql_list(cells)})")
    if sources is not None:
        where.append(f"p.source in ({sql_list(sources)})")
    end = "" if limit is None else f"limit {int(limit)}"
    return lake.copy(SQL.format(where=" and ".join(where), limit=end), path)
