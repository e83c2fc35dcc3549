"""Those who run the steps of bench-train: a process each, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEERS = {
    "trl": ["trl==1.16.0", "transformers==5.19.0", "torch==2.13.0"],
    "padded": ["transformers==5.19.0", "torch==2.13.0", "numpy"],
}
BEGAN = time.perf_counter()


class Contender:
    """A process that runs steps when it is told to."""

    def __init__(self, python: str, script: str, model: Path, log: Path, **own: str) -> None:
        own |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        own |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        self.script, self.log = script, log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [python, str(HERE / script), str(model)],
                env=os.environ | own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._answer()

    def run(self, task: str, steps: list[Any], **options: Any) -> dict[str, Any]:
        """What the process answers: seconds of all steps but the first, losses or scores, peak.

        Raises:
            RuntimeError: it died; its log says why.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"task": task, "steps": steps, **options}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            message = f"{self.script} ended; see {self.log}"
            raise RuntimeError(message)
        return json.loads(line)


def python_of(peer: str, folder: Path) -> str:
    """The interpreter of a peer's environment, which is made if it is not there."""
    python, ready = folder / peer / "bin" / "python", folder / peer / "ready"
    if not ready.is_file():
        say(f"making the environment of {peer} in {folder} (minutes) ...")
        subprocess.run([sys.executable, "-m", "venv", str(folder / peer)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *PEERS[peer]], check=True)
        ready.touch()
    return str(python)


def say(text: str) -> None:
    """A line of progress with the time since the start."""
    print(f"[{time.perf_counter() - BEGAN:6.0f} s] {text}", flush=True)
