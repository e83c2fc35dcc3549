"""Next-token training: small policies from scratch, and backbones for reward models to start from.

    python -m trainer ...      trains reward models; this module is called from Python

A document is one row of a batch, so rows of like length go together and nothing of one document is
seen by another. What the documents say is not known here: `pipelines.embedded` writes those of the
embedded policies, `documents_from_groups` those of a backbone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from trainer.data import texts_of
from trainer.errors import BadGroupsError, DivergedError, ResumeError
from trainer.language_settings import LanguageModelSettings
from trainer.layout import precision
from trainer.model import quiet
from trainer.resume import LOG, STATE, only_trainer, weights_digest
from trainer.stopping import held_back
from trainer.template import REWARD, SEPARATOR, wrapped

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SAVE_SECONDS = 60.0
Document = str | tuple[str, ...]
"""A text, or texts that the separator token joins (a reference's half and a candidate's)."""
Progress = Callable[[int, int, str], None]


def train_tokenizer(
    texts: Sequence[str],
    vocab_size: int,
    out: Path,
    special: Sequence[str] = (SEPARATOR, REWARD),
    context: int = 1024,
) -> Path:
    """Train a byte-level BPE tokenizer and write it to `out`, as transformers loads it.

    The vocabulary starts with BOS, EOS, PAD and `special`; BOS is put before every text. Any text
    comes back from its ids unchanged, for all 256 bytes are in the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS} $B",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(special),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    out.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(out)
    return out


