"""Dedup beside its peers: cost for each document, memory, precision and recall, growth.

    python benchmarks/dedup/bench.py [--documents 1000000] [--peer-documents 100000] [--data DIR]

Same words, shingles (five words), permutations (128) and bands (16 of 8) for all. Every number is
CPU time (user and system) of a process of its own, less that of the same command on twenty
documents: start-up, imports and compilation stand apart. Peers run on `--peer-documents`, and
ratios are taken at that size. Peers that do not verify candidates (datatrove, text-dedup) are taken
as they are. `--data` (or POLAR_DATA) is a folder with `trajectories.parquet`; without it texts are
made up. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import corpus
import environments
import exact
import numpy as np
import pyarrow.parquet as pq

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Cost(NamedTuple):
    """CPU seconds and peak resident memory of a process and its children."""

    seconds: float
    gib: float


USAGE = """
import json, resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=sys.stderr, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20]))
"""
"""A small process in between: a peak counts from the fork, with all that the parent then holds."""


def measure(command: list[str], log: Path) -> Cost:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed.
    """
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    own |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-c", USAGE, *command],
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=output,
            check=False,
        )
    if done.returncode:
        message = f"{' '.join(command)} failed; see {log}"
        raise RuntimeError(message)
    return Cost(*json.loads(done.stdout))


class Bench:
    """A work folder and the commands that are measured in it."""

    def __init__(self, work: Path, envs: Path, peers: list[str]) -> None:
        self.work, self.peers = work, peers
        self.pythons = {"ours": Path(sys.executable)}
        self.pythons |= {peer: environments.python_of(peer, envs) for peer in peers}
        self.start_up: dict[tuple[str, str], float] = {}

    def run(self, tool: str, mode: str, documents: Path, *more: str) -> tuple[Cost, Path]:
        """Cost of a tool on documents, less start-up, and the folder with what it found."""
        if (tool, mode) not in self.start_up:
            tiny = self.work / "tiny.parquet"
            self._run(tool, mode, tiny)  # once for caches
            self.start_up[tool, mode] = self._run(tool, mode, tiny)[0].seconds
        cost, out = self._run(tool, mode, documents, *more)
        return Cost(cost.seconds - self.start_up[tool, mode], cost.gib), out

    def _run(self, tool: str, mode: str, documents: Path, *more: str) -> tuple[Cost, Path]:
        out = self.work / f"out-{tool}-{mode}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        script = HERE / "ours.py"
        if tool != "ours":
            script = HERE / "peers" / f"{tool.replace('-', '_')}_peer.py"
        command = [str(self.pythons[tool]), str(script), mode, str(documents), str(out), *more]
        return measure(command, self.work / f"{tool}-{mode}.log"), out

    def clusters(self, tool: str, out: Path, documents: Path) -> np.ndarray:
        """Cluster of each row."""
        if tool != "ours":
            return np.load(out / "clusters.npy")
        found = pq.read_table(out / "duplicates.parquet", filters=[("scope", "==", "corpus")])
        return corpus.row_numbers(pq.read_table(documents, columns=["trajectory_id"]), found)


def median(costs: list[Cost]) -> Cost:
    """Median seconds, largest peak."""
    seconds = float(np.median([cost.seconds for cost in costs]))
    return Cost(seconds, max(cost.gib for cost in costs))


def compare(
    bench: Bench, documents: Path, truth: np.ndarray, name: str, rounds: int
) -> dict[str, dict[str, float]]:
    """All tools on one set of documents, in turns; medians of the costs."""
    rows = len(truth)
    tools = ["ours", *bench.peers]
    costs: dict[str, list[Cost]] = {f"{tool} {mode}": [] for tool in tools for mode in MODES}
    labels: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for tool in tools:
            for mode in MODES:
                cost, out = bench.run(tool, mode, documents)
                costs[f"{tool} {mode}"].append(cost)
                if mode == "all" and tool not in labels:
                    labels[tool] = bench.clusters(tool, out, documents)
    print(f"\n{name}, {rows:,} documents: documents per CPU-second, start-up apart")
    print(f"{'':12} signatures  end to end  start-up s  peak GiB  precision  recall  as ours")
    table = {}
    for tool in tools:
        (signatures, _), (every, gib) = (median(costs[f"{tool} {mode}"]) for mode in MODES)
        precision, recall = exact.agreement(labels[tool], truth)
        same = float(np.mean(_smallest(labels[tool]) == _smallest(labels["ours"])))
        table[tool] = {"signatures": signatures, "all": every, "precision": precision}
        table[tool] |= {"recall": recall, "gib": gib}
        print(
            f"{tool:12} {rows / signatures:10,.0f}  {rows / every:10,.0f}  "
            f"{bench.start_up[tool, 'all']:10.2f}  {gib:8.2f}  {precision:9.4f}  {recall:6.4f}  "
            f"{same:7.4f}",
            flush=True,
        )
    return table


