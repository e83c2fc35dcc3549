"""text-dedup: its command line; signatures alone are its embedding function in a loop.

It does not verify: whatever shares a bucket is one cluster.
"""

import pickle
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
from common import BANDS, PERMUTATIONS, ROWS, WORDS, batches, options

given = options()
if given.mode == "signatures":
    from text_dedup import minhash

    prime = np.uint64((1 << 61) - 1)
    drawn = (
        minhash.RNG.randint(1, prime, size=(PERMUTATIONS,), dtype=np.uint64),
        minhash.RNG.randint(0, prime, size=(PERMUTATIONS,), dtype=np.uint64),
    )
    for texts in batches(given.documents):
        for number, text in enumerate(texts):
            minhash.embed_func(
                text,
                number,
                num_perm=PERMUTATIONS,
                ngram_size=WORDS,
                min_length=WORDS,
                hashranges=[(at * ROWS, (at + 1) * ROWS) for at in range(BANDS)],
                permutations=drawn,
                hash_func=minhash.xxh3_32hash,
                dtype=np.uint64,
                max_hash=np.uint32((1 << 32) - 1),
                modulo_prime=prime,
            )
else:
    plain = given.out / "plain.parquet"  # its reader does not know the type of ids
    pq.write_table(pq.read_table(given.documents, columns=["text"]), plain)
    command = [sys.executable, "-m", "text_dedup.minhash", "--path", "parquet", "--split", "train"]
    command += ["--data_files", str(plain), "--cache_dir", str(given.out / "cache")]
    command += ["--output", str(given.out / "kept"), "--column", "text", "--debug"]
    command += ["--num_perm", str(PERMUTATIONS), "--b", str(BANDS), "--r", str(ROWS)]
    command += ["--ngram", str(WORDS), "--min_length", str(WORDS), "--hash_func", "xxh3"]
    command += ["--num_proc", "1", "--batch_size", "10000"]
    subprocess.run(command, check=True)
    label = np.arange(pq.read_metadata(given.documents).num_rows)
    with (given.out / "kept" / "uf.pkl").open("rb") as file:
        found = pickle.load(file)
    for row, of in getattr(found, "parent", found).items():
        label[row] = of
    while (label[label] != label).any():
        label = label[label]
    np.save(given.out / "clusters.npy", label)
