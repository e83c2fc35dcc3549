-- Does any pair cross the sides of its policies or of its prompt? Nothing, in a sound lake.
select 'policies of a pair on two sides, or not on those of its cell' as rule, sum(s.pairs) as pairs
from pair_sums as s
join policies as a on a.policy_id = s.policy_a
join policies as b on b.policy_id = s.policy_b
where a.split <> b.split or (a.split = 'test') <> (s.cell in ('new_policy', 'both_new'))
   or (s.split = 'train') <> (s.cell = 'seen')
having sum(s.pairs) > 0
union all
select 'a prompt not on the side of its pairs', sum(p.pairs)
from prompt_sums as p join prompts as q on q.prompt_id = p.prompt_id
where (q.split = 'test') <> (p.cell in ('new_prompt', 'both_new'))
having sum(p.pairs) > 0
union all
select 'a group of policies on both sides', count(*) from
(select policy_group from policies group by policy_group having count(distinct split) > 1)
having count(*) > 0
