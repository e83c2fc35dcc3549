-- Which cross-policy pairs are most alike? Those that are near-duplicates count as ambiguous.
select prompt_id, trajectory_a, trajectory_b, similarity
from pairs where label = 'cross_policy' and similarity > 0.5
order by similarity desc, trajectory_a, trajectory_b limit 100
