"""The written-down weights: tokens tell policies apart, and averages are where they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import real_pool_heads as heads
from benchmarks import real_pool_start as start
from benchmarks.real_pool_authors import KEPT, LENGTH, authors, token_features
from benchmarks.real_pool_overlap import fit_overlap, fresh, numbers
from trainer import decoder
from trainer.language_model import train_tokenizer
from trainer.model import RewardModel
from trainer.packed import row_of
from trainer.template import SEPARATOR, Limits, Template, Texts

WORDS = [f"{a}{b}{c}" for a in "bdfglm" for b in "aeiou" for c in "nrst"]


def answers(rng, policy, count):
    """Texts of a policy, which prefers some words and shuns others."""
    weights = np.exp(1.5 * np.random.default_rng(policy).standard_normal(len(WORDS)))
    drawn = rng.choice(WORDS, (count, 50), p=weights / weights.sum())
    return [" ".join(words[: rng.integers(30, 51)]) for words in drawn]


def groups(rng, policies, first, end):
    """Rows of a reference, an answer of its policy and two of others, of policies in a range."""
    found = []
    for _ in range(100):
        one, two, three = rng.choice(np.arange(first, end), 3, replace=False)
        own = rng.choice(np.flatnonzero(policies == one), 2, replace=False)
        others = [rng.choice(np.flatnonzero(policies == other)) for other in (two, three)]
        found.append([*own, *others])
    return np.array(found)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    rng = np.random.default_rng(0)
    policies = np.repeat(np.arange(60), 12)
    texts = [text for policy in range(60) for text in answers(rng, policy, 12)]
    tokenizer = train_tokenizer([*texts, "what?\n\n"], 500, folder / "tokenizer", context=1024)
    shape = {"hidden": 256, "layers": 3, "intermediate": 256, "context": 1024, "longest": 128}
    lessons = [(np.flatnonzero(policies < 40), groups(rng, policies, 40, 60))]
    prompts = ["what?"] * len(texts)
    start.first_weights(tokenizer, folder / "start", texts, policies, prompts, lessons, **shape)
    network = AutoTokenizer.from_pretrained(tokenizer)
    known, breaks = token_features(network)
    lines = network([f"\n{text}" for text in texts], add_special_tokens=False)["input_ids"]
    rows = [row[:128] for row in lines]
    space = start.room(breaks)
    found = authors(rows, policies, np.clip(known, -3, 3), space, start.early(), seed=0)
    return folder / "start", found


def encoded(folder, prompt, reference, candidates):
    """The model, and the ids of a group as one piece without a shared prefix."""
    limits = Limits(600, 128)
    model = RewardModel.start(folder, wrapper="sft", limits=limits)
    template = Template(AutoTokenizer.from_pretrained(folder), limits)
    (ids,) = template.encode([Texts(prompt, reference, candidates, "sft")])
    return model.network.eval(), [(np.array([], int), [np.array(row) for row in ids])]


def two_answers(folder, prompt, seed):
    """Answers of two policies never seen, with the model and their ids."""
    rng = np.random.default_rng(seed)
    reference, candidate = answers(rng, 100, 1)[0], answers(rng, 101, 1)[0]
    return reference, candidate, *encoded(folder, prompt, reference, [candidate])


def expected(found, tokenizer, text):
    """What the averages of an answer are in the kept directions."""
    ids = torch.tensor(tokenizer("\n" + text, add_special_tokens=False)["input_ids"])
    vectors, early = found.tokens[ids], start.early()
    share = LENGTH / (LENGTH + len(ids))
    begin = early @ vectors[: len(early)] / early.sum()
    return found.whole @ vectors.mean(0) + found.begin @ begin + found.length * share + found.offset


@pytest.mark.parametrize("prompt", ["what?", " ".join(WORDS[:30])])
def test_the_scored_id_holds_the_averages_of_both_answers_and_none_of_the_prompt(made, prompt):
    folder, found = made
    reference, candidate, network, pieces = two_answers(folder, prompt, seed=1)
    seen = []
    decoder.layers(network)[2].mlp.register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    with torch.inference_mode():
        decoder.last_hidden(network, row_of(pieces, network.device))
    state = seen[0].reshape(-1)
    width = found.tokens.shape[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for side, text in enumerate((candidate, reference)):
        held = state[width + side * KEPT : width + (side + 1) * KEPT]
        wanted = expected(found, tokenizer, text)
        assert np.corrcoef(held, wanted)[0, 1] > 0.9


@pytest.mark.parametrize("prompt", ["what?", " ".join(WORDS[:30])])
def test_ids_know_whether_they_are_fresh_and_whether_the_reference_lacks_them(made, prompt):
    folder, found = made
    _, _, network, pieces = two_answers(folder, prompt, seed=3)
    ids = pieces[0][1][0].tolist()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    middle = ids.index(tokenizer.convert_tokens_to_ids(SEPARATOR))
    with torch.inference_mode():
        states = network.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    places = heads.State(network.config.hidden_size, found.tokens.shape[1])
    given = states[2][0].numpy() / heads.FAINT  # to layer 2
    novel, lacking = given[:, places.novel], given[:, places.lacking]
    for begin, end in ((1, middle), (middle + 1, len(ids) - 1)):
        wanted = np.array([ids[i] not in ids[begin:i] for i in range(begin, end)])
        assert np.abs(novel[begin:end] - wanted).mean() < 0.1
        assert ((novel[begin:end] > 0.5) == wanted).mean() > 0.97
    wanted = np.array([token not in ids[:middle] for token in ids[middle + 1 : -1]])
    assert np.abs(lacking[middle + 1 : -1] - wanted).max() < 0.2


def test_shared_ids_say_more_where_policies_are_not_known():
    rng = torch.Generator().manual_seed(0)
    likelihood = torch.randn(400, 3, generator=rng)
    x = torch.rand(400, 3, 3, generator=rng)
    x[:, 0, 0] *= 0.7  # the positive lacks less of the reference
    found = fit_overlap(likelihood, x)
    assert abs(found.ratio) < 0.2  # it is chance here
    scores = found.evidence(likelihood, x)
    assert (scores[:, :1] > scores[:, 1:]).float().mean() > 0.6
    more = torch.tensor([[0.9, 0.5, 0.5], [0.1, 0.5, 0.5]])
    less, much = found.evidence(torch.zeros(2), more)
    assert much > less


def test_shared_ids_are_counted_without_the_prompt_and_without_repetition():
    reference, candidate = fresh([1, 2, 2, 3, 9], [9]), fresh([2, 4, 4, 9], [9])
    absent, own, other = numbers(reference, candidate)
    assert (absent, own, other) == (1 / 62, 60 / 62, 60 / 63)


def test_answers_of_one_policy_score_higher_also_of_one_never_seen(made):
    folder, _ = made
    rng, right = np.random.default_rng(2), []
    for policy in range(200, 230):
        (reference, same), (other,) = answers(rng, policy, 2), answers(rng, policy + 50, 1)
        network, pieces = encoded(folder, "what?", reference, [same, other])
        with torch.inference_mode():
            states = decoder.last_hidden(network, row_of(pieces, network.device))
            near, far = network.score(states)[:, 0]
        right.append(bool(near > far))
    assert np.mean(right) > 0.8, np.mean(right)
