-- Against whom is one policy paired, with which labels, and how alike are the answers?
select y.name as other, s.label, s.relation, sum(s.pairs) as pairs,
       sum(s.pairs * s.mean_similarity) / sum(s.pairs) as similarity,
       sum(s.pairs * s.mean_length_ratio) / sum(s.pairs) as length_ratio
from pair_sums as s
join policies as y on y.policy_id = case when s.policy_a = $policy then s.policy_b else s.policy_a end
where s.policy_a = $policy or s.policy_b = $policy
group by all order by pairs desc, other, label limit 100
