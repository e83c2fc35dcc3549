"""What the contenders of bench-train are asked, in turns, and what is made of their answers."""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import triples
from contenders import Contender, say

BEST = {"attention": "sdpa", "optimiser": "adamw_torch_fused", "micro": 3}
"""Where TRL's search begins; then one setting after another is tried, each while it helps."""
MICRO: list[tuple[str, list[Any]]] = [("micro", [7, 21]), ("micro", [1])]
"""Pairs that TRL runs at once, a step being 21: fewer are padded less, more use kernels better."""
EAGER: tuple[str, list[Any]] = ("attention", ["eager"])
"""Not tried on a GPU: it keeps every probability, which 21 long pairs at once have no room for."""
LADDER: list[tuple[str, list[Any]]] = [
    *MICRO,
    EAGER,
    ("optimiser", ["adamw_torch"]),
    ("threads", [1]),
]

PADDED_REPEATS = 2
"""The loop of padded pairs runs what TRL runs; it is not what a ratio is taken against."""


class Race:
    """The contenders, and what they did."""

    def __init__(
        self,
        contenders: dict[str, Contender],
        threads: int,
        precision: str,
        device: str,
        quick: bool,
        answers: Path,
    ) -> None:
        self.contenders, self.threads, self.bf16 = contenders, threads, precision == "bf16"
        self.quick, self.answers = quick, answers
        self.ladder = [rung for rung in LADDER if device == "cpu" or rung != EAGER]
        self.settings: dict[bool, dict[str, Any]] = {}

    def ask(self, name: str, task: str, steps: list[Any], **options: Any) -> dict[str, Any]:
        """What a contender answers; asked before, its answer is read from the home."""
        asked = json.dumps([name, task, steps, options], sort_keys=True).encode()
        file = self.answers / f"{hashlib.blake2b(asked, digest_size=12).hexdigest()}.json"
        if not file.is_file():
            found = self.contenders[name].run(task, steps, **options)
            draft = file.with_suffix(".part")
            draft.write_text(json.dumps(found))
            draft.replace(file)
        return json.loads(file.read_text())

    def train(self, name: str, steps: list[Any], **options: Any) -> Any:
        """Run steps on a contender; TRL's and the padded loop's are pairs."""
        options = {"threads": self.threads, "lr": 1e-4, "bf16": self.bf16, **options}
        return self.ask(name, "train", steps, **options)

    def search(self, steps: dict[bool, list[Any]]) -> None:
        """Find TRL's fastest settings on a step, in random order and sorted by length.

        How many pairs are run at once depends on the order; the rest is searched for once.
        """
        chosen = BEST | {"threads": self.threads}
        for grouped, mine in steps.items():
            best, ladder = 0.0, MICRO if grouped else self.ladder
            ladder = ladder[:1] if self.quick else ladder
            for name, values in [("micro", [BEST["micro"]]), *ladder]:
                for value in values:
                    if best and chosen[name] == value:
                        continue
                    tried = chosen | {name: value}
                    found = pairs_per_s(self.train("trl", mine, **tried), mine)
                    say(f"TRL, {'sorted' if grouped else 'random'}, {tried}: {found:.2f} pairs/s")
                    if found <= best:
                        break
                    best, chosen = found, tried
            self.settings[grouped] = chosen

    def compare(self, label: str, repeats: list[list[list[triples.Sequences]]]) -> dict[str, Any]:
        """All contenders on all repeats, in turns."""
        paired = [[[p for g in step for p in triples.pairs(g)] for step in r] for r in repeats]
        ranked = triples.by_length([steps[1:] for steps in paired])
        micro = {grouped: chosen["micro"] for grouped, chosen in self.settings.items()}
        names = ("ours", "padded", "trl", "trl_sorted")
        rates: dict[str, list[float]] = {name: [] for name in names}
        peaks = dict.fromkeys(names, 0.0)
        for number, steps in enumerate(paired):
            grouped = [steps[0], *ranked[number]]
            turns = {
                "ours": lambda n=number: self.train("ours", repeats[n]),
                "padded": lambda s=steps: self.train("padded", s, micro=micro[False]),
                "trl": lambda s=steps: self.train("trl", s, **self.settings[False]),
                "trl_sorted": lambda s=grouped: self.train("trl", s, **self.settings[True]),
            }
            for turn in range(len(names)):  # another one begins every time
                name = names[(turn + number) % len(names)]
                if name == "padded" and number >= PADDED_REPEATS:
                    continue
                found = turns[name]()
                rates[name].append(pairs_per_s(found, steps))
                peaks[name] = max(peaks[name], found["peak_mib"])
            ran = [name for name in names if len(rates[name]) > number]
            shown = ", ".join(f"{name} {rates[name][-1]:.2f}" for name in ran)
            say(f"{label}, repeat {number + 1} of {len(repeats)}: {shown} pairs/s")
        medians = {name: statistics.median(values) for name, values in rates.items()}
        ours = sum(triples.ids_of_shared(s) for r in repeats for s in r[1:])
        ids = {
            "whole_steps": sum(triples.ids_of_padded(s) for r in paired for s in r[1:]),
            "trl": sum(triples.ids_of_padded(s, micro[False]) for r in paired for s in r[1:]),
            "trl_sorted": sum(triples.ids_of_padded(s, micro[True]) for r in ranked for s in r),
        }
        return {
            "pairs_per_s": {name: round(value, 2) for name, value in medians.items()},
            "spread": {name: [round(min(v), 2), round(max(v), 2)] for name, v in rates.items()},
            "peak_mib": peaks,
            "ratio_vs_trl": round(medians["ours"] / max(medians["trl"], medians["trl_sorted"]), 2),
            "ratio_vs_padded": round(medians["ours"] / medians["padded"], 2),
            "token_bound": {name: round(value / ours, 2) for name, value in ids.items()},
            "ids_a_pair": round(ours / (2 * triples.PAIRS * len(repeats))),
            "repeats": len(repeats),
        }

    def curves(self, steps: list[list[triples.Sequences]]) -> dict[str, Any]:
        """Losses in fp32 of all three from one start on the same batches."""
        paired = [[p for g in step for p in triples.pairs(g)] for step in steps]
        options = self.settings[False]
        losses = {
            "ours": self.train("ours", steps, bf16=False)["losses"],
            "trl": self.train("trl", paired, bf16=False, **options)["losses"],
            "padded": self.train("padded", paired, bf16=False, micro=options["micro"])["losses"],
        }
        ours = np.array(losses["ours"])
        apart = {
            name: float(np.abs(np.array(losses[name]) / ours - 1).max())
            for name in ("trl", "padded")
        }
        return {"steps": len(steps), "losses": losses, "largest_relative_difference": apart}

    def scoring(self, repeats: list[list[list[triples.Sequences]]]) -> dict[str, Any]:
        """Candidates a second without gradients, ours against padded rows, as drawn and sorted."""
        rates: dict[str, list[float]] = {"ours": [], "padded": [], "padded_sorted": []}
        apart = 0.0
        for number, steps in enumerate(repeats):
            rows = [[row for group in step for row in group] for step in steps]
            every = sorted((row for step in rows[1:] for row in step), key=len)
            half = len(every) // 2
            turns = {
                "ours": steps,
                "padded": rows,
                "padded_sorted": [rows[0], every[:half], every[half:]],
            }
            scores = {}
            for name, mine in turns.items():
                contender = "ours" if name == "ours" else "padded"
                found = self.ask(contender, "score", mine, threads=self.threads, bf16=self.bf16)
                rates[name].append(len(every) / found["seconds"])
                scores[name] = np.array(found["scores"])
            apart = max(apart, float(np.abs(scores["ours"] - scores["padded"]).max()))
            shown = ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items())
            say(f"scoring, repeat {number + 1} of {len(repeats)}: {shown} candidates/s")
        medians = {name: statistics.median(values) for name, values in rates.items()}
        best = max(medians["padded"], medians["padded_sorted"])
        return {
            "candidates_per_s": {name: round(value, 1) for name, value in medians.items()},
            "ratio_vs_padded": round(medians["ours"] / best, 2),
            "largest_difference": apart,
        }


def pairs_per_s(found: dict[str, Any], steps: list[Any]) -> float:
    """Pairs of all steps but the first, a second."""
    return triples.PAIRS * (len(steps) - 1) / found["seconds"]
