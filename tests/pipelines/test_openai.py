"""The client of OpenAI-compatible endpoints: what it sends, waits for, refuses, counts, hides."""

import collections
import json
import logging
import threading
import time
import traceback
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from pipelines import answer_rows, ids, staged
from pipelines.engines import asking, choose, vllm_server, wire
from pipelines.engines.asking import Endpoint
from pipelines.engines.base import Completion, Request, SetAside
from pipelines.engines.openai import OpenAIEngine
from pipelines.engines.options import AskOptions, OpenAIOptions
from pipelines.engines.sampling import SamplingSettings
from pipelines.engines.spending import CapReachedError, Ledger
from pipelines.errors import ConfigError, PolicyUnavailableError
from pipelines.policies import Pool, PoolPolicy
from pipelines.rollouts import RolloutSettings, rollout
from pipelines.settings import parse
from tests.pipelines import fake_endpoint, tiny_policy
from tests.pipelines.fake_endpoint import good
from tests.pipelines.tiny_policy import with_system

KEY = "sk-secret-0123456789"
SAMPLING = SamplingSettings(max_tokens=10)
TWICE = RolloutSettings(samples=2)
ASKED = tiny_policy.policy()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(asking, "FIRST_DELAY", 0.01)


@pytest.fixture
def endpoint():
    opened = []

    def start(answer=None):
        opened.append(fake_endpoint.Endpoint(answer))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def requests(*prompts, samples=1):
    return [
        Request(
            trajectory_id=b"%08d%08d" % (p, s), prompt=prompt, seed=1000 * p + s, sampling=SAMPLING
        )
        for p, prompt in enumerate(prompts)
        for s in range(samples)
    ]


def engine(fake, *, chat=False, ledger=None, key=None, takes=("top_k", "seed", "n"), **options):
    said = {"request_timeout": 5, "patience": 5, "concurrency": 4} | options
    place = Endpoint(model="m", chat=chat, url=fake.url, key=key, takes=takes)
    return OpenAIEngine(place, AskOptions(**said), ledger=ledger)


def ask(asked, wanted):
    return [answer for answers in asked.stream(wanted, 1) for answer in answers]


# --- what is sent


def test_samples_of_one_prompt_are_one_request_with_seeds_that_follow(endpoint):
    fake = endpoint()
    answers = ask(engine(fake), requests("a", "b", samples=3))
    assert sorted((body["prompt"], body["n"], body["seed"]) for body in fake.bodies) == [
        ("a", 3, 0),
        ("b", 3, 1000),
    ]
    assert {a.trajectory_id: (a.text, a.seed) for a in answers} == {
        b"%08d%08d" % (p, s): (f"{'ab'[p]} / {1000 * p + s}.", 1000 * p + s)
        for p in (0, 1)
        for s in range(3)
    }
    body = fake.bodies[0]
    sent = {name: body[name] for name in ("model", "temperature", "top_p", "top_k", "max_tokens")}
    assert sent == {"model": "m", "temperature": 1, "top_p": 0.9, "top_k": 50, "max_tokens": 10}
    assert {a.version for a in answers} == {"m-1"}


def test_base_policies_are_sent_text_and_chat_policies_a_message(endpoint):
    fake = endpoint()
    ask(engine(fake), requests("a"))
    ask(engine(fake, chat=True), requests("b"))
    assert fake.paths == ["/v1/completions", "/v1/chat/completions"]
    assert fake.bodies[1]["messages"] == [{"role": "user", "content": "b"}]
    assert "prompt" not in fake.bodies[1]


