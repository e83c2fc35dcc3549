"""InternLM2 beside Llama: the same arithmetic, other names, queries, keys and values in one matrix.

Configuration, names, matrices and tokenizer, each translated; nothing here opens a file of weights
or writes one: folders belong to `convert`, the tokenizer's ids to `spm`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from trainer.errors import BadCheckpointError
from trainer.files import read_object
from trainer.spm import fast_tokenizer, spelling

ARCHITECTURE = "InternLM2ForRewardModel"

_SAME = {
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "vocab_size": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
"""Fields that both configurations have, with InternLM2's value where the file does not say."""

_NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "model.norm": "model.norm",
    "v_head": "score",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_BACK = {llama: internlm2 for internlm2, llama in _NAMES.items()}
_QKV = ("q_proj", "k_proj", "v_proj")
Made = tuple[str, Callable[[], Tensor]]
"""A tensor's name, and how it is made when its turn comes."""

_LAYER = re.compile(r"(model\.layers\.\d+\.)?(.+)\.(weight|bias)")


def llama_config(config: Mapping[str, Any], where: Path) -> LlamaConfig:
    """InternLM2's configuration as Llama's; only dynamic and linear rope scaling exist there.

    Raises:
        BadCheckpointError: a field is missing or has a value without a counterpart.
    """
    values = {name: config.get(name, default) for name, default in _SAME.items()}
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    missing = sorted(name for name, value in values.items() if value is None)
    if missing:
        msg = f"{where}/config.json: {', '.join(missing)} missing; restore the file"
        raise BadCheckpointError(msg)
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    if kind not in ("default", "dynamic", "linear"):
        msg = f"{where}/config.json: rope scaling {kind!r}; known are dynamic and linear"
        raise BadCheckpointError(msg)
    rope = {"rope_type": kind, "rope_theta": float(config.get("rope_theta", 10000))}
    if kind != "default":
        rope["factor"] = float(scaling["factor"])
    return LlamaConfig.from_dict(
        {
            **values,
            "architectures": ["LlamaForSequenceClassification"],
            "rope_parameters": rope,
            "attention_bias": bool(config.get("bias", True)),
            "tie_word_embeddings": False,
            "num_labels": 1,
            "dtype": config.get("torch_dtype") or config.get("dtype"),
        }
    )


