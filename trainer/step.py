"""What one training step computes: gradients of the mean loss over all pairs of its groups.

A step's groups are run in parts that fit `micro_tokens`, each process its own share. How sequences
are laid out belongs to `layout`, the loss itself to `loss`; which groups make which step, and what
happens between steps, to `loop`.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from trainer import distributed
from trainer.distributed import World
from trainer.errors import LayoutError
from trainer.layout import attention_kept, difference, ids_run, precision, rounding, taken
from trainer.loss import bradley_terry, pairs_of
from trainer.metrics import SUMS
from trainer.model import RewardModel
from trainer.optim import adamw
from trainer.packing import Ids, costs, microbatches, shares
from trainer.settings import TrainSettings

ALLOWED = 1e-4
"""Difference from separate sequences, as a share of the scores, at which a layout is refused."""
ROUNDINGS = 10
"""Or as many times what rounding does to separate sequences, where that is more: some weights, as
those that are written down rather than learned, blow up the last digit of fp32."""


class NotFiniteError(Exception):
    """A step's loss or gradient is not finite; the weights are as they were before."""

    def __init__(self, groups: list[str], loss: float, norm: float) -> None:
        """`groups` are those at fault, as far as that is known; `loss` is the mean over pairs."""
        super().__init__(f"loss {loss}, gradient norm {norm}, in groups {groups}")
        self.groups, self.loss, self.norm = groups, loss, norm


class Stepper:
    """Takes steps: the network in its world of processes, and the optimiser."""

    def __init__(self, model: RewardModel, ids: Ids, settings: TrainSettings, here: World) -> None:
        self.network, self.ids, self.settings, self.here = model.network, ids, settings, here
        self._costs = costs(ids, settings.layout, model.network.config.hidden_size)
        self._known = {"official": ids.official(), "ids": ids.distinct(), "seen": ids.seen()}
        if settings.checkpointing:
            model.network.gradient_checkpointing_enable({"use_reentrant": False})
        scores = distributed.Scores(model.network, settings.layout)
        self._scores = distributed.spread(scores, here, settings.strategy)
        self.optimiser = adamw(model.network, settings)

    def take(self, batch: np.ndarray, number: int, rate: float) -> dict[str, float]:
        """One optimiser step over the pairs of `batch`.

        Args:
            batch: the step's groups, the same in every process.
            number: the steps before it; it seeds what is random in the step.
            rate: learning rate.

        Returns:
            `metrics.SUMS` over all groups and processes, and `grad_norm` before clipping.

        Raises:
            NotFiniteError: nothing was changed.
        """
        settings, ids = self.settings, self.ids
        torch.manual_seed(settings.seed * 1_000_003 + number)
        pairs = sum(pairs_of(ids.group_ranks(g)) for g in batch)
        totals, suspects = dict.fromkeys(SUMS, 0.0), list[str]()
        parts = self._parts(batch)
        for place, part in enumerate(parts, 1):
            with distributed.quietly(self._scores, place == len(parts)):
                suspects += self._backward(part, batch, self.here.size / pairs, totals)
        summed = self.here.summed(list(totals.values()))
        totals = dict(zip(totals, summed, strict=True))
        norm = distributed.clip_gradients(self.network, settings.clip)
        if not math.isfinite(totals["loss"]) or not math.isfinite(norm):
            names = suspects or [ids.group_ids[g] for g in batch]
            raise NotFiniteError(names, totals["loss"] / pairs, norm)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        return totals | {"grad_norm": norm}

    def _parts(self, batch: np.ndarray) -> list[np.ndarray]:
        """This process's parts of a step, as many as any process has; the last may be empty."""
        padded = self.settings.layout == "separate"
        all_parts = []
        for share in shares(self._costs[batch], self.here.size):
            mine = batch[share]
            parts = microbatches(self._costs[mine], self.settings.micro_tokens, padded=padded)
            all_parts.append([mine[part] for part in parts])
        most = max(map(len, all_parts))
        mine = all_parts[self.here.rank]
        return mine + [batch[:0]] * (most - len(mine))

    def _backward(
        self, part: np.ndarray, batch: np.ndarray, weight: float, totals: dict[str, float]
    ) -> list[str]:
        """Gradients of one part's loss times `weight`; an empty part only keeps others company.

        Adds to `totals`, and gives the groups whose loss is not finite.
        """
        network, settings, ids = self.network, self.settings, self.ids
        pieces = pieces_of(ids, part if len(part) else batch[:1])
        with attention_kept(network, settings.layout, settings.precision):
            with precision(network, settings.precision):
                scores = self._scores(pieces)
            if not len(part):
                (scores.sum() * 0).backward()
                return []
            ranks = [ids.group_ranks(g) for g in part]
            sums = bradley_terry(scores, ranks)
            (sums.loss * weight).backward()
        loss, tokens = float(sums.loss.detach()), sum(len(p) + len(s) for p, o in pieces for s in o)
        totals["loss"] += loss
        totals["correct"] += sums.correct
        totals["margin"] += sums.margin
        totals["pairs"] += sums.pairs
        totals["tokens"] += tokens
        totals["run"] += ids_run(taken(settings.layout, network), pieces)
        for key, values in self._known.items():
            totals[key] += float(values[part].sum())
        apart = settings.layout == "separate"
        totals["needed"] += tokens if apart else float(self._known["ids"][part].sum())
        if math.isfinite(loss):
            return []
        by_group = scores.detach().split([len(own) for own in ranks])
        return [
            ids.group_ids[group]
            for group, own, rank in zip(part, by_group, ranks, strict=True)
            if not bradley_terry(own, [rank]).loss.isfinite()
        ]


def check_layout(model: RewardModel, ids: Ids, layout: str, batch: np.ndarray) -> None:
    """Compare the layout with separate sequences on two groups of a batch, in fp32.

    They are its shortest and its longest, for some faults show in long rows only. What rounding
    does is found out only where the scores differ.

    Raises:
        LayoutError: the scores differ.
    """
    lengths = ids.lengths()[batch]
    some = batch[np.unique([lengths.argmin(), lengths.argmax()])]
    network = model.network.eval()
    pieces = pieces_of(ids, some)
    found = difference(network, layout, pieces)
    if not found <= ALLOWED and not found <= ROUNDINGS * rounding(network, pieces):
        names = ", ".join(ids.group_ids[g] for g in some)
        msg = (
            f"layout {layout!r} gives {type(network).__name__} other scores than "
            f"separate sequences on groups {names}: they differ by {found:.2g} of their size, "
            f"{ALLOWED:.2g} is allowed; set layout=separate"
        )
        raise LayoutError(msg)


def pieces_of(ids: Ids, groups: np.ndarray) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Prefix and suffixes of each group, as layouts take them."""
    return [(ids.prefix(g), ids.suffixes(g)) for g in groups]
