"""Where the project and its home are. Nothing else is imported, so that `polar --help` is quick."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def polar_home() -> Path:
    """POLAR_HOME as an absolute path; `var` in the project's folder when it is not set."""
    given = os.environ.get("POLAR_HOME")
    return Path(given).expanduser().resolve() if given else PROJECT / "var"
