"""One vLLM server for one policy: started, watched, started again when it dies, stopped.

The server runs in an environment of its own (`make vllm`), as a child of `guard.py`, which ends it
with all its processes when this one lets go or dies. What is asked of it is in `openai.py`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.engines import memory
from pipelines.engines.options import VllmOptions
from pipelines.errors import PolicyUnavailableError

PROJECT = Path(__file__).resolve().parents[2]
GUARD = Path(__file__).with_name("guard.py")
MODEL = "policy"  # the name under which the server knows its one model
SHOWN = 12  # last lines of a log that an error shows
POLL = 0.25
_MEMORY = re.compile(
    r"out of memory|no available memory|cannot allocate|MemoryError|bad_alloc|not enough memory"
    r"|insufficient memory|available memory .* is less",
    re.IGNORECASE,
)
# What says nothing of the cause, at the end of vLLM's log.
_NOISE = re.compile(r"nanobind|leaked|skipped remainder|resource_tracker|warnings\.warn|^\s*$")


def interpreter() -> Path:
    """The Python that has vLLM: POLAR_VLLM_PYTHON, or that of `.venv-vllm`.

    Raises:
        PolicyUnavailableError: there is none.
    """
    given = os.environ.get("POLAR_VLLM_PYTHON")
    path = Path(given).expanduser() if given else PROJECT / ".venv-vllm" / "bin" / "python"
    if not path.is_file():
        msg = f"{path}: no Python with vLLM there; run `make vllm`, or set POLAR_VLLM_PYTHON"
        raise PolicyUnavailableError(msg)
    return path.absolute()


def command(
    model: str, revision: str | None, options: VllmOptions, *, python: Path, port: int
) -> list[str]:
    """The server's command line; a model of a hub has a revision, a folder has none."""
    said: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "tokenizer-revision": revision,
        "served-model-name": MODEL,
        "host": "127.0.0.1",
        "port": port,
        "dtype": options.dtype,
        "max-model-len": options.max_model_len,
    }
    if memory.on_gpu(options):
        said["tensor-parallel-size"] = options.tensor_parallel
        said["gpu-memory-utilization"] = options.gpu_memory
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    words += [f"--{name}={value}" for name, value in said.items() if value is not None]
    if not memory.on_gpu(options):
        words.append("--enforce-eager")
    return [*words, "--disable-uvicorn-access-log", *options.arguments]


def environment(options: VllmOptions, *, offline: bool) -> dict[str, str]:
    """What the server's processes see: ours, and how vLLM is to behave."""
    found = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found["VLLM_NO_USAGE_STATS"] = "1"
    if offline:
        found["HF_HUB_OFFLINE"] = "1"
    if not memory.on_gpu(options):
        found["VLLM_CPU_KVCACHE_SPACE"] = str(options.kv_cache_gib)
        found.setdefault("OMP_NUM_THREADS", "1")
    return found


class Server:
    """A server process that can be waited for, looked at, started again and stopped."""

    def __init__(
        self,
        words: Callable[[int], Sequence[str]],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 900.0,
        memory_note: str = "",
    ):
        """Prepare; nothing starts yet.

        Args:
            words: the command line for a port.
            log: file that takes what the server says, of all its starts.
            environment: of the server, or None for that of this process.
            start_timeout: seconds until it must be healthy.
            memory_note: need and have, for an error that looks like a want of memory.
        """
        self.words = words
        self.log = log
        self.environment = environment
        self.start_timeout = start_timeout
        self.memory_note = memory_note
        self.generation = 0  # how often it was started
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._given_up = threading.Event()

    def start(self) -> None:
        """Start it where it is not running, and wait until it is healthy.

        Raises:
            PolicyUnavailableError: it ended, or was not healthy in time; with its last words.
        """
        self._given_up.clear()
        with self._lock:
            if self._process is None:
                self._start()

    def restart(self) -> None:
        """End what is left of it and start it again."""
        with self._lock:
            self._stop()
            self._start()

    def stop(self) -> None:
        """End it with all its processes; returns when none is left."""
        with self._lock:
            self._stop()

    def give_up(self) -> None:
        """End a start that another thread waits for."""
        self._given_up.set()

    def healthy(self) -> bool:
        """Whether it runs and says that it is well."""
        import httpx

        if self._ended():
            return False
        # The address is plain http: without `verify` no certificates are read, 40 ms at every poll.
        try:
            answer = httpx.get(f"{self.url}/health", timeout=5, trust_env=False, verify=False)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    def describe(self) -> tuple[str, int]:
        """Version, and the most tokens of prompt and answer together, as the server says.

        Raises:
            PolicyUnavailableError: it does not say.
        """
        import httpx

        try:
            with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as http:
                version = http.get("/version").json()["version"]
                (model, *_) = http.get("/v1/models").json()["data"]
                return f"vllm {version}", int(model["max_model_len"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            msg = f"{self.url} does not say which vLLM it is ({type(error).__name__})"
            raise PolicyUnavailableError(msg) from None

    def _start(self) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._began = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(GUARD), *self.words(port)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd=self.log.parent,
                start_new_session=True,  # Ctrl-C is for the driver, who then stops the server
            )
        self.generation += 1
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise

    def _wait(self) -> None:
        """Until it is healthy, or cannot become so."""
        deadline = time.monotonic() + self.start_timeout
        while not self.healthy():
            if self._ended():
                raise PolicyUnavailableError(self._last_words("ended before it was ready"))
            if time.monotonic() > deadline:
                late = f"was not ready in {self.start_timeout:.0f} s"
                raise PolicyUnavailableError(self._last_words(late))
            if self._given_up.wait(POLL):
                msg = "the start of vLLM was given up"
                raise PolicyUnavailableError(msg)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.wait()

    def _ended(self) -> bool:
        process = self._process  # another thread may stop it meanwhile
        return process is None or process.poll() is not None

    def _last_words(self, what: str) -> str:
        with self.log.open("rb") as file:
            file.seek(self._began)
            text = file.read().decode(errors="replace")
        lines = [line.rstrip() for line in text.splitlines() if not _NOISE.search(line)]
        code = self._process.poll() if self._process else None
        killed = " (killed: often a want of memory)" if code == 128 + 9 else ""
        note = f"; {self.memory_note}" if killed or _MEMORY.search(text) else ""
        ended = f", exit code {code}{killed}" if code is not None else ""
        said = "\n".join(f"    {line}" for line in lines[-SHOWN:])
        return f"vLLM {what}{ended}{note}; the last lines of {self.log}:\n{said}"


def beginning_of_text(folder: Path) -> str | None:
    """The token that opens a text in a checkpoint, as text; None where it has none."""
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    token = said.get("bos_token")
    return token.get("content") if isinstance(token, dict) else token


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
