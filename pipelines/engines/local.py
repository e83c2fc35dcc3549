"""Answers from a transformers checkpoint in this process: fp32, batched, made to be repeatable.

Each trajectory has a random stream of its own, keyed by its seed, and its t-th token is drawn with
the t-th number of that stream; so neither the batch nor the moment a neighbour ends changes what
is drawn, only the last bits of the arithmetic do. No policy is named here, and no file written.

Decoding keeps keys and values in buffers written in place, computes shared prompts once, and drops
finished rows.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.engines.base import Answer, Completion, Request, in_batches
from pipelines.engines.sampling import SamplingSettings, draw, uniform
from pipelines.errors import PolicyUnavailableError

if TYPE_CHECKING:
    import torch
    from transformers.cache_utils import CacheLayerMixin

COMPACT_AT = 0.75  # of the rows still running: below it the finished ones leave the batch
GROWTH = 64  # positions by which key and value buffers grow


class LocalEngine:
    """One policy, loaded from a transformers folder."""

    name = "local"
    chat = False

    def __init__(self, weights: Path, threads: int = 1):
        """Load the policy; `threads` holds for the whole process.

        Raises:
            PolicyUnavailableError: the folder is missing, incomplete or damaged.
        """
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.version = f"transformers {transformers.__version__}"
        self.weights = weights
        self.model, self.tokenizer = _load(weights)
        self.context_length: int = self.model.config.max_position_embeddings
        self._stops = _stop_ids(self.model, self.tokenizer)

    def stream(self, requests: Sequence[Request], at_once: int) -> Generator[list[Answer]]:
        """Answer `at_once` requests at a time, in their order."""
        return in_batches(self.generate, requests, at_once)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer a batch, in the order of the requests.

        An answer depends on its request alone, up to the arithmetic, never on the batch.

        Raises:
            PolicyUnavailableError: the model gives no numbers (NaN), so its weights are damaged.
        """
        prompts = self._encode([request.prompt for request in requests])
        done: dict[int, Completion] = {}
        fitting = []
        for row, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            if len(prompt) < self.context_length:
                fitting.append(row)
            else:
                done[row] = Completion(
                    trajectory_id=request.trajectory_id,
                    text="",
                    tokens=0,
                    finish_reason="prompt_too_long",
                    seed=None,
                )
        by_sampling = sorted(fitting, key=lambda row: requests[row].sampling.sampling_id)
        for _, group in groupby(by_sampling, key=lambda row: requests[row].sampling):
            rows = list(group)
            answers = self._decode([requests[row] for row in rows], [prompts[row] for row in rows])
            done.update(zip(rows, answers, strict=True))
        return [done[row] for row in range(len(requests))]

    def close(self) -> None:
        """Free the weights."""
        del self.model, self.tokenizer

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids, opened by the beginning-of-text token where the tokenizer has one."""
        if not prompts:
            return []
        bos = self.tokenizer.bos_token_id
        encoded = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        if bos is None:  # an empty prompt still needs a token to start from
            return [prompt or self._stops[:1].tolist() for prompt in encoded]
        return [prompt if prompt[:1] == [bos] else [bos, *prompt] for prompt in encoded]

    def _decode(
        self, requests: Sequence[Request], prompts: Sequence[Sequence[int]]
    ) -> list[Completion]:
        """Answer requests of one sampling, all of whose prompts leave room in the context."""
        sampling = requests[0].sampling
        rooms = [min(sampling.max_tokens, self.context_length - len(p)) for p in prompts]
        uniforms = np.stack([uniform(request.seed, max(rooms)) for request in requests])
        tokens, lengths = self._run(prompts, np.array(rooms), uniforms, sampling)
        kept = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
        texts = self.tokenizer.batch_decode(
            kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [
            Completion(
                trajectory_id=request.trajectory_id,
                text=text,
                tokens=int(length),
                finish_reason="length" if length == room else "stop",
                seed=request.seed,
            )
            for request, text, length, room in zip(requests, texts, lengths, rooms, strict=True)
        ]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        rooms: np.ndarray,
        uniforms: np.ndarray,
        sampling: SamplingSettings,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw tokens until each row has met a stop token or filled its room.

        Args:
            prompts: token ids, one list a row.
            rooms: most new tokens of each row, (rows,).
            uniforms: numbers in [0, 1), (rows, most new tokens of any row).
            sampling: of all rows.

        Returns:
            The tokens drawn, (rows, steps), and how many of them precede the stop token, (rows,).
        """
        import torch
        from transformers import Cache

        places: dict[tuple[int, ...], int] = {}
        source = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
        ids, mask = _left_padded(list(places))
        drawn = np.zeros(uniforms.shape, np.int64)
        lengths = rooms.copy()
        rows = np.arange(len(prompts))  # of the requests, at each row of the running batch
        with torch.inference_mode():
            past = Cache(layer_class_to_replicate=_growing_layer())
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
            keep = torch.tensor(source)
            past.batch_select_indices(keep)
            mask, logits = mask[keep], output.logits[keep, -1]
            for step in range(uniforms.shape[1]):
                if not torch.isfinite(logits.amax(1)).all():
                    msg = f"{self.weights}: logits are not numbers; make the weights again"
                    raise PolicyUnavailableError(msg)
                tokens = draw(logits, uniforms[rows, step], sampling)
                drawn[rows, step] = tokens
                stopped = np.isin(tokens, self._stops) & (lengths[rows] > step)
                lengths[rows[stopped]] = step
                running = lengths[rows] > step + 1
                if not running.any():
                    break
                if running.mean() < COMPACT_AT:
                    keep = torch.from_numpy(np.flatnonzero(running))
                    past.batch_select_indices(keep)
                    mask, tokens, rows = mask[keep], tokens[running], rows[running]
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                output = self.model(
                    input_ids=torch.from_numpy(tokens)[:, None],
                    attention_mask=mask,
                    position_ids=mask.sum(1, keepdim=True) - 1,
                    past_key_values=past,
                    use_cache=True,
                )
                logits = output.logits[:, -1]
        return drawn, lengths


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (rows, longest prompt); the padding's id is 0 and never seen."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


