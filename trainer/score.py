"""Scores from a checkpoint, for Python and for the command line: `python -m trainer score`.

Items are the official client's: `prompt`, `reference` and `output`, each a string or a list of
messages, and optionally `wrapper`. What the scores are compared with belongs to `evaluate`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import pyarrow as pa
import torch

from trainer import decoder
from trainer.data import parse_jsonl, text_of, texts_of
from trainer.errors import BadGroupsError
from trainer.layout import LAYOUTS, precision
from trainer.model import RewardModel
from trainer.packing import Progress, microbatches
from trainer.template import Texts, common_prefix

T = TypeVar("T")
WINDOW = 4096
"""Items sorted by length together; bounds what is held in memory."""


class Scorer:
    """A checkpoint ready to score, in fp32 or, with ties, in bf16.

    Items with the same prompt and reference share these, unless the network is of a kind for which
    only a training run would check that this changes nothing.
    """

    def __init__(
        self, model: RewardModel, *, layout: str | None = None, precision: str = "fp32"
    ) -> None:
        self.model, self.precision = model, precision
        known = decoder.ready(model.network)
        self.layout = LAYOUTS[layout or ("shared" if known else "separate")]
        self.model.network.eval()

    @classmethod
    def load(cls, checkpoint: Path, *, device: str | None = None) -> Scorer:
        """Open a checkpoint folder, by default on the GPU where there is one.

        Raises:
            BadCheckpointError: the folder is not a POLAR checkpoint.
        """
        return cls(RewardModel.load(checkpoint).place(device))

    def score(
        self,
        items: Iterable[Mapping[str, Any]],
        *,
        batch_tokens: int = 16384,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Scores (items,) in fp32, in the order of the items.

        Args:
            items: mappings with `prompt`, `reference`, `output` and optionally `wrapper`.
            batch_tokens: padded ids per forward pass.
            progress: called after every batch with items done, items known, and a note.

        Raises:
            BadGroupsError: an item lacks a field or has one of another shape.
        """
        default = self.model.record.wrapper
        checked = (item_texts(item, f"item {i}", default) for i, item in enumerate(items))
        return self.score_texts(checked, batch_tokens, progress)

    def score_groups(
        self, groups: pa.Table, *, batch_tokens: int = 16384, progress: Progress | None = None
    ) -> list[np.ndarray]:
        """Per row of a groups table the fp32 scores (K,) of its candidates, in their order."""
        grouped = texts_of(groups)
        single = (replace(text, candidates=[c]) for text in grouped for c in text.candidates)
        scores = self.score_texts(single, batch_tokens, progress)
        ends = np.cumsum([len(text.candidates) for text in grouped], dtype=np.int64)
        return np.split(scores, ends[:-1]) if grouped else []

    def score_texts(
        self,
        texts: Iterable[Texts],
        batch_tokens: int = 16384,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Scores (texts,) in fp32; each entry has one candidate."""
        parts = [np.empty(0, dtype=np.float32)]
        for window in _chunks(texts, WINDOW):
            parts.append(np.empty(len(window), dtype=np.float32))
            done = sum(map(len, parts)) - len(window)
            for positions, scores in self._batches(window, batch_tokens):
                parts[-1][positions] = scores
                done += len(positions)
                if progress:
                    progress(done, max(done, sum(map(len, parts))), "items scored")
        return np.concatenate(parts)

    @torch.inference_mode()
    def _batches(
        self, window: tuple[Texts, ...], batch_tokens: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions in the window and their scores, batch by batch.

        Items with the same prompt and reference go together, so that these are run once.
        """
        padded = self.layout is LAYOUTS["separate"]
        ids = [sequences[0] for sequences in self.model.template.encode(window)]
        alike: dict[tuple[str, str, str], list[int]] = {}
        for position, text in enumerate(window):
            alike.setdefault((text.wrapper, text.prompt, text.reference), []).append(position)
        most = max(1, batch_tokens // max(map(len, ids)))
        groups = [list(part) for same in alike.values() for part in _chunks(same, most)]
        pieces, costs = [], []
        for group in groups:
            rows = [np.asarray(ids[position]) for position in group]
            shared = common_prefix(rows)
            pieces.append((rows[0][:shared], [row[shared:] for row in rows]))
            once = shared + sum(len(row) - shared for row in rows)
            costs.append(max(map(len, rows)) * len(rows) if padded else once)
        for part in microbatches(np.asarray(costs), batch_tokens, padded=padded):
            with precision(self.model.network, self.precision):
                scores = self.layout(self.model.network, [pieces[i] for i in part])
            yield np.concatenate([groups[i] for i in part]), scores.cpu().numpy()


def _chunks(values: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    iterator = iter(values)
    while chunk := tuple(islice(iterator, size)):
        yield chunk


def item_texts(item: Mapping[str, Any], where: str, default: str) -> Texts:
    """One item as texts for the template; `where` opens each error.

    Raises:
        BadGroupsError: a field is missing, of another shape, or the wrapper is unknown.
    """
    wrapper = item.get("wrapper", default)
    if wrapper not in ("pretrain", "sft"):
        msg = f"{where}: field 'wrapper' is {wrapper!r}; give 'pretrain' or 'sft', or leave it out"
        raise BadGroupsError(msg)
    prompt, reference, output = (
        text_of(item, key, where) for key in ("prompt", "reference", "output")
    )
    return Texts(prompt, reference, [output], wrapper)


def write_scores(
    checkpoint: Path, source: str, out: TextIO, *, wrapper: str | None = None, as_json: bool = False
) -> None:
    """Score a JSONL file of items, or standard input for `-`, writing a line an item to `out`.

    Plain, a line is the number alone; with `as_json` it is an object with `index` and `score`. An
    item's own wrapper comes first, then `wrapper`, then the checkpoint's.

    Raises:
        TrainerError: the checkpoint or an item cannot be used; nothing has been written then.
    """
    if wrapper not in (None, "pretrain", "sft"):
        msg = f"--wrapper {wrapper!r}: give pretrain or sft, or leave it out"
        raise BadGroupsError(msg)
    name = "standard input" if source == "-" else source
    if source != "-" and not Path(source).is_file():
        msg = f"{source}: no such file; give a JSONL file of items, or - for standard input"
        raise BadGroupsError(msg)
    scorer = Scorer.load(checkpoint)
    default = wrapper or scorer.model.record.wrapper
    with nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb") as lines:
        texts = [
            item_texts(record, f"{name}: line {number}", default)
            for number, record in parse_jsonl(iter(lines), name)
        ]
    for index, score in enumerate(scorer.score_texts(texts).tolist()):
        line = json.dumps({"index": index, "score": score}) if as_json else repr(score)
        out.write(line + "\n")
