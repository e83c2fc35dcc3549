"""The ids are the official ones, and no text can forge a special token."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tests.trainer.conftest import TEXT, byte_level_tokenizer, metaspace_tokenizer
from trainer.errors import BadCheckpointError, BadGroupsError
from trainer.template import (
    REWARD,
    SEPARATOR,
    Limits,
    Template,
    Texts,
    common_prefix,
    joined,
    wrapped,
)


def with_tokens(tokenizer):
    specials = [AddedToken(t, special=True, normalized=False) for t in (SEPARATOR, REWARD)]
    tokenizer.add_tokens(specials, special_tokens=True)
    return tokenizer


TOKENIZERS = {
    "byte-level": with_tokens(byte_level_tokenizer()),
    "metaspace-first": with_tokens(metaspace_tokenizer()),
    "metaspace-always": with_tokens(metaspace_tokenizer(scheme="always")),
}


@cache
def template_of(name: str, limits: Limits) -> Template:
    return Template(TOKENIZERS[name], limits)


def official(tokenizer, text: Texts, limits: Limits) -> list[list[int]]:
    """What the official client and training code do, written out naively."""

    def encode(string):
        return tokenizer.encode(string, add_special_tokens=True)

    def plain(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    longest = limits.max_response_length
    sequences = []
    for candidate in text.candidates:
        prompt, reference, answer = map(encode, (text.prompt, text.reference, candidate))
        reference, answer = reference[:longest], answer[:longest]
        room = (limits.max_length - 4 - len(reference) - len(answer)) // 2
        prompt, reference, answer = plain(prompt[-room:]), plain(reference), plain(answer)
        newline = "\n" if text.wrapper == "sft" else ""
        left = prompt + (newline if reference else "") + reference
        right = prompt + (newline if answer else "") + answer
        ids = encode(left + SEPARATOR + right)
        sequences.append([*ids, tokenizer.convert_tokens_to_ids(REWARD)])
    return sequences


words = st.sampled_from([w for t in TEXT[:4] for w in t.split(" ")] + ["\n", " ", "\t", "東", "🙂"])
phrases = st.lists(words, max_size=30).map(" ".join) | st.text(alphabet="abc \n.é", max_size=40)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
    prompt=phrases,
    reference=phrases,
    candidates=st.lists(phrases, min_size=1, max_size=4),
    wrapper=st.sampled_from(["pretrain", "sft"]),
    limits=st.sampled_from([Limits(), Limits(64, 12), Limits(40, 16)]),
)
def test_ids_are_the_official_ones(name, prompt, reference, candidates, wrapper, limits):
    text = Texts(prompt, reference, candidates, wrapper)
    tokenizer = TOKENIZERS[name]
    expected = official(tokenizer, text, limits)
    if max(map(len, expected)) <= limits.max_length:  # ours bounds what the round trip lengthened
        assert template_of(name, limits).encode([text]) == [expected]


def test_the_tokenizer_merges_across_the_joint():
    tokenizer = TOKENIZERS["byte-level"]
    together = tokenizer.encode("the sea", add_special_tokens=False)
    apart = [i for s in ("the", " sea") for i in tokenizer.encode(s, add_special_tokens=False)]
    assert together != apart
    [[ids]] = Template(tokenizer).encode([Texts("the", " sea", ["x"], "pretrain")])
    assert ids[1 : 1 + len(together)] == together


FORGERIES = [SEPARATOR, REWARD, "<s>", "</s>", "<unk>", f"a{REWARD}", f"<|rew{SEPARATOR}ard|>"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("forgery", FORGERIES)
def test_text_that_spells_a_special_token_does_not_become_one(name, forgery):
    tokenizer = TOKENIZERS[name]
    for limits in (Limits(), Limits(64, 12)):
        groups = [
            Texts(f"p {forgery} q", "r", ["c"]),
            Texts("p", f"{forgery}r", ["c"]),
            Texts("p", "r", [f"c {forgery}", forgery]),
        ]
        for [ids, *_] in template_of(name, limits).encode(groups):
            specials = ["<s>", SEPARATOR, REWARD, "</s>", "<unk>"]
            specials = tokenizer.convert_tokens_to_ids(specials)
            assert [i for i in ids if i in specials] == specials[:3]


def test_special_tokens_in_text_are_kept_as_ordinary_ids():
    tokenizer = TOKENIZERS["byte-level"]
    [[ids]] = Template(tokenizer).encode([Texts("p", "r", [f"a {REWARD} b"])])
    assert tokenizer.decode(ids[:-1]).endswith(f"a {REWARD} b")


def test_a_token_that_the_vocabulary_builds_from_text_is_dropped():
    tokenizer = byte_level_tokenizer()
    merged = max(tokenizer.tokenize(TEXT[2]), key=len)
    assert len(merged) > 1
    template = Template(with_tokens(tokenizer), reward=merged)
    [[ids]] = template.encode([Texts(TEXT[2], TEXT[2], [TEXT[2]])])
    assert ids.count(template.reward_id) == 1


def test_an_unflagged_reward_token_is_still_not_reachable_from_text():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([SEPARATOR, REWARD])  # ordinary added tokens, as some checkpoints have
    template = Template(tokenizer)
    [[ids]] = template.encode([Texts(REWARD, SEPARATOR, [REWARD + SEPARATOR])])
    assert ids.count(template.reward_id) == ids.count(template.separator_id) == 1


def test_one_prompt_cuts_every_candidate_alike():
    template = Template(TOKENIZERS["byte-level"], Limits(64, 20))
    text = Texts("planets " * 30, "short", ["a", "the lazy dog " * 9])
    [apart] = template.encode([text])
    [together] = template.encode([text], one_prompt=True)
    assert len(apart[0]) > len(together[0])
    assert together[1] == apart[1]
    assert common_prefix(together) > common_prefix(apart)


def test_no_room_for_the_prompt_means_no_prompt():
    template = Template(TOKENIZERS["byte-level"], Limits(20, 8))
    [[ids]] = template.encode([Texts("planets " * 30, "dog " * 30, ["fox " * 30])])
    plain = TOKENIZERS["byte-level"].decode(ids)
    assert "planets" not in plain
    assert len(ids) <= 20


def test_nothing_is_longer_than_the_limit_even_with_cut_characters():
    template = Template(TOKENIZERS["byte-level"], Limits(50, 15))
    [[ids]] = template.encode([Texts("🙂東" * 40, "東🙂" * 40, ["🙂🙂東" * 40])])
    assert len(ids) <= 50


def test_joined_and_wrapped():
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert joined(turns) == "a\nb"
    assert joined("plain") == "plain"
    assert wrapped("p", "r", "sft") == "p\nr"
    assert wrapped("p", "r", "pretrain") == "pr"
    assert wrapped("p", "", "sft") == "p"


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=5))
def test_common_prefix(sequences):
    n = common_prefix(sequences)
    shortest = min(map(len, sequences))
    assert 0 <= n <= shortest - 1
    assert all(s[:n] == sequences[0][:n] for s in sequences)
    assert n == shortest - 1 or len({s[n] for s in sequences}) > 1


def test_unusable_limits_and_tokenizers_are_refused():
    with pytest.raises(BadGroupsError, match="max_length=10"):
        Limits(10, 8)
    with pytest.raises(BadCheckpointError, match="UNUSED_TOKEN_130"):
        Template(byte_level_tokenizer())
    assert Limits.for_context(100_000) == Limits()
    assert Limits.for_context(512) == Limits(512, 128)
