-- What did each policy make?
from pool_overview order by source, name
