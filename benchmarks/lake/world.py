"""A small lake from recorded answers, and larger ones that repeat it: what the benchmarks run on.

The base is made by the product: ingest, dedup and (for the lake's benchmark) pairs of a folder of
recorded trajectories, or of made-up ones. A larger lake holds the base again and again: copy 0 is
the base itself, every further copy has its prompts again under other ids, with the same texts,
lengths, policies and duplicates. Ids of copies are md5 hashes of the id and the copy's number.

For pairs there can also be more samples. An added sample of a policy is one of its samples cut to
75-100 % of its characters, and its signature has 30-100 % of the permutations of another answer:
new texts that are alike as edits are, but never near-duplicates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import ids
from pipelines.dedup import DedupSettings, dedup
from pipelines.engines.recorded import ingest
from pipelines.labels import input_sql
from pipelines.lake import Append, Lake
from pipelines.pairs import PairSettings, make_pairs
from pipelines.prompts import SplitSettings

SPLIT = SplitSettings(prompt_test_share=0.17, policy_test_share=0.2)  # as configs/recorded.yaml
MEMORY = "3GB"
ROWS = 65_536


def made_up(folder: Path, prompts: int = 300, policies: int = 60, samples: int = 5) -> Path:
    """Recorded trajectories of runs with three checkpoints each, with words drawn by Zipf's law."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{n}" for n in range(5_000)])
    share = 1 / np.arange(1, len(words) + 1)
    cells = [(p, q, s) for p in range(prompts) for q in range(policies) for s in range(samples)]
    lengths = np.minimum(rng.geometric(1 / 60, len(cells)), 400)
    drawn = words[rng.choice(len(words), lengths.sum(), p=share / share.sum())]
    table = pa.table(
        {
            "prompt_id": [f"made-up/{p}" for p, _, _ in cells],
            "source": ["made-up"] * len(cells),
            "prompt": [f"question {p} of {p * 7919 % 10007}" for p, _, _ in cells],
            "policy": [f"run{q // 3}@{q % 3}" for _, q, _ in cells],
            "policy_group": [f"run{q // 3}" for _, q, _ in cells],
            "lineage_step": [q % 3 for _, q, _ in cells],
            "response": [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])],
            "sample_index": pa.array([s for *_, s in cells], pa.int32()),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "trajectories.parquet")
    return folder


def base(home: Path, data: Path | None, *, pairs: bool) -> Path:
    """The lake that is repeated: policies, prompts, trajectories, duplicates, maybe pairs.

    Returns:
        The file with its signatures. A finished base is taken as it is.
    """
    signatures = home / "signatures.parquet"
    if signatures.exists():
        return signatures
    data = data or made_up(home / "made-up")
    found = ingest(data / "trajectories.parquet", SPLIT)
    work = home / "work"
    texts = work / "texts.parquet"
    work.mkdir(parents=True, exist_ok=True)
    tables = ("policies", "prompts", "trajectories")
    with Lake.open(home, memory_limit=MEMORY) as lake:
        changes = [Append(name, getattr(found, name)) for name in tables]
        lake.publish("benchmark", "base", changes)
        lake.copy(
            "select t.trajectory_id, t.prompt_id, p.source, t.text, t.content_hash "
            "from trajectories t join prompts p using (prompt_id) order by 2, 1",
            texts,
        )
        result = dedup([texts], DedupSettings(), work / "dedup")
        lake.publish("benchmark", "duplicates", [Append("duplicates", result.duplicates)])
        if pairs:
            lake.copy(input_sql(sources(lake), result.signatures), work / "answers.parquet")
            settings = PairSettings(require_same_sampling=False)
            made = make_pairs(work / "answers.parquet", settings, work / "pairs")
            lake.publish("benchmark", "pairs", [Append("pairs", made.files)])
            lake.publish("benchmark", "sums", [Append("pair_sums", made.sums)])
    result.signatures.rename(signatures)
    return signatures


def sources(lake: Lake) -> list[str]:
    """All prompt sources of a lake."""
    return lake.query("select distinct source from prompts order by 1")["source"].to_pylist()


