"""On a GPU: FlexAttention's kernels, bf16, training and scoring do what separate sequences do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.trainer.conftest import make_groups, tiny_llama
from tests.trainer.test_layout import (
    FAMILIES,
    SHAPES,
    assert_alike,
    family,
    gradients,
    random_pieces,
)
from tests.trainer.test_loop import losses, run, undisturbed_and_gone_on
from trainer import layout
from trainer.layout import LAYOUTS, precision, separate
from trainer.loss import bradley_terry
from trainer.score import Scorer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which is not here"),
    pytest.mark.timeout(600),
]
WIDE = {"head_dim": 32, "hidden_size": 64, "max_position_embeddings": 16384}


def on_gpu(name, **changes):
    return family(name, **changes).cuda()


@pytest.fixture
def wide_backbone(tmp_path_factory, tokenizer):
    """A backbone whose heads FlexAttention's kernels can run."""
    path = tmp_path_factory.mktemp("wide")
    tiny_llama(len(tokenizer), hidden_size=64, tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def refused(*_):
    pytest.fail("the other way was taken")


@pytest.fixture
def kernels_alone(monkeypatch):
    """No dense mask may stand in for the kernels."""
    monkeypatch.setattr(layout, "_dense_mask", refused)


@pytest.mark.usefixtures("kernels_alone")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernels_change_neither_scores_nor_gradients(name):
    network = on_gpu(name, **WIDE)
    assert layout.taken("shared", network) == "flex"
    for seed, more in enumerate([[], [(700, [90, 300])]]):
        assert_alike(network, layout.flex, random_pieces(SHAPES + more, seed))


@pytest.mark.usefixtures("kernels_alone")
@pytest.mark.parametrize("name", FAMILIES)
def test_in_long_rows_the_kernels_round_no_more_than_separate_sequences_do(name):
    network, pieces = on_gpu(name, **WIDE), random_pieces([*SHAPES, (2000, [40] * 16)], 2)
    ranks = [np.arange(len(own)) for _, own in pieces]

    def learned(run):
        return gradients(network, bradley_terry(run(network, pieces), ranks).loss).double()

    apart, together = learned(separate), learned(layout.flex)
    network.double()
    exact = learned(separate)
    largest = float(exact.abs().max())
    off = [float((found - exact).abs().max()) / largest for found in (apart, together)]
    assert off[1] <= max(1e-5, 2 * off[0]), off


def test_many_lengths_are_compiled_few_times():
    """Past the limit torch would go on without kernels, slowly, and with a warning only."""
    network = on_gpu("llama", **WIDE)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for thousands in range(1, 13):
            pieces = random_pieces([(1024 * thousands - 300, [80, 110])], thousands)
            expected, found = separate(network, pieces), layout.flex(network, pieces)
            assert torch.allclose(expected, found, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_group_does_not_touch_the_scores_of_another(name):
    network, pieces = on_gpu(name, **WIDE), random_pieces(SHAPES, 3)
    with torch.no_grad():
        before = layout.flex(network, pieces)
        pieces[0] = random_pieces(SHAPES[:1], 4)[0]
        after = layout.flex(network, pieces)
    own = len(SHAPES[0][1])
    assert torch.equal(before[own:], after[own:])
    assert not torch.equal(before[:own], after[:own])


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_too_narrow_for_the_kernels_go_another_way(name, monkeypatch):
    monkeypatch.setattr(layout, "_block_mask", refused)
    network = on_gpu(name)
    for kind in ("shared", "flex"):
        assert_alike(network, LAYOUTS[kind], random_pieces(SHAPES, 5))


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_stays_close_to_separate_sequences(name):
    network, pieces = on_gpu(name, **WIDE), random_pieces(SHAPES, 6)
    with torch.no_grad():
        full = separate(network, pieces)
        with precision(network, "bf16"):
            apart, together = separate(network, pieces), layout.shared(network, pieces)
    noise = float((apart - full).abs().max())
    assert 0 < float((together - full).abs().max()) < 2 * noise


def test_layouts_and_checkpointing_train_alike(tmp_path, groups_file, wide_backbone):
    plain = run(groups_file, wide_backbone, tmp_path / "a", layout="separate")
    for name, changes in {
        "shared": {},
        "parts": {"micro_tokens": 600},
        "checkpointing": {"checkpointing": True},
    }.items():
        other = run(groups_file, wide_backbone, tmp_path / name, **changes)
        assert losses(other) == pytest.approx(losses(plain), rel=1e-4), name
        assert max(line["padding"] for line in other["curve"]) > 1 / 32  # of rows of 1,024s
    half = run(groups_file, wide_backbone, tmp_path / "half", precision="bf16")
    assert losses(half) == pytest.approx(losses(plain), rel=0.05)


@pytest.mark.parametrize("half", ["fp32", "bf16"])
def test_a_stopped_run_goes_on_with_the_same_numbers(
    tmp_path, groups_file, wide_backbone, monkeypatch, half
):
    undisturbed, resumed = undisturbed_and_gone_on(
        monkeypatch, groups_file, wide_backbone, tmp_path, max_steps=14, epochs=9, precision=half
    )
    assert losses(resumed) == losses(undisturbed)


def test_a_checkpoint_scores_on_a_gpu_as_on_a_cpu(tmp_path, groups_file, wide_backbone):
    run(groups_file, wide_backbone, tmp_path / "a", max_steps=4)
    scorer = Scorer.load(tmp_path / "a")
    assert scorer.model.network.device.type == "cuda"
    groups = make_groups(20, seed=1)
    found = np.concatenate(scorer.score_groups(groups))
    scorer.model.place("cpu")
    assert found == pytest.approx(np.concatenate(scorer.score_groups(groups)), abs=1e-5)
