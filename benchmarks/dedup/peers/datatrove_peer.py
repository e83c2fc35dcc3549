"""datatrove: its own four stages, with the benchmark's words, shingles and bands.

It does not verify: whatever shares a bucket is one cluster.
"""

import numpy as np
import pyarrow.parquet as pq
from common import BANDS, ROWS, WORDS, options
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import ParquetReader
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer


class Spaces(WordTokenizer):
    """The benchmark's words stand between single spaces."""

    def word_tokenize(self, text):
        return text.split(" ")

    def sent_tokenize(self, text):
        return [text]

    def span_tokenize(self, text):
        return [(0, len(text))]


if __name__ == "__main__":
    given = options()
    work = given.out / "datatrove"
    config = MinhashConfig(
        n_grams=WORDS,
        num_buckets=BANDS,
        hashes_per_bucket=ROWS,
        hash_config=HashConfig(precision=64, hash_fc="xxhash"),
        norm_config=TextNormConfig(
            lowercase=False,
            norm_whitespace=False,
            remove_punctuation=False,
            norm_unicode_diacritics=False,
            norm_numbers=False,
        ),
    )

    def run(name, pipeline, tasks=1):
        LocalPipelineExecutor(
            pipeline=pipeline, tasks=tasks, workers=1, logging_dir=str(work / "logs" / name)
        ).run()

    reader = ParquetReader(
        str(given.documents.parent), glob_pattern=given.documents.name, text_key="text"
    )
    signatures, buckets, found = (str(work / name) for name in ("signatures", "buckets", "found"))
    run("1", [reader, MinhashDedupSignature(signatures, config=config, language=Spaces())])
    if given.mode == "all":
        run("2", [MinhashDedupBuckets(signatures, buckets, config=config)], BANDS)
        run("3", [MinhashDedupCluster(buckets, found, config=config, save_cluster_id=True)])
        label = np.arange(pq.read_metadata(given.documents).num_rows)
        file = work / "found" / "000000.clusters"  # none where nothing was found
        members = np.fromfile(file, np.uint32) if file.is_file() else np.zeros(0, np.uint32)
        members = members.reshape(-1, 2)
        _, first = np.unique(members[:, 1], return_index=True)
        label[members[:, 0]] = members[first, 0][members[:, 1]]
        np.save(given.out / "clusters.npy", label)
