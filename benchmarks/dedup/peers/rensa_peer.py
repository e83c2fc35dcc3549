"""rensa: signatures and LSH from the package, verification and clusters around it."""

import numpy as np
from common import BANDS, PERMUTATIONS, THRESHOLD, Clusters, batches, options, shingles, verified
from rensa import RMinHash, RMinHashLSH

given = options()
if given.mode == "signatures":
    for texts in batches(given.documents):
        RMinHash.digest_matrix_from_token_sets([shingles(text) for text in texts], PERMUTATIONS, 1)
else:
    lsh = RMinHashLSH(THRESHOLD, PERMUTATIONS, BANDS)
    signatures, hashes = [], []
    for texts in batches(given.documents):
        sets = [shingles(text) for text in texts]
        signatures += RMinHash.from_token_sets(sets, PERMUTATIONS, 1)
        hashes += [np.array(found, np.uint64) for found in RMinHash.hash_token_sets(sets)]
    lsh.insert_many(signatures)
    clusters = Clusters(len(signatures))
    for at in range(0, len(signatures), 8192):
        found = lsh.query_all(signatures[at : at + 8192])
        pairs = ((at + i, j) for i, keys in enumerate(found) for j in keys if at + i < j)
        for a, b in verified(pairs, hashes):
            clusters.join(a, b)
    clusters.save(given.out)
