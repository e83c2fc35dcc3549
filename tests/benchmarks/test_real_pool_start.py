"""The written-down weights: tokens tell policies apart, and averages are where they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import real_pool_start as start
from trainer import decoder
from trainer.language_model import train_tokenizer
from trainer.model import RewardModel
from trainer.packed import row_of
from trainer.template import Limits, Template, Texts

WORDS = [f"{a}{b}{c}" for a in "bdfglm" for b in "aeiou" for c in "nrst"]


def answers(rng, policy, count):
    """Texts of a policy, which prefers some words and shuns others."""
    weights = np.exp(1.5 * np.random.default_rng(policy).standard_normal(len(WORDS)))
    drawn = rng.choice(WORDS, (count, 40), p=weights / weights.sum())
    return [" ".join(words) for words in drawn]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    rng = np.random.default_rng(0)
    policies = np.repeat(np.arange(60), 12)
    texts = [text for policy in range(60) for text in answers(rng, policy, 12)]
    tokenizer = train_tokenizer(texts, 500, folder / "tokenizer", context=1024)
    sizes = {"hidden": 288, "layers": 3, "intermediate": 256, "context": 1024, "longest": 128}
    start.first_weights(tokenizer, folder / "start", texts, policies, **sizes)
    return folder / "start", rng


def test_the_separator_and_the_scored_id_hold_the_averages_of_their_sides(made):
    folder, rng = made
    limits = Limits(600, 128)
    network = RewardModel.start(folder, wrapper="pretrain", limits=limits).network.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = Template(tokenizer, limits)
    reference, candidate = answers(rng, 100, 1)[0], answers(rng, 101, 1)[0]
    ((ids,),) = template.encode([Texts("", reference, [candidate], "pretrain")])
    at = ids.index(template.separator_id)
    seen = {}

    def keep(_layer, arguments, _named):
        seen["states"] = arguments[0][0]

    decoder.layers(network)[2].register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        decoder.last_hidden(network, row_of([(np.array([], int), [np.array(ids)])], network.device))
    half = start.KEPT // 2  # the better directions, in the second head
    own = slice(25 + start.AUTHORS + half, 25 + start.AUTHORS + start.KEPT)
    read = decoder.layers(network)[1].self_attn.v_proj.weight[start.HEAD : start.HEAD + half]
    table = network.base_model.embed_tokens.weight[torch.tensor(ids)]
    normed = table * table.square().mean(1, keepdim=True).rsqrt()
    for scored, side in ((at, slice(1, at)), (len(ids) - 1, slice(at + 1, len(ids) - 1))):
        expected = (normed[side] @ read.T).mean(0)
        found = seen["states"][scored, own] / start.AVERAGE
        assert np.corrcoef(expected.detach(), found.detach())[0, 1] > 0.97


def test_averages_of_one_policy_are_alike_also_of_one_never_seen(made):
    folder, rng = made
    limits = Limits(600, 128)
    model = RewardModel.start(folder, wrapper="pretrain", limits=limits)
    template = Template(AutoTokenizer.from_pretrained(folder), limits)
    size = 25 + start.AUTHORS
    differences = slice(size + 2 * start.KEPT, size + 3 * start.KEPT)
    right = []
    for policy in range(200, 230):
        (reference, same), (other,) = answers(rng, policy, 2), answers(rng, policy + 50, 1)
        (ids,) = template.encode([Texts("", reference, [same, other], "pretrain")])
        pieces = [(np.array([], int), [np.array(row) for row in ids])]
        with torch.inference_mode():
            states = decoder.last_hidden(model.network.eval(), row_of(pieces, model.network.device))
        near, far = states[:, differences].sum(1)
        right.append(bool(near < far))
    assert np.mean(right) > 0.8, np.mean(right)
