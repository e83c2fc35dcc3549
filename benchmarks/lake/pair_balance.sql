-- How many pairs has each label, and does similarity or length give it away?
from pair_balance order by source, cell, label, reason, relation
