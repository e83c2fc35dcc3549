"""The local engine: one stream a trajectory, the right distribution, no influence of the batch."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.engines.base import Request
from pipelines.engines.local import LocalEngine
from pipelines.engines.sampling import SamplingSettings, draw, uniform
from pipelines.errors import PolicyUnavailableError
from tests.pipelines import tiny_policy

GREEDY = SamplingSettings(temperature=0, max_tokens=24)
PAPER = SamplingSettings(max_tokens=24)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_policy.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(weights):
    engine = LocalEngine(weights)
    yield engine
    engine.close()


def requests(texts, sampling=PAPER, first_seed=0):
    return [
        Request(trajectory_id=b"%016d" % i, prompt=text, seed=first_seed + i, sampling=sampling)
        for i, text in enumerate(texts)
    ]


def philox(key, position):
    """Salmon et al. 2011, Philox 4x64 with ten rounds, block counters from 1."""
    low, high = key, 0
    a, b, c, d = 1 + position // 4, 0, 0, 0
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b = (second >> 64) ^ b ^ low, second % 2**64
        c, d = (first >> 64) ^ d ^ high, first % 2**64
        low, high = (low + 0x9E3779B97F4A7C15) % 2**64, (high + 0xBB67AE8584CAA73B) % 2**64
    return ((a, b, c, d)[position % 4] >> 11) / 2**53


def test_uniform_numbers_depend_on_seed_and_position_only():
    seed = 0x123456789ABCDEF
    assert uniform(seed, 5).tolist() == uniform(seed, 4096)[:5].tolist()
    assert uniform(seed, 3).tolist() != uniform(seed + 1, 3).tolist()
    assert uniform(seed, 9).tolist() == [philox(seed, t) for t in range(9)]
    many = np.concatenate([uniform(s, 50) for s in range(400)])
    assert stats.kstest(many, "uniform").pvalue > 1e-3
    assert (many >= 0).all()
    assert (many < 1).all()


def by_hand(logits, sampling):
    """The distribution over tokens, one step at a time and without arrays."""
    if sampling.temperature == 0:
        best = max(range(len(logits)), key=lambda token: (logits[token], -token))
        return [float(token == best) for token in range(len(logits))]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: sampling.top_k or None]
    mass = {token: np.exp(logits[token] / sampling.temperature) for token in order}
    total = sum(mass.values())
    kept, held = [], 0.0
    for token in order:
        if held < sampling.top_p:
            kept.append(token)
        held += mass[token] / total
    whole = sum(mass[token] for token in kept)
    return [mass[token] / whole if token in kept else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(),
        SamplingSettings(temperature=0.7, top_p=0.95, top_k=5),
        SamplingSettings(top_k=0, top_p=1),
        SamplingSettings(top_k=0, top_p=0.8),
        SamplingSettings(top_k=4, top_p=1, temperature=1.5),
        SamplingSettings(top_k=100, top_p=1),
        SamplingSettings(temperature=0),
    ],
)
def test_draws_follow_the_distribution(sampling):
    logits = [2.0, 0.5, 2.0, -1.0, 0.0, 1.5, -3.0, 0.25, -float("inf"), 1.0, 2.0, -0.5]
    expected = np.array(by_hand(logits, sampling))
    rows = 20_000
    numbers = np.array([uniform(seed, 1)[0] for seed in range(rows)])
    drawn = draw(torch.tensor(logits).expand(rows, -1).contiguous(), numbers, sampling)
    counts = np.bincount(drawn, minlength=len(logits))
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    if possible.sum() > 1:
        test = stats.chisquare(counts[possible], rows * expected[possible])
        assert test.pvalue > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5001, 3.0]), min_size=2, max_size=12),
    st.integers(0, 12),
    st.sampled_from([0.3, 0.9, 1.0]),
    st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2.0**-53])),
)
def test_draw_inverts_the_distribution_function(logits, top_k, top_p, number):
    sampling = SamplingSettings(top_k=top_k, top_p=top_p)
    token = int(draw(torch.tensor([logits]), np.array([number]), sampling)[0])
    chances = by_hand(logits, sampling)
    upper = np.cumsum(chances)
    assert chances[token] > 0
    assert number < upper[token] + 1e-9
    assert number >= upper[token] - chances[token] - 1e-9


def test_nearly_equal_logits_may_change_places():
    logits = torch.linspace(-1, 1, 60).repeat(200, 1)
    jittered = logits.clone()
    logits[:, 20], jittered[:, 20] = logits[:, 21] + 1e-7, logits[:, 21] - 1e-7
    numbers = uniform(5, 200)
    sampling = SamplingSettings(top_p=1)
    assert draw(logits, numbers, sampling).tolist() == draw(jittered, numbers, sampling).tolist()


def test_greedy_equals_transformers(engine):
    texts = tiny_policy.texts(12)
    ours = engine.generate(requests(texts, GREEDY))
    for text, answer in zip(texts, ours, strict=True):
        ids = torch.tensor([[1, *engine.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        out = engine.model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
        tokens = [t for t in out.tolist() if t not in engine._stops]
        assert engine.tokenizer.decode(tokens, skip_special_tokens=True) == answer.text
        assert len(tokens) == answer.tokens


def test_sampling_equals_a_loop_without_cache_or_batch(engine):
    for request, answer in zip(
        made := requests(tiny_policy.texts(6)), engine.generate(made), strict=True
    ):
        ids = [1, *engine.tokenizer(request.prompt, add_special_tokens=False)["input_ids"]]
        tokens: list[int] = []
        reason = "length"
        for number in uniform(request.seed, 24):
            with torch.inference_mode():
                logits = engine.model(torch.tensor([ids + tokens])).logits[0, -1]
            chances = np.array(by_hand(logits.double().tolist(), PAPER))
            token = int(np.searchsorted(np.cumsum(chances), number, side="right"))
            if token in engine._stops:
                reason = "stop"
                break
            tokens.append(token)
        assert answer.text == engine.tokenizer.decode(tokens, skip_special_tokens=True)
        assert (answer.tokens, answer.finish_reason) == (len(tokens), reason)


def test_the_batch_does_not_matter(engine):
    wanted = [*requests(tiny_policy.texts(40)), *requests(tiny_policy.texts(3), GREEDY)]
    together = engine.generate(wanted)
    assert {answer.finish_reason for answer in together} == {"stop", "length"}
    alone = [answer for request in wanted for answer in engine.generate([request])]
    other = [*engine.generate(wanted[::-1][:25]), *engine.generate(wanted[::-1][25:])][::-1]
    assert alone == together == other
    assert engine.generate([]) == []


def test_samples_of_one_prompt_differ_and_repeat(engine):
    wanted = requests(["the river"] * 16)
    answers = engine.generate(wanted)
    assert len({answer.text for answer in answers}) > 12
    assert engine.generate(wanted) == answers


def test_special_tokens_are_neither_text_nor_answer(engine):
    answers = engine.generate(requests(tiny_policy.texts(64), SamplingSettings(top_k=0, top_p=1)))
    assert any(answer.tokens for answer in answers)
    assert not any(mark in a.text for a in answers for mark in ("<s>", "</s>", "<pad>"))


def test_beginning_of_text_is_put_once(engine):
    plain, marked = engine._encode(["old mill", "<s>old mill"])
    assert plain == marked
    assert plain[0] == 1


def test_an_empty_prompt_is_answered(engine, weights):
    assert engine.generate(requests([""]))[0].tokens
    without = LocalEngine(weights)
    without.tokenizer.bos_token = None
    assert without._encode(["", "1"]) == [[2], engine._encode(["1"])[0][1:]]
    assert without.generate(requests(["", "the river"]))[0].tokens


def test_prompts_and_the_context(engine):
    def of_length(tokens):
        return "1" * (tokens - 1)

    assert len(engine._encode([of_length(30)])[0]) == 30
    context = tiny_policy.CONTEXT
    texts = [of_length(context + 1), of_length(context), of_length(context - 3), "the river"]
    answers = engine.generate(requests(texts, SamplingSettings(max_tokens=40)))
    reasons = [answer.finish_reason for answer in answers]
    assert reasons[:2] == ["prompt_too_long"] * 2
    assert answers[0].text == ""
    assert answers[2].tokens <= 3
    assert [answer.trajectory_id for answer in answers] == [b"%016d" % i for i in range(4)]


def test_missing_and_damaged_weights(weights, tmp_path):
    with pytest.raises(PolicyUnavailableError, match=r"nowhere: no policy there .*pool file"):
        LocalEngine(tmp_path / "nowhere")

    def copy(name):
        return shutil.copytree(weights, tmp_path / name)

    cut = copy("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    (copy("tokenless") / "tokenizer.json").write_text("{}")
    (copy("configless") / "config.json").write_text("{")
    (copy("weightless") / "model.safetensors").unlink()
    config = json.loads((weights / "config.json").read_text())
    (copy("taller") / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    for name in ("cut", "tokenless", "configless", "weightless", "taller"):
        with pytest.raises(PolicyUnavailableError, match=rf"{name}: .*make the weights again"):
            LocalEngine(tmp_path / name)


def test_weights_that_are_not_numbers(weights):
    engine = LocalEngine(weights)
    with torch.no_grad():
        engine.model.model.norm.weight[3] = float("nan")
    with pytest.raises(PolicyUnavailableError, match="logits are not numbers"):
        engine.generate(requests(["the river"]))
