-- Which pairs has one prompt, across all policies?
select least(ya.name, yb.name) as one, greatest(ya.name, yb.name) as other, p.label,
       count(*) as pairs, avg(p.similarity) as similarity, avg(p.length_ratio) as length_ratio
from (from pairs where prompt_id = $prompt) as p
join (from trajectories where prompt_id = $prompt) as a on a.trajectory_id = p.trajectory_a
join (from trajectories where prompt_id = $prompt) as b on b.trajectory_id = p.trajectory_b
join policies as ya on ya.policy_id = a.policy_id
join policies as yb on yb.policy_id = b.policy_id
group by all order by pairs desc, one, other, label limit 100
