"""Every layout gives the scores and gradients of separate sequences, for every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    PhiConfig,
    PhiForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from trainer import attention, blocks, decoder, layout
from trainer.layout import attention_kept, precision, separate, shared
from trainer.loss import bradley_terry
from trainer.packed import row_of

WORDS = 90
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "num_labels": 1,
    "pad_token_id": 0,
}
SLIDING = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FAMILIES = {
    "llama": lambda sizes: LlamaForSequenceClassification(LlamaConfig(**sizes)),
    "qwen2": lambda sizes: Qwen2ForSequenceClassification(Qwen2Config(**sizes)),
    "gemma3": lambda sizes: Gemma3TextForSequenceClassification(
        Gemma3TextConfig(**sizes, **SLIDING, query_pre_attn_scalar=8)
    ),
}
RELATIVES = {
    "qwen3": lambda sizes: Qwen3ForSequenceClassification(Qwen3Config(**sizes)),
    "mistral": lambda sizes: MistralForSequenceClassification(
        MistralConfig(**sizes, sliding_window=16)
    ),
    "phi": lambda sizes: PhiForSequenceClassification(
        PhiConfig(**sizes, partial_rotary_factor=0.5)
    ),
}
"""Phi's layers are not `decoder.LAYERS`: it runs over a row with a dense mask."""


def family(name, **changes):
    torch.manual_seed(0)
    network = (FAMILIES | RELATIVES)[name](SIZES | changes).eval()
    for module in network.modules():  # biases and norms that do something
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.3, std=0.2)
    torch.nn.init.normal_(network.score.weight, std=network.config.hidden_size**-0.5)
    return network


