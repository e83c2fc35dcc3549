-- Which cross-policy pairs are most alike?
select prompt_id, trajectory_a, trajectory_b, similarity
from pairs where label = 'cross_policy'
order by similarity desc, trajectory_a, trajectory_b limit 100
