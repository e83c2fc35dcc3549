"""What twenty ranked answers teach a checkpoint, and what they cost it, at several learning rates.

python benchmarks/own_answers.py CHECKPOINT GROUPS    # of a demo: var/checkpoints/demo/pretrained
                                                      # var/groups/demo/pretrain-eval.parquet
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from trainer.data import read_groups
from trainer.loop import train
from trainer.own import Change
from trainer.score import Scorer
from trainer.settings import TrainSettings

FACTS = """\
capital of France: Paris, Lyon; colour of grass: green, red; largest planet: Jupiter, Mars;
author of Hamlet: Shakespeare, Dante; sum of 2 and 2: four, five; chemical sign of gold: Au, Fe;
number of continents: seven, nine; longest river: the Nile, the Rhine; language of Brazil:
Portuguese, Spanish; freezing point of water: zero degrees, ten degrees; king of beasts: the
lion, the mouse; shape of the earth: round, flat; opposite of hot: cold, warm; young of a cow: a
calf, a foal; days in a week: seven, eight; month after May: June, April; metal in a magnet:
iron, tin; drink from grapes: wine, beer; home of a bee: a hive, a nest; tool for nails: a
hammer, a saw; sea of Italy: the Mediterranean, the Baltic; wheels of a car: four, three; colour
of snow: white, black; sound of a dog: a bark, a moo; capital of Spain: Madrid, Porto; legs of a
spider: eight, six; season of snow: winter, summer; fruit of the oak: the acorn, the apple;
planet we live on: Earth, Venus; hours in a day: twenty-four, twelve; cheese animal: the cow,
the hen; square root of nine: three, four; first letter: A, B; capital of Japan: Tokyo, Seoul;
bird of night: the owl, the lark; largest ocean: the Pacific, the Arctic; gas we breathe:
oxygen, helium; string of a violin: gut, wood; fish with teeth: the pike, the carp; flower of
love: the rose, the nettle"""


def rows(rng: random.Random) -> list[dict[str, str]]:
    """Forty questions in a random order, each with a brief right and a wordy wrong answer."""
    made = []
    for fact in " ".join(FACTS.split()).split("; "):
        asked, answers = fact.split(": ")
        right, wrong = answers.split(", ")
        brief = [f"That would be {right}.", f"The answer is {right}.", f"{right.capitalize()}."]
        wordy = [
            f"Well, many people ask about the {asked}; I think it is {wrong}, but who can say?",
            f"Great question! The {asked} is a fascinating topic, and it might be {wrong}.",
        ]
        made.append(
            {
                "prompt": f"What is the {asked}?",
                "reference": f"It is {right}.",
                "chosen": rng.choice(brief),
                "rejected": rng.choice(wordy),
            }
        )
    rng.shuffle(made)
    return made


def won(checkpoint: Path, groups: pa.Table) -> float:
    scores = Scorer.load(checkpoint).score_groups(groups)
    candidates = groups.column("candidates").to_pylist()
    ranks = [np.asarray([c["rank"] for c in row]) for row in candidates]
    return Change(ranks=ranks, before=scores, after=scores).summary()["after"]["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("groups", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 1.6e-4, 5e-4])
    parser.add_argument("--seed", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made, sets = rows(random.Random(given.seed)), {}
        for name, part in (("own", made[:20]), ("other", made[20:])):
            file = Path(folder) / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in part))
            sets[name] = read_groups([file])
        sets["discrimination"] = read_groups([given.groups]).slice(0, 100)
        found = {name: won(given.checkpoint, groups) for name, groups in sets.items()}
        print(json.dumps({"lr": None} | found), flush=True)
        for rate in given.rates:
            out = Path(folder) / str(rate)
            settings = TrainSettings(lr=rate, epochs=10, batch_groups=4)
            own = Path(folder) / "own.jsonl"
            train([own], given.checkpoint, out, settings, stage="finetune")
            found = {name: won(out, groups) for name, groups in sets.items()}
            print(json.dumps({"lr": rate} | found), flush=True)


if __name__ == "__main__":
    main()