@cache
def _growing_layer() -> type[CacheLayerMixin]:
    """The class of a layer's keys and values, made here because it needs transformers."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """Keys and values, (rows, heads, positions, width), in buffers that are written in place.

        `DynamicLayer` copies all that went before at each step.
        """

        def __init__(self) -> None:
            super().__init__()
            self.length = 0
            self.buffers: list[torch.Tensor] = []

        def get_seq_length(self) -> int:
            return self.length

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            states = (key_states, value_states)
            start, end = self.length, self.length + key_states.shape[2]
            if not self.buffers or end > self.buffers[0].shape[2]:
                grown = [x.new_empty((*x.shape[:2], end + GROWTH, x.shape[3])) for x in states]
                for buffer, old in zip(grown, self.buffers, strict=False):  # none at first
                    buffer[:, :, :start] = old[:, :, :start]
                self.buffers = grown
            for buffer, new in zip(self.buffers, states, strict=True):
                buffer[:, :, start:end] = new
            self.length = end
            return self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            self.buffers = [buffer.index_select(0, indices) for buffer in self.buffers]

    return GrowingLayer


def _load(weights: Path) -> tuple[Any, Any]:
    """Model (fp32, evaluation mode) and tokenizer of a transformers folder; nothing is fetched."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the loading, in the middle of the rollout's own
    remedy = "make the weights again, or correct `weights` in the pool file"
    if not (weights / "config.json").is_file():
        msg = f"{weights}: no policy there (config.json is missing); {remedy}"
        raise PolicyUnavailableError(msg)
    try:
        tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            weights,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, tokenizers and safetensors raise kinds of their own
        msg = f"{weights}: the policy does not load ({error}); {remedy}"
        raise PolicyUnavailableError(msg) from error
    model, report = loaded
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        msg = f"{weights}: weights are missing, among them {names}; {remedy}"
        raise PolicyUnavailableError(msg)
    return model.eval(), tokenizer


def _stop_ids(model: Any, tokenizer: Any) -> np.ndarray:
    """The tokens that end an answer: those of the generation settings and of the tokenizer."""
    declared = model.generation_config.eos_token_id
    stops = declared if isinstance(declared, list) else [declared]
    every = dict.fromkeys([*stops, tokenizer.eos_token_id])
    return np.array([stop for stop in every if stop is not None], np.int64)
