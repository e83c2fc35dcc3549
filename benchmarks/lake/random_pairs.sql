-- A thousand random pairs of 25 random prompts, with their texts.
-- DuckDB skips row groups by ranges of ids but not by lists of them, hence the filter made of text.
-- Without `materialized` it would look for the drawn rows in all pairs again.
with found as materialized (
    from query('from pairs where ' || array_to_string(
        [format('prompt_id between ''{0}'' and ''{0}''', p) for p in $prompts], ' or '))
),
drawn as materialized (
    select label, trajectory_a, trajectory_b from found
    order by hash(trajectory_a, trajectory_b, $seed) limit 1000
),
texts as materialized (
    from query('select trajectory_id, text from trajectories where ' || array_to_string(
        [format('prompt_id between ''{0}'' and ''{0}''', p) for p in $prompts], ' or '))
)
select d.label, a.text as one, b.text as other
from drawn as d
join texts as a on a.trajectory_id = d.trajectory_a
join texts as b on b.trajectory_id = d.trajectory_b
