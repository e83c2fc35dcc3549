"""Text to ids, exactly as POLAR does (wrappers, truncation, special tokens).

A sequence is `[BOS] left SEPARATOR right REWARD`, where left is the prompt and the reference, and
right is the prompt and the candidate. The SFT wrapper joins the two with one newline, unless the
second is empty; the pre-training wrapper joins them with nothing. The prompt stands twice because
the model compares two complete trajectories.

The official client encodes one string and lets the tokenizer find the separator in it, so a user's
text that spells a special token becomes one. Here user text never does: a private copy of the
tokenizer treats every special token as plain text, and the separator is written as a token whose
spelling nobody can know. Wherever no special token is spelled, the ids are the official ones.

What tokens a checkpoint uses is stored by `model`; reading files belongs to `data`.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from trainer.errors import BadCheckpointError, BadGroupsError

SEPARATOR = "<|reward|>"
REWARD = "[UNUSED_TOKEN_130]"
RESERVED = 4
"""Ids kept free of text: the reward token, the separator and two newlines."""

Wrapper = Literal["pretrain", "sft"]


@dataclass(frozen=True)
class Limits:
    """Longest sequence, and longest reference or candidate, in ids."""

    max_length: int = 16384
    max_response_length: int = 4096

    def __post_init__(self) -> None:
        if (
            self.max_response_length < 1
            or self.max_length < 2 * self.max_response_length + RESERVED
        ):
            msg = (
                f"max_length={self.max_length} cannot hold two responses of "
                f"max_response_length={self.max_response_length} and {RESERVED} reserved ids; "
                f"raise max_length or lower max_response_length"
            )
            raise BadGroupsError(msg)

    @classmethod
    def for_context(cls, context: int) -> Limits:
        """The official limits, or the same proportions within a smaller context."""
        length = min(cls.max_length, context)
        return cls(length, min(cls.max_response_length, length // 4))


@dataclass(frozen=True)
class Texts:
    """One prompt, one reference and the candidates measured against it, as plain strings."""

    prompt: str
    reference: str
    candidates: Sequence[str]
    wrapper: Wrapper = "sft"


def joined(value: str | Sequence[dict[str, Any]]) -> str:
    """A string as it is; of messages the contents, joined by newlines (roles are not used)."""
    if isinstance(value, str):
        return value
    return "\n".join(message["content"] for message in value)


def wrapped(prompt: str, response: str, wrapper: Wrapper) -> str:
    """Prompt and response in one string; the SFT newline stands only before a response."""
    return prompt + ("\n" if wrapper == "sft" and response else "") + response


class Template:
    """Turns texts into id lists for one tokenizer and one pair of limits.

    `fingerprint` is equal where ids are.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits | None = None,
        *,
        separator: str = SEPARATOR,
        reward: str = REWARD,
    ) -> None:
        """Prepare the private copy of `tokenizer`.

        Raises:
            BadCheckpointError: the tokenizer is not a fast one or lacks one of the two tokens.
        """
        if not tokenizer.is_fast:
            msg = f"{type(tokenizer).__name__} is not a fast tokenizer; convert it (tokenizer.json)"
            raise BadCheckpointError(msg)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (separator, reward) if token not in vocabulary]
        if missing:
            msg = f"the tokenizer lacks {', '.join(missing)}; build the model with trainer.model"
            raise BadCheckpointError(msg)
        self.limits = limits or Limits()
        self.separator_id = vocabulary[separator]
        self.reward_id = vocabulary[reward]
        blind = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        blind.no_truncation()
        blind.no_padding()
        added = {token.content: token for token in blind.get_added_tokens_decoder().values()}
        own = added.get(separator, AddedToken(separator))
        blind.add_special_tokens([separator, reward])  # flagged special, hence plain text below
        blind.encode_special_tokens = True
        self._nonce = f"<|{secrets.token_hex(24)}|>"
        blind.add_tokens(
            [AddedToken(self._nonce, normalized=False, lstrip=own.lstrip, rstrip=own.rstrip)]
        )
        self._blind = blind
        said = (tokenizer.backend_tokenizer.to_str(), separator, reward, repr(self.limits))
        self.fingerprint = hashlib.blake2b("\0".join(said).encode(), digest_size=16).hexdigest()
        ids = {token: i for i, token in blind.get_added_tokens_decoder().items() if token.special}
        unknown = {tokenizer.unk_token_id}  # an unknown character is not a spelled token
        self._forbidden = frozenset(ids.values()) | {self.separator_id, self.reward_id}
        self._forbidden -= unknown
        bare = blind.encode("").ids
        inner = blind.encode(self._nonce).tokens.index(self._nonce)
        self._before, self._after = bare[:inner], bare[inner:]

    def encode(self, texts: Sequence[Texts], *, one_prompt: bool = False) -> list[list[list[int]]]:
        """Ids of every candidate's sequence: one list of sequences per entry of `texts`.

        `one_prompt` cuts a group's prompt to what its longest candidate leaves, as training does;
        otherwise each candidate is cut as if it came alone, as the official client does.
        """
        fitted = self._fit(texts, one_prompt)
        strings = [half for group in fitted for pair in group for half in pair]
        ids = self._ids(list(dict.fromkeys(strings)), special=False)
        return [
            self._bounded([self._sequence(ids[left], ids[right]) for left, right in group])
            for group in fitted
        ]

    def _fit(self, texts: Sequence[Texts], one_prompt: bool) -> list[list[tuple[str, str]]]:
        """Both halves of every sequence, cut to the limits, with the separator's stand-in.

        The last ids of the prompt are kept and the first of a response. Where nothing is left for
        the prompt it becomes empty (the official slice `[-0:]` would keep all of it).
        """
        raw = [t for text in texts for t in (text.prompt, text.reference, *text.candidates)]
        ids = self._ids(list(dict.fromkeys(raw)), special=True)
        longest = self.limits.max_response_length
        space = self.limits.max_length - RESERVED
        spans = []
        for text in texts:
            lengths = [min(len(ids[answer]), longest) for answer in text.candidates]
            reference = min(len(ids[text.reference]), longest)
            rooms = [max(0, (space - reference - length) // 2) for length in lengths]
            if one_prompt:
                rooms = [min(rooms, default=0)] * len(rooms)
            whole = len(ids[text.prompt])
            spans.append(
                [
                    (
                        (text.prompt, max(0, whole - room), whole),
                        (text.reference, 0, reference),
                        (answer, 0, length),
                    )
                    for room, answer, length in zip(rooms, text.candidates, lengths, strict=True)
                ]
            )
        cuts = list(dict.fromkeys(cut for group in spans for triple in group for cut in triple))
        slices = [ids[text][first:last] for text, first, last in cuts]
        plain = self._blind.decode_batch(slices, skip_special_tokens=True)
        kept = dict(zip(cuts, plain, strict=True))
        return [
            [
                (
                    wrapped(kept[prompt], kept[reference], text.wrapper) + self._nonce,
                    self._nonce + wrapped(kept[prompt], kept[answer], text.wrapper),
                )
                for prompt, reference, answer in group
            ]
            for text, group in zip(texts, spans, strict=True)
        ]

    def _ids(self, strings: list[str], *, special: bool) -> dict[str, list[int]]:
        encoded = self._blind.encode_batch_fast(strings, add_special_tokens=special)
        return {string: encoding.ids for string, encoding in zip(strings, encoded, strict=True)}

    def _sequence(self, left: list[int], right: list[int]) -> list[int]:
        """The two halves, each with the separator's stand-in at its inner end, as one sequence."""
        return [
            *self._before,
            *self._harmless(left[:-1]),
            self.separator_id,
            *self._harmless(right[1:]),
            *self._after,
            self.reward_id,
        ]

    def _harmless(self, ids: list[int]) -> list[int]:
        """Without ids that only we may place (a vocabulary may build one out of ordinary text)."""
        if self._forbidden.isdisjoint(ids):
            return ids
        return [i for i in ids if i not in self._forbidden]

    def _bounded(self, sequences: list[list[int]]) -> list[list[int]]:
        """Cut the front of the prompt if decoding and encoding again made sequences too long."""
        excess = max(map(len, sequences), default=0) - self.limits.max_length
        first = len(self._before)
        if excess > 0:
            return [ids[:first] + ids[first + excess :] for ids in sequences]
        return sequences


def common_prefix(sequences: Sequence[Sequence[int] | np.ndarray]) -> int:
    """How many leading ids all sequences share, leaving each at least its last id."""
    shortest = min(map(len, sequences)) - 1
    first = np.asarray(sequences[0][:shortest])
    for other in sequences[1:]:
        differing = np.flatnonzero(first[:shortest] != np.asarray(other[:shortest]))
        if len(differing):
            shortest = int(differing[0])
    return shortest
