"""Quality flags and cuts: what counts as blank or a loop, and that cuts only ever shorten."""

import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import quality, schemas


def flags_of(text):
    return quality.flags(pa.array([text]))[0].as_py()


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\t\r ", "\u200b", "\ufeff", "\u2060\u200d", "\u00a0\u3000", "\u2800\u3164\ufe0f"],
)
def test_blank_texts_are_empty(text):
    assert flags_of(text) == ["empty"]


@pytest.mark.parametrize("text", ["a", " .", "\u200bx\u200b", "\U0001f680", "\u4f60"])
def test_one_visible_character_is_an_answer(text):
    assert flags_of(text) == []


def test_broken_characters():
    assert flags_of("a\x07b") == ["control_characters"]
    assert flags_of("a\x93b") == ["control_characters"]
    assert flags_of("tab\tline\nreturn\r") == []
    assert flags_of("a\ufffd") == ["replacement_character"]
    assert flags_of("\x00\ufffd") == ["control_characters", "replacement_character"]
    assert flags_of("\x00") == ["empty", "control_characters"]


def test_flags_of_a_batch_and_of_chunks():
    texts = ["fine", "", "x " * 40, None, "bad \ufffd " * 9]
    expected = [[], ["empty"], ["loop"], [], ["loop", "replacement_character"]]
    flags = quality.flags(pa.array(texts))
    assert flags.to_pylist() == expected
    assert flags.type == schemas.TEXTS
    chunked = pa.chunked_array([pa.array(texts[:2]), pa.array(texts[2:])])
    assert quality.flags(chunked).to_pylist() == expected
    assert quality.flags(pa.array(texts)[1:]).to_pylist() == expected[1:]
    assert quality.flags(pa.array([], pa.string())).to_pylist() == []
    assert {flag for row in expected for flag in row} <= set(schemas.FLAGS)


@pytest.mark.parametrize(
    "text",
    [
        "He said " + "no no no " * 10,
        "Then: " + "!" * 60,
        "One. " + "The clue is a clue to the answer. " * 3,
        "One. " + "The clue is a clue to the answer. " * 3 + "The clue is",
        "x" * 4 + ("0" * 20 + "1") * 5,
        "start " + "User: \nJoi: \n" * 6 + "\n\n",
        "start" + "\n" * 60,
        "\u4f60\u597d" * 40,
    ],
)
def test_loops_are_found_and_cut(text):
    cut, looped = quality.cut_loop(text)
    assert looped
    assert "loop" in flags_of(text)
    assert text.startswith(cut)
    assert len(cut) < len(text)


@pytest.mark.parametrize(
    "text",
    [
        "stone stone stone stone stone",
        "la la la la, and then they went home to rest for the night." * 2,
        "chorus of the song. " * 6 + "And at last the verse that ends it all.",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "heading\n" + "-" * 30,
    ],
)
def test_repetition_that_is_no_loop(text):
    assert quality.cut_loop(text) == (text, False)


def test_what_hit_its_limit_is_said_by_who_knows_it():
    texts = pa.array(["ends. here", "so " * 40, "whole.", ""])
    found = quality.flags(texts, truncated=np.array([True, True, False, True])).to_pylist()
    assert found == [["truncated"], ["loop", "truncated"], [], ["empty", "truncated"]]
    kept = [quality.finish(t, f) for t, f in zip(texts.to_pylist(), found, strict=True)]
    assert kept == [("ends.", "sentence"), (kept[1][0], "loop"), ("whole.", None), ("", None)]
    assert kept[1][0] == quality.cut_loop("so " * 40)[0]


def test_cut_loop_keeps_the_first_repeats():
    assert quality.cut_loop("So it goes: " + "La la la, he sang. " * 9) == (
        "So it goes: La la la, he sang. La la la, he sang.",
        True,
    )


@given(
    st.text("ab \n.", max_size=30),
    st.text("abc \u00e9.", min_size=1, max_size=12).filter(str.strip),
    st.integers(48, 70),
)
def test_every_long_run_is_a_loop(head, unit, repeats):
    text = head + unit * repeats
    cut, looped = quality.cut_loop(text)
    assert looped
    assert text.startswith(cut)
    assert len(cut) <= len(head) + 2 * len(unit)


@given(st.text(max_size=300))
def test_cuts_keep_a_beginning(text):
    for cut in (quality.cut_loop, quality.cut_sentence):
        kept, shortened = cut(text)
        assert text.startswith(kept)
        assert shortened == (len(kept) < len(text))
        assert bool(kept.strip()) == bool(text.strip())


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("It rains. It pours. The old m", "It rains. It pours."),
        ('He said "Stop!" and then we', 'He said "Stop!"'),
        ("It is done. ", "It is done."),
        ("All is said.", "All is said."),
        ("Pi is 3.14 and then", "Pi is 3.14 and then"),
        ("Fruits.\n1. apples\n2. pe", "Fruits."),
        ("first line\nsecond li", "first line"),
        ("no end in sight", "no end in sight"),
        ("\u4eca\u5929\u4e0b\u96e8\u3002\u660e\u5929", "\u4eca\u5929\u4e0b\u96e8\u3002"),
        ("\nabc", "\nabc"),
        ("", ""),
    ],
)
def test_last_complete_sentence(text, kept):
    assert quality.cut_sentence(text) == (kept, len(kept) < len(text))