def train(
    documents: Sequence[Document],
    tokenizer: Path,
    out: Path,
    settings: LanguageModelSettings,
    progress: Progress | None = None,
    start: Path | None = None,
) -> dict[str, float]:
    """Train a Llama decoder on `documents` and write it, with its tokenizer, to `out`.

    With `start` (a checkpoint whose tokenizer is `tokenizer`) training goes on from its weights
    and the sizes in `settings` are not used. `out` has its configuration only when it is complete.
    The same arguments give the same weights on one machine and number of threads; also where the
    training was stopped, for what `out/resume` holds of these same arguments is gone on with.

    Returns:
        loss (nats per token, mean over the last tenth of the steps), tokens (seen, padding not
        counted), parameters, steps, seconds.

    Raises:
        BadGroupsError: there is no document to train on.
        ResumeError: another process trains in `out`, or what was saved there cannot be read.
        DivergedError: the loss is not finite.
    """
    if not documents:
        msg = "no documents to train a language model on; make its trajectories or groups first"
        raise BadGroupsError(msg)
    began = time.monotonic()
    encoder = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(tokenizer))
    rows = _encode(documents, encoder, settings.context)
    with only_trainer(out), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: Any = _model(encoder, settings, start)
        model.train()
        optimiser = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
        )
        kept = out / "resume" / STATE
        identity = _identity(rows, encoder, settings, start)
        state = _restore(kept, identity, model, optimiser)
        losses, tokens = state["losses"], state["tokens"]
        began -= state["seconds"]

        def keep() -> None:
            spent = time.monotonic() - began
            state = {"losses": losses, "tokens": tokens, "seconds": spent, "identity": identity}
            _keep(kept, state, model, optimiser)

        steps = _steps(model, optimiser, rows, encoder, settings, len(losses))
        with held_back() as stopped:
            saved = time.monotonic()
            for step, (loss, size) in enumerate(steps, len(losses) + 1):
                if not math.isfinite(loss):
                    msg = (
                        f"next-token training, step {step}: loss {loss}; lower learning_rate "
                        f"(now {settings.learning_rate}), or train without bf16"
                    )
                    raise DivergedError(msg)
                losses.append(loss)
                tokens += size
                if step in settings.save_at:
                    _save(model, encoder, out / f"step-{step}")
                if stopped() or time.monotonic() - saved > SAVE_SECONDS:
                    keep()
                    saved = time.monotonic()
                if stopped():
                    break  # and out of here: the signal is obeyed now
                if progress is not None:
                    progress(step, settings.steps, f"loss {loss:.3f}")
        _write_log(losses, out)
        _save(model, encoder, out)
        shutil.rmtree(kept.parent, ignore_errors=True)
    return {
        "loss": float(np.mean(losses[-max(1, settings.steps // 10) :])),
        "tokens": float(tokens),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "steps": float(settings.steps),
        "seconds": time.monotonic() - began,
    }


def _identity(
    rows: Sequence[np.ndarray],
    encoder: PreTrainedTokenizerFast,
    settings: LanguageModelSettings,
    start: Path | None,
) -> str:
    """What decides the weights that a training ends with."""
    found = hashlib.blake2b(digest_size=16)
    weights = weights_digest(start) if start else ""
    parts = [settings.model_dump_json(), weights, encoder.backend_tokenizer.to_str()]
    found.update(json.dumps(parts).encode())
    for row in rows:
        found.update(row.tobytes())
    return found.hexdigest()


def _restore(
    kept: Path, identity: str, model: torch.nn.Module, optimiser: torch.optim.Optimizer
) -> dict[str, Any]:
    """Take up weights and moments of a stopped training; its losses, tokens and seconds.

    What another training left is passed over.
    """
    fresh = {"losses": [], "tokens": 0, "seconds": 0.0}
    if not kept.is_file():
        return fresh
    try:
        state = torch.load(kept, weights_only=True)
        if state["identity"] != identity:
            return fresh
        model.load_state_dict(state["weights"])
        optimiser.load_state_dict(state["optimiser"])
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        msg = f"{kept}: cannot go on from here ({error}); remove it to train from the start"
        raise ResumeError(msg) from error
    return state


def _keep(
    kept: Path, state: dict[str, Any], model: torch.nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    """Save a training that is under way; what was saved before stays until this is complete."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    draft = kept.with_suffix(".draft")
    moments, weights = optimiser.state_dict(), model.state_dict()
    torch.save(state | {"weights": weights, "optimiser": moments}, draft)
    draft.replace(kept)


def _encode(
    documents: Sequence[Document], encoder: PreTrainedTokenizerFast, context: int
) -> list[np.ndarray]:
    """Ids of each document, BOS to EOS, cut into pieces of at most `context`."""
    parts = [(d,) if isinstance(d, str) else d for d in documents]
    blind = Tokenizer.from_str(encoder.backend_tokenizer.to_str())
    blind.encode_special_tokens = True  # a text that spells a special token stays text
    flat = [text for document in parts for text in document]
    encoded = iter(blind.encode_batch_fast(flat, add_special_tokens=False))
    separator = encoder.convert_tokens_to_ids(SEPARATOR)
    rows = []
    for document in parts:
        ids = [encoder.bos_token_id]
        for part in range(len(document)):
            ids += [separator] * (part > 0) + next(encoded).ids
        ids.append(encoder.eos_token_id)
        starts = range(0, len(ids) - 1, context - 1)  # pieces share one id: each is predicted once
        rows += [np.array(ids[i : i + context]) for i in starts]
    return rows


def _model(
    encoder: PreTrainedTokenizerFast, settings: LanguageModelSettings, start: Path | None
) -> torch.nn.Module:
    if start is not None:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(encoder),
            hidden_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            intermediate_size=settings.intermediate,
            max_position_embeddings=settings.context,
            tie_word_embeddings=True,
            initializer_range=settings.init,
            bos_token_id=encoder.bos_token_id,
            eos_token_id=encoder.eos_token_id,
            pad_token_id=encoder.pad_token_id,
        )
    )


def _steps(
    model: Any,
    optimiser: torch.optim.Optimizer,
    rows: list[np.ndarray],
    encoder: PreTrainedTokenizerFast,
    settings: LanguageModelSettings,
    done: int,
) -> Iterator[tuple[float, int]]:
    """Loss and number of predicted ids of each step after those that are done."""
    batches = itertools.islice(_batches(rows, settings), done, None)
    for step in range(done, settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, settings)
        batch = next(batches)
        ids = torch.full((len(batch), max(map(len, batch))), encoder.pad_token_id)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = torch.from_numpy(row)
        known = ids[:, 1:] != encoder.pad_token_id
        with precision(model, "bf16" if settings.bf16 else "fp32"):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[known])
        loss = functional.cross_entropy(logits.float(), ids[:, 1:][known])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        yield loss.item(), int(known.sum())


def schedule(step: int, settings: LanguageModelSettings) -> float:
    """Share of the learning rate at a 0-based step: linear warm-up, then cosine to the end."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.final_share + (1 - settings.final_share) * (1 + math.cos(math.pi * done)) / 2


def _batches(rows: list[np.ndarray], settings: LanguageModelSettings) -> Iterator[list[np.ndarray]]:
    """Endless batches of at most `batch_tokens` ids with padding, rows of like length together."""
    rng = np.random.default_rng(settings.seed)
    lengths = np.array([len(row) for row in rows])
    while True:
        order = rng.permutation(len(rows))
        order = order[np.argsort(lengths[order] // 4, kind="stable")]
        batches: list[list[np.ndarray]] = [[]]
        for i in order:  # lengths rise (nearly), so the newest row is about the longest
            if batches[-1] and (len(batches[-1]) + 1) * (lengths[i] + 3) > settings.batch_tokens:
                batches.append([])
            batches[-1].append(rows[i])
        for i in rng.permutation(len(batches)):
            yield batches[i]


def _save(model: Any, encoder: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a checkpoint beside `out` and move its files in, the configuration last."""
    draft = out.with_name(out.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    with quiet():
        model.save_pretrained(draft)
    encoder.save_pretrained(draft)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(draft.iterdir(), key=lambda p: p.name == "config.json"):
        path.replace(out / path.name)
    draft.rmdir()


def _write_log(losses: Sequence[float], out: Path) -> None:
    """About a hundred lines of step and mean loss since the line before, in `metrics.jsonl`."""
    every = max(1, len(losses) // 100)
    ends = range(every, len(losses) + 1, every)
    lines = [{"step": end, "loss": float(np.mean(losses[end - every : end]))} for end in ends]
    out.mkdir(parents=True, exist_ok=True)
    (out / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def documents_from_groups(groups: Any) -> list[Document]:
    """Documents that teach a backbone to compare: two answers of one policy, side by side.

    `groups` is a table with `trainer.data.GROUPS_SCHEMA`. Of each group comes the reference's half
    and the best candidate's half, as the template writes them; lesser candidates are not shown.
    """
    documents: list[Document] = []
    for texts, candidates in zip(
        texts_of(groups), groups.column("candidates").to_pylist(), strict=True
    ):
        best = min(candidates, key=lambda c: c["rank"])
        documents.append(
            (
                wrapped(texts.prompt, texts.reference, texts.wrapper),
                wrapped(texts.prompt, best["text"], texts.wrapper),
            )
        )
    return documents
