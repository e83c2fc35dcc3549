"""Tiny random backbones and tokenizers, made on the spot, for everyone who tests the trainer."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.data import GROUPS_SCHEMA

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "How many planets are there? There are eight planets; the largest is Jupiter.",
    "Write a short poem about the sea. The sea is wide, the sea is deep.",
    "What is 12 + 30? It is 42.  Two  spaces,\nnew lines\n\nand tabs\tstay.",
    "Straße, naïve, 東京, emoji 🙂 and <|reward|> [UNUSED_TOKEN_130] in text.",
]


def byte_level_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE without word boundaries, so merges cross spaces, newlines and joints."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _finish(backend, vocab_size, pre_tokenizers.ByteLevel.alphabet())


def metaspace_tokenizer(vocab_size: int = 400, scheme: str = "first") -> PreTrainedTokenizerFast:
    """SentencePiece-like: metaspace for spaces, one more at the start, bytes as the fall-back."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _finish(backend, vocab_size, [], [f"<0x{i:02X}>" for i in range(256)])


def _finish(backend, vocab_size, alphabet, extra=()) -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + len(extra),
        initial_alphabet=alphabet,
        special_tokens=[*special, *extra],
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    if extra:  # byte pieces belong to the model, they are not tokens of their own
        state = json.loads(backend.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
        backend = Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_llama(vocab_size: int, **changes) -> LlamaForCausalLM:
    """A random Llama with grouped keys and values."""
    values = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**values, **changes}))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is seen, for tests that look into what only a CPU runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@contextmanager
def handled(number: int, handler: Any) -> Iterator[None]:
    """A signal with this handler, also where a background job ignores it; it must be left there."""
    before = signal.signal(number, handler)
    try:
        yield
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory, tokenizer) -> Path:
    """A causal language model checkpoint, as language_model.train would leave it."""
    path = tmp_path_factory.mktemp("backbone")
    tiny_llama(len(tokenizer), tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


STYLES = {"shout": str.upper, "dots": lambda s: s.replace(" ", ".. "), "plain": str.lower}


def make_groups(n: int, *, wrapper: str = "pretrain", seed: int = 0, k: int = 3) -> pa.Table:
    """Groups that can be learned: a candidate is better if its style is the reference's."""
    rng = random.Random(seed)
    words = " ".join(TEXT).split()
    rows = []
    for number in range(n):
        styles = rng.sample(sorted(STYLES), 3)[: max(2, min(k, 3))]
        styles += rng.choices(styles[1:], k=k - len(styles))

        def answer(style: str) -> str:
            return STYLES[style](" ".join(rng.choices(words, k=rng.randint(3, 9))))

        candidates = [
            {
                "trajectory_id": f"t{number}-{i}",
                "text": answer(style),
                "rank": int(i > 0),
                "policy_id": style,
                "relation": "same_policy" if i == 0 else "other_family",
                "policy_group": style,
            }
            for i, style in enumerate(styles)
        ]
        rng.shuffle(candidates)
        rows.append(
            {
                "group_id": f"g{number}",
                "wrapper": wrapper,
                "prompt": [{"role": "user", "content": " ".join(rng.choices(words, k=6))}],
                "reference": answer(styles[0]),
                "candidates": candidates,
                "category": "style",
                "split": "eval" if number % 5 == 4 else "train",
                "cell": "seen",
                "prompt_group": f"p{number % 7}",
                "policy_group": styles[0],
            }
        )
    return pa.Table.from_pylist(rows, GROUPS_SCHEMA)


@pytest.fixture(scope="session")
def groups_file(tmp_path_factory) -> Path:
    """120 groups of three, every fifth of them in split `eval`."""
    path = tmp_path_factory.mktemp("groups") / "groups.parquet"
    pq.write_table(make_groups(120), path)
    return path


@pytest.fixture(scope="session")
def uneven_groups(tmp_path_factory) -> Path:
    """Train groups of two, three and four candidates, some with three ranks and some with ties."""
    path = tmp_path_factory.mktemp("groups") / "uneven.parquet"
    tables = [make_groups(15, k=k, seed=k) for k in (2, 3, 4)]
    rows = pa.concat_tables(tables).to_pylist()
    for number, row in enumerate(rows):
        row["group_id"] = f"u{number}"
        for place, candidate in enumerate(row["candidates"] if number % 2 else []):
            candidate["rank"] = place
    pq.write_table(pa.Table.from_pylist(rows, GROUPS_SCHEMA), path)
    return path
