"""Recipes hold the published values, and the law gives them."""

from __future__ import annotations

import pytest

from trainer import __main__ as cli
from trainer.errors import TrainerError
from trainer.recipes import law, names, recipe_file
from trainer.settings import TrainSettings, read_settings

SMALL = {"parameters": 1.8e9, "pretrain_tokens": 2.5e12, "reward_tokens": 0.94e12}
LARGE = {"parameters": 7e9, "pretrain_tokens": 4.0e12, "reward_tokens": 3.6e12}


@pytest.mark.parametrize(
    ("sizes", "lr", "batch", "recipe"),
    [(SMALL, 1.4293e-5, 1939.7, "polar-1.8b"), (LARGE, 1.6735e-5, 4342.8, "polar-7b")],
)
def test_the_law_gives_the_published_values(sizes, lr, batch, recipe):
    rate = law(**sizes)
    assert rate.lr == pytest.approx(lr, abs=5e-10)
    assert rate.batch == pytest.approx(batch, abs=0.05)
    used = read_settings(recipe_file(f"{recipe}-pretrain"))
    assert used.lr == pytest.approx(rate.lr, rel=0.03)  # the paper rounds it
    assert used.batch_groups == round(rate.batch)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", SMALL)
def test_the_law_refuses_what_is_no_size(name, bad):
    with pytest.raises(TrainerError, match=f"{name} is"):
        law(**{**SMALL, name: bad})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("polar-1.8b-pretrain", {"lr": 1.4e-5, "batch_groups": 1940, "epochs": 1}),
        ("polar-7b-pretrain", {"lr": 1.67e-5, "batch_groups": 4343, "epochs": 1}),
        ("polar-1.8b-finetune", {"lr": 1e-5, "batch_groups": 320, "epochs": 1}),
        ("polar-7b-finetune", {"lr": 2e-5, "batch_groups": 320, "epochs": 1}),
        ("xtuner-1.8b-finetune", {"lr": 1e-5, "epochs": 1, "micro_tokens": 32768}),
        ("xtuner-7b-finetune", {"lr": 2e-5, "epochs": 1, "micro_tokens": 32768}),
    ],
)
def test_recipes_hold_the_published_values(name, values):
    settings = read_settings(None, recipe=name)
    common = {
        "betas": (0.9, 0.95),
        "weight_decay": 0.0,
        "clip": 1.0,
        "warmup": 0.03,
        "floor": 0.1,
        "max_length": 16384,
        "max_response_length": 4096,
    }
    assert settings.model_dump().items() >= (common | values).items()


def test_every_value_has_its_source_beside_it():
    assert len(names()) >= 6
    for name, what in names().items():
        assert what.endswith("."), name
        for line in recipe_file(name).read_text().splitlines():
            if line and not line.lstrip().startswith("#"):
                assert any(tag in line for tag in ("[paper]", "[recipe]", "[ours]")), (name, line)


def test_configuration_and_words_win_over_a_recipe(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("lr: 0.5\nclip: 2.0\n")
    settings = read_settings(config, ["clip=3"], recipe="polar-7b-finetune")
    assert (settings.lr, settings.clip, settings.batch_groups) == (0.5, 3.0, 320)
    with pytest.raises(TrainerError, match="did you mean 'polar-7b-finetune'"):
        read_settings(None, recipe="polar-7b-finetun")


def test_the_law_prints_settings(capsys, tmp_path):
    words = ["--parameters", "1.8e9", "--pretrain-tokens", "2.5e12", "--reward-tokens", "0.94e12"]
    cli.app(["law", *words], standalone_mode=False)
    config = tmp_path / "law.yaml"
    config.write_text(capsys.readouterr().out)
    settings = read_settings(config)
    assert settings == TrainSettings(lr=1.4293e-5, batch_groups=1940)
    cli.app(["recipes"], standalone_mode=False)
    assert "polar-1.8b-pretrain" in capsys.readouterr().out