def test_a_system_turn_is_a_message_of_its_own(endpoint, tmp_path):
    fake = endpoint()
    prompts = with_system(tiny_policy.prompts_table(["a", "b"]), None, "be kind")
    result = rollout(ASKED, prompts, engine(fake, chat=True), TWICE, tmp_path / "1", set())
    system, user = {"role": "system", "content": "be kind"}, {"role": "user", "content": "b"}
    assert sorted((body["messages"] for body in fake.bodies), key=len) == [
        [{"role": "user", "content": "a"}],
        [system, user],
    ]
    assert result.made == 4
    fake.bodies.clear()
    policy = tiny_policy.policy(template="{system}\n{prompt}")
    rollout(policy, prompts, engine(fake, chat=True), TWICE, tmp_path / "2", set())
    assert sorted(body["messages"][0]["content"] for body in fake.bodies) == ["\na", "be kind\nb"]
    assert {len(body["messages"]) for body in fake.bodies} == {1}


def test_prompts_that_differ_in_the_system_turn_are_not_one_request(endpoint):
    fake = endpoint()
    wanted = requests("a", samples=2)
    wanted += [replace(one, trajectory_id=b"x%d" % one.seed, system="be kind") for one in wanted]
    ask(engine(fake, chat=True), wanted)
    assert sorted((len(body["messages"]), body["n"]) for body in fake.bodies) == [(1, 2), (2, 2)]


def test_the_system_turn_counts_towards_a_cap(endpoint, tmp_path):
    ledger = Ledger(tmp_path / "account", capped(max_tokens_in_all=200))
    wanted = [replace(one, system="x" * 200) for one in requests("a")]
    with pytest.raises(CapReachedError):
        ask(engine(endpoint(), chat=True, ledger=ledger), wanted)


def test_an_endpoint_is_only_sent_what_it_takes(endpoint):
    fake = endpoint()
    plain = engine(fake, takes=())
    with pytest.raises(PolicyUnavailableError, match=r"takes no top_k.*sampling.top_k to 0"):
        ask(plain, requests("a"))
    sampling = SamplingSettings(top_k=0, max_tokens=10)
    wanted = [
        Request(trajectory_id=b"%016d" % i, prompt="a", seed=i, sampling=sampling) for i in (1, 2)
    ]
    answers = ask(plain, wanted)
    assert [a.seed for a in answers] == [None, None]
    assert len(fake.bodies) == 2
    assert not {"n", "seed", "top_k"} & set(fake.bodies[0])


def test_no_more_requests_at_a_time_than_allowed(endpoint):
    def slow(body, _):
        time.sleep(0.01)
        return good(body)

    fake = endpoint(slow)
    assert len(ask(engine(fake, concurrency=5), requests(*map(str, range(60))))) == 60
    assert 2 <= fake.most <= 5


def test_seeds_stay_where_64_bits_can_hold_them():
    assert list(wire.seeds(7, 3)) == [7, 8, 9]
    assert max(wire.seeds(2**63 - 1, 16)) < 2**63


# --- waiting


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529])
def test_trouble_on_the_servers_side_passes(endpoint, status):
    fake = endpoint(lambda body, i: (status, {"error": "busy"}, {}) if i < 3 else good(body))
    answers = ask(engine(fake, concurrency=2), requests("a", "b"))
    assert all(isinstance(a, Completion) for a in answers)
    assert len(fake.bodies) == 5


def test_retry_after_is_honoured_by_all(endpoint):
    times = []

    def answer(body, i):
        times.append(time.monotonic())
        return (429, {}, {"Retry-After": "0.6"}) if i == 0 else good(body)

    fake = endpoint(answer)
    assert len(ask(engine(fake, concurrency=1), requests("a", "b", "c"))) == 3
    assert times[1] - times[0] >= 0.59
    fake = endpoint(lambda body, i: (429, {}, {"Retry-After": "3600"}))
    with pytest.raises(PolicyUnavailableError, match=r"asks to wait 3,600 s, longer than patience"):
        ask(engine(fake), requests("a"))


def test_retry_after_does_not_trust_our_clock():
    def headers(**said):
        return {name.replace("_", "-"): value for name, value in said.items()}

    date = "Tue, 01 Jan 2030 00:00:10 GMT"
    there = headers(retry_after=date, date="Tue, 01 Jan 2030 00:00:00 GMT")
    assert wire.retry_after(there) == 10
    past = headers(retry_after=date, date="Tue, 01 Jan 2030 00:01:00 GMT")
    assert wire.retry_after(past) == 0
    assert wire.retry_after(headers(retry_after="-3")) == 0
    assert wire.retry_after(headers(retry_after="soon")) is None
    assert wire.retry_after({}) is None


