"""A small folder of the official layout with random weights, and its arithmetic written out.

The network here is a reading of the published formulas (POLAR's architecture, dynamic NTK scaling)
that shares no code with what is tested.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, rms_norm, silu
from transformers.utils import sentencepiece_model_pb2_new as schema

from tests.trainer.conftest import TEXT

SEPARATOR_ID, REWARD_ID, VOCABULARY = 92397, 92527, 92544
SPECIAL = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    SEPARATOR_ID: "<|reward|>",
    92538: "<|plugin|>",
    92541: "<|action_start|>",
}
CONFIG = {
    "architectures": ["InternLM2ForRewardModel"],
    "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForRewardModel"},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "model_type": "internlm2",
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "reward_token_id": REWARD_ID,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 50000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
}


def sentencepiece_model(*, dummy_prefix: bool = False) -> bytes:
    """A BPE model with bytes as the fall-back whose last 147 pieces are those of InternLM2."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20 + ["aaaa bbbb ---- ====   a   aaaaaaa abababab"] * 50),
        model_writer=out,
        model_type="bpe",
        vocab_size=600,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    proto = schema.ModelProto()
    proto.ParseFromString(out.getvalue())
    for i in range(len(proto.pieces), VOCABULARY):
        unused = i - SEPARATOR_ID
        name = f"[UNUSED_TOKEN_{unused}]" if unused >= 0 else chr(0xF0000 + i)
        kind = schema.ModelProto.SentencePiece.Type.Value(
            "USER_DEFINED" if unused >= 0 else "NORMAL"
        )
        proto.pieces.add(piece=name, score=-float(i), type=kind)
    return proto.SerializeToString()


def weights(config: dict, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Random tensors under the official names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, mean: float = 0.0, std: float = 0.2) -> torch.Tensor:
        return (mean + std * torch.randn(*shape, generator=generator)).to(dtype)

    width, inner = config["hidden_size"], config["intermediate_size"]
    size = width // config["num_attention_heads"]
    fused = size * (config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    tensors = {
        "model.tok_embeddings.weight": random(config["vocab_size"], width, std=1.0),
        "model.norm.weight": random(width, mean=1.0),
        "v_head.weight": random(1, width),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes = {
            "attention.wqkv": (fused, width),
            "attention.wo": (width, width),
            "feed_forward.w1": (inner, width),
            "feed_forward.w3": (inner, width),
            "feed_forward.w2": (width, inner),
        }
        tensors |= {f"{layer}{name}.weight": random(*shape) for name, shape in shapes.items()}
        if config["bias"]:
            tensors[f"{layer}attention.wqkv.bias"] = random(fused)
            tensors[f"{layer}attention.wo.bias"] = random(width)
        for name in ("attention_norm", "ffn_norm"):
            tensors[f"{layer}{name}.weight"] = random(width, mean=1.0)
    return tensors


def write_official(
    folder: Path, model: bytes, *, dtype: torch.dtype = torch.float32, shards: str = "", **changes
) -> dict:
    """Write a folder as it is published; `shards` is '', 'safetensors' or 'bin'.

    Returns:
        The tensors in it.
    """
    config = CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    tensors = weights(config, dtype=dtype)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(model)
    added = {
        str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False}
        for i, token in SPECIAL.items()
    }
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "InternLM2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "modeling_internlm2.py").write_text("# the folder's own code travels with it\n")
    if not shards:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    names = list(tensors)
    cuts = [names[:4], names[4:9], names[9:]]
    stem = "model" if shards == "safetensors" else "pytorch_model"
    where = {}
    for number, part in enumerate(cuts, start=1):
        file = f"{stem}-{number:05d}-of-{len(cuts):05d}.{shards}"
        own = {name: tensors[name] for name in part}
        if shards == "bin":
            torch.save(own, folder / file)
        else:
            save_file(own, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{stem}.{shards}.index.json").write_text(json.dumps(index))
    return tensors


def slow_ids(processor: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """What the official slow tokenizer makes of a text: BOS, special tokens, and the rest."""
    numbers = {token: i for i, token in SPECIAL.items()}
    parts = re.split("(" + "|".join(map(re.escape, numbers)) + ")", text)
    ids = [1]
    for part in filter(None, parts):
        ids += [numbers[part]] if part in numbers else processor.encode(part)
    return ids


def score(tensors: dict, config: dict, ids: list[int]) -> torch.Tensor:
    """The score of one sequence, step by step, in fp64."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    heads, shared = config["num_key_value_heads"], config["num_attention_heads"]
    shared //= heads
    width, n = config["hidden_size"], len(ids)
    size = width // (heads * shared)
    cos, sin = _rotations(config, n, size)
    later = torch.ones(n, n, dtype=torch.bool).triu(1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, (width,), wide[f"{name}.weight"], config["rms_norm_eps"])

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, wide[f"{name}.weight"], wide.get(f"{name}.bias"))

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    x = wide["model.tok_embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        fused = project(norm(x, f"{layer}attention_norm"), f"{layer}attention.wqkv")
        mixed = []
        for h in range(heads):
            block = fused[:, h * (shared + 2) * size : (h + 1) * (shared + 2) * size]
            *queries, key, value = block.split(size, dim=-1)
            for query in queries:
                weight = turn(query) @ turn(key).T / size**0.5
                mixed.append(weight.masked_fill(later, -torch.inf).softmax(-1) @ value)
        x = x + project(torch.cat(mixed, dim=-1), f"{layer}attention.wo")
        y = norm(x, f"{layer}ffn_norm")
        gate = silu(project(y, f"{layer}feed_forward.w1"))
        x = x + project(gate * project(y, f"{layer}feed_forward.w3"), f"{layer}feed_forward.w2")
    return project(norm(x, "model.norm")[-1], "v_head")[0]


def _rotations(config: dict, n: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    base, longest = config["rope_theta"], config["max_position_embeddings"]
    scaling = config["rope_scaling"]
    if scaling and n > longest:
        stretch = scaling["factor"] * n / longest - (scaling["factor"] - 1)
        base *= stretch ** (size / (size - 2))
    rates = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(n, dtype=torch.float64), rates)
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()