MODES = ("signatures", "all")


def _smallest(label: np.ndarray) -> np.ndarray:
    """The smallest row of each row's cluster."""
    _, first, place = np.unique(label, return_index=True, return_inverse=True)
    return first[place]


def grow(
    bench: Bench, base: list[str], largest: int, rounds: int
) -> tuple[float, list[Cost], Path]:
    """Five sizes up to the largest: exponent, costs, and the largest documents."""
    sizes = [round(largest * share) for share in (0.1, 0.2, 0.4, 0.7, 1.0)]
    costs = []
    for size in sizes:
        documents = bench.work / "growing.parquet"
        corpus.write_families(documents, base, size, seed=1)
        cost = median([bench.run("ours", "all", documents)[0] for _ in range(rounds)])
        costs.append(cost)
        print(f"ours, {size:,} documents: {cost.seconds:.1f} s, {cost.gib:.2f} GiB", flush=True)
    seconds = [max(cost.seconds, 1e-3) for cost in costs]
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]), costs, documents


def add_one_percent(bench: Bench, documents: Path, rounds: int) -> tuple[float, bool, bool]:
    """Share of a full run's cost for 1 % more; are clusters the same so, and in another order?

    The share is the median of `rounds`; in each a full run is followed by its 1 %.
    """
    table = pq.read_table(documents)
    known = round(len(table) / 1.01)
    old, new = bench.work / "known.parquet", bench.work / "more.parquet"
    pq.write_table(table.slice(0, known), old, row_group_size=corpus.ROWS)
    pq.write_table(table.slice(known), new, row_group_size=corpus.ROWS)
    del table
    index = bench.work / "index"
    shares = []
    for _ in range(rounds):
        shutil.rmtree(index, ignore_errors=True)
        full, _ = bench.run("ours", "all", old, "--index", str(index))
        more, out = bench.run("ours", "all", new, "--index", str(index))
        shares.append(more.seconds / full.seconds)
        print(f"1 % more: {more.seconds:.2f} s after {full.seconds:.2f} s, {more.gib:.2f} GiB")
    added = pq.read_table(out / "duplicates.parquet")
    _, out = bench.run("ours", "all", documents)
    whole = pq.read_table(out / "duplicates.parquet")
    corpus.shuffled(documents, bench.work / "shuffled.parquet", seed=3)
    _, out = bench.run("ours", "all", bench.work / "shuffled.parquet")
    return (
        float(np.median(shares)),
        added.equals(whole),
        pq.read_table(out / "duplicates.parquet").equals(whole),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--peer-documents", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5, help="of everything but the real texts")
    parser.add_argument("--data", type=Path, default=os.environ.get("POLAR_DATA"))
    home = Path(os.environ.get("POLAR_HOME", "var"))
    parser.add_argument("--work", type=Path, default=home / "bench" / "dedup")
    parser.add_argument("--environments", type=Path, default=home / "bench" / "environments")
    parser.add_argument("--peers", nargs="*", default=list(environments.PEERS))
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, options.environments.resolve(), options.peers)
    base = corpus.base_texts(options.data, options.documents)
    corpus.write_plain(work / "tiny.parquet", [*base[:19], base[19] + " \u00e9\u4f60\u597d"])
    if options.data:
        real = work / "real.parquet"
        corpus.write_plain(real, base[: options.peer_documents])
        truth = exact.near_exhaustive_clusters(str(real))
        compare(bench, real, truth, "real trajectories", 1)
    documents = work / "families.parquet"
    corpus.write_families(documents, base, options.peer_documents)
    table = compare(
        bench, documents, exact.true_clusters(str(documents)), "seeded edits", options.rounds
    )
    exponent, costs, largest = grow(bench, base, options.documents, options.rounds)
    share, same, order = add_one_percent(bench, largest, options.rounds)
    result = {
        "documents": options.documents,
        "peer_documents": options.peer_documents,
        "growth_exponent": round(exponent, 3),
        "incremental_share": round(share, 3),
        "incremental_equals_full": same,
        "shuffled_equals": order,
        "peak_gib": round(costs[-1].gib, 2),
        "precision": round(table["ours"]["precision"], 4),
        "recall": round(table["ours"]["recall"], 4),
        "peers": {
            peer: {key: round(table[peer][key], 4) for key in ("precision", "recall")}
            for peer in options.peers
        },
    }
    for peer in options.peers:
        signatures, every = (table[peer][mode] / table["ours"][mode] for mode in MODES)
        result[f"signature_ratio_vs_{peer}"] = round(signatures, 2)
        result[f"ratio_vs_{peer}"] = round(every, 2)
    print(json.dumps(result))
    if not (same and order):
        sys.exit("clusters depend on the order or the split of the documents")


if __name__ == "__main__":
    main()
