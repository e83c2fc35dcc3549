"""One environment for each peer, made once; ours is the one that runs the benchmark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PEERS = {
    "rensa": ["rensa==0.5.0", "pyarrow", "numpy"],
    "datasketch": ["datasketch==2.0.0", "xxhash==4.1.0", "pyarrow", "numpy"],
    "datatrove": ["datatrove[processing]==0.10.1", "pyarrow", "xxhash"],
    "text-dedup": ["text-dedup==0.4.0"],
}


def python_of(peer: str, folder: Path) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there."""
    python = folder / peer / "bin" / "python"
    ready = folder / peer / "ready"
    if not ready.is_file():
        print(f"making the environment of {peer} in {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder / peer)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *PEERS[peer]], check=True)
        ready.touch()
    return python
