"""The reward model: a decoder with a scalar head, and its checkpoint folder in and out.

A checkpoint is a normal transformers folder: a one-label sequence classifier in safetensors, its
tokenizer, and `polar.json` with what POLAR adds (template, limits, stage, where it comes from). It
loads in plain transformers. How a batch is laid out belongs to `layout`, ids to `template`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from trainer.errors import BadCheckpointError
from trainer.internlm2 import is_official
from trainer.lora import merged
from trainer.template import REWARD, SEPARATOR, Limits, Template, Wrapper

RECORD = "polar.json"
_CONVERT = "it is an official POLAR checkpoint: convert it, `python -m trainer convert {} OUT`"
Stage = Literal["pretrain", "finetune"]


class Mark(BaseModel):
    """A special token and the id that the checkpoint was trained with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str
    id: int


class Record(BaseModel):
    """What `polar.json` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: Literal["polar-1"] = "polar-1"
    wrapper: Wrapper
    separator: Mark
    reward: Mark
    max_length: int
    max_response_length: int
    stage: Stage | None = None
    parents: tuple[str, ...] = ()
    snapshot: int | None = None
    checkpoint_id: str | None = None


class RewardModel:
    """A network with one score, its tokenizer and its record.

    Raises:
        BadCheckpointError: the record's limits are beyond the network's positions. There, scores of
            a network with dynamic rope would depend on what it scored before.
    """

    def __init__(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: Record
    ) -> None:
        context = _context(network)
        if context and record.max_length > context:
            msg = (
                f"max_length={record.max_length} is beyond the {context} positions of the network "
                f"(max_position_embeddings); with settings, give max_length={context} and "
                f"max_response_length={context // 4}, or leave both out"
            )
            raise BadCheckpointError(msg)
        self.network = network
        self.tokenizer = tokenizer
        self.record = record
        self.template = Template(
            tokenizer,
            Limits(record.max_length, record.max_response_length),
            separator=record.separator.token,
            reward=record.reward.token,
        )

    @classmethod
    def start(cls, path: Path, *, wrapper: Wrapper, limits: Limits | None = None) -> RewardModel:
        """A model to train: a POLAR checkpoint as it is, or a language model with a new head.

        `limits` are those of the checkpoint, or of the language model's context, unless given.

        Raises:
            BadCheckpointError: the folder is neither, or weights are missing in it.
        """
        if (Path(path) / RECORD).is_file():
            model = cls.load(path)
            changes: dict[str, object] = {"wrapper": wrapper}
            if limits:
                changes |= {
                    "max_length": limits.max_length,
                    "max_response_length": limits.max_response_length,
                }
            return cls(model.network, model.tokenizer, model.record.model_copy(update=changes))
        network, tokenizer = _open(Path(path), may_miss_head=True)
        marks = add_marks(network, tokenizer)
        limits = limits or Limits.for_context(_context(network) or Limits.max_length)
        record = Record(
            wrapper=wrapper,
            separator=marks[0],
            reward=marks[1],
            max_length=limits.max_length,
            max_response_length=limits.max_response_length,
        )
        return cls(network, tokenizer, record)

    @classmethod
    def load(cls, path: Path) -> RewardModel:
        """Open a checkpoint that `save` wrote.

        Raises:
            BadCheckpointError: it is not one; the message says what is missing and what to do.
        """
        path = Path(path)
        record = read_record(path)
        network, tokenizer = _open(path, may_miss_head=False)
        for mark in (record.separator, record.reward):
            found = tokenizer.get_vocab().get(mark.token)
            if found != mark.id:
                msg = (
                    f"{path}: the tokenizer gives {mark.token} the id {found}, but the model was "
                    f"trained with {mark.id}; restore the tokenizer that was saved with it"
                )
                raise BadCheckpointError(msg)
        return cls(network, tokenizer, record)

    def place(self, device: str | None = None) -> RewardModel:
        """Move the network to `device`, by default the GPU where there is one."""
        best = "cuda" if torch.cuda.is_available() else "cpu"
        nn.Module.to(self.network, torch.device(device or best))
        return self

    def save(self, path: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write the folder; `polar.json` comes last, so a folder that has it is complete.

        `weights` by name stand in for the network's own where those are split over processes.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with quiet():
            state = weights or merged(self.network)
            self.network.save_pretrained(path, state_dict=state)
        self.tokenizer.save_pretrained(path)
        write_record(path, self.record)


def write_record(path: Path, record: Record) -> None:
    """Put `polar.json` into a checkpoint folder."""
    (path / RECORD).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_record(path: Path) -> Record:
    """The `polar.json` of a checkpoint folder.

    Raises:
        BadCheckpointError: the folder or the file is missing or does not say what it must.
    """
    if not path.is_dir():
        msg = f"{path}: no such folder; give the folder of a POLAR checkpoint"
        raise BadCheckpointError(msg)
    file = path / RECORD
    if not file.is_file():
        kind = (
            "it is another kind of model: make a reward model of it with "
            "`python -m trainer pretrain` or `finetune`"
            if (path / "config.json").is_file()
            else "it holds no model at all: check the path, or whether its training has finished"
        )
        kind = _CONVERT.format(path) if _is_official(path) else kind
        msg = f"{path}: not a POLAR checkpoint, {RECORD} is missing; {kind}"
        raise BadCheckpointError(msg)
    try:
        return Record.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        faults = error.errors() if isinstance(error, ValidationError) else []
        said = "; ".join(
            f"{'.'.join(map(str, f['loc']))}: {f['msg']}, not {f['input']!r:.40}" for f in faults
        )
        msg = f"{file}: not a record of this version ({said or error}); restore or retrain it"
        raise BadCheckpointError(msg) from error


def _open(path: Path, *, may_miss_head: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Network (one label, fp32, weights all found) and fast tokenizer of a folder."""
    if not (path / "config.json").is_file():
        msg = f"{path}: config.json is missing; give the folder of a transformers checkpoint"
        raise BadCheckpointError(msg)
    if _is_official(path):
        msg = f"{path}: {_CONVERT.format(path)}"
        raise BadCheckpointError(msg)
    try:
        config = AutoConfig.from_pretrained(path)
        config.num_labels = 1
        tokenizer = AutoTokenizer.from_pretrained(path)
        with quiet():
            network, report = AutoModelForSequenceClassification.from_pretrained(
                path, config=config, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        msg = f"{path}: transformers cannot load it as a sequence classifier: {error}"
        raise BadCheckpointError(msg) from error
    if config.get_text_config() is not config:
        msg = f"{path}: it reads more than text; give the language model inside it, saved alone"
        raise BadCheckpointError(msg)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()  # a file's bytes lie anywhere: sums would vary
    headless = "score.weight" in report["missing_keys"]
    missing = set(report["missing_keys"]) - ({"score.weight"} if may_miss_head else set())
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    if missing or mismatched:
        msg = (
            f"{path}: weights are missing or of another shape: "
            f"{_some(missing | mismatched)}; the folder is incomplete or of another architecture"
        )
        raise BadCheckpointError(msg)
    head = getattr(network, "score", None)
    if not isinstance(head, nn.Linear):
        msg = f"{path}: {type(network).__name__} has no linear head named 'score'; use a decoder"
        raise BadCheckpointError(msg)
    if headless:
        nn.init.zeros_(head.weight)
    bad = [name for name, value in network.named_parameters() if not value.isfinite().all()]
    if bad:
        msg = f"{path}: weights are not finite numbers: {_some(bad)}; use an earlier checkpoint"
        raise BadCheckpointError(msg)
    return network, tokenizer


def _context(network: PreTrainedModel) -> int | None:
    """The positions that a network was made for, if it says."""
    return getattr(network.config, "max_position_embeddings", None)


def _is_official(path: Path) -> bool:
    """Whether a folder says that it is one of the official POLAR checkpoints."""
    try:
        return is_official(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's bars and its report on missing keys: ours is an error or nothing."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def add_marks(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Mark, Mark]:
    """Give tokenizer and embedding the separator, the reward token and a pad token.

    New rows start at the mean of the others, each with a little noise of its own.
    """
    for token in (SEPARATOR, REWARD):
        tokenizer.add_tokens([AddedToken(token, normalized=False)], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    if tokenizer.pad_token is None or tokenizer.pad_token in (SEPARATOR, REWARD):
        if tokenizer.eos_token is None:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        else:
            tokenizer.pad_token = tokenizer.eos_token
    rows = cast(nn.Embedding, network.get_input_embeddings()).weight.shape[0]
    if len(tokenizer) > rows:
        network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weight = cast(nn.Embedding, network.get_input_embeddings()).weight
        with torch.no_grad():
            old = weight[:rows]
            noise = torch.randn(weight[rows:].shape, generator=torch.Generator().manual_seed(0))
            weight[rows:] = old.mean(dim=0) + 0.1 * old.std(dim=0) * noise
    network.config.pad_token_id = tokenizer.pad_token_id
    separator, reward = (Mark(token=token, id=vocabulary[token]) for token in (SEPARATOR, REWARD))
    return separator, reward