def test_an_endpoint_that_stays_silent_is_given_up(endpoint):
    fake = endpoint(lambda body, i: (429, {"error": {"message": "slow down"}}, {}))
    with pytest.raises(PolicyUnavailableError, match=r"no answer for .*429: slow down"):
        ask(engine(fake, request_timeout=1.5, patience=1.5), requests("a"))
    fake.close()
    with pytest.raises(PolicyUnavailableError, match=r"127.0.0.1.*no answer for"):
        ask(engine(fake, request_timeout=1.5, patience=1.5), requests("a"))


def test_a_request_that_hangs_is_set_aside_and_the_others_go_on(endpoint):
    def answer(body, i):
        if body["prompt"] == "wedge":
            fake.closing.wait(5)
        return good(body)

    fake = endpoint(answer)
    answers = ask(engine(fake, request_timeout=1.5), requests("a", "wedge", *"bcdefgh"))
    (aside,) = [a for a in answers if isinstance(a, SetAside)]
    assert (aside.reason, aside.detail) == ("timed_out", "no answer in 1.5 s")
    assert aside.trajectory_id == requests("a", "wedge")[1].trajectory_id
    assert len(answers) == 9
    assert sum(body["prompt"] == "wedge" for body in fake.bodies) == asking.FAILURES


# --- nonsense

