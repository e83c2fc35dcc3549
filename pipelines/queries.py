"""Ten queries to start from, for people: `docs/lake.md` shows them and a test runs each.

Questions that everybody asks again and again are views (`views.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Query:
    """One query with the question that it answers."""

    name: str
    question: str
    sql: str


QUERIES: tuple[Query, ...] = (
    Query(
        "labels",
        "How many pairs has each label, on each split?",
        """
select split, label, sum(pairs) as pairs, sum(pairs) / sum(sum(pairs)) over (partition by split)
       as share
from pair_balance
group by split, label
order by split, label
""",
    ),
    Query(
        "pool",
        "Who is in the pool, and what did each policy make?",
        """
select source, name, policy_group, split, prompts, trajectories, mean_characters, empty, loop,
       truncated, repeated, correct
from pool_overview
order by source, policy_group, lineage_step, name
""",
    ),
    Query(
        "triples",
        "What does a model learn from? Five triples with their texts.",
        """
select p.text as prompt, r.text as reference, a.text as positive, b.text as negative, t.relation
from (from triples where split = 'train' order by group_id limit 5) as t
join prompts as p on p.prompt_id = t.prompt_id
join trajectories as r on r.trajectory_id = t.reference
join trajectories as a on a.trajectory_id = t.positive
join trajectories as b on b.trajectory_id = t.negative
""",
    ),
    Query(
        "results",
        "How good is each checkpoint, beside the best ruler on the same comparisons?",
        """
select c.name as checkpoint, e.suite, e.cell, e.category, e.n,
       max(e.value) filter (e.scorer = 'model') as model,
       max(e.low) filter (e.scorer = 'model') as low,
       max(e.high) filter (e.scorer = 'model') as high,
       max(e.value) filter (e.scorer <> 'model') as best_ruler,
       arg_max(e.scorer, e.value) filter (e.scorer <> 'model') as ruler
from evaluations as e join checkpoints as c on c.checkpoint_id = e.checkpoint_id
where e.metric = 'accuracy'
group by c.name, c.created_at, e.suite, e.cell, e.category, e.n
order by c.created_at desc, e.suite, e.cell, e.category
""",
    ),
    Query(
        "kept_out",
        "What did not come through, and why?",
        """
select source, stage, what, label, reason, sum(rows) as rows
from counts
where what in ('excluded', 'quarantined')
group by source, stage, what, label, reason
order by source, stage, rows desc
""",
    ),
    Query(
        "leaks",
        "Does anything cross the splits? Sound when empty.",
        "\nfrom leakage limit 20\n",
    ),
    Query(
        "repeats",
        "Which answers are repeated most often, and by how many policies?",
        """
select d.scope, d.kind, d.size, count(distinct t.policy_id) as policies,
       any_value(t.text) filter (d.representative) as answer
from duplicates as d join trajectories as t on t.trajectory_id = d.trajectory_id
group by d.scope, d.cluster_id, d.kind, d.size
order by d.size desc, d.cluster_id
limit 10
""",
    ),
    Query(
        "origin",
        "Where does a trajectory come from? All that is needed to make it again.",
        """
select t.trajectory_id, p.name as policy, p.revision, p.template, t.temperature, t.top_p,
       t.top_k, t.max_tokens, t.sample_index, t.seed, t.engine, t.engine_version, q.text as prompt
from trajectories as t
join policies as p on p.policy_id = t.policy_id
join prompts as q on q.prompt_id = t.prompt_id
order by t.created_at desc, t.trajectory_id
limit 5
""",
    ),
    Query(
        "length",
        "Would the longer answer win? The preferences of each category.",
        """
select category, split, preferences, longer_chosen, mean_strength
from preference_by_category
order by preferences desc
""",
    ),
    Query(
        "history",
        "Who published what, and when?",
        """
select snapshot_id, snapshot_time, author, commit_message
from lake.snapshots()
order by snapshot_id desc
limit 20
""",
    ),
)
