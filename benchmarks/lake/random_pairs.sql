-- A thousand random pairs with their texts: of 50 random prompts 20 random pairs each.
with chosen as (select unnest($prompts::uuid[]) as prompt_id),
drawn as (
    select label, trajectory_a, trajectory_b
    from pairs where prompt_id in (from chosen)
    qualify row_number() over (
        partition by prompt_id order by hash(trajectory_a, trajectory_b, $seed)
    ) <= 20
),
texts as (
    select trajectory_id, text from trajectories where prompt_id in (from chosen)
)
select d.label, a.text as one, b.text as other
from drawn as d
join texts as a on a.trajectory_id = d.trajectory_a
join texts as b on b.trajectory_id = d.trajectory_b