def test_flags_are_cheap():
    text = "The quick brown fox jumps over the lazy dog number {}. " * 18
    texts = pa.array([text.format(*range(i, i + 18)) for i in range(5_000)])
    start = time.process_time()
    quality.flags(texts)
    assert time.process_time() - start < 8 * 5_000 / 137_000 * 3  # thrice the budget: a busy core


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Where is the station, please?", "latin"),
        ("Tôi không biết nhà ga ở đâu.", "latin"),
        ("Где находится вокзал, скажите?", "cyrillic"),
        ("Πού είναι ο σταθμός, παρακαλώ;", "greek"),
        ("أين تقع محطة القطار من فضلك؟", "arabic"),
        ("איפה תחנת הרכבת בבקשה?", "hebrew"),
        ("कृपया बताइए रेलवे स्टेशन कहाँ है?", "devanagari"),
        ("รถไฟสถานีอยู่ที่ไหนครับ", "thai"),
        ("기차역이 어디에 있는지 알려 주세요.", "hangul"),
        ("请问火车站在哪里？我想坐车去北京。", "han"),
        ("駅はどこですか。東京へ行きたいです。", "kana"),
        ("東京都庁の所在地は新宿区西新宿である。", "kana"),
        ("def add(a, b):\n    return a + b  # 相加", "latin"),
        ("42 + 17 = 59", ""),
        ("😀🎉" * 20, ""),
        ("ok", ""),
        ("Moskva Москва Moskva Москва Moskva Москва", ""),
    ],
)
def test_the_script_of_a_text(text, script):
    assert quality.scripts(pa.array([text])).tolist() == [script]


def test_an_answer_in_another_script_than_its_prompt_is_flagged():
    asked = [
        "Where is the station, please?",
        "请问火车站在哪里？我想坐车。",
        "Add 2 and 2, please.",
        None,
    ]
    said = ["Вокзал находится на севере города.", "火车站在城市的北边，走十分钟。", "4",
            "The station is in the north."]  # fmt: skip
    found = quality.flags(pa.array(said), pa.array(asked)).to_pylist()
    assert found == [["other_language"], [], [], []]
    assert quality.flags(pa.array(said)).to_pylist() == [[], [], [], []]
    chunked = pa.chunked_array([pa.array(asked[:1]), pa.array(asked[1:])])
    assert quality.flags(pa.array(said), chunked).to_pylist() == found
    swapped = quality.flags(pa.array(said[1:3]), pa.array(asked[0:2])).to_pylist()
    assert swapped == [["other_language"], []]


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that request.",
        "I’m sorry, but as an AI I cannot provide instructions for this.",
        "I am so sorry, I am unable to answer this.",
        "I cannot assist with that.",
        '"I can\'t help with this."',
        "I must decline to create such a text.",
        "As an AI language model, I don't have personal opinions.",
        "As a large language model I am not able to browse the web.",
        "Je suis désolé, mais je ne peux pas vous aider avec cela.",
        "Es tut mir leid, aber ich kann Ihnen dabei nicht helfen.",
        "Lo siento, pero no puedo ayudarte con eso.",
        "Desculpe, mas não posso ajudar com isso.",
        "Mi dispiace, ma non posso aiutarti.",
        "Извините, но я не могу помочь с этим запросом.",
        "К сожалению, я не могу ответить на этот вопрос.",
        "很抱歉，我无法提供这方面的帮助。",
        "对不起，作为人工智能助手，我不能回答这个问题。",
        "作为一个AI语言模型，我无法回答这个问题。",
        "申し訳ございませんが、その質問にはお答えできません。",
        "죄송합니다. 해당 요청은 도와드릴 수 없습니다.".replace(". ", ", "),
    ],
)
def test_refusals_are_flagged(text):
    assert "refusal" in flags_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that your dog is ill. Here is what you can do.",
        "Sorry for the delay! The answer is 4.",
        "He said: I cannot help you, and went home.",
        "The machine cannot assist with heavy loads.",
        "As an AI engineer you will write a lot of code.",
        "I can help with that. First, open the lid.",
        "Es tut mir leid, das zu hören. Hier sind drei Vorschläge.",
        "抱歉让您久等了，答案是四。",
        "Je peux vous aider avec plaisir.",
        "I can't believe how good this soup is!",
    ],
)
def test_what_is_no_refusal(text):
    assert flags_of(text) == []


def test_flags_with_prompts_are_cheap():
    text = "The quick brown fox jumps over the lazy dog number {}. " * 18
    texts = pa.array([text.format(*range(i, i + 18)) for i in range(2_000)])
    start = time.process_time()
    quality.flags(texts)
    alone = time.process_time() - start
    start = time.process_time()
    quality.flags(texts, texts)
    assert time.process_time() - start < 20 * alone + 0.5


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("यह पहला वाक्य है। दूसरा वाक्य अधू", "यह पहला वाक्य है।"),
        ("هل هذا صحيح؟ نعم، هذا صح", "هل هذا صحيح؟"),
        ("これは文です。次の文は途", "これは文です。"),
        ("Это правда! А вот это ещё не", "Это правда!"),
    ],
)
def test_last_complete_sentence_in_several_scripts(text, kept):
    assert quality.cut_sentence(text) == (kept, True)
