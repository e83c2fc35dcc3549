import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import ids, schemas
from pipelines.errors import BadInputError
from pipelines.prompts import SplitSettings, normalised, prompt_id, prompts_table, side

SPLIT = SplitSettings()


def row(key: str, text: str, **more: object) -> dict[str, object]:
    return {"source": "s", "source_key": key, "text": text, **more}


def test_ids_are_golden() -> None:
    golden = "c3884764-bd09-9e9f-0220-f170ad001619"
    assert ids.text(prompt_id("qa_feedback", "qa_feedback/dev-126")) == golden


def test_table_has_the_schema_and_its_defaults() -> None:
    table = prompts_table(
        [
            row("1", "What is 2+2?", category="math", reference="4", licence="MIT"),
            row("2", "Go on:", kind="prefix", messages=[{"role": "user", "content": "Go on:"}]),
        ],
        SPLIT,
    )
    assert table.schema == schemas.PROMPTS.schema
    assert table["kind"].to_pylist() == ["instruction", "prefix"]
    assert table["reference"].to_pylist() == ["4", None]
    assert ids.storage(table["prompt_id"]).to_pylist() == [prompt_id("s", "1"), prompt_id("s", "2")]
    assert prompts_table([], SPLIT).schema == schemas.PROMPTS.schema


def test_near_equal_prompts_share_a_group_and_a_side() -> None:
    table = prompts_table(
        [row("1", "What is 2+2?"), row("2", "what is 2 + 2"), row("3", "What is 2 + 3?")], SPLIT
    )
    first, second, third = table["prompt_group"].to_pylist()
    assert first == second != third


def test_a_prompt_without_group_joins_the_named_group_of_its_text() -> None:
    table = prompts_table([row("1", "Say hi!"), row("2", "say HI", prompt_group="g7")], SPLIT)
    assert table["prompt_group"].to_pylist() == ["g7", "g7"]


def test_one_key_twice_is_refused() -> None:
    with pytest.raises(BadInputError, match="'1' of source 's' occurs twice"):
        prompts_table([row("1", "a"), row("1", "b")], SPLIT)


@given(st.text())
def test_only_white_space_normalises_to_nothing(text: str) -> None:
    assert bool(normalised(text)) == bool(text.split())
    assert normalised(f"  {text}\n") == normalised(text)


def test_side_is_stable_follows_the_share_and_the_seed() -> None:
    groups = [f"g{i}" for i in range(4000)]
    sides = [side("prompt", group, SPLIT) for group in groups]
    assert sides == [side("prompt", group, SPLIT) for group in groups]
    assert abs(sides.count("test") / len(groups) - SPLIT.prompt_test_share) < 0.02
    more = SplitSettings(prompt_test_share=0.4)
    grown = [side("prompt", group, more) for group in groups]
    assert all(b == "test" for a, b in zip(sides, grown, strict=True) if a == "test")
    other = [side("prompt", group, SplitSettings(seed=1)) for group in groups]
    assert other != sides
    assert [side("policy", group, SPLIT) for group in groups] != sides
    assert {side("prompt", g, SplitSettings(prompt_test_share=0)) for g in groups} == {"train"}
    assert {side("prompt", g, SplitSettings(prompt_test_share=1)) for g in groups} == {"test"}