def random_pieces(shapes, seed):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, WORDS, prefix), [rng.integers(0, WORDS, own) for own in suffixes])
        for prefix, suffixes in shapes
    ]


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def assert_alike(network, run, pieces):
    expected, found = separate(network, pieces), run(network, pieces)
    assert torch.allclose(expected, found, atol=1e-5)
    ranks = [np.arange(len(own)) // 2 for _, own in pieces]  # pairs of equals among them
    apart, together = (bradley_terry(scores, ranks).loss for scores in (expected, found))
    assert together.item() == pytest.approx(apart.item(), rel=1e-5)
    first, second = gradients(network, apart), gradients(network, together)
    assert float((first - second).abs().max()) <= 1e-5 * max(float(first.abs().max()), 1e-3)


groups = st.lists(
    st.tuples(st.integers(0, 60), st.lists(st.integers(1, 30), min_size=2, max_size=16)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(shapes=groups, seed=st.integers(0, 99), tile=st.sampled_from([7, 64]))
def test_shared_prefixes_change_neither_scores_nor_gradients(name, shapes, seed, tile):
    network, pieces = family(name), random_pieces(shapes, seed)
    assert decoder.ready(network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "TILE", tile)
        assert_alike(network, shared, pieces)


SHAPES = [(40, [5, 30, 12]), (0, [9, 3]), (21, [1, 1]), (3, [25, 7, 7, 2])]
RANKS = [np.arange(len(own)) for _, own in SHAPES]


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_these_families_too(name):
    network = family(name)
    assert decoder.ready(network) == (name != "phi")
    assert_alike(network, shared, random_pieces(SHAPES, 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mask_over_a_row_says_the_same(name):
    def dense(network, pieces):
        row = row_of(pieces, network.device, length=256)  # filled up, as flex does
        return layout._over_masks(network, row, layout._dense_mask)

    assert_alike(family(name), dense, random_pieces(SHAPES, 2))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=6, deadline=None)
@given(shapes=groups.filter(lambda g: len(g) > 1), data=st.data())
def test_one_group_does_not_touch_the_scores_of_another(name, shapes, data):
    network = family(name)
    changed = data.draw(st.integers(0, len(shapes) - 1))
    pieces = random_pieces(shapes, 3)
    mine = np.repeat(np.arange(len(shapes)), [len(own) for _, own in shapes]) == changed
    with torch.no_grad():
        before = shared(network, pieces)
        pieces[changed] = random_pieces([shapes[changed]], 4)[0]
        same_lengths = shared(network, pieces)
        prefix, own = shapes[changed]
        pieces[changed] = random_pieces([(prefix + 9, [n + 3 for n in own])], 4)[0]
        other_lengths = shared(network, pieces)
    assert torch.equal(before[~mine], same_lengths[~mine])
    assert not torch.equal(before[mine], same_lengths[mine])
    assert torch.allclose(before[~mine], other_lengths[~mine], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    shapes=groups,
    heads=st.sampled_from([1, 4]),
    window=st.sampled_from([None, 5]),
    only_last=st.booleans(),
)
def test_a_plan_asks_for_every_visible_key_once(shapes, heads, window, only_last):
    row = row_of(random_pieces(shapes, 0), torch.device("cpu"))
    plan = blocks.plan_of(row, heads, heads, window, only_last)
    asked = row.last if only_last else torch.arange(row.ids.shape[1])
    every = torch.arange(row.ids.shape[1])
    wanted = row.sees(window)(every, every, asked[:, None], every[None])
    seen = torch.zeros(len(asked) * heads, len(every) * heads)
    read = torch.ones(len(plan.queries), dtype=torch.bool)
    read[plan.filling] = False
    for batch in plan.batches:
        products = torch.zeros(batch.blocks * heads, batch.rows, batch.keys)
        visible = attention._probabilities(products, batch, window) > 0
        q = plan.queries[batch.query].view(batch.blocks * heads, batch.rows)
        k = plan.keys[batch.key].view(batch.blocks * heads, batch.keys)
        real = read[batch.query].view(q.shape)
        for n in range(len(q)):
            seen[q[n, real[n]].unsqueeze(1), k[n]] += visible[n, real[n]]
    for head in range(heads):
        assert torch.equal(seen[head::heads, head::heads], wanted.float())
    assert seen.sum() == heads * wanted.sum()
    assert len({(b.blocks, b.rows, b.keys) for b in plan.batches}) <= len(plan.batches)


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_stays_close_to_separate_sequences(name):
    network, pieces = family(name), random_pieces(SHAPES, 6)
    with torch.no_grad():
        full = separate(network, pieces)
        with precision(network, "bf16"):
            apart, together = separate(network, pieces), shared(network, pieces)
    noise = float((apart - full).abs().max())
    assert 0 < float((together - full).abs().max()) < 2 * noise


def test_the_difference_of_a_wrong_layout_is_seen(monkeypatch):
    network, pieces = family("llama"), random_pieces(SHAPES, 7)
    torch.nn.init.zeros_(network.score.weight)
    assert layout.difference(network, "shared", pieces) < 1e-5
    assert not network.score.weight.any()
    monkeypatch.setattr(attention, "_later", lambda rows, _: torch.zeros(rows, rows))
    assert layout.difference(network, "shared", pieces) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_differ_by_what_rounding_does_and_weights_stay_as_they_are(name):
    network, pieces = family(name), random_pieces(SHAPES, 7)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    rounding = layout.rounding(network, pieces)
    assert 0 < rounding < 1e-5
    assert layout.difference(network, "shared", pieces) < 10 * rounding
    after = network.state_dict()
    assert all(after[key].dtype == value.dtype for key, value in before.items())
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_the_head_is_in_fp32_whatever_ran_before():
    network, pieces = family("llama"), random_pieces(SHAPES, 9)
    seen = []
    handle = network.base_model.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad(), precision(network, "bf16"):
        scores = separate(network, pieces)
    handle.remove()
    ends = [len(prefix) + len(own) - 1 for prefix, suffixes in pieces for own in suffixes]
    last = seen[0].last_hidden_state[torch.arange(len(ends)), ends]
    head = network.score.weight
    assert torch.equal(scores, torch.nn.functional.linear(last.float(), head).squeeze(-1))
    half = torch.nn.functional.linear(last.bfloat16(), head.bfloat16()).squeeze(-1)
    assert not torch.equal(scores, half.float())


@pytest.mark.parametrize("half", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["separate", "shared", "flex"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi"])
def test_checkpointed_layers_run_again_as_they_ran(kind, name, half):
    def learned(checkpointing):
        network = family(kind).train()
        if checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        runs = []
        for layer in decoder.layers(network):
            layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
        with attention_kept(network, name, half):
            with precision(network, half):
                scores = layout.LAYOUTS[name](network, random_pieces(SHAPES, 10))
            once = len(runs)
            found = gradients(network, bradley_terry(scores, RANKS).loss)
        assert network.config._attn_implementation == "sdpa"
        assert len(runs) == once * (2 if checkpointing else 1) > 0
        return found

    assert torch.equal(learned(False), learned(True))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FAMILIES)
def test_flex_attention_gives_the_same_scores(name):
    network, pieces = family(name), random_pieces(SHAPES, 8)
    with torch.no_grad():
        assert torch.allclose(separate(network, pieces), layout.flex(network, pieces), atol=1e-5)
    assert_alike(network, layout.flex, pieces)
