"""Through the protocol that Flink, Spark and Dataflow speak, the rows are equal, row for row.

The portable job service gets a pipeline as a message and hands its parts to workers: LOOPBACK ones,
in the process which built it, or EXTERNAL ones, processes that a worker pool starts.
"""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import ExitStack, contextmanager

import pyarrow.parquet as pq
import pytest

from pipelines.dedup import DedupSettings, dedup
from pipelines.pairs import PairSettings, make_pairs
from tests.pipelines.answers import answers_table
from tests.pipelines.test_dedup import corpus, same_rows, write
from tests.pipelines.test_pairs import big_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(module, option):
    """A service of Beam's on a free port, ended with all that it started."""
    port = free_port()
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", f"apache_beam.runners.{module}", f"--{option}={port}"],
        env=os.environ | {"PATH": path},  # a pool starts its workers as `python`, whichever that is
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, f"{module} ended with {process.returncode}"
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.fixture(params=["LOOPBACK", "EXTERNAL"])
def options(request):
    """Those of Beam's own job service, and for EXTERNAL those of a pool that starts processes."""
    with ExitStack() as stack:
        job = stack.enter_context(served("portability.local_job_service_main", "port"))
        made = [
            "--runner=PortableRunner",
            f"--job_endpoint=127.0.0.1:{job}",
            f"--environment_type={request.param}",
        ]
        if request.param == "EXTERNAL":
            pool = stack.enter_context(served("worker.worker_pool_main", "service_port"))
            made.append(f"--environment_config=127.0.0.1:{pool}")
        yield made


def test_duplicates_are_equal_through_the_job_service(tmp_path, monkeypatch, options):
    monkeypatch.setattr("pipelines.sketches.PART_ROWS", 40)
    file = write(tmp_path / "in.parquet", corpus(), 40)
    expected = dedup([file], DedupSettings(), tmp_path / "a")
    result = dedup([file], DedupSettings(), tmp_path / "b", options=options)
    same_rows(result, expected)
    assert result.duplicates.num_rows > 20
    assert pq.read_table(result.signatures).equals(pq.read_table(expected.signatures))


def test_pairs_are_equal_through_the_job_service(tmp_path, options):
    answers = tmp_path / "answers.parquet"
    pq.write_table(answers_table(big_world()), answers)
    made = [
        make_pairs(answers, PairSettings(), tmp_path / name, chunk_pairs=1000, **more)
        for name, more in (("a", {}), ("b", {"options": options}))
    ]
    tables = [pq.read_table(result.files) for result in made]
    assert tables[0].equals(tables[1])
    assert tables[0].num_rows > 100
    order = [(name, "ascending") for name in made[0].counts.column_names if name != "rows"]
    counts = [result.counts.sort_by(order) for result in made]
    assert counts[0].equals(counts[1])
