-- Which pairs has one prompt, across all policies?
-- `materialized` reads them by their prompt alone; joins would also look each id up in the files.
with answers as materialized (
    select t.trajectory_id, y.name
    from trajectories as t join policies as y on y.policy_id = t.policy_id
    where t.prompt_id = $prompt
),
found as materialized (
    select trajectory_a, trajectory_b, label, similarity, length_ratio
    from pairs where prompt_id = $prompt
)
select least(a.name, b.name) as one, greatest(a.name, b.name) as other, p.label,
       count(*) as pairs, avg(p.similarity) as similarity, avg(p.length_ratio) as length_ratio
from found as p
join answers as a on a.trajectory_id = p.trajectory_a
join answers as b on b.trajectory_id = p.trajectory_b
group by all order by pairs desc, one, other, label limit 100
