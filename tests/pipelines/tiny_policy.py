"""A random Llama with a byte-level tokenizer, small enough to make in a test; and its pool row."""

from pathlib import Path
from uuid import UUID

import pyarrow as pa

from pipelines import ids, schemas

WORDS = "the river carries seven red boats past an old mill while birds answer from a far bank"
CONTEXT = 160


def save(folder: Path, *, head: int = 8) -> Path:
    """Write a policy whose answers end, now and then, at one of several stop tokens.

    `head` is the width of its heads: vLLM on a CPU wants 32 or more.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=4 * head,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2, *range(260, 276)]
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def texts(count: int) -> list[str]:
    """Distinct prompts of two to thirteen words."""
    words = WORDS.split()
    return [" ".join(words[i % 7 : i % 7 + 2 + i % 12] + [str(i)]) for i in range(count)]


def prompts_table(given: list[str], kind: str = "prefix", source: str = "tiny") -> pa.Table:
    """Rows of the prompts table."""
    columns = {
        "prompt_id": ids.array(ids.content_id("prompt", source, text) for text in given),
        "source_key": pa.array(given),
        "text": pa.array(given),
        "kind": pa.array([kind] * len(given)),
        "source": pa.array([source] * len(given)),
        "prompt_group": pa.array(given),
        "split": pa.array(["train"] * len(given)),
    }
    schema = schemas.PROMPTS.schema
    arrays = [
        columns.get(name, pa.nulls(len(given), schema.field(name).type)) for name in schema.names
    ]
    return pa.table(arrays, schema=schema)


def with_system(prompts: pa.Table, *said: str | None) -> pa.Table:
    """Prompts with a system turn each, or none."""
    turns = [
        one and [{"role": "system", "content": one}, {"role": "user", "content": text}]
        for one, text in zip(said, prompts["text"].to_pylist(), strict=True)
    ]
    at = prompts.schema.get_field_index("messages")
    return prompts.set_column(at, "messages", pa.array(turns, schemas.MESSAGES))


def policy(name: str = "tiny", kind: str = "base", template: str | None = "{prompt}") -> dict:
    """A row of the policies table."""
    return {
        "policy_id": UUID(bytes=ids.content_id("policy", name, template)),
        "name": name,
        "kind": kind,
        "template": template,
        "licence": "Apache-2.0",
    }
