"""Servers of our own without vLLM: the guard leaves nobody behind, errors say why, memory fits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipelines.engines import memory, vllm_server
from pipelines.engines.options import VllmOptions
from pipelines.errors import PolicyUnavailableError
from tests.pipelines.test_vllm import family, left_of

ROOT = Path(__file__).parents[2]
QUICK_GUARD = (
    "import sys; from pipelines.engines import guard; guard.GRACE = 0.3; "
    "sys.exit(guard.main(sys.argv[1:]))"
)
# A child that leaves its group and does not heed SIGTERM, and one that is stopped.
STUBBORN = """
import os, signal, sys, time
for kind in ("deaf", "stopped"):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)
print("ready", flush=True)
time.sleep(600)
"""


def guarded(*command: str, **more):
    return subprocess.Popen(
        [sys.executable, "-c", QUICK_GUARD, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
        **more,
    )


def test_the_guard_ends_as_its_command_does():
    assert guarded(sys.executable, "-c", "raise SystemExit(3)").wait(30) == 3
    killed = "import os; os.kill(os.getpid(), 9)"
    assert guarded(sys.executable, "-c", killed).wait(30) == 128 + 9
    assert guarded("no-such-command", stderr=subprocess.DEVNULL).wait(30) == 127


def test_nobody_is_left_when_the_driver_lets_go():
    guard = guarded(sys.executable, "-c", STUBBORN)
    assert guard.stdout.readline() == b"ready\n"
    members = family(guard.pid)
    assert len(members) == 4
    guard.stdin.close()
    assert guard.wait(30) == 0
    assert not left_of(members, 0)


def test_nobody_is_left_when_the_driver_is_killed():
    driver = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {QUICK_GUARD!r}, "
        f"sys.executable, '-c', {STUBBORN!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE, "
        "start_new_session=True); print(p.stdout.readline(), p.pid, flush=True); p.wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    said = process.stdout.readline()
    members = family(int(said.split()[-1]))
    assert len(members) == 4
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not left_of(members)


def test_nobody_is_left_when_the_command_dies_before_its_children():
    guard = guarded(sys.executable, "-c", STUBBORN)
    guard.stdout.readline()
    members = family(guard.pid)
    (child,) = [pid for pid, _ in members if os.getpgid(pid) == pid and pid != guard.pid
                and len(family(pid)) == 3]  # fmt: skip
    os.kill(child, signal.SIGKILL)
    assert guard.wait(30) == 128 + 9
    assert not left_of(members, 0)


def server(tmp_path, script, **more):
    return vllm_server.Server(
        lambda port: [sys.executable, "-c", script, str(port)], tmp_path / "logs" / "s.log", **more
    )


SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_started_once_restarted_and_stopped(tmp_path):
    one = server(tmp_path, SERVE)
    one.start()
    one.start()
    assert one.generation == 1
    assert one.healthy()
    before, url = family(one._process.pid), one.url
    for pid, _ in before - {member for member in before if member[0] == one._process.pid}:
        os.kill(pid, signal.SIGKILL)
    assert not one.healthy()
    one.restart()
    assert one.generation == 2
    assert one.healthy()
    assert one.url != url
    after = family(one._process.pid)
    one.stop()
    one.stop()
    assert not left_of(before | after, 0)
    assert not one.healthy()


def test_a_server_that_does_not_start_says_why(tmp_path):
    script = "print('nanobind: leaked'); print('RuntimeError: {}'); raise SystemExit(1)"
    broken = server(tmp_path, script.format("bad config"), memory_note="need 9, have 1")
    with pytest.raises(PolicyUnavailableError, match=r"exit code 1; the last lines of .*s.log:\n"
                       r"    RuntimeError: bad config$"):  # fmt: skip
        broken.start()
    full = server(tmp_path, script.format("out of memory"), memory_note="need 9, have 1")
    with pytest.raises(PolicyUnavailableError, match="exit code 1; need 9, have 1; the last"):
        full.start()
    killed = "import os; os.kill(os.getpid(), 9)"
    with pytest.raises(PolicyUnavailableError, match=r"often a want of memory\); need 9, have 1"):
        server(tmp_path, killed, memory_note="need 9, have 1").start()
    slow = server(tmp_path, "import time; time.sleep(60)", start_timeout=0.5)
    with pytest.raises(PolicyUnavailableError, match="was not ready in 0 s|was not ready in 1 s"):
        slow.start()
    assert slow._process is None


def test_a_start_can_be_given_up(tmp_path):
    import threading

    slow = server(tmp_path, "import time; time.sleep(60)")
    threading.Timer(0.5, slow.give_up).start()
    start = time.monotonic()
    with pytest.raises(PolicyUnavailableError, match="given up"):
        slow.start()
    assert time.monotonic() - start < 15


def checkpoint(folder, dtype=np.float32, **config):
    folder.mkdir()
    tensors = {"a": np.zeros((1000, 10), dtype), "b": np.zeros(24, dtype)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_bytes_of_weights_as_they_are_held(tmp_path):
    wide = checkpoint(tmp_path / "wide", dtype="float32")
    assert memory.weight_bytes(wide, "float32") == 4 * 10_024
    assert memory.weight_bytes(wide, "bfloat16") == memory.weight_bytes(wide) == 2 * 10_024
    small = checkpoint(tmp_path / "small", np.int8)
    assert memory.weight_bytes(small, "bfloat16") == 10_024
    (wide / "model.safetensors").write_bytes(b"damaged")
    assert memory.weight_bytes(wide) == 7


def test_need_and_have(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "w")
    options = VllmOptions(device="cpu", kv_cache_gib=4)
    monkeypatch.setattr(memory, "available", lambda: 8.0)
    memory.require(folder, options)
    monkeypatch.setattr(memory, "weight_bytes", lambda *_: 70 * memory.GIB)
    need = r"need 78.5 GiB \(weights 73.5 GiB, keys and values 4 GiB, vLLM itself 1.0 GiB\)"
    with pytest.raises(PolicyUnavailableError, match=need + ", have 8.0 GiB; lower kv_cache_gib"):
        memory.require(folder, options)
    monkeypatch.setattr(memory, "_gpus", lambda: [80.0, 40.0])
    one, two = (VllmOptions(device="cuda", tensor_parallel=n) for n in (1, 2))
    with pytest.raises(PolicyUnavailableError, match=r"need 73.5 GiB .*have 72.0 GiB"):
        memory.require(folder, one)
    with pytest.raises(PolicyUnavailableError, match=r"need 36.8 GiB .*have 36.0 GiB"):
        memory.require(folder, two)


def test_the_opening_of_a_text_is_read_from_the_tokenizer(tmp_path):
    assert vllm_server.beginning_of_text(tmp_path) is None
    for said, expected in (
        ({"bos_token": "<s>"}, "<s>"),
        ({"bos_token": {"content": "<bos>"}}, "<bos>"),
        ({"bos_token": None}, None),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
        assert vllm_server.beginning_of_text(tmp_path) == expected
