"""Scaling plans and laws: known laws come back, a plan is whole or refused, and so are its runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.errors import TrainerError
from trainer.scaling import Result, ScalingPlan, fit_law, scaling
from trainer.scaling_report import write_scaling_report

WIDTHS = (32, 48, 64, 128, 192)
SPANS = np.array([3e4, 6e4, 1.1e5, 2.4e5, 4.3e5, 1.7e6])


def plan_of(sizes: list[dict[str, Any]] | None = None, **values: Any) -> ScalingPlan:
    sizes = sizes or [size_of(width) for width in WIDTHS]
    common = {"pretrain": {"max_steps": 10, "epochs": 99}, "resamples": 100}
    return ScalingPlan.model_validate({**common, "sizes": sizes, **values})


def size_of(width: int, **values: Any) -> dict[str, Any]:
    language = {"hidden": width, "heads": 2, "intermediate": 3 * width}
    seeds = [0, 1, 2] if width < 64 else [0]
    return {"name": f"w{width}", "seeds": seeds, "language": language, **values}


def results_of(
    plan: ScalingPlan, law: Any, *, between_seeds: float = 0.0, seed: int = 0
) -> tuple[dict[str, Result], np.ndarray, np.ndarray]:
    """Runs whose losses follow a law of N, with noise of pairs, prompts and seeds."""
    rng = np.random.default_rng(seed)
    prompts, policies = np.repeat(np.arange(30), 20), np.tile(np.arange(5), 120)
    common = rng.normal(0, 0.1, 30)[prompts] + rng.normal(0, 0.3, 600)
    results = {}
    for run in plan.runs:
        mean = float(law(run.size.parameters)) * np.exp(rng.normal(0, between_seeds))
        losses = mean * np.exp(common) / np.exp(common).mean()
        tokens = 100 * run.size.groups
        results[run.name] = Result(
            tokens=tokens,
            language_tokens=1,
            losses=losses,
            accuracy=0.7,
            siblings=None,
            seconds=1.0,
        )
    return results, prompts, policies


@settings(max_examples=30, deadline=None)
@given(
    b=st.floats(0.02, 0.6),
    share=st.one_of(st.just(0.0), st.floats(0.1, 0.6)),
    level=st.floats(0.1, 2.0),
    units=st.sampled_from([1.0, 1e8]),
)
def test_a_law_without_noise_comes_back(b: float, share: float, level: float, units: float):
    """`level` is the loss at 1e5 weights and `share` the part of it that is floor."""
    x = SPANS * units
    a = level * (1 - share) * (1e5 * units) ** b
    losses = a * x**-b + share * level
    found = fit_law(x, losses, floor=True)
    assert found.b == pytest.approx(b, rel=1e-3)
    assert found.a == pytest.approx(a, rel=3e-2)
    assert found.floor == pytest.approx(share * level, rel=1e-3, abs=1e-3 * level)
    assert found.r2 == pytest.approx(1.0, abs=1e-6)
    assert found.loss(x) == pytest.approx(losses, rel=1e-4)
    straight = fit_law(x, losses, floor=False)
    if share:
        assert straight.r2 < found.r2
    else:
        assert straight.b == pytest.approx(b, rel=1e-6)
        assert straight.a == pytest.approx(a, rel=1e-6)


def test_a_loss_that_grows_is_said_to_grow():
    losses = 0.3 * SPANS**0.05
    assert fit_law(SPANS, losses, floor=False).b == pytest.approx(-0.05)
    assert fit_law(SPANS, losses, floor=True).r2 < 0.5


@pytest.mark.parametrize("losses", [[0.5, 0.4, 0.0], [0.5, np.nan, 0.3], [0.5, 0.4]])
def test_points_that_no_law_goes_through_are_refused(losses: list[float]):
    with pytest.raises(TrainerError, match="no power law"):
        fit_law(np.array([1.0, 2.0, 3.0])[: len(losses)], np.array(losses), floor=True)


def test_intervals_hold_a_known_law_and_grow_with_the_noise_between_seeds():
    plan = plan_of()
    made = {}
    for noise in (0.0, 0.02):
        results, prompts, policies = results_of(plan, lambda n: 5 * n**-0.2, between_seeds=noise)
        made[noise] = scaling(plan, results, prompts, policies)
    for found in made.values():
        (fit, *_) = found.fits
        assert fit.form == "a N^-b"
        for name, truth in (("a", 5.0), ("b", 0.2)):
            low, high = fit.ends[name]
            assert low <= truth + 1e-9
            assert truth - 1e-9 <= high
    assert made[0.0].spread == pytest.approx(0.0, abs=1e-12)
    assert made[0.02].spread == pytest.approx(0.02, rel=0.9)
    low, high = made[0.02].fits[0].ends["b"]
    low_0, high_0 = made[0.0].fits[0].ends["b"]
    assert high - low > high_0 - low_0
    assert high_0 - low_0 < 1e-9  # the pairs' noise is common to all runs: no exponent in it


def test_the_largest_size_is_foretold_from_the_others():
    plan = plan_of()
    results, prompts, policies = results_of(plan, lambda n: 5 * n**-0.2)
    largest = results["w192-s0"]
    results["w192-s0"] = replace(largest, losses=2 * largest.losses)
    fit = scaling(plan, results, prompts, policies).fits[0]
    assert fit.foretold == pytest.approx(5 * plan.sizes[-1].parameters ** -0.2, rel=1e-6)
    assert fit.law.r2 < 0.9


def test_a_law_over_compute_is_that_over_weights_where_all_read_the_same():
    plan = plan_of()
    results, prompts, policies = results_of(plan, lambda n: 3 * n**-0.3)
    over_n, _, over_c, _ = scaling(plan, results, prompts, policies).fits
    assert (over_n.variable, over_c.variable) == ("N", "C")
    assert over_c.law.b == pytest.approx(over_n.law.b)
    each = 6 * results["w32-s0"].tokens  # C = 6 N D
    assert over_c.law.a == pytest.approx(over_n.law.a * each**over_n.law.b)


def test_a_run_left_out_is_refused_by_name():
    plan = plan_of()
    results, prompts, policies = results_of(plan, lambda n: n**-0.1)
    for name in results:
        others = {other: result for other, result in results.items() if other != name}
        with pytest.raises(TrainerError, match=f"{name} missing"):
            scaling(plan, others, prompts, policies)
    with pytest.raises(TrainerError, match="w32-s9 not in the plan"):
        scaling(plan, {**results, "w32-s9": results["w32-s0"]}, prompts, policies)


def test_pairs_of_one_prompt_and_policy_are_refused():
    plan = plan_of()
    results, prompts, policies = results_of(plan, lambda n: n**-0.1)
    with pytest.raises(TrainerError, match="one prompt group and one policy group"):
        scaling(plan, results, prompts * 0, policies * 0)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([size_of(w) for w in (32, 48, 128, 192)], "4 sizes"),
        ([size_of(w) for w in (32, 48, 64, 96, 128)], "a factor of"),
        ([size_of(w) for w in (48, 32, 64, 128, 192)], "smallest to the largest"),
        ([size_of(w) for w in (32, 32, 64, 128, 192)], "4 sizes of different names"),
        ([size_of(32, seeds=[0, 1]), *(size_of(w) for w in WIDTHS[1:])], "w32 has 2 seeds"),
        ([size_of(32, seeds=[0, 1, 1]), *(size_of(w) for w in WIDTHS[1:])], "named twice"),
        ([size_of(32, pretrain={"max_steps": None})], "not by the clock"),
        ([size_of(32, pretrain={"max_seconds": 9})], "not by the clock"),
        ([size_of(34, language={"hidden": 34, "heads": 4})], "not a multiple"),
        ([size_of(32, pretrain={"max_step": 9})], "max_step"),
    ],
)
def test_a_plan_that_proves_nothing_is_refused(sizes: list[dict[str, Any]], words: str):
    with pytest.raises(ValidationError, match=words):
        plan_of(sizes)


def test_the_plan_in_configs_is_one():
    file = Path(__file__).parents[2] / "configs" / "scaling.yaml"
    plan = ScalingPlan.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    compute = [size.parameters * size.groups for size in plan.sizes]
    assert len(plan.sizes) >= 5
    assert compute[-1] >= 30 * compute[0]
    assert [len(size.seeds) for size in plan.sizes[:2]] == [3, 3]


def test_a_size_has_what_is_common_unless_it_says_otherwise():
    plan = plan_of(language={"layers": 3, "steps": 7}, sizes=[
        *(size_of(w) for w in WIDTHS[:-1]), size_of(192, pretrain={"max_steps": 20})])  # fmt: skip
    assert {size.language.layers for size in plan.sizes} == {3}
    assert [size.pretrain.max_steps for size in plan.sizes] == [10, 10, 10, 10, 20]
    assert {size.pretrain.epochs for size in plan.sizes} == {99}
    assert [run.name for run in plan.runs][:4] == ["w32-s0", "w32-s1", "w32-s2", "w48-s0"]
    assert plan.runs[2].language.seed == plan.runs[2].pretrain.seed == 2
    assert {size.language.seed for size in plan.sizes} == {0}


def test_the_report_holds_every_run_and_law_and_opens_without_a_server(tmp_path):
    plan = plan_of()
    results, prompts, policies = results_of(plan, lambda n: 5 * n**-0.2, between_seeds=0.05)
    found = scaling(plan, results, prompts, policies)
    paths = write_scaling_report(tmp_path, found)
    texts = {kind: path.read_text(encoding="utf-8") for kind, path in paths.items()}
    record = json.loads(texts["json"])
    assert [row["run"] for row in record["runs"]] == [run.name for run in plan.runs]
    assert [row["law"] for row in record["laws"]] == [fit.form for fit in found.fits]
    for kind in ("html", "md"):
        for fit in found.fits:
            assert f"R² {fit.law.r2:.4f}" in texts[kind]
        assert all(run.name in texts[kind] for run in plan.runs)
        assert "0.9886" in texts[kind]
        assert "0.9912" in texts[kind]
    assert "<script" not in texts["html"]
    svg = texts["html"][texts["html"].index("<svg") : texts["html"].index("</svg>") + 6]
    assert ElementTree.fromstring(svg) is not None


def test_a_loss_that_does_not_fall_is_owned_up_to(tmp_path):
    plan = plan_of()
    results, prompts, policies = results_of(plan, lambda n: 0.1 * n**0.05)
    results["w32-s1"] = replace(results["w32-s1"], losses=np.full(600, np.log(2)))
    found = scaling(plan, results, prompts, policies)
    text = write_scaling_report(tmp_path, found)["md"].read_text(encoding="utf-8")
    assert "does not fall from every size to the next" in text
    assert "like all others: w32-s1." in text
