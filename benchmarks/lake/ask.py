"""Ask one query of one store and print the seconds that each answer took, as JSON.

    python benchmarks/lake/ask.py STORE ROOT QUERY KEYS [--budget SECONDS] [--warm]

Cold times hold opening the store and the query in a new process, less Python's imports. Warm ones
are on one open connection, after an answer that is not counted.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import stores


def main() -> None:
    store, root, query, keys, *rest = sys.argv[1:]
    budget = float(rest[rest.index("--budget") + 1])
    sql = (Path(__file__).parent / f"{query}.sql").read_text(encoding="utf-8")
    wanted = set(re.findall(r"\$(\w+)", sql))
    chosen: list[dict[str, Any]] = json.loads(keys)
    began = time.perf_counter()
    con = stores.opened(store, Path(root))
    seconds = []
    rows = 0
    if "--warm" in rest:
        con.execute(sql, {name: chosen[-1][name] for name in wanted} or None).fetchall()
        began = time.perf_counter()
    start = began
    for key in chosen:
        rows = len(con.execute(sql, {name: key[name] for name in wanted} or None).fetchall())
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
        if now - start > budget:
            break
    print(json.dumps({"seconds": seconds, "rows": rows}))


if __name__ == "__main__":
    main()
