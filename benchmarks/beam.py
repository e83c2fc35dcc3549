"""The signature stage with one FnApiRunner process and with two: wall time, and equal files.

    python benchmarks/beam.py [--documents 1000000] [--workers 2] [--rounds 5] [--data DIR]

The stage of `pipelines.dedup.sketch_parts`: texts in, parts on disk out. Runs alternate and the
medians are compared. Building the pipeline and starting processes are in the wall time; imports are
in that of the first round of several processes alone, for the server that they are forked from
keeps them as this process does. On a machine with other work wall times say little: the CPU seconds
of one process and the load average tell whether it was quiet. The last line is JSON.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent / "dedup"))
import corpus

from pipelines.dedup import sketch_parts
from pipelines.near import DedupSettings
from pipelines.sketches import pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=os.environ.get("POLAR_DATA"))
    home = Path(os.environ.get("POLAR_HOME", "var"))
    parser.add_argument("--work", type=Path, default=home / "bench" / "beam")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    documents = work / "documents.parquet"
    if not documents.is_file() or pq.read_metadata(documents).num_rows != options.documents:
        base = corpus.base_texts(options.data, options.documents)
        corpus.write_families(documents, base, options.documents)
    seconds: dict[int, list[float]] = {1: [], options.workers: []}
    used: list[float] = []
    for _ in range(options.rounds):
        for workers in seconds:
            folder = work / f"parts-{workers}"
            shutil.rmtree(folder, ignore_errors=True)
            began, before = time.perf_counter(), time.process_time()
            sketch_parts(pieces([documents], folder), DedupSettings(), workers)
            seconds[workers].append(time.perf_counter() - began)
            said = f"{workers} processes: {seconds[workers][-1]:.1f} s wall"
            if workers == 1:
                used.append(time.process_time() - before)
                said += f", {used[-1]:.1f} s CPU"
            print(f"{said}, load {os.getloadavg()[0]:.1f}", flush=True)
    single, several = work / "parts-1", work / f"parts-{options.workers}"
    names = [str(path.relative_to(single)) for path in single.glob("*/*")]
    _, differing, missing = filecmp.cmpfiles(single, several, names, shallow=False)
    if differing or missing:
        sys.exit(f"files differ or are missing: {differing + missing}")
    one, more = (statistics.median(seconds[workers]) for workers in (1, options.workers))
    print(
        json.dumps(
            {
                "documents": options.documents,
                "workers": options.workers,
                "equal_files": len(names),
                "seconds_one": round(one, 2),
                "seconds": round(more, 2),
                "cpu_one": round(statistics.median(used), 2),
                "speedup": round(one / more, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
