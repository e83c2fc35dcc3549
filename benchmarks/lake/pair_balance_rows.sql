-- The same from the pairs themselves: every row is read.
select split, cell, label, reason, relation, count(*) as pairs, avg(similarity) as similarity,
       avg(length_ratio) as length_ratio
from pairs group by all order by all