def official_config(llama: LlamaConfig, official: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """`official` with what differs in `llama`, which may have been trained further.

    Raises:
        BadCheckpointError: the network cannot be written as an InternLM2 one.
    """
    head = llama.hidden_size // llama.num_attention_heads
    own = llama.head_dim
    rope = _rope(llama)
    faults = {
        f"head_dim is {own}, not {head}": own not in (None, head),
        "mlp_bias is set": llama.mlp_bias,
        f"rope type is {rope['rope_type']!r}": rope["rope_type"]
        not in ("default", "dynamic", "linear"),
    }
    found = [fault for fault, present in faults.items() if present]
    if found:
        msg = f"{where}: {'; '.join(found)}, which InternLM2 has no setting for"
        raise BadCheckpointError(msg)
    before = llama_config(official, where)
    changes = {
        name: getattr(llama, name)
        for name in _SAME
        if getattr(llama, name) != getattr(before, name)
    }
    if rope != _rope(before):
        plain = rope["rope_type"] == "default"
        changes["rope_theta"] = rope["rope_theta"]
        changes["rope_scaling"] = (
            None if plain else {"type": rope["rope_type"], "factor": rope["factor"]}
        )
    if llama.attention_bias != before.attention_bias:
        changes["bias"] = llama.attention_bias
    if llama.dtype != before.dtype:
        changes["torch_dtype"] = str(llama.dtype).removeprefix("torch.")
    return {**official, **changes}


def _rope(llama: LlamaConfig) -> dict[str, Any]:
    return {**cast("dict[str, Any]", llama.rope_parameters)}


def split(weights: Mapping[str, Tensor], llama: LlamaConfig) -> Iterator[Made]:
    """Llama's tensors out of InternLM2's."""
    for name in weights:
        layer, part, kind = _parts(name)
        if part != "attention.wqkv":
            yield f"{layer}{_NAMES[part]}.{kind}", partial(weights.__getitem__, name)
            continue
        for index, target in enumerate(_QKV):
            made = partial(_third, weights, name, index, *_heads(llama))
            yield f"{layer}self_attn.{target}.{kind}", made


def fuse(weights: Mapping[str, Tensor], llama: LlamaConfig) -> Iterator[Made]:
    """InternLM2's tensors out of Llama's."""
    for name in weights:
        layer, part, kind = _parts(name)
        target = part.removeprefix("self_attn.")
        if target not in _QKV:
            yield f"{layer}{_BACK[part]}.{kind}", partial(weights.__getitem__, name)
        elif target == "q_proj":
            three = [f"{layer}self_attn.{other}.{kind}" for other in _QKV]
            made = partial(_joined, weights, three, *_heads(llama))
            yield f"{layer}attention.wqkv.{kind}", made


def _heads(llama: LlamaConfig) -> tuple[int, int]:
    """How many heads keys and values have, and of what size."""
    size = llama.hidden_size // llama.num_attention_heads
    return llama.num_key_value_heads or llama.num_attention_heads, size


def _third(weights: Mapping[str, Tensor], name: str, index: int, heads: int, size: int) -> Tensor:
    return split_qkv(weights[name], heads, size)[index]


def _joined(weights: Mapping[str, Tensor], names: list[str], heads: int, size: int) -> Tensor:
    query, key, value = (weights[name] for name in names)
    return fuse_qkv(query, key, value, heads, size)


def split_qkv(fused: Tensor, heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (all heads * size, ...), keys and values (heads * size, ...) of a fused tensor.

    The rows of `fused` are, for each of the `heads` of keys and values, the heads of queries that
    share it, then its key, then its value, each of `size` rows.
    """
    by_head = fused.unflatten(0, (heads, -1, size))
    query, key, value = by_head[:, :-2], by_head[:, -2], by_head[:, -1]
    return query.flatten(0, 2), key.flatten(0, 1), value.flatten(0, 1)


def fuse_qkv(query: Tensor, key: Tensor, value: Tensor, heads: int, size: int) -> Tensor:
    """The inverse of `split_qkv`."""
    parts = [part.unflatten(0, (heads, -1, size)) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def _parts(name: str) -> tuple[str, str, str]:
    found = _LAYER.fullmatch(name)
    assert found is not None  # the caller has compared all names
    return found[1] or "", found[2], found[3]


def llama_names(llama: LlamaConfig) -> Iterator[str]:
    """Names of all tensors of the one-label classifier."""
    yield from ("model.embed_tokens.weight", "model.norm.weight", "score.weight")
    for layer in range(llama.num_hidden_layers):
        start = f"model.layers.{layer}."
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield f"{start}{part}.weight"
        for part in ("gate_proj", "up_proj", "down_proj"):
            yield f"{start}mlp.{part}.weight"
        for part in (*_QKV, "o_proj"):
            yield f"{start}self_attn.{part}.weight"
            if llama.attention_bias:
                yield f"{start}self_attn.{part}.bias"


def is_official(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of an official checkpoint."""
    return ARCHITECTURE in (config.get("architectures") or ())


def official_names(llama: LlamaConfig) -> Iterator[str]:
    """Names of all tensors of the same model as an InternLM2 one."""
    for name in llama_names(llama):
        layer, part, kind = _parts(name)
        if part.removeprefix("self_attn.") not in _QKV:
            yield f"{layer}{_BACK[part]}.{kind}"
        elif part.endswith("q_proj"):
            yield f"{layer}attention.wqkv.{kind}"


def tokenizer_of(folder: Path, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The folder's SentencePiece model with its special tokens, as a fast tokenizer.

    Raises:
        BadCheckpointError: a file is missing, or the model is of another kind.
    """
    settings = read_object(folder / "tokenizer_config.json", "restore the file")
    named = {
        name: content
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (content := _content(settings.get(name)))
    }
    special = {
        int(i): AddedToken(
            token["content"],
            lstrip=token.get("lstrip", False),
            rstrip=token.get("rstrip", False),
            normalized=False,
            special=True,
        )
        for i, token in settings.get("added_tokens_decoder", {}).items()
    }
    for name, default in (("unk_token", 0), ("bos_token", 1), ("eos_token", 2)):
        i = config.get(f"{name}_id", default)
        if named.get(name) and i not in special:
            special[i] = AddedToken(named[name], normalized=False, special=True)
    reward = config.get("reward_token_id")
    if isinstance(reward, int) and reward not in special:
        content = spelling(folder / "tokenizer.model", reward)
        special[reward] = AddedToken(content, normalized=False, special=True)
    opened = settings.get("add_bos_token", True) and "bos_token" in named
    backend = fast_tokenizer(
        folder / "tokenizer.model",
        dict(sorted(special.items())),
        before=(named["bos_token"],) if opened else (),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side=settings.get("padding_side", "right"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token
