"""Real vLLM, killed or hung: all is there in the end, nothing twice, nobody left behind."""

import collections
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.engines import choose, vllm_server
from pipelines.engines.asking import Endpoint
from pipelines.engines.base import Request
from pipelines.engines.local import LocalEngine
from pipelines.engines.openai import OpenAIEngine
from pipelines.engines.sampling import SamplingSettings
from pipelines.errors import PolicyUnavailableError
from tests.pipelines import tiny_policy, vllm_process

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", autouse=True)
def _installed():
    try:
        vllm_server.interpreter()
    except PolicyUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_policy.save(tmp_path_factory.mktemp("tiny"), head=32)


def processes():
    """Parent, state and start time of every process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        found[int(path.parent.name)] = (int(fields[1]), fields[0], fields[19])
    return found


def family(pid):
    """The process and its descendants, each with its start time."""
    every = processes()
    found = {pid}
    while more := {one for one, (parent, *_) in every.items() if parent in found} - found:
        found |= more
    return {(one, every[one][2]) for one in found if one in every}


def left_of(members, seconds=30.0):
    """Those of a family that still run when the seconds are over."""
    deadline = time.monotonic() + seconds
    while True:
        every = processes()
        left = {
            (pid, start) for pid, start in members
            if pid in every and every[pid][2] == start and every[pid][1] != "Z"
        }  # fmt: skip
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def named(members, word):
    """A process of a family whose command holds the word; None where there is none (yet)."""
    for pid, _ in members:
        try:
            said = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        except OSError:  # it has just ended
            continue
        if word in said:
            return pid
    return None


def check(result, log):
    """All trajectories are there and none twice; how many requests were sent again."""
    table = pa.concat_tables([pq.read_table(path) for path in result.files])
    keys = table["trajectory_id"].to_pylist()
    assert len(keys) == len(set(keys)) == vllm_process.PROMPTS
    counts = {(r["what"], r["reason"]): r["rows"] for r in result.counts.to_pylist()}
    assert counts == {("in", ""): vllm_process.PROMPTS, ("out", ""): vllm_process.PROMPTS}
    sent = collections.Counter(log.read_text().splitlines())
    assert len(sent) == vllm_process.PROMPTS
    assert set(table["engine"].to_pylist()) == {"vllm"}
    assert len(set(table["seed"].to_pylist())) == vllm_process.PROMPTS
    return table, sum(sent.values()) - vllm_process.PROMPTS


def test_the_engine_is_killed_and_hangs_and_agrees_with_the_local_one(weights, tmp_path):
    log = tmp_path / "log"
    asked = vllm_process.engine(weights, tmp_path)
    seen, families = [], []

    def trouble(done, total, note):
        process = asked.server._process
        if process is None:  # answers of the server that died arrive while it is started again
            return
        members = family(process.pid)
        families.append(members)
        engine = named(members, "EngineCore")
        if engine is None:
            return
        if done >= 500 and "killed" not in seen:
            seen.append("killed")
            os.kill(engine, signal.SIGKILL)
        elif done >= 1200 and "stopped" not in seen:
            seen.append("stopped")
            os.kill(engine, signal.SIGSTOP)

    try:
        result = vllm_process.run(asked, tmp_path, log, trouble)
        assert seen == ["killed", "stopped"]
        deaths = asked.server.generation - 1  # more than two where the machine itself hangs
        assert deaths >= 2
        table, again = check(result, log)
        assert again <= deaths * vllm_process.CONCURRENCY
        assert table["engine_version"][0].as_py().startswith("vllm ")
        families.append(family(asked.server._process.pid))
        samples_of_one_prompt(asked)
        greedy(asked, weights)
        chat(asked)
    finally:
        asked.close()
    assert not left_of(set().union(*families))


def samples_of_one_prompt(asked):
    """n samples in one request differ, and each is made again alone with its own seed."""
    sampling = SamplingSettings(max_tokens=16)
    wanted = [
        Request(trajectory_id=b"%016d" % i, prompt="the river", seed=77, sampling=sampling)
        for i in range(8)
    ]
    (together,) = asked.stream(wanted, 1)
    assert len({one.text for one in together}) >= 7
    assert [one.seed for one in together] == list(range(77, 85))
    for one in together[:3]:
        request = Request(trajectory_id=b"x", prompt="the river", seed=one.seed, sampling=sampling)
        ((alone,),) = asked.stream([request], 1)
        assert (alone.text, alone.tokens) == (one.text, one.tokens)


def greedy(asked, weights):
    """Both engines see the same tokens: beginning of text, stop tokens, count of tokens.

    Not all need be equal: the last bits of the arithmetic differ. Where a random policy's answer
    ends in bytes that are no character, vLLM leaves them away.
    """
    sampling = SamplingSettings(temperature=0, max_tokens=16)
    wanted = [
        Request(trajectory_id=b"%016d" % i, prompt=text, seed=i, sampling=sampling)
        for i, text in enumerate([*tiny_policy.texts(60), "1" * 300])
    ]
    here = {one.trajectory_id: one for one in LocalEngine(weights).generate(wanted)}
    there = {one.trajectory_id: one for some in asked.stream(wanted, 1) for one in some}
    assert there.keys() == here.keys()
    assert there[wanted[-1].trajectory_id].finish_reason == "prompt_too_long"

    def alike(one, other):
        ends = (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        return ends and one.text.startswith(other.text)

    differ = [(here[key], there[key]) for key in here if not alike(here[key], there[key])]
    assert len(differ) <= 0.1 * len(wanted), differ
    assert {one.finish_reason for one in there.values()} == {"stop", "length", "prompt_too_long"}


def chat(asked):
    """A chat policy's prompt goes through the model's own template: here, a colon behind it."""
    sampling = SamplingSettings(temperature=0, max_tokens=16)

    def said(chat, prompt):
        place = Endpoint(model=vllm_server.MODEL, chat=chat, extra=asked.endpoint.extra)
        engine = OpenAIEngine(place, asked.options, name="vllm", server=asked.server)
        request = Request(trajectory_id=b"x", prompt=prompt, seed=1, sampling=sampling)
        ((answer,),) = engine.stream([request], 1)
        return answer.text, answer.tokens, answer.finish_reason

    assert said(True, "the river") == said(False, "the river:")
    assert said(True, "the river") != said(False, "the river")


def test_the_driver_is_killed_and_started_again(weights, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", vllm_process.__name__, weights, tmp_path, log]
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT)
    members = set()
    try:
        while process.poll() is None and not (
            log.exists() and len(log.read_text().splitlines()) > 700
        ):
            time.sleep(0.05)
        members = family(process.pid)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    finally:
        process.kill()
    assert len(members) >= 4  # driver, guard, server, engine
    assert not left_of(members)
    before = log.read_text().splitlines()
    asked = vllm_process.engine(weights, tmp_path)
    try:
        result = vllm_process.run(asked, tmp_path, log)
    finally:
        asked.close()
    check(result, log)
    after = set(log.read_text().splitlines()[len(before) :])
    assert len(after.intersection(before)) <= vllm_process.CONCURRENCY
    assert 0 < result.made <= vllm_process.PROMPTS - 600


def test_a_server_that_cannot_start_says_why(weights, tmp_path):
    policy = choose.PoolPolicy(name="t/x", kind="base", engine="vllm", weights=str(weights))
    options = vllm_process.OPTIONS.model_copy(update={"arguments": ("--no-such-option",)})
    pool = choose.Pool(source="t", policies=(policy,), vllm=options)
    asked = choose.open_engine(policy, pool, tmp_path, policy_id="t")
    request = Request(trajectory_id=b"x", prompt="a", seed=1, sampling=SamplingSettings())
    with pytest.raises(PolicyUnavailableError) as caught:
        next(asked.stream([request], 1))
    assert "ended before it was ready, exit code 2" in str(caught.value)
    assert "--no-such-option" in str(caught.value)
    assert str(tmp_path / "logs" / "vllm" / "t_x.log") in str(caught.value)
