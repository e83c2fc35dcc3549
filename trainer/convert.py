"""Official checkpoints in and out: `python -m trainer convert SRC OUT`, the way seen from SRC.

An `InternLM2ForRewardModel` folder becomes a Llama-layout one-label classifier that needs no remote
code, with `polar.json`; such a classifier becomes an official folder again. The arithmetic of the
two is the same, only names and layout differ (`internlm2`). Weights stream tensor by tensor, each
in its own dtype (`weights`).

The files of an official folder that are not weights (code, tokenizer, configuration) travel in
`official/`, so that the way back is exact. The tokenizer's ids belong to `spm`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from trainer.errors import BadCheckpointError, TrainerError
from trainer.files import read_object
from trainer.internlm2 import (
    ARCHITECTURE,
    fuse,
    is_official,
    llama_config,
    llama_names,
    official_config,
    official_names,
    split,
    tokenizer_of,
)
from trainer.model import Mark, Record, read_record, write_record
from trainer.packing import Progress
from trainer.template import SEPARATOR, Limits, Wrapper
from trainer.weights import SHARD_BYTES, WEIGHTS, Shards, Weights

OFFICIAL = "official"
"""Folder in a converted checkpoint with the official files that are not weights."""


def convert(
    source: Path,
    out: Path,
    *,
    like: Path | None = None,
    wrapper: Wrapper = "sft",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> str:
    """Convert a checkpoint folder; `out` appears when it is complete.

    Args:
        source: an official folder, or a Llama-layout classifier with `polar.json`.
        out: a folder that does not exist yet.
        like: on the way back, an official folder (or a converted one) whose configuration, code and
            tokenizer the result gets; by default those that came with `source`.
        wrapper: on the way in, how the checkpoint's scores join prompt and answer: `sft` for a
            fine-tuned one, `pretrain` for one that is only pre-trained (the `-Base` folders).
        shard_bytes: about the largest file of weights, and about what is held in memory.
        progress: called with tensors written, tensors in all, and a note.

    Returns:
        The architecture that was written.

    Raises:
        BadCheckpointError: `source` is of neither kind, incomplete, or cannot be expressed.
        TrainerError: `out` exists.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        msg = f"{out} exists; choose another folder, or remove it"
        raise TrainerError(msg)
    config = _configuration(source)
    official = is_official(config)
    if not official and config.get("model_type") != "llama":
        msg = (
            f"{source}: model type {config.get('model_type')!r}, architectures "
            f"{config.get('architectures')}; give an {ARCHITECTURE} folder or a Llama classifier"
        )
        raise BadCheckpointError(msg)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        weights, shards = Weights(source), Shards(unfinished, shard_bytes, progress)
        if official:
            _to_llama(source, config, weights, unfinished, shards, wrapper)
        else:
            _to_official(source, config, weights, unfinished, shards, like)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return "LlamaForSequenceClassification" if official else ARCHITECTURE


def _to_llama(
    source: Path,
    config: Mapping[str, Any],
    weights: Weights,
    out: Path,
    shards: Shards,
    wrapper: Wrapper,
) -> None:
    llama = llama_config(config, source)
    tokenizer = tokenizer_of(source, config)
    vocabulary = tokenizer.get_vocab()
    reward: Any = config.get("reward_token_id")
    names = {i: token for token, i in vocabulary.items()}
    known = isinstance(reward, int) and reward in names and SEPARATOR in vocabulary
    if not known or vocabulary[SEPARATOR] == reward:
        msg = (
            f"{source}: reward_token_id is {reward} and {SEPARATOR} has id "
            f"{vocabulary.get(SEPARATOR)}; POLAR needs both, and two different ones"
        )
        raise BadCheckpointError(msg)
    _require_all(weights, set(official_names(llama)), source)
    shards.write(split(weights, llama))
    llama.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _copy_small(source, out / OFFICIAL)
    limits = Limits.for_context(llama.max_position_embeddings)
    record = Record(
        wrapper=wrapper,
        separator=Mark(token=SEPARATOR, id=vocabulary[SEPARATOR]),
        reward=Mark(token=names[reward], id=reward),
        max_length=limits.max_length,
        max_response_length=limits.max_response_length,
        stage="finetune" if wrapper == "sft" else "pretrain",
    )
    write_record(out, record)


def _to_official(
    source: Path,
    config: Mapping[str, Any],
    weights: Weights,
    out: Path,
    shards: Shards,
    like: Path | None,
) -> None:
    record = read_record(source)
    llama = LlamaConfig.from_dict(dict(config))
    files = _official_files(like or source)
    official = _configuration(files)
    reward, separator = record.reward.id, tokenizer_of(files, official).get_vocab().get(SEPARATOR)
    if (official.get("reward_token_id"), separator) != (reward, record.separator.id):
        msg = (
            f"{source} was trained with reward token {reward} and separator {record.separator.id}, "
            f"but {files} has {official.get('reward_token_id')} and {separator}; "
            "give the official folder that it descends from"
        )
        raise BadCheckpointError(msg)
    changed = official_config(llama, official, source)
    _require_all(weights, set(llama_names(llama)), source)
    shards.write(fuse(weights, llama))
    _copy_small(files, out)
    if changed != official:
        text = json.dumps(changed, indent=2, sort_keys=True) + "\n"
        (out / "config.json").write_text(text, encoding="utf-8")


def _configuration(folder: Path) -> dict[str, Any]:
    return read_object(folder / "config.json", "give the folder of a checkpoint")


def _require_all(weights: Weights, wanted: set[str], where: Path) -> None:
    found = set(weights)
    if found != wanted:
        msg = (
            f"{where}: weights missing: {sorted(wanted - found)[:3]}; "
            f"not known: {sorted(found - wanted)[:3]}; the folder is incomplete or of another kind"
        )
        raise BadCheckpointError(msg)


def _official_files(folder: Path) -> Path:
    """Where a folder keeps the official files that are not weights."""
    for place in (folder / OFFICIAL, folder):
        if (place / "config.json").is_file() and is_official(_configuration(place)):
            return place
    msg = (
        f"{folder}: no {ARCHITECTURE} configuration and tokenizer came with it; give an official "
        "folder, or one converted from it, with --like"
    )
    raise BadCheckpointError(msg)


def _copy_small(source: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not WEIGHTS.search(file.name):
            shutil.copyfile(file, out / file.name)
