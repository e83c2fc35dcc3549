"""`dagster definitions validate` and `polar up` on a home elsewhere: the repository stays clean."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.assets.homes import ROOT, Home

pytestmark = pytest.mark.slow
QUERY = """{
  repositoriesOrError { ... on RepositoryConnection { nodes {
    assetNodes { groupName description assetKey { path } }
    schedules { name cronSchedule scheduleState { status } }
  } } }
}"""


LAUNCH = """mutation {
  launchRun(executionParams: {
    selector: {repositoryLocationName: "assets.definitions", repositoryName: "__repository__",
               jobName: "__ASSET_JOB", assetSelection: [{path: ["scaling"]}]}
    runConfigData: {}
  }) { __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } }
}"""
STATUS = 'query { runOrError(runId: "%s") { ... on Run { status } } }'


def root_files() -> set[str]:
    """What lies in the repository's root, but for caches of tools."""
    caches = {".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".git"}
    return {path.name for path in ROOT.iterdir()} - caches


def test_definitions_are_valid_and_nothing_is_written_into_the_repository(made: Home):
    before = root_files()
    environment = made.environment() | {
        "DAGSTER_HOME": str(ROOT),
        "POLAR_CONFIG": str(made.config),
    }
    command = [sys.executable, "-m", "dagster", "definitions", "validate"]
    done = subprocess.run(
        [*command, "-m", "assets.definitions"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Validation successful" in done.stdout + done.stderr
    assert root_files() == before


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def family(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(path.parent.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found & set(parents)


@contextmanager
def up(home: Home, port: int) -> Iterator[subprocess.Popen[str]]:
    """`polar up` as a shell's background job; none of its processes outlives the test."""
    process = subprocess.Popen(
        home.command("up", "--config", str(home.config), "--port", str(port)),
        cwd=ROOT,
        env=home.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    seen: set[int] = set()
    try:
        yield process
    finally:
        seen |= family(process.pid)
        for pid in seen:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def ask(port: int, path: str, body: Any = None) -> tuple[int, bytes]:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.status, answer.read()


def await_answer(process: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + 200
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline, "no answer"
        try:
            assert ask(port, "/server_info")[0] == 200
            break
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)


def test_scaling_runs_from_the_ui(made: Home, tmp_path: Path):
    home, port = made.copy(tmp_path), free_port()
    with up(home, port) as process:
        await_answer(process, port)
        launched = json.loads(ask(port, "/graphql", {"query": LAUNCH})[1])["data"]["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        deadline, status = time.monotonic() + 270, ""
        while status != "SUCCESS":
            assert time.monotonic() < deadline, status
            time.sleep(1)
            query = {"query": STATUS % launched["run"]["runId"]}
            status = json.loads(ask(port, "/graphql", query)[1])["data"]["runOrError"]["status"]
            assert status != "FAILURE"
    assert (home.path / "reports" / "tiny" / "scaling" / "report.html").exists()
    assert home.plan("scaling") == {}


def test_the_ui_lists_the_assets_and_ctrl_c_leaves_nothing_behind(made: Home, tmp_path: Path):
    home, before, port = made.copy(tmp_path), root_files(), free_port()
    with up(home, port) as process:
        await_answer(process, port)
        _, said = ask(port, "/graphql", {"query": QUERY})
        (node,) = json.loads(said)["data"]["repositoriesOrError"]["nodes"]
        groups: dict[str, set[str]] = {}
        for asset in node["assetNodes"]:
            assert asset["description"]
            groups.setdefault(asset["groupName"], set()).add(asset["assetKey"]["path"][0])
        assert set(groups) == {"pool", "corpus", "training", "evaluation"}
        assert "trajectories" in groups["corpus"]
        (schedule,) = node["schedules"]
        assert schedule["name"] == "refresh_corpus"
        assert schedule["scheduleState"]["status"] == "STOPPED"
        everyone = family(process.pid)
        assert len(everyone) > 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        deadline = time.monotonic() + 20
        while left := {pid for pid in everyone if Path(f"/proc/{pid}").exists()}:
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
    assert root_files() == before
    assert home.plan() == {}