def copied(name: str, *salt: str) -> str:
    """SQL of an id in copy `copy.k` (or sample `more.s`, or both): itself in the first of each."""
    for part in salt:
        salted = f"md5({name}::varchar || '/{part}' || {part})::uuid"
        name = f"case when {part} = 0 then {name} else {salted} end"
    return name


def repeat(small: Lake, large: Lake, work: Path, copies: int, samples: int = 1) -> None:
    """Publish `copies` times the prompts of a base, with `samples` times their answers."""
    times = f"range({copies}) as copy(k), range({samples}) as more(s)"
    answer = copied("trajectory_id", "s", "k")
    prompt = copied("prompt_id", "k")
    queries = {
        "policies": "from policies",
        "prompts": f"select * replace ({prompt} as prompt_id, source_key || '/' || k as source_key)"
        f" from prompts, range({copies}) as copy(k)",
        "trajectories": f"select * replace ({answer} as "
        f"trajectory_id, {prompt} as prompt_id, {copied('content_hash', 's')} as content_hash, "
        "sample_index + (1000 * s)::integer as sample_index, "
        "case when s = 0 then text else left(text, (length(text) * "
        "(0.75 + 0.25 * (hash(trajectory_id, s) % 1000) / 1000))::integer) end as text) "
        f"from trajectories, {times}",
        "duplicates": f"select * replace ({copied('trajectory_id', 'k')} as "
        f"trajectory_id, {copied('cluster_id', 'k')} as cluster_id) "
        f"from duplicates, range({copies}) as copy(k) where scope = 'prompt'",
    }
    for table, sql in queries.items():
        columns = ", ".join(large.query(f"from {table} limit 0").column_names)
        file = work / f"{table}.parquet"
        small.copy(f"select {columns} from ({sql})", file)
        large.publish("benchmark", f"{table}, repeated", [Append(table, [file])])
        file.unlink()


def repeat_signatures(
    small: Lake, known: Path, large: Path, work: Path, copies: int, samples: int
) -> None:
    """Write the signatures of a repeated lake; those of added samples are varied, by seed."""
    rows = work / "rows.parquet"
    small.copy(
        f"select trajectory_id as base, s, {copied('trajectory_id', 's', 'k')} as trajectory_id "
        f"from trajectories, range({copies}) as copy(k), range({samples}) as more(s)",
        rows,
    )
    table = pq.read_table(known)
    high = ids.words(table["trajectory_id"])[:, 0]
    order = np.argsort(high)
    values = table["signature"].combine_chunks()
    signatures = values.flatten().to_numpy().reshape(len(values), -1)
    width = signatures.shape[1]
    kind = pa.schema([("trajectory_id", pa.uuid()), ("signature", pa.list_(pa.uint32()))])
    rng = np.random.default_rng(0)
    with pq.ParquetFile(rows) as source, pq.ParquetWriter(large, kind, compression="zstd") as sink:
        for batch in source.iter_batches(ROWS):
            base_high = ids.words(batch["base"])[:, 0]
            own = signatures[order[np.searchsorted(high, base_high, sorter=order)]]
            other = signatures[rng.integers(0, len(signatures), len(own))]
            share = np.where(batch["s"].to_numpy() == 0, 0, rng.uniform(0.3, 1, len(own)))
            drawn = rng.random((len(own), width), np.float32) < share[:, None].astype(np.float32)
            flat = pa.array(np.where(drawn, other, own).ravel())
            offsets = pa.array(np.arange(len(own) + 1, dtype=np.int32) * width)
            lists = pa.ListArray.from_arrays(offsets, flat)
            sink.write_table(pa.table([batch["trajectory_id"], lists], schema=kind))
    rows.unlink()


def repeated_pairs(copies: int, *extra: str) -> str:
    """SQL of a base's pairs in `copies` copies: the lake's columns, and `extra` ones of `pairs`."""
    a, b = copied("trajectory_a", "k"), copied("trajectory_b", "k")
    more = "".join(f", {name}" for name in extra)
    return (
        f"select least({a}, {b}) as trajectory_a, greatest({a}, {b}) as trajectory_b, "
        f"{copied('prompt_id', 'k')} as prompt_id, label, reason, relation, same_sampling, "
        f"similarity, length_ratio, split, cell{more} from pairs, range({copies}) as copy(k)"
    )
