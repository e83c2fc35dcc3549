"""datasketch: bulk signatures and its LSH, verification and clusters around it."""

import numpy as np
import xxhash
from common import BANDS, PERMUTATIONS, ROWS, Clusters, batches, options, shingles, verified
from datasketch import MinHash, MinHashLSH

given = options()
made = {
    "num_perm": PERMUTATIONS,
    "seed": 1,
    "scheme": "affine32",
    "hashfunc": xxhash.xxh32_intdigest,
}
lsh = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS))
signatures, hashes = [], []
for texts in batches(given.documents):
    sets = [[shingle.encode() for shingle in shingles(text)] for text in texts]
    if given.mode == "signatures":
        MinHash.bulk(sets, **made)
        continue
    signatures += MinHash.bulk(sets, **made)
    hashes += [np.array([xxhash.xxh32_intdigest(x) for x in found], np.uint32) for found in sets]
if given.mode == "all":
    for number, signature in enumerate(signatures):
        lsh.insert(number, signature, check_duplication=False)
    clusters = Clusters(len(signatures))
    for number, signature in enumerate(signatures):
        pairs = ((number, other) for other in lsh.query(signature) if number < other)
        for a, b in verified(pairs, hashes):
            clusters.join(a, b)
    clusters.save(given.out)
