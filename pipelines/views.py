"""The views of the lake: questions about the corpus that everybody asks, said once in SQL.

Table names are unqualified, so the views answer under whatever name the lake is attached. Tables
are in `schemas.py`; queries for people to start from are in `queries.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """One view: its columns with their meaning, in order, and the query behind it."""

    name: str
    meaning: str
    columns: dict[str, str]
    sql: str

    @property
    def comment(self) -> str:
        """The comment stored with the view; its mark tells whether the stored query is this one."""
        mark = hashlib.blake2b((self.meaning + self.sql).encode(), digest_size=4).hexdigest()
        return f"{self.meaning} [{mark}]"


TRIPLES = View(
    "triples",
    "Reference, positive and negative: each ordered couple of candidates in each group.",
    {
        "group_id": "the group",
        "prompt_id": "the prompt",
        "reference": "trajectory that both are compared with",
        "positive": "candidate of the better rank",
        "negative": "candidate of the worse rank",
        "relation": "of the negative to the reference's policy",
        "wrapper": "pretrain or sft",
        "category": "category of the prompt or preference",
        "split": "train or eval",
        "cell": "seen, new_policy, new_prompt or both_new",
        "snapshot": "lake snapshot that the group was made from",
    },
    """
    select g.group_id, g.prompt_id, g.reference,
           p.c.trajectory_id as positive, n.c.trajectory_id as negative, n.c.relation,
           g.wrapper, g.category, g.split, g.cell, g.snapshot
    from groups as g, unnest(g.candidates) as p(c), unnest(g.candidates) as n(c)
    where p.c.rank < n.c.rank
    """,
)

POOL_OVERVIEW = View(
    "pool_overview",
    "One row a policy: how much it answered, how long, and how often something is flagged.",
    {
        "policy_id": "the policy",
        "source": "where it comes from",
        "name": "its name there",
        "policy_group": "related policies share it",
        "family": "wider kinship",
        "kind": "base, chat, checkpoint, api or recorded",
        "lineage_step": "training step within its run",
        "split": "side of its policy_group",
        "prompts": "prompts that it answered",
        "trajectories": "answers",
        "mean_characters": "mean length of an answer in characters, before any cut",
        "mean_tokens": "mean length in its own tokens, where known",
        "empty": "share of answers flagged empty",
        "loop": "share flagged loop",
        "truncated": "share flagged truncated",
        "refusal": "share flagged refusal",
        "other_language": "share flagged other_language",
        "repeated": "share in a duplicate cluster within its prompt",
        "correct": "share found correct, among those that can be checked",
    },
    """
    select p.policy_id, p.source, p.name, p.policy_group, p.family, p.kind, p.lineage_step,
           p.split,
           coalesce(s.prompts, 0) as prompts,
           coalesce(s.trajectories, 0) as trajectories,
           s.characters / nullif(s.trajectories, 0) as mean_characters,
           s.tokens / nullif(s.counted, 0) as mean_tokens,
           s.empty / nullif(s.trajectories, 0) as empty,
           s.loop / nullif(s.trajectories, 0) as loop,
           s.truncated / nullif(s.trajectories, 0) as truncated,
           s.refusal / nullif(s.trajectories, 0) as refusal,
           s.other_language / nullif(s.trajectories, 0) as other_language,
           s.repeated / nullif(s.trajectories, 0) as repeated,
           s.correct / nullif(s.checked, 0) as correct
    from policies as p left join answer_sums as s on s.policy_id = p.policy_id
    """,
)

PAIR_BALANCE = View(
    "pair_balance",
    "Pairs by source, split and label, and whether similarity or length give a label away.",
    {
        "source": "source of the prompts",
        "split": "train or eval",
        "cell": "seen, new_policy, new_prompt or both_new",
        "label": "same_policy, cross_policy or ambiguous",
        "reason": "why ambiguous",
        "relation": "of the two policies",
        "pairs": "how many",
        "share": "of the pairs of this source, split and cell",
        "mean_similarity": "mean estimated Jaccard of the two answers",
        "mean_length_ratio": "mean of the shorter length by the longer",
    },
    """
    select source, split, cell, label, nullif(reason, '') as reason, relation,
           sum(pairs)::bigint as pairs,
           sum(pairs) / sum(sum(pairs)) over (partition by source, split, cell) as share,
           sum(pairs * mean_similarity) / sum(pairs) as mean_similarity,
           sum(pairs * mean_length_ratio) / sum(pairs) as mean_length_ratio
    from pair_sums
    group by source, split, cell, label, pair_sums.reason, relation
    """,
)

_CELL = """case when {prompt} = 'train' and {policy} = 'train' then 'seen'
                when {prompt} = 'train' then 'new_policy'
                when {policy} = 'train' then 'new_prompt' else 'both_new' end"""

LEAKAGE = View(
    "leakage",
    "Rows that break the split; a sound lake has none.",
    {
        "rule": "the rule that is broken",
        "id": "the group name, or the ids of the row",
        "detail": "what was found",
    },
    f"""
    with sides as (
        -- answers of unnamed policies (unknown:<source>) take no side
        select t.trajectory_id, q.split as prompt_side,
               case when not starts_with(p.name, 'unknown:') then p.split end as policy_side
        from trajectories as t
        join policies as p on p.policy_id = t.policy_id
        join prompts as q on q.prompt_id = t.prompt_id
    ),
    pair_sides as (
        select p.trajectory_a, p.trajectory_b, p.split, p.cell, a.prompt_side,
               a.policy_side as side_a, b.policy_side as side_b
        from pairs as p
        join sides as a on a.trajectory_id = p.trajectory_a
        join sides as b on b.trajectory_id = p.trajectory_b
    ),
    members as (
        select group_id, wrapper, split, cell, reference as trajectory_id from groups
        union all
        select group_id, wrapper, split, cell, unnest(candidates).trajectory_id from groups
    ),
    group_sides as (
        select m.group_id, m.wrapper, m.split, m.cell, any_value(s.prompt_side) as prompt_side,
               coalesce(min(s.policy_side), 'train') as lowest,
               coalesce(max(s.policy_side), 'train') as highest
        from members as m join sides as s on s.trajectory_id = m.trajectory_id
        group by m.group_id, m.wrapper, m.split, m.cell
    )
    select 'a prompt group on both sides' as rule, prompt_group as id,
           count(*)::varchar || ' prompts' as detail
    from prompts group by prompt_group having count(distinct split) > 1
    union all
    select 'a policy group on both sides', policy_group, string_agg(name, ', ' order by name)
    from policies group by policy_group having count(distinct split) > 1
    union all
    select 'a pair outside its split or cell',
           trajectory_a::varchar || ' ' || trajectory_b::varchar,
           'split ' || split || ', cell ' || cell || '; prompt ' || prompt_side
           || ', policies ' || side_a || ' and ' || side_b
    from pair_sides
    where side_a <> side_b or (split = 'train' and cell <> 'seen')
       or cell <> {_CELL.format(prompt="prompt_side", policy="side_a")}
    union all
    select 'a group outside its split or cell', group_id::varchar,
           wrapper || ', split ' || split || ', cell ' || cell || '; prompt ' || prompt_side
           || ', policies ' || lowest || ' to ' || highest
    from group_sides
    where lowest <> highest or (split = 'train' and cell <> 'seen')
       or cell <> {_CELL.format(prompt="prompt_side", policy="lowest")}
    union all
    select 'a reference in train and eval groups', reference::varchar,
           count(*)::varchar || ' groups'
    from groups where wrapper = 'pretrain'
    group by reference having count(distinct split) > 1
    union all
    select 'a train preference on a test prompt', r.preference_id::varchar, q.prompt_group
    from preferences as r join prompts as q on q.prompt_id = r.prompt_id
    where r.split = 'train' and q.split <> 'train'
    """,
)

PREFERENCE_BY_CATEGORY = View(
    "preference_by_category",
    "Preferences by category, and how far answering 'the longer one' would go.",
    {
        "category": "topic or task; none where it is not given",
        "split": "train or eval",
        "annotator_type": "human, llm or verifier",
        "preferences": "how many",
        "prompts": "distinct prompts",
        "with_reference": "share that has a reference",
        "longer_chosen": "share whose chosen answer is the longer one, ties counted one half",
        "mean_strength": "mean strength, in the source's unit",
    },
    """
    select coalesce(p.category, 'none') as category, p.split, p.annotator_type,
           count(*) as preferences,
           count(distinct p.prompt_id) as prompts,
           avg((p.reference is not null)::int) as with_reference,
           avg((sign(length(c.text) - length(r.text)) + 1) / 2) as longer_chosen,
           avg(p.strength) as mean_strength
    from preferences as p
    join trajectories as c on c.trajectory_id = p.chosen
    join trajectories as r on r.trajectory_id = p.rejected
    group by all
    """,
)

VIEWS: dict[str, View] = {
    view.name: view
    for view in (TRIPLES, POOL_OVERVIEW, PAIR_BALANCE, LEAKAGE, PREFERENCE_BY_CATEGORY)
}
