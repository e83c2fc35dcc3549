"""Which pool file a source and its policies' names belong to: one home, one file for each.

Two files that both call themselves `embedded` would replace each other's prompts and answers, and
two policies of one name would share a Dagster partition; the second is refused instead.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from assets.workspace import Workspace
from pipelines.errors import ConfigError
from pipelines.policies import Pool, load_pool

CLAIMS = "pools.json"  # under the home: source -> pool file, relative to the home


def claim(workspace: Workspace) -> None:
    """Note that this home's source is the configuration's pool file.

    A claim ends when its file is gone or names another source. A file that says the same is the
    same pool, wherever it is.

    Raises:
        ConfigError: another pool file has the source, or a policy of the same name.
    """
    if workspace.config.is_recorded:
        return
    path, record = workspace.pool_path, workspace.home / CLAIMS
    claims: dict[str, str] = {}
    if record.exists():
        claims = json.loads(record.read_text(encoding="utf-8"))
    own = {policy.name for policy in workspace.pool.policies}
    for source, place in claims.items():
        other = (workspace.home / place).resolve()
        pool = _still_there(other, source)
        if other == path or pool is None:
            continue
        if source == workspace.pool.source:
            if other.read_bytes() == path.read_bytes():
                return
            msg = (
                f"{path} and {other} are two pools that both claim the source {source!r}: they "
                "would replace each other's prompts; give one of them another `source`, or another "
                "POLAR_HOME"
            )
            raise ConfigError(msg)
        if shared := sorted(own & {policy.name for policy in pool.policies}):
            msg = (
                f"{path} (source {workspace.pool.source!r}) and {other} (source {source!r}) both "
                f"name a policy {shared[0]!r}; rename one of them, or use another POLAR_HOME"
            )
            raise ConfigError(msg)
    claims[workspace.pool.source] = os.path.relpath(path, workspace.home)
    part = record.with_suffix(".part")
    part.write_text(json.dumps(claims, indent=1, sort_keys=True), encoding="utf-8")
    part.replace(record)


def _still_there(path: Path, source: str) -> Pool | None:
    try:
        pool = load_pool(path)
    except ConfigError:
        return None
    return pool if pool.source == source else None
