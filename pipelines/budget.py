"""Which pairs are kept: rates of drawing that bring the shares of labels to what was asked for.

Pairs are counted by stratum first, rates follow from the counts, and a pair stays where its hash
is below its stratum's rate: the same whatever the chunks or the order. No labelling here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from pydantic import Field

from pipelines.settings import Settings

KINDS = ("same", "sibling", "other", "ambiguous", "prompts")  # the last counts prompts, not pairs
BINS = 10  # of the length ratio, for length-matched draws
MOST_SAME = 0.5  # same-policy pairs are thinned beyond this share where cross pairs are scarce
UNMATCHED = 0.25  # pairs of strata with one label only, for each pair of the other strata

Stratum = tuple[str, int, int, int]  # source, cell, kind, bin
Rates = dict[Stratum, float]


class Budget(Settings):
    """How many pairs are kept of all that are possible."""

    same_policy_share: float = Field(
        default=0.12,
        ge=0.07,
        le=MOST_SAME,
        description="of same and cross pairs, per source and cell",
    )
    same_per_policy: int = Field(
        default=10, ge=1, description="same-policy pairs per prompt and policy, at most"
    )
    cross_per_policies: int | None = Field(
        default=None, ge=1, description="cross-policy pairs per prompt and two policies, at most"
    )
    sibling_share: float = Field(
        default=0.2, ge=0, le=1, description="of the cross pairs, as far as there are siblings"
    )
    ambiguous_share: float = Field(
        default=0.05, ge=0, description="ambiguous pairs kept per labelled pair, at most"
    )
    length_matched: bool = Field(
        default=True,
        description="draw cross pairs so that length ratios spread as in same-policy pairs",
    )
    unmatched_per_prompt: int = Field(
        default=100,
        ge=0,
        description="mean pairs per prompt where a source has one label only, at most",
    )
    pairs_per_prompt: int | None = Field(default=None, ge=1, description="kept per prompt, at most")
    seed: int = Field(default=0, ge=0)


def draw_rates(tallies: Mapping[Stratum, int], budget: Budget) -> Rates:
    """Rates in 0..1 per stratum.

    In each (source, cell) with both labels, cross pairs are drawn until `same_policy_share` is
    met; siblings and length bins each get their part as far as they have pairs. Where one of the
    labels is missing no share can be met: few of these pairs are kept, and together not more than
    a quarter of the others in their cell, so that they cannot carry its share out of bounds.
    """
    counted: dict[tuple[str, int], np.ndarray] = defaultdict(lambda: np.zeros((len(KINDS), BINS)))
    for (source, cell, kind, place), rows in tallies.items():
        counted[source, cell][kind, place] += rows
    rates: Rates = {}
    for cell in sorted({cell for _, cell in counted}):
        strata = {source: n for (source, c), n in sorted(counted.items()) if c == cell}
        matched = {s: _matched(n, budget) for s, n in strata.items() if _both_labels(n)}
        rest = {s: _unmatched(n, budget) for s, n in strata.items() if s not in matched}
        allowed = UNMATCHED * sum(kept.sum() for kept in matched.values())
        wanted = sum(kept.sum() for kept in rest.values())
        if matched and wanted > allowed:
            rest = {s: kept * (allowed / wanted) for s, kept in rest.items()}
        for source, kept in (matched | rest).items():
            available = strata[source]
            ambiguous = available[3].sum()
            if ambiguous:
                limit = budget.ambiguous_share * kept.sum()
                kept[3] = available[3] * min(1.0, limit / ambiguous)
            for kind, place in zip(*np.nonzero(available[:4]), strict=True):
                rate = kept[kind, place] / available[kind, place]
                rates[source, cell, int(kind), int(place)] = float(rate)
    return rates


def _both_labels(available: np.ndarray) -> bool:
    return bool(available[0].any() and available[1:3].any())


def _matched(available: np.ndarray, budget: Budget) -> np.ndarray:
    """Expected pairs to keep by kind and bin."""
    same, sibling, other = available[:3].sum(axis=1)
    cross = min(same * (1 / budget.same_policy_share - 1), sibling + other)
    siblings = min(sibling, max(budget.sibling_share * cross, cross - other))
    kept = np.zeros_like(available)
    most_same = min(same, cross * MOST_SAME / (1 - MOST_SAME))
    kept[0] = available[0] * (most_same / same)
    for kind, total in ((1, siblings), (2, cross - siblings)):
        like = available[0] if budget.length_matched else available[kind]
        kept[kind] = _spread(total, like, available[kind])
    return kept


def _unmatched(available: np.ndarray, budget: Budget) -> np.ndarray:
    kept = np.zeros_like(available)
    pairs, prompts = available[:3].sum(), available[4].sum()
    if pairs:
        kept[:3] = available[:3] * min(1.0, budget.unmatched_per_prompt * prompts / pairs)
    return kept


def _spread(total: float, like: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Share `total` out in proportion to `like`, up to what is available; the overflow goes on."""
    kept = np.zeros_like(available)
    for _ in range(2 * len(available)):
        left, room = total - kept.sum(), available - kept
        if left < 1e-6 * max(total, 1.0):
            break
        weights = np.where(room > 1e-9, like, 0.0)
        if not weights.any():
            weights = room
        kept = np.minimum(available, kept + left * weights / weights.sum())
    return kept
