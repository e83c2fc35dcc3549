"""What the lake says as plain JSON: rows of a query, and when and why a snapshot was published.

For `explain.py` and `difference.py`, whose facts are printed or handed on as JSON.
"""

from __future__ import annotations

import json
from typing import Any

from pipelines.lake import Lake

Facts = dict[str, Any]


def facts_of(lake: Lake, sql: str, *parameters: Any, snapshot: int | None = None) -> list[Facts]:
    """The rows of a query, ids and times in their written form."""
    rows = lake.query(sql, parameters, snapshot=snapshot).to_pylist()
    return [plain(row) for row in rows]


def publish_of(lake: Lake, snapshot: int) -> Facts | None:
    """A snapshot with its time, author and message; None when it is not there."""
    rows = facts_of(
        lake,
        "select snapshot_id as snapshot, snapshot_time as time, author, commit_message as message "
        "from lake.snapshots() where snapshot_id = ?",
        snapshot,
    )
    return rows[0] if rows else None


def plain(row: Facts) -> Facts:
    """A row as JSON can say it."""
    return json.loads(json.dumps(row, default=str))
