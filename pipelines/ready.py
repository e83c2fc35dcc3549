"""What dedup's processes need before their first text, imported once by the server they come from.

Importing this imports Beam and datasketch and loads (or compiles) the machine code of the loops.
"""

import pyarrow as pa

import pipelines.beam  # noqa: F401
from pipelines import minhash
from pipelines.near import DedupSettings

_TEXT = pa.array(["a text that is longer than one shingle is"])
minhash.signatures(
    minhash.distinct(minhash.shingles(_TEXT, DedupSettings().words)), DedupSettings()
)
