"""Ours, as the benchmark runs it: python ours.py signatures|all DOCUMENTS OUT [--index DIR]."""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as pq

from pipelines import minhash
from pipelines.dedup import dedup
from pipelines.near import DedupSettings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["signatures", "all"])
    parser.add_argument("documents", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--index", type=Path)
    options = parser.parse_args()
    settings = DedupSettings()
    if options.mode == "signatures":
        for batch in pq.ParquetFile(options.documents).iter_batches(8192, columns=["text"]):
            minhash.signatures(minhash.shingles(batch["text"], settings.words), settings)
        return
    result = dedup([options.documents], settings, options.out / "work", index=options.index)
    pq.write_table(result.duplicates, options.out / "duplicates.parquet")


if __name__ == "__main__":
    main()
