-- Which pairs has one prompt, across all policies?
with answers as materialized (
    select t.trajectory_id, y.name
    from trajectories as t join policies as y on y.policy_id = t.policy_id
    where t.prompt_id = $prompt
)
select least(a.name, b.name) as one, greatest(a.name, b.name) as other, p.label,
       count(*) as pairs, avg(p.similarity) as similarity, avg(p.length_ratio) as length_ratio
from pairs as p
join answers as a on a.trajectory_id = p.trajectory_a
join answers as b on b.trajectory_id = p.trajectory_b
where p.prompt_id = $prompt
group by all order by pairs desc, one, other, label limit 100