NONSENSE = {
    "html": (b"<html>Welcome</html>", "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "list": ([1], "no list of choices"),
    "null": ({"choices": None}, "no list of choices"),
    "none": ({"choices": []}, "0 answers for 2"),
    "three": ({"choices": [{"index": i, "text": "x"} for i in range(3)]}, "3 answers for 2"),
    "twins": ({"choices": [{"index": 0, "text": "x"}] * 2}, "numbered"),
    "textless": (
        {"choices": [{"index": i, "text": None, "finish_reason": "stop"} for i in (0, 1)]},
        "no text",
    ),
    "endless": ({"choices": [{"index": i, "text": "x"} for i in (0, 1)]}, "unknown reason None"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_tried_again_then_set_aside_with_the_reason(endpoint, name):
    said, why = NONSENSE[name]
    fake = endpoint(lambda body, i: (200, said, {}) if body["prompt"] == "bad" else good(body))
    answers = ask(engine(fake), requests("a", "bad", "b", samples=2))
    aside = [a for a in answers if isinstance(a, SetAside)]
    assert len(aside) == 2
    assert len(answers) == 6
    assert {a.reason for a in aside} == {"bad_answer"}
    assert why in aside[0].detail
    assert sum(body["prompt"] == "bad" for body in fake.bodies) == asking.FAILURES


def test_nonsense_once_is_forgiven(endpoint):
    fake = endpoint(lambda body, i: (200, b"{", {}) if i == 0 else good(body))
    assert isinstance(ask(engine(fake), requests("a"))[0], Completion)


def test_withheld_blank_and_broken_texts(endpoint):
    def answer(body, _):
        status, said, headers = good(body)
        choice = said["choices"][0]
        choice |= {
            "withheld": {"finish_reason": "content_filter", "text": None},
            "blank": {"text": ""},
            "surrogate": {"text": "a\ud800b"},
        }[body["prompt"]]
        return status, said, headers

    answers = ask(engine(endpoint(answer)), requests("withheld", "blank", "surrogate"))
    by_prompt = dict(zip(("withheld", "blank", "surrogate"), sorted(
        answers, key=lambda a: a.trajectory_id), strict=True))  # fmt: skip
    assert by_prompt["withheld"].reason == "content_filter"
    assert by_prompt["blank"].text == ""
    assert by_prompt["surrogate"].text == "a\ufffdb"


def test_refusals(endpoint):
    too_long = "This model's maximum context length is 1024 tokens. However, you requested 2000"

    def answer(body, _):
        message = {"long": too_long, "odd": "logit_bias: no"}.get(body["prompt"])
        return (400, {"error": {"message": message}}, {}) if message else good(body)

    answers = ask(engine(endpoint(answer)), requests("a", "long", "odd"))
    found = {a.trajectory_id[7:8]: a for a in answers}
    assert found[b"1"].finish_reason == "prompt_too_long"
    assert (found[b"2"].reason, found[b"2"].detail) == ("refused", "logit_bias: no")
    fake = endpoint(lambda body, i: (400, {"error": {"message": "unknown: top_k"}}, {}))
    with pytest.raises(PolicyUnavailableError, match=r"400 to every request: unknown: top_k"):
        ask(engine(fake), requests(*map(str, range(50))))
    assert len(fake.bodies) < 20


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (404, {"error": {"message": "no model m"}}, r"404: no model m; correct base_url or"),
        (301, {}, "301"),
        (429, {"error": {"code": "insufficient_quota", "message": "pay"}}, "no money left"),
        (402, {}, "no money left"),
    ],
)
def test_what_waiting_does_not_mend_stops_at_once(endpoint, status, said, message):
    fake = endpoint(lambda body, i: (status, said, {}))
    with pytest.raises(PolicyUnavailableError, match=message):
        ask(engine(fake), requests("a"))
    assert len(fake.bodies) == 1


# --- a server of our own


class FakeServer:
    """Dies when it is told to, and hangs up on everybody until it is started again."""

    def __init__(self, fake):
        self.url = fake.url.removesuffix("/v1")
        self.generation, self.dead, self.log = 0, False, "the log"

    def start(self):
        self.generation = self.generation or 1

    def restart(self):
        self.generation += 1
        self.dead = False

    def healthy(self):
        return not self.dead

    def give_up(self):
        pass

    stop = give_up
    describe = vllm_server.Server.describe


def served(fake, server, **options):
    said = {"request_timeout": 5, "patience": 5, "concurrency": 8} | options
    place = Endpoint(model="m", chat=False)
    return OpenAIEngine(place, AskOptions(**said), name="vllm", server=server)


def test_who_kills_the_server_is_set_aside_and_no_neighbour(endpoint):
    def answer(body, _):
        time.sleep(0.02)
        if "poison" in body["prompt"]:
            server.dead = True
        return None if server.dead else good(body)

    fake = endpoint(answer)
    server = FakeServer(fake)
    prompts = [f"poison {i}" if i in (5, 30) else str(i) for i in range(40)]
    answers = ask(served(fake, server), requests(*prompts))
    assert len(answers) == 40
    aside = [a for a in answers if isinstance(a, SetAside)]
    assert {a.trajectory_id for a in aside} == {
        request.trajectory_id for request in requests(*prompts) if "poison" in request.prompt
    }
    assert {a.reason for a in aside} == {"engine_died"}
    assert {a.version for a in answers if isinstance(a, Completion)} == {"vllm 0"}
    assert fake.bodies[0]["max_tokens"] == 10


@pytest.mark.parametrize("apart", [0.0, 0.05])
def test_a_server_that_hangs_is_started_again(endpoint, apart):
    def answer(body, i):
        time.sleep(apart * (i % 8))
        if i == 20:
            server.hung = True
        hung = server.hung
        while server.hung and not fake.closing.is_set():
            time.sleep(0.01)
        return None if hung else good(body)

    class Hanging(FakeServer):
        hung = False

        def restart(self):
            super().restart()
            self.hung = False

    fake = endpoint(answer)
    server = Hanging(fake)
    answers = ask(served(fake, server, request_timeout=2), requests(*map(str, range(60))))
    assert sum(isinstance(a, Completion) for a in answers) == 60
    assert server.generation == 2
    assert len(fake.bodies) <= 68


def test_a_server_that_always_dies_is_given_up(endpoint):
    fake = endpoint(lambda body, i: None)
    server = FakeServer(fake)
    server.healthy = lambda: False
    with pytest.raises(PolicyUnavailableError, match="died or hung 5 times .* see the log"):
        ask(served(fake, server), requests(*map(str, range(60))))


# --- the key


def pool_of(fake, **options):
    section = {"base_url": fake.url, "api_key_env": "POLAR_TEST_KEY", "request_timeout": 5}
    policy = {"name": "v", "kind": "api", "engine": "openai", "weights": "m", "revision": "1"}
    return Pool.model_validate({"source": "t", "policies": [policy], "openai": section | options})


def opened(pool, home):
    return choose.open_engine(pool.policies[0], pool, home, policy_id="p")


def test_the_key_is_sent_and_never_said(endpoint, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)

    def answer(body, i):
        prompt = body["messages"][0]["content"]
        return {
            "echo": (400, {"error": {"message": f"odd key {KEY} there"}}, {}),
            "nonsense": (200, f"Bearer {KEY}".encode(), {}),
        }.get(prompt) or good(body)

    fake = endpoint(answer)
    monkeypatch.setenv("POLAR_TEST_KEY", KEY + "\n")
    asked = opened(pool_of(fake), tmp_path)
    answers = ask(asked, requests("a", "echo", "nonsense"))
    asked.close()
    assert fake.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert len([a for a in answers if isinstance(a, SetAside)]) == 2
    said = repr([answers, asked, asked.endpoint, vars(asked)]) + caplog.text
    said += "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY not in said
    assert "***" in said


def test_a_key_that_is_missing_bad_or_not_accepted(endpoint, tmp_path, monkeypatch):
    fake = endpoint(lambda body, i: (401, {"error": {"message": f"Incorrect key: {KEY}"}}, {}))
    pool = pool_of(fake)
    monkeypatch.delenv("POLAR_TEST_KEY", raising=False)
    with pytest.raises(PolicyUnavailableError, match="POLAR_TEST_KEY holds no key; set it"):
        opened(pool, tmp_path)
    monkeypatch.setenv("POLAR_TEST_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(PolicyUnavailableError, match="cannot be a key") as caught:
        opened(pool, tmp_path)
    assert KEY not in str(caught.value)
    monkeypatch.setenv("POLAR_TEST_KEY", KEY)
    with pytest.raises(PolicyUnavailableError, match="401: the key was not accepted") as caught:
        ask(opened(pool, tmp_path), requests("a"))
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert len(fake.bodies) == 1


@pytest.mark.parametrize(
    "section",
    [
        {"api_key_env": KEY},
        {"api_key": KEY},
        {"base_url": f"https://user:{KEY}@host/v1"},
        {"base_url": f"https://host/v1?key={KEY}"},
    ],
)
def test_a_key_in_the_pool_file_is_refused_and_not_repeated(section):
    with pytest.raises(ConfigError) as caught:
        parse({"base_url": "http://h/v1"} | section, OpenAIOptions, "pool.yaml")
    assert KEY not in "".join(traceback.format_exception(caught.value))


# --- tokens and money


def capped(**caps):
    prices = {"price_prompt": 1.0, "price_answer": 10.0}
    return OpenAIOptions(base_url="http://unused/v1", **prices, **caps)


def test_a_cap_is_never_passed_and_what_was_made_is_kept(endpoint, tmp_path):
    options = capped(max_tokens_in_all=1200)

    def answer(body, _):
        status, said, headers = good(body)
        return status, said | {"usage": {"prompt_tokens": 60, "completion_tokens": 9}}, headers

    fake = endpoint(answer)
    answers = []
    account = tmp_path / "account.jsonl"
    asked = engine(fake, ledger=Ledger(account, options))
    arriving = asked.stream(requests(*map(str, range(100))), 1)
    with pytest.raises(CapReachedError, match=r"tokens used, max_tokens_in_all 1,200; what was"):
        collections.deque((answers.extend(some) for some in arriving), maxlen=0)
    asked.close()
    used = 69 * len(fake.bodies)
    assert len(answers) == len(fake.bodies)
    assert 1200 - 2 * 75 < used <= 1200  # the next one could have used 1 + 64 + 10
    again = engine(fake, ledger=Ledger(account, options))
    with pytest.raises(CapReachedError):
        ask(again, requests("x"))
    assert used == 69 * len(fake.bodies)


def test_money(tmp_path):
    options = capped(max_cost=0.0012)  # a request may cost up to (65 + 100 x 10) / 1e6
    ledger = Ledger(tmp_path / "a.jsonl", options)
    entry = ledger.enter("x", 100)
    assert ledger.enter("y", 100) is None
    ledger.settle(entry, 10, 1)
    assert ledger.now.cost == pytest.approx(20e-6)
    ledger.strike(ledger.enter("y", 100))
    assert ledger.now.cost == pytest.approx(20e-6)
    assert ledger.enter("z", 100)  # and then this run is killed
    after = Ledger(tmp_path / "a.jsonl", options)
    assert after.before.cost == pytest.approx(20e-6 + 1065e-6)
    assert after.enter("z", 100) is None
    assert Ledger(tmp_path / "a.jsonl", options).before == after.before


def test_a_torn_account_line_is_of_a_request_that_was_not_sent(tmp_path):
    path = tmp_path / "a.jsonl"
    ledger = Ledger(path, capped())
    ledger.settle(ledger.enter("x", 5), 1, 1)
    with path.open("a") as file:
        file.write('{"enter": 1, "mo')
    assert Ledger(path, capped()).before.tokens == 2
    path.write_text("{\n{}\n")
    with pytest.raises(PolicyUnavailableError, match="line 1 is damaged"):
        Ledger(path, capped())


def test_a_cap_on_money_needs_prices():
    with pytest.raises(ConfigError, match="max_cost needs price_prompt and price_answer"):
        parse({"base_url": "http://h/v1", "max_cost": 1}, OpenAIOptions, "pool.yaml")


# --- in a rollout


def test_a_rollout_over_an_endpoint_and_what_is_set_aside(endpoint, tmp_path):
    fake = endpoint(lambda b, i: (200, b"?", {}) if "boats" in b["prompt"] else good(b))
    prompts = tiny_policy.prompts_table(tiny_policy.texts(20))
    bad = sum("boats" in text for text in tiny_policy.texts(20))
    settings = RolloutSettings(samples=3, batch_size=7)
    policy = tiny_policy.policy()
    result = rollout(policy, prompts, engine(fake), settings, tmp_path, set())
    assert result.made == 3 * (20 - bad)
    counts = {(r["what"], r["reason"]): r["rows"] for r in result.counts.to_pylist()}
    assert counts["excluded", "bad_answer"] == 3 * bad > 0
    assert "not JSON" in result.excluded["detail"][0].as_py()
    rows = [row for file in result.files for row in staged.pq.read_table(file).to_pylist()]
    assert len({row["trajectory_id"] for row in rows}) == len(rows) == result.made
    assert {(row["engine"], row["engine_version"]) for row in rows} == {("openai", "m-1")}
    assert len({row["seed"] for row in rows}) == len(rows)
    assert len({row["content_hash"] for row in rows}) == len(rows)


def test_answers_are_kept_as_they_arrive(endpoint, tmp_path):
    """Whatever stops the driver, all it was given but the requests under way is there again."""

    class Killed(BaseException):
        pass

    def stop_at(done, total, note):
        if done >= 30:
            raise Killed

    fake = endpoint()
    prompts = tiny_policy.prompts_table(tiny_policy.texts(50))
    settings = RolloutSettings(samples=1, batch_size=1000)
    ask_for = (tiny_policy.policy(), prompts)
    with pytest.raises(Killed):
        rollout(*ask_for, engine(fake), settings, tmp_path, set(), progress=stop_at)
    journal = next(tmp_path.rglob(staged.JOURNAL))
    with journal.open("a") as file:
        file.write('{"trajectory_id": "12')  # a line that its writer was killed over
    sent = len(fake.bodies)
    result = rollout(*ask_for, engine(fake), settings, tmp_path, set())
    assert 30 <= 50 - result.made <= sent
    times = collections.Counter(body["prompt"] for body in fake.bodies)
    assert len(times) == 50
    assert sum(times.values()) - 50 <= 4  # as many as may be under way
    assert not journal.exists()
    rows = [row for file in result.files for row in staged.pq.read_table(file).to_pylist()]
    assert len({row["trajectory_id"] for row in rows}) == len(rows) == 50
    assert all(row["engine_version"] == "m-1" and row["created_at"].tzinfo for row in rows)


def test_a_journal_and_its_file_together_are_no_double(tmp_path):
    """Killed between writing a batch's file and removing its journal."""
    row = {
        "trajectory_id": b"t" * 16, "prompt_id": b"p" * 16, "policy_id": b"q" * 16,
        "sampling_id": b"s" * 16, "sample_index": 0, "text": "a\u2028b", "original_length": 3,
        "engine": "e", "content_hash": b"c" * 16, "flags": ["loop"],
        "created_at": datetime.now(UTC),
    }  # fmt: skip
    journal = staged.Journal(tmp_path, 10)
    journal.add([row])
    kept = (tmp_path / staged.JOURNAL).read_bytes()
    (path,) = journal.close()
    (tmp_path / staged.JOURNAL).write_bytes(kept)
    assert staged.take_up(tmp_path, set()) == ([path], {b"t" * 16})
    path.unlink()
    (tmp_path / staged.JOURNAL).write_bytes(kept)
    (again,), found = staged.take_up(tmp_path, set())
    assert staged.pq.read_table(again).equals(staged.table_of([row]))


def test_a_clock_that_goes_backwards_loses_nothing(endpoint, tmp_path, monkeypatch):
    times = iter(range(2_000_000_000, 0, -3600))

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(next(times), tz)

    monkeypatch.setattr(answer_rows, "datetime", Clock)
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    fake = endpoint(lambda b, i: (429, {}, {"Retry-After": "0.05"}) if i == 3 else good(b))
    prompts = tiny_policy.prompts_table(tiny_policy.texts(40))
    settings = RolloutSettings(samples=1, batch_size=8)
    result = rollout(tiny_policy.policy(), prompts, engine(fake), settings, tmp_path, set())
    assert result.made == 40
    assert rollout(tiny_policy.policy(), prompts, engine(fake), settings, tmp_path, set()).made == 0


def test_stopping_early_leaves_no_thread(endpoint):
    fake = endpoint(lambda body, i: good(body) if i < 4 else (fake.closing.wait(3), good(body))[1])
    arriving = engine(fake).stream(requests(*map(str, range(50))), 1)
    next(arriving)
    start = time.monotonic()
    arriving.close()
    assert time.monotonic() - start < 2
    assert "asking" not in [thread.name for thread in threading.enumerate()]


def test_the_account_is_json_lines_without_texts(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("POLAR_TEST_KEY", KEY)
    asked = opened(pool_of(endpoint()), tmp_path)
    ask(asked, requests("a confidential prompt"))
    asked.close()
    text = (tmp_path / "spending" / "p.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()]
    assert "confidential" not in text


def test_an_engine_for_each_policy():
    base = PoolPolicy(name="a", kind="base", weights="w")
    assert choose.engine_of(base, None) == "local"
    assert choose.engine_of(base, "vllm") == "vllm"
    hub = PoolPolicy(name="a", kind="chat", weights="w", revision="1", engine="vllm")
    assert choose.engine_of(hub, "local") == "vllm"
    assert (base.chat, hub.chat) == (False, True)
    assert ids.content_id("policy", "r", "{prompt}") != ids.content_id(
        "policy", "r", "{prompt}", "chat"
    )
