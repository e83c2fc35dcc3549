"""Tiny random backbones and tokenizers, made on the spot; everyone who tests the trainer uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    """SentencePiece-like: spaces become metaspace, a prefix one at the start, bytes as fall-back."""
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
        state = __import__("json").loads(backend.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
        backend = Tokenizer.from_str(__import__("json").dumps(state))
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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory, tokenizer) -> Path:
    """A causal language model checkpoint, as language_model.train would leave it."""
    path = tmp_path_factory.mktemp("backbone")
    tiny_llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
