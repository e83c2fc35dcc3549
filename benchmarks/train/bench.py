"""Training beside TRL's RewardTrainer and plain padded pairs: pairs/s, memory, loss curves.

    python benchmarks/train/bench.py [--data ../shared/data/open] [--home DIR] [--quick]

One Llama from random weights (10 M parameters), real triples of `oasst_sampling`, ids made
beforehand, both cores, all in bf16 autocast where the CPU has bf16 and in fp32 elsewhere. Every
contender is a process in an environment of its own and they take turns; a repeat is a step to warm
up and two timed steps of 21 pairs. All run the same pairs. TRL runs them in random order and, as
grouping by length would, sorted over all repeats (short with short, long with long), each at the
fastest settings found; a ratio is against the faster of the two. The plain loop runs as many pairs
at once as TRL does. With `--threads 1` seconds are CPU seconds, so other work on the machine does
little harm; with `--device cuda` a GPU runs them, for which `--width 1024 --layers 16` is a better
size. Environments are made in the home on the first run (TRL's has 1.5 GB). Stop it whenever
you like: what was timed with this code is kept in the home, and the same command goes on. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triples
import wire
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from trainer.language_model import train_tokenizer
from trainer.layout import fast_bf16
from trainer.template import Limits, Template, Texts

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEERS = {
    "trl": ["trl==1.16.0", "transformers==5.19.0", "torch==2.13.0"],
    "padded": ["transformers==5.19.0", "torch==2.13.0", "numpy"],
}
CONTEXT = 2048
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


class Contender:
    """A process that runs steps when it is told to."""

    def __init__(self, python: str, script: str, model: Path, log: Path, **own: str) -> None:
        own |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        own |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        self.script, self.log = script, log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [python, str(HERE / script), str(model)],
                env=os.environ | own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._answer()

    def run(self, task: str, steps: list[Any], **options: Any) -> dict[str, Any]:
        """What the process answers: seconds of all steps but the first, losses or scores, peak.

        Raises:
            RuntimeError: it died; its log says why.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"task": task, "steps": steps, **options}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            message = f"{self.script} ended; see {self.log}"
            raise RuntimeError(message)
        return json.loads(line)


def python_of(peer: str, folder: Path) -> str:
    """The interpreter of a peer's environment, which is made if it is not there."""
    python, ready = folder / peer / "bin" / "python", folder / peer / "ready"
    if not ready.is_file():
        say(f"making the environment of {peer} in {folder} (minutes) ...")
        subprocess.run([sys.executable, "-m", "venv", str(folder / peer)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *PEERS[peer]], check=True)
        ready.touch()
    return str(python)


def say(text: str) -> None:
    """A line of progress with the time since the start."""
    print(f"[{time.perf_counter() - BEGAN:6.0f} s] {text}", flush=True)


