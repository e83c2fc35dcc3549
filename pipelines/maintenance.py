"""Keeping the lake small and quick: few files, no snapshots that nothing names, no forgotten files.

Rows stay as they are; what is published is a matter of `lake.py`.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipelines.attach import DATA, SPILL
from pipelines.lake import Lake

AUTHOR = "lake"
SPILL_KEPT = timedelta(days=2)  # of a process that was killed, in case it lives

_EXPENDABLE = """
select snapshot_id from lake.snapshots()
where snapshot_time < ? and snapshot_id < (select max(snapshot_id) from lake.snapshots())
    and snapshot_id not in (
        select snapshot from checkpoints where snapshot is not null
        union all select snapshot from evaluations where snapshot is not null
        union all select snapshot from groups
        union all select snapshot_id from groups -- the publish that shows them
    )
order by snapshot_id
"""


def maintain(
    lake: Lake, grace: timedelta = timedelta(hours=1), keep: timedelta | None = None
) -> dict[str, int]:
    """Merge small files, rewrite those mostly deleted, remove files that no snapshot needs.

    Without `keep` every snapshot stays readable. With it, those older than that are let go,
    but for the newest and all that a checkpoint, an evaluation or a group names. A file is
    removed `grace` (and up to a day) after it fell out of use, so that queries which still read
    it can end; without grace at once, for where nobody else has the lake open.

    Returns:
        Data files of the newest snapshot `before` and `after`, files `removed`, snapshots
        `expired`, and bytes of the data folder, `bytes_before` and `bytes_after`.

    Raises:
        LakeError: the lake is locked for too long, or cannot be read.
    """
    before, size = _data_files(lake), _bytes(lake.home / DATA)
    # DuckLake compares these times as text in SQLite, where "... 23:59" comes before "...T00".
    age = f"older_than => now() - interval {int(grace.total_seconds())} second - interval 1 day"
    which = age if grace else "cleanup_all => true"
    with lake.turn():
        expired = _expendable(lake, keep) if keep is not None else []
        if expired:
            call = f"call ducklake_expire_snapshots('lake', versions => {expired})"
            lake.commit(AUTHOR, "expire snapshots", [call])
        call = "call ducklake_rewrite_data_files('lake', delete_threshold => 0.5)"
        lake.commit(AUTHOR, "rewrite files", [call])
        lake.commit(AUTHOR, "merge small files", ["call ducklake_merge_adjacent_files('lake')"])
        removed = sum(
            lake.query(f"call ducklake_{name}('lake', {which})").num_rows
            for name in ("cleanup_old_files", "delete_orphaned_files")
        )
    for spilled in (lake.home / SPILL).glob("duckdb-*"):
        if time.time() - spilled.stat().st_mtime > SPILL_KEPT.total_seconds():
            shutil.rmtree(spilled, ignore_errors=True)
    return {
        "before": before,
        "after": _data_files(lake),
        "removed": removed,
        "expired": len(expired),
        "bytes_before": size,
        "bytes_after": _bytes(lake.home / DATA),
    }


def _expendable(lake: Lake, keep: timedelta) -> list[int]:
    """Snapshots older than `keep` that are not the newest and that nothing names.

    Groups count as well: a training run may be reading theirs and has no checkpoint yet.
    """
    found = lake.query(_EXPENDABLE, [datetime.now(UTC) - keep])
    return found["snapshot_id"].to_pylist()


def _bytes(folder: Path) -> int:
    """Bytes of all files in a folder; of the lake's data, those waiting for removal included."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # another process removes it just now
            total += path.stat().st_size if path.is_file() else 0
    return total


def _data_files(lake: Lake) -> int:
    files = lake.query("select sum(file_count)::bigint from ducklake_table_info('lake')")
    return files[0][0].as_py()