def make_model(
    folder: Path, drawn: dict[int, list[triples.Triples]], width: int, layers: int, quick: bool
) -> Template:
    """Write the classifier with random weights and its tokenizer; the template that makes ids."""
    groups = [group for k in sorted(drawn) for group in drawn[k]]
    texts = [text for g in groups for text in (g.prompt, g.reference, *g.candidates)]
    train_tokenizer(texts, 4096, folder, context=CONTEXT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    width, layers = (64, 2) if quick else (width, layers)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 if width > 64 else 2,
        num_key_value_heads=width // 64 if width > 64 else 2,
        max_position_embeddings=CONTEXT,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    network = LlamaForSequenceClassification(config)
    network.save_pretrained(folder)
    say(f"model: {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters")
    return Template(tokenizer, Limits.for_context(256 if quick else CONTEXT))


def encode(template: Template, drawn: list[triples.Triples]) -> list[triples.Sequences]:
    """Every group's sequences; those whose cut texts became equal are left out."""
    found = template.encode(
        [Texts(g.prompt, g.reference, g.candidates, "pretrain") for g in drawn], one_prompt=True
    )
    return [group for group in found if all(group[0] != other for other in group[1:])]


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


def identity(where: str, weights: Path) -> str:
    """A digest of what seconds depend on beside what is asked: code, weights, clock and device."""
    files = [*sorted((ROOT / "trainer").glob("*.py")), *sorted(HERE.glob("*.py")), weights]
    total = hashlib.blake2b(where.encode(), digest_size=6)
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


def pairs_per_s(found: dict[str, Any], steps: list[Any]) -> float:
    """Pairs of all steps but the first, a second."""
    return triples.PAIRS * (len(steps) - 1) / found["seconds"]


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = os.environ.get("POLAR_DATA", str(ROOT.parent / "shared" / "data" / "open"))
    home = Path(os.environ.get("POLAR_HOME", ROOT / "var")) / "bench" / "train"
    parser.add_argument("--data", default=data)
    parser.add_argument("--home", default=str(home))
    parser.add_argument("--environments", help="the peers' environments (default: in the home)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--curve-steps", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="small and unmeasured: does it run?")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out")
    if options.width % 64:
        parser.error(f"--width {options.width}: heads have 64 elements; give a multiple of 64")
    folder = Path(options.home).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environments = Path(options.environments or folder / "environments").resolve()
    pythons = {"ours": sys.executable, **{p: python_of(p, environments) for p in PEERS}}

    precision = options.precision
    if precision == "auto":
        precision = "bf16" if fast_bf16(torch.device(options.device)) else "fp32"
    few = 1 if options.quick else 3
    count = {2: 1 if options.quick else options.repeats}
    count |= {4: count[2], 8: min(count[2], few)}
    rng = np.random.default_rng(1)
    say(f"drawing triples of {triples.SOURCE} from {options.data}")
    need = {k: 3 * n * (triples.PAIRS // (k - 1)) for k, n in count.items()}
    many = {k: n * (12 if k == 4 else 1) + 20 for k, n in need.items()}
    drawn = {k: triples.draw(Path(options.data), k, n, rng) for k, n in many.items()}
    template = make_model(folder / "model", drawn, options.width, options.layers, options.quick)
    groups = {k: encode(template, drawn[k]) for k in drawn}
    shapes = {f"mixed_k{k}": (groups[k][: need[k]], k, count[k]) for k in need}
    rest = sorted(groups[4][need[4] :], key=triples.longest)
    quarter = len(rest) // 4
    shapes |= {
        name: ([part[i] for i in rng.permutation(len(part))], 4, min(few, 2))
        for name, part in (("short_k4", rest[:quarter]), ("long_k4", rest[-quarter:]))
    }
    ready = {
        name: triples.repeats(triples.steps(part, k), n) for name, (part, k, n) in shapes.items()
    }
    clock = "cpu" if options.threads == 1 and options.device == "cpu" else "wall"
    own = {wire.CLOCK: clock, wire.ON: options.device}
    scripts = {"ours": "ours.py", "trl": "trl_peer.py", "padded": "padded_peer.py"}
    contenders = {
        name: Contender(pythons[name], script, folder / "model", folder / f"{name}.log", **own)
        for name, script in scripts.items()
    }
    where = f"{clock} {options.device}"
    answers = folder / "answers" / identity(where, folder / "model" / "model.safetensors")
    answers.mkdir(parents=True, exist_ok=True)
    race = Race(contenders, options.threads, precision, options.device, options.quick, answers)
    results: dict[str, Any] = {}
    try:
        race.contenders["ours"].run(
            "score", ready["mixed_k4"][0][:1], threads=options.threads, bf16=race.bf16
        )
        first = [[p for g in s for p in triples.pairs(g)] for s in ready["mixed_k4"][0]]
        race.search({False: first[:2], True: [first[0], triples.by_length([first[1:]])[0][0]]})
        say(f"TRL runs with {race.settings[False]}, sorted with {race.settings[True]}")
        curve = triples.steps(groups[4], 4)[: 2 if options.quick else options.curve_steps]
        results["curves"] = race.curves(curve)
        say(f"losses in fp32 differ by {results['curves']['largest_relative_difference']}")
        for name, repeats in ready.items():
            results[name] = race.compare(name, repeats)
            print(json.dumps({name: results[name]}), flush=True)
        results["scoring_k4"] = race.scoring(ready["mixed_k4"][:few])
    finally:
        for contender in contenders.values():
            contender.stop()
    ratios = {f"ratio_vs_trl_k{k}": results[f"mixed_k{k}"]["ratio_vs_trl"] for k in (2, 4, 8)}
    settings = {"random": race.settings[False], "sorted": race.settings[True]}
    run = {
        "threads": options.threads,
        "device": options.device,
        "clock": clock,
        "precision": precision,
        "quick": options.quick,
        "seconds": round(time.perf_counter() - BEGAN),
    }
    print(json.dumps({**ratios, "trl_settings": settings, **results, **run}))


BEGAN = time.perf_counter()

if __name__ == "__main__":
    main()
